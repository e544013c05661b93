"""Asynchrony without threads: a whole run with any schedule of updates as one compiled program.

A run is determined by the initial parameters, the workers' initial states and a schedule, which says
which worker makes each update, and from which version of the parameters. Threads produce one schedule or
another. Here it is an argument, so that many runs can be compared under the same asynchrony.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from a3c_jax.asynchrony.records import Schedule
from a3c_jax.asynchrony.simulation_result import SimulationResult
from a3c_jax.blueprint import Parts, describe, make_parts
from a3c_jax.config import A3CConfig
from a3c_jax.host_environment import HostEnvironment
from a3c_jax.optimizers import Updater
from a3c_jax.own_checks import check_settings
from a3c_jax.rules import check_int

Array = jax.Array

Settings = Any  # a learning rate, or a dict of fields of the configuration
Simulate = Callable[[Any, Settings, Schedule], SimulationResult]


def make_simulation(
    config: A3CConfig,
    max_staleness: int,
    *,
    workers_at_once: int = 1,
    environment: Any = None,
    network: Any = None,
    loss: Any = None,
    optimizer: Any = None,
    algorithm: Any = None,
) -> Simulate:
    """Makes a function that simulates whole runs: `simulate(seed, learning_rate, schedule)`.

    It computes what `a3c_jax.replay` computes for the same schedule, but for the last bits of floats,
    because the compiler rounds differently in a different program. It is a pure function, and its three
    arguments may be traced: map it over seeds, learning rates and schedules of equal length with
    `jax.vmap`. In place of the learning rate it takes a dict of any of the fields `a3c_jax.config.TRACEABLE`, to
    map over discounts or entropy costs, for instance.

    >>> import jax, jax.numpy as jnp
    >>> from a3c_jax import A3CConfig, fixed_delay, make_simulation
    >>> simulate = make_simulation(A3CConfig(num_workers=1, hidden_sizes=(8,)), max_staleness=4)
    >>> over_seeds = jax.vmap(simulate, in_axes=(0, None, None))
    >>> over_seeds(jnp.arange(10), 2e-3, fixed_delay(4, num_updates=20)).applied.shape
    (10, 20)
    >>> over_costs = jax.vmap(simulate, in_axes=(None, {"entropy_cost": 0}, None))
    >>> over_costs(0, {"entropy_cost": jnp.array([0., .01, .1])}, fixed_delay(4, num_updates=20)).applied.shape
    (3, 20)

    Args:
      config: the configuration. Its seed and its budgets are not used, except that a `linear` learning rate is
        annealed over `max_steps`.
      max_staleness: the largest staleness of the schedules to come. One more version of the parameters
        than this is kept.
      workers_at_once: play the segments of so many updates side by side, and then make the updates one after the other. It
        is the same run, up to rounding, and several times faster if segments are small. The workers of such a group must
        all be different, and start from versions that are there before the group's first update. For `round_robin`, and
        for a `fixed_delay` of at least `num_workers - 1`, any number up to `num_workers` will do.
      environment: what to play instead of the environment that the configuration names.
      network: what to train instead of the network that it describes.
      loss: what to minimise instead of A3C's loss, as in `a3c_jax.build`.
      optimizer: the optimizer to use instead of the one that the configuration describes, as in
        `a3c_jax.build`. If it is no function of the learning rate, the learning rate has no effect.
      algorithm: what the workers do, as in `a3c_jax.build`.

    Returns:
      `simulate(seed, learning_rate, schedule) -> SimulationResult`, with a seed in `[0, 2**32)` and a
      positive learning rate, or a dict of fields; scalars each. What a dict does not name, the configuration
      says. It is compiled once for each number of updates and set of fields. If a schedule
      that is not traced names a worker, a version or a staleness that cannot be, or a group that cannot be played side by
      side, it raises a ValueError. Such a row of a traced one is left out and changes nothing, except that it ends the run
      if `config.nonfinite` is `stop`.

    Raises:
      ValueError: if `max_staleness` is negative, if `workers_at_once` is less than 1, or if the environment is unknown or not supported.
    """
    check_int("max_staleness", max_staleness, 0)
    check_int("workers_at_once", workers_at_once, 1)
    objects = {"environment": environment, "network": network}
    objects |= {"loss": loss, "optimizer": optimizer, "algorithm": algorithm}
    parts = make_parts(config, **objects)
    if isinstance(parts.environment, HostEnvironment):
        raise ValueError(
            f"a simulation is one compiled program and needs an environment written in JAX, got {parts.environment.name!r}, "
            "which runs on the host; use train, or replay with a schedule of your own."
        )
    run = jax.jit(_make_run(config, parts, max_staleness + 1, workers_at_once))

    def simulate(seed: Any, settings: Settings, schedule: Schedule) -> SimulationResult:
        if not any(isinstance(column, jax.core.Tracer) for column in schedule):
            _check_schedule(schedule, config.num_workers, max_staleness, workers_at_once)
        fields = settings if isinstance(settings, dict) else {"learning_rate": settings}
        check_settings(config, fields, loss=loss, optimizer=optimizer)
        return run(
            jnp.asarray(seed, jnp.uint32),
            {name: jnp.asarray(number, jnp.float32) for name, number in fields.items()},
            jax.tree.map(lambda column: jnp.asarray(column, jnp.int32), schedule),
        )

    return simulate


class _Updated(NamedTuple):
    """What one simulated update hands to the next."""

    params: Array
    versions: Array  # the last versions of the parameters: version v is in row v % num_versions
    optimizer_state: Any
    runs: Array  # whether the run goes on: False after an update that stopped it


class _Carry(NamedTuple):
    """What one group of updates hands to the next."""

    updated: _Updated
    states: Any  # every worker's, with a leading axis


def _make_run(
    config: A3CConfig, parts: Parts, num_versions: int, workers_at_once: int
) -> Callable[[Array, dict[str, Array], Schedule], SimulationResult]:
    """The whole run as a pure function of seed, traced fields of the configuration and schedule."""
    num_workers = config.num_workers

    def run(seed: Array, fields: dict[str, Array], schedule: Schedule) -> SimulationResult:
        traced = config.with_traced(**fields)
        blueprint = describe(traced, parts)
        updater = blueprint.updater(traced.learning_rate)
        states = jax.vmap(blueprint.start, (None, 0))(seed, jnp.arange(num_workers))
        observation = jax.tree.map(lambda x: x[0], states.observation)
        initial = blueprint.init(seed, observation)
        params, unravel = ravel_pytree(initial)  # one vector, so that a version is one row
        versions = jnp.zeros((num_versions, params.size), params.dtype).at[0].set(params)

        def step(stale: Array, state: Any) -> Any:
            return blueprint.worker_step(unravel(stale), state)

        step_side_by_side = _side_by_side(step, workers_at_once)
        update = _make_update(updater, unravel, num_versions, config.nonfinite == "skip")

        def update_group(carry: _Carry, rows: Any) -> tuple[_Carry, Any]:
            updated, states = carry
            k, worker, pulled = rows
            is_possible = (worker >= 0) & (worker < num_workers) & _is_first(worker)
            is_possible &= (pulled >= 0) & (pulled <= k[0]) & (k - pulled < num_versions)

            stale = updated.versions[pulled % num_versions]
            own = jax.tree.map(lambda x: x[worker], states)
            gradients, own, report = step_side_by_side(stale, own)
            played = (is_possible, k, worker, gradients, report)
            updated, (counts, outputs) = jax.lax.scan(update, updated, played)

            index = jnp.where(counts, worker, num_workers)  # what does not count is dropped
            states = jax.tree.map(lambda x, y: x.at[index].set(y, mode="drop"), states, own)
            return _Carry(updated, states), outputs

        start = _Updated(params, versions, updater.init(initial), jnp.bool_(True))
        num_updates = len(schedule.worker)
        rows = _in_groups((jnp.arange(num_updates, dtype=jnp.int32), *schedule), workers_at_once)
        carry, outputs = jax.lax.scan(update_group, _Carry(start, states), rows)
        outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_updates], outputs)
        return SimulationResult(unravel(carry.updated.params), *outputs)

    return run


def _make_update(
    updater: Updater, unravel: Callable[[Array], Any], num_versions: int, skips: bool
) -> Callable[[_Updated, Any], tuple[_Updated, Any]]:
    """Makes what applies the gradients of one segment that has been played."""

    def update(now: _Updated, played: Any) -> tuple[_Updated, Any]:
        is_possible, k, worker, gradients, report = played
        new_params, optimizer_state, metrics = updater.update(
            gradients, now.optimizer_state, unravel(now.params), worker
        )
        applied = is_possible & optimizer_state.finite
        runs = now.runs & (applied | skips)
        applied &= runs
        params, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(applied, new, old),
            (ravel_pytree(new_params)[0], optimizer_state),
            (now.params, now.optimizer_state),
        )
        versions = now.versions.at[(k + 1) % num_versions].set(params)
        counts = is_possible & runs
        metrics = {**report.metrics, **metrics}
        outputs = (*_mean_return(report.episodes, counts), metrics, applied)
        return _Updated(params, versions, optimizer_state, runs), (counts, outputs)

    return update


def _side_by_side(function: Callable[..., Any], size: int) -> Callable[..., Any]:
    """The function mapped over a group. A group of one is not mapped, because a mapped `cond` computes both branches."""
    if size > 1:
        return jax.vmap(function)

    def of_one(*arguments: Any) -> Any:
        result = function(*jax.tree.map(lambda x: x[0], arguments))
        return jax.tree.map(lambda x: jnp.asarray(x)[None], result)

    return of_one


def _in_groups(columns: Any, size: int) -> Any:
    """Columns of equal length as `[groups, size]`. The last group is filled up with rows of -1, which no worker has."""
    missing = -len(columns[0]) % size
    return [jnp.pad(x, (0, missing), constant_values=-1).reshape(-1, size) for x in columns]


def _is_first(worker: Array) -> Array:
    """Whether no earlier one of a group is the same worker's, `[size]` bool."""
    return jnp.argmax(worker[:, None] == worker, axis=1) == jnp.arange(len(worker))


