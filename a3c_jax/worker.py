"""A worker as a pure function: play a segment, return the gradients of its loss.

(parameters, worker state)  ->  (gradients, worker state, statistics)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from a3c_jax import kernels, moments, rollout
from a3c_jax.environments import Environment
from a3c_jax.losses import a3c_loss
from a3c_jax.networks import model, trajectory_apply
from a3c_jax.packing import Packing

Array = jax.Array
WorkerState = rollout.RolloutState


class Statistics(NamedTuple):
    """What a segment reports.

    Attributes:
      metrics: the parts of the loss (`a3c_jax.losses.a3c_loss`) and `gradient_norm`, scalars.
      episodes: the episodes that ended.
    """

    metrics: dict[str, Array]
    episodes: rollout.Episodes


WorkerStep = Callable[[Any, WorkerState], tuple[Any, WorkerState, Statistics]]


def make_worker_step(
    environment: Environment,
    network: nn.Module,
    *,
    t_max: int,
    discount: float,
    critic_cost: float,
    entropy_cost: float,
    lambda_: float = 1.0,
    reward_clip: float | None = None,
    terminal_reward: float | None = None,
) -> WorkerStep:
    """Makes the function that every worker thread calls again and again.

    Args:
      environment: what to play.
      network: a module like `a3c_jax.networks.ActorCritic`.
      t_max: steps played in each environment between two updates.
      discount: the factor gamma, per step.
      critic_cost: weight of the critic's loss.
      entropy_cost: weight of the entropy loss.
      lambda_: the returns' lambda: 1 is A3C, less is generalised advantage estimation.
      reward_clip: if given, the loss sees rewards clipped to [-reward_clip, reward_clip].
      terminal_reward: if given, what the loss sees as the reward of a step that terminated its episode.

    Returns:
      `worker_step(params, state) -> (gradients, state, statistics)`: pure, to be compiled by its caller.
    """
    functions = model(network)
    apply_fn = trajectory_apply(network)

    def worker_step(params: Any, state: WorkerState) -> tuple[Any, WorkerState, Statistics]:
        def policy(key: Array, observation: Array, carry: Any) -> tuple[Array, Any]:
            distribution, carry = functions.act(params, observation, carry)
            return distribution.sample(key), carry

        shared = moments.held(params)
        fresh_carry = functions.initialize_carry(state.observation.shape[0])
        state, trajectory, episodes = rollout.unroll(environment, policy, state, t_max, fresh_carry)
        statistics: dict[str, Any] = {}
        if "observation" in shared:
            statistics["observation"] = moments.of(trajectory.observation_tm1, 2)
        reward_t = trajectory.reward_t
        if "reward" in shared:
            state, statistics["reward"] = _discounted_returns(state, trajectory, discount)
            reward_t = moments.scale(reward_t, shared["reward"])
        if terminal_reward is not None:
            reward_t = jnp.where(trajectory.terminated_t, terminal_reward, reward_t)
        if reward_clip is not None:
            reward_t = jnp.clip(reward_t, -reward_clip, reward_clip)
        trajectory = trajectory._replace(reward_t=reward_t)
        gradients, metrics = jax.grad(a3c_loss, has_aux=True)(
            params,
            apply_fn,
            trajectory,
            discount=discount,
            critic_cost=critic_cost,
            entropy_cost=entropy_cost,
            lambda_=lambda_,
        )
        squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)]
        metrics["gradient_norm"] = jnp.sqrt(sum(squares))
        if statistics:
            gradients = {**gradients, moments.STATISTICS: statistics}
        return gradients, state, Statistics(metrics, episodes)

    return worker_step


def _discounted_returns(
    state: WorkerState, trajectory: rollout.Trajectory, discount: float
) -> tuple[WorkerState, moments.Moments]:
    """Carries the running episodes' discounted returns over a segment; the moments of all of them."""

    def step(running: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, ended = step
        running = discount * running + reward
        return jnp.where(ended, 0.0, running), running

    ended_t = trajectory.terminated_t | trajectory.truncated_t
    last, returns = jax.lax.scan(step, state.discounted_return, (trajectory.reward_t, ended_t))
    return state._replace(discounted_return=last), moments.of(returns, 2)


@jax.jit
def _ravel(tree: Any) -> Array:
    return ravel_pytree(tree)[0]


def _unraveller(tree: Any) -> Callable[[Array], Any]:
    """The inverse of `_ravel`. The tree is only traced: eagerly, each of its leaves would compile a program."""
    found: list[Callable[[Array], Any]] = []
    jax.eval_shape(lambda tree: found.append(ravel_pytree(tree)[1]), tree)
    return found[0]


class _Report(NamedTuple):
    """What a packed step reports: the statistics, with the number of episodes that ended as the first word."""

    num_ended: Any
    metrics: Any
    episodes: Any


class PackedWorkerStep:
    """A worker step compiled over one vector of parameters and one of state, as the threads call it.

    An array that enters or leaves a compiled call costs microseconds, however small; a network has eight,
    a worker's state a dozen. The trees are rebuilt inside the program, where that is free.

    Args:
      worker_step: what `make_worker_step` made.
      params: parameters like those to come.
      state: a worker's state like those to come.
    """

    def __init__(self, worker_step: WorkerStep, params: Any, state: WorkerState) -> None:
        unravel = _unraveller(params)
        self.unflatten: Callable[[Array], Any] = kernels.jit_for_one_call(unravel)
        """The parameter tree from its vector."""
        packing = Packing(state)
        self.pack_state: Callable[[WorkerState], Array] = jax.jit(packing.pack)
        """A worker's state as a vector."""
        statistics = jax.eval_shape(worker_step, params, state)[2]
        self._metric_names = list(statistics.metrics)
        self._report = Packing(
            _Report(
                jax.ShapeDtypeStruct((), jnp.int32),
                jax.ShapeDtypeStruct((len(self._metric_names),), jnp.float32),
                statistics.episodes,
            )
        )

        def step(flat_params: Array, packed_state: Array) -> tuple[Array, Array, Array]:
            gradients, state, (metrics, episodes) = worker_step(
                unravel(flat_params), packing.unpack(packed_state)
            )
            num_ended = jnp.sum(episodes.ended, dtype=jnp.int32)
            values = jnp.stack([metrics[name] for name in self._metric_names])
            return (
                _ravel(gradients),
                packing.pack(state),
                self._report.pack(_Report(num_ended, values, episodes)),
            )

        # The multiplications of one forward pass, but for the weights that are shared.
        flat_params = self.flatten(params)
        work = statistics.episodes.ended.size * flat_params.size
        self._step: Callable[[Array, Array], tuple[Array, Array, Array]] = jax.jit(step)
        self.fused = work <= kernels.MAX_WORK and flat_params.size <= kernels.MAX_PARAMETERS
        """Whether it was compiled into a single kernel, as far as XLA can."""
        if self.fused:
            self._step = kernels.compile_fused(step, flat_params, self.pack_state(state))

    @staticmethod
    def flatten(params: Any) -> Array:
        """The parameters, or their gradients, as one vector."""
        return _ravel(params)

    def __call__(self, flat_params: Array, packed_state: Array) -> tuple[Array, Array, np.ndarray]:
        """Plays a segment and waits for it.

        Returns:
          The flat gradients, the packed state, and the report: a vector of words for the methods below,
          since most reports hold nothing that anyone reads.
        """
        gradients, packed_state, report = self._step(flat_params, packed_state)
        return gradients, packed_state, np.asarray(report)  # waits: a call's results come together

    def play(self, flat_params: Array, packed_state: Array) -> tuple[Array, Array, "Record"]:
        """The same, with what every update has to count read from the report: before the lock is taken."""
        gradients, packed_state, report = self(flat_params, packed_state)
        return gradients, packed_state, Record(report, *self.episodes(report))

    def metrics(self, report: np.ndarray) -> dict[str, float]:
        """The metrics of a report, by name."""
        values = self._report.unpack_on_host(report).metrics.tolist()
        return dict(zip(self._metric_names, values, strict=True))

    def episodes(self, report: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The returns and the lengths of the episodes that ended, `[E]` each."""
        if not report[0]:  # by far the most frequent case with small segments
            return _NO_EPISODES
        episodes = self._report.unpack_on_host(report).episodes
        return episodes.episode_return[episodes.ended], episodes.length[episodes.ended]


class Record(NamedTuple):
    """A report, and the episodes that it holds.

    Attributes:
      report: for `PackedWorkerStep.metrics`.
      returns: `[E]` float32.
      lengths: `[E]` int32.
    """

    report: np.ndarray
    returns: np.ndarray
    lengths: np.ndarray


_NO_EPISODES = np.zeros(0, np.float32), np.zeros(0, np.int32)
