"""Asynchrony without threads: any schedule of updates as one compiled program, over seeds and learning rates at once.

A run is the initial parameters, the workers' initial states and a schedule: which worker makes each update, and
from which version of the parameters. Threads produce one schedule or another; here it is an argument.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from a3c_jax import environments
from a3c_jax.agent import make_blueprint
from a3c_jax.config import A3CConfig
from a3c_jax.parameters import Schedule, all_finite

Array = jax.Array


class SimulationResult(NamedTuple):
    """What a simulated run leaves behind. Mapped over B runs, each array has a leading axis B.

    Attributes:
      params: the final parameters, Flax variables.
      num_episodes: how many episodes ended in each update's segment, `[updates]` int32.
      episode_return: their mean return, `[updates]` float32; 0 where none ended.
      metrics: the parts of the loss and `gradient_norm` (`a3c_jax.worker.Statistics`), `[updates]` each.
      applied: whether the update changed the parameters, `[updates]` bool. False where it was not finite (or the
        schedule's row cannot be); with `config.nonfinite` `stop` the run ends there, all later rows are False too,
        and no episodes are counted any more.
    """

    params: Any
    num_episodes: Array
    episode_return: Array
    metrics: dict[str, Array]
    applied: Array

    def final_return(self, fraction: float = 0.1) -> Array:
        """Mean return of the episodes that ended in the last `fraction` of the updates, `[]`; NaN where none did.

        Args:
          fraction: of the updates, in (0, 1].
        """
        last = -max(1, round(fraction * self.num_episodes.shape[-1]))
        count = self.num_episodes[..., last:]
        total = jnp.sum(count * self.episode_return[..., last:], axis=-1)
        return total / jnp.sum(count, axis=-1)


Simulate = Callable[[Any, Any, Schedule], SimulationResult]


def make_simulation(
    config: A3CConfig,
    max_staleness: int,
    *,
    environment: environments.Environment | None = None,
    network: nn.Module | None = None,
) -> Simulate:
    """Makes `simulate(seed, learning_rate, schedule) -> SimulationResult`: a whole run as one `lax.scan`.

    It computes what `a3c_jax.replay` computes for the same schedule, but for the last bits of floats, which the
    compiler rounds differently in a different program. It is a pure function of three arguments that may all be
    traced: map it over seeds, learning rates and schedules of equal length with `jax.vmap`.

    >>> import jax, jax.numpy as jnp
    >>> from a3c_jax import A3CConfig, fixed_delay, make_simulation
    >>> simulate = make_simulation(A3CConfig(num_workers=1, hidden_sizes=(8,)), max_staleness=4)
    >>> over_seeds = jax.vmap(simulate, in_axes=(0, None, None))
    >>> over_seeds(jnp.arange(10), 2e-3, fixed_delay(4, num_updates=20)).applied.shape
    (10, 20)

    Args:
      config: the configuration. Its seed, its learning rate and its budgets are not used, but for `max_steps`, over
        which a `linear` learning rate is annealed.
      max_staleness: the largest staleness of the schedules to come. So many versions of the parameters are kept,
        and one more.
      environment: what to play instead of the environment that the configuration names.
      network: what to train instead of the network that it describes.

    Returns:
      `simulate(seed, learning_rate, schedule)`, with a seed in `[0, 2**32)` and a positive learning rate, scalars
      each. It is compiled for each number of updates. It raises a ValueError where a schedule is not traced and
      names a worker, a version or a staleness that there cannot be; such a row of a traced one is not applied.

    Raises:
      ValueError: where `max_staleness` is negative or the environment unknown or not supported.
    """
    _check_int("max_staleness", max_staleness, 0)
    blueprint = make_blueprint(config, environment=environment, network=network)
    num_workers, num_versions = config.num_workers, max_staleness + 1
    skips = config.nonfinite == "skip"

    @jax.jit
    def run(seed: Array, learning_rate: Array, schedule: Schedule) -> SimulationResult:
        optimizer = optax.with_extra_args_support(blueprint.optimizer(learning_rate))
        states = jax.vmap(blueprint.start, (None, 0))(seed, jnp.arange(num_workers))
        params, unravel = ravel_pytree(blueprint.init(seed, states.observation[0]))
        # A ring: version v is in row v % num_versions until version v + num_versions takes its place.
        versions = jnp.zeros((num_versions, params.size), params.dtype).at[0].set(params)

        def update(carry: Any, row: Any) -> tuple[Any, Any]:
            params, versions, opt_state, states, runs = carry
            k, worker, pulled = row
            possible = (worker >= 0) & (worker < num_workers)
            possible &= (pulled >= 0) & (pulled <= k) & (k - pulled < num_versions)

            state = jax.tree.map(lambda x: x[worker], states)
            stale = unravel(versions[pulled % num_versions])
            gradients, new_state, (metrics, episodes) = blueprint.worker_step(stale, state)
            flat_gradients = ravel_pytree(gradients)[0]
            updates, new_opt_state = optimizer.update(
                flat_gradients, opt_state, params, worker=worker
            )
            new_params = optax.apply_updates(params, updates)

            applied = possible & all_finite((flat_gradients, new_params, new_opt_state))
            runs &= applied | skips
            applied &= runs
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(applied, new, old),
                (new_params, new_opt_state),
                (params, opt_state),
            )
            states = jax.tree.map(
                lambda all_, new, old: all_.at[worker].set(jnp.where(runs, new, old)),
                states,
                new_state,
                state,
            )
            versions = versions.at[(k + 1) % num_versions].set(params)

            ended = episodes.ended & runs
            count = jnp.sum(ended, dtype=jnp.int32)
            total = jnp.sum(jnp.where(ended, episodes.episode_return, 0.0))
            outputs = (count, total / jnp.maximum(count, 1), metrics, applied)
            return (params, versions, opt_state, states, runs), outputs

        carry: Any = (params, versions, optimizer.init(params), states, jnp.bool_(True))
        worker, pulled = schedule
        rows = (jnp.arange(len(worker), dtype=jnp.int32), worker, pulled)
        (params, *_), outputs = jax.lax.scan(update, carry, rows)
        return SimulationResult(unravel(params), *outputs)

    def simulate(seed: Any, learning_rate: Any, schedule: Schedule) -> SimulationResult:
        if not any(isinstance(column, jax.core.Tracer) for column in schedule):
            _check_schedule(schedule, num_workers, max_staleness)
        return run(
            jnp.asarray(seed, jnp.uint32),
            jnp.asarray(learning_rate, jnp.float32),
            jax.tree.map(lambda column: jnp.asarray(column, jnp.int32), schedule),
        )

    return simulate


def round_robin(num_workers: int, num_updates: int) -> Schedule:
    """Workers take turns: each pulls right after its own update, and waits for the others'.

    The staleness is `num_workers - 1` from the second round on; in the first one all start from version 0.

    >>> round_robin(3, 5).pulled_version.tolist()
    [0, 0, 0, 1, 2]

    Args:
      num_workers: W, at least 1.
      num_updates: how many updates to make.

    Raises:
      TypeError, ValueError: where a number is no integer or too small; so do the makers below.
    """
    return fixed_delay(
        _check_int("num_workers", num_workers, 1) - 1, num_updates, num_workers=num_workers
    )


def fixed_delay(delay: int, num_updates: int, num_workers: int = 1) -> Schedule:
    """Every update is computed from the parameters of `delay` updates ago; from version 0 before there are so many.

    >>> fixed_delay(2, 5).pulled_version.tolist()
    [0, 0, 0, 1, 2]

    Args:
      delay: the staleness, at least 0. One worker with delay 0 is plain training.
      num_updates: how many updates to make.
      num_workers: workers that take turns; each has its own environments.
    """
    _check_int("delay", delay, 0)
    k = np.arange(_check_int("num_updates", num_updates, 1))
    worker = k % _check_int("num_workers", num_workers, 1)
    return Schedule(worker.astype(np.int32), np.maximum(k - delay, 0))


def random_delays(
    probabilities: Sequence[float] | np.ndarray,
    num_updates: int,
    rng: np.random.Generator,
    num_workers: int = 1,
) -> Schedule:
    """Every update is as stale as a draw says; less where there are not yet so many versions.

    To mimic a run, give its histogram: `random_delays(np.bincount(result.schedule.staleness), ...)`.

    Args:
      probabilities: of the delays 0, 1, 2 and so on, `[D]`. Their sum need not be 1.
      num_updates: how many updates to make.
      rng: where the draws come from.
      num_workers: workers that take turns; each has its own environments.

    Raises:
      ValueError: where the probabilities are no vector of finite numbers >= 0 with a positive sum.
    """
    weights = np.asarray(probabilities, np.float64)
    if weights.ndim != 1 or not np.all(np.isfinite(weights) & (weights >= 0)) or not weights.any():
        raise ValueError(
            f"probabilities must be a vector of finite numbers >= 0, not all 0, got {probabilities}; "
            "give one for each delay from 0 on."
        )
    now, _ = fixed_delay(0, num_updates, num_workers)
    delays = rng.choice(len(weights), size=num_updates, p=weights / weights.sum())
    return Schedule(now, np.maximum(np.arange(num_updates) - delays, 0))


def straggler(num_workers: int, slowness: float, num_updates: int) -> Schedule:
    """Worker 0 takes `slowness` times as long for a segment as each of the others; none waits for another.

    Where several end a segment at the same time, the one of the lowest number updates first, so that slowness 1 is
    `round_robin`. The straggler's updates are `slowness * (num_workers - 1)` updates stale, and the others' about
    `num_workers - 2 + 1 / slowness`.

    >>> straggler(2, 2.0, 6).worker.tolist(), straggler(2, 2.0, 6).pulled_version.tolist()
    ([1, 0, 1, 1, 0, 1], [0, 0, 1, 3, 2, 4])

    Args:
      num_workers: W, at least 1.
      slowness: how many times slower worker 0 is, at least 1.
      num_updates: how many updates to make.

    Raises:
      ValueError: where `slowness` is not a finite number >= 1.
    """
    _check_int("num_workers", num_workers, 1)
    _check_int("num_updates", num_updates, 1)
    if not 1 <= slowness < np.inf:
        raise ValueError(
            f"slowness must be >= 1 and finite, got {slowness}; use 1 for no straggler."
        )
    duration = np.ones(num_workers)
    duration[0] = slowness
    segments = np.ones(num_workers, np.int64)  # each worker's so far, the running one included
    ends = [(duration[w], w) for w in range(num_workers)]
    heapq.heapify(ends)
    pulled = np.zeros(num_workers, np.int64)
    schedule = Schedule(np.zeros(num_updates, np.int32), np.zeros(num_updates, np.int64))
    for k in range(num_updates):
        _, worker = heapq.heappop(ends)
        schedule.worker[k], schedule.pulled_version[k] = worker, pulled[worker]
        pulled[worker] = k + 1
        segments[worker] += 1
        heapq.heappush(ends, (segments[worker] * duration[worker], worker))
    return schedule


def _check_int(name: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer >= {minimum}, got {value!r}; use {minimum}.")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}; use {minimum} or more.")
    return int(value)


def _check_schedule(schedule: Schedule, num_workers: int, max_staleness: int) -> None:
    schedule.check(num_workers)
    if not len(schedule.worker):
        raise ValueError("a schedule must hold one update at least, got none; give one.")
    staleness = schedule.staleness.max()
    if staleness > max_staleness:
        raise ValueError(
            f"the schedule's staleness must be at most max_staleness {max_staleness}, got "
            f"{staleness}; make the simulation with a larger one."
        )