def _mean_return(episodes: Any, counts: Array) -> tuple[Array, Array]:
    """How many episodes ended in a segment, and their mean return; none if the segment does not count."""
    ended = episodes.ended & counts
    count = jnp.sum(ended, dtype=jnp.int32)
    total = jnp.sum(jnp.where(ended, episodes.episode_return, 0.0))
    return count, total / jnp.maximum(count, 1)


def _check_schedule(
    schedule: Schedule, num_workers: int, max_staleness: int, workers_at_once: int
) -> None:
    schedule.check(num_workers)
    if not len(schedule.worker):
        raise ValueError("a schedule must hold one update at least, got none; give one.")
    staleness = schedule.staleness.max()
    if staleness > max_staleness:
        raise ValueError(
            f"the schedule's staleness must be at most max_staleness {max_staleness}, got "
            f"{staleness}; make the simulation with a larger one."
        )
    for first in range(0, len(schedule.worker) if workers_at_once > 1 else 0, workers_at_once):
        group = slice(first, first + workers_at_once)
        worker, pulled = schedule.worker[group], schedule.pulled_version[group]
        if len(set(worker.tolist())) < len(worker) or pulled.max() > first:
            raise ValueError(
                f"workers_at_once must be such that the segments of {workers_at_once} updates can be played side by side: by "
                f"different workers, and from parameters that are there before the first of them, got updates {first} to "
                f"{first + len(worker) - 1} by workers {worker.tolist()} from versions {pulled.tolist()}; use 1, or make the schedule with "
                f"num_workers={num_workers}."
            )
