"""A worker as a pure function: play a segment, return the gradients of its loss.

(parameters, worker state)  ->  (gradients, worker state, report)
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from a3c_jax import normalization, rollout
from a3c_jax.algorithm import Algorithm, Metrics, join_shared, split_shared
from a3c_jax.environments import Environment

Array = jax.Array
WorkerState = rollout.RolloutState


class SegmentReport(NamedTuple):
    """What a worker reports of a segment.

    Attributes:
      metrics: what the loss reports of itself, and `gradient_norm`, scalars by name.
      episodes: the episodes that ended.
      num_episodes: how many episodes ended, a scalar, int32.
    """

    metrics: dict[str, Array]
    episodes: rollout.Episodes
    num_episodes: Array


class Segment(NamedTuple):
    """What a worker has played and learns from.

    Attributes:
      trajectory: the steps, with the rewards that the loss sees.
      own: what the algorithm keeps for this worker.
      moments: the moments of the segment by which observations and rewards are normalised, by name; empty if
        neither is.
    """

    trajectory: rollout.Trajectory
    own: Any
    moments: dict[str, Any]


WorkerStep: TypeAlias = Callable[[Any, WorkerState], tuple[Any, WorkerState, SegmentReport]]
Differentiate: TypeAlias = Callable[[Any, Segment], tuple[Any, Metrics]]
Learn: TypeAlias = Callable[
    [Any, WorkerState, rollout.Trajectory, rollout.Episodes], tuple[Any, WorkerState, SegmentReport]
]


def make_worker_step(
    environment: Environment, algorithm: Algorithm, *, t_max: int, **rewards: Any
) -> WorkerStep:
    """Makes the function that each worker calls again and again.

    Args:
      environment: what to play.
      algorithm: how to choose actions, and what to minimise.
      t_max: the number of steps played in each environment between two updates.
      **rewards: see `make_learn`.

    Returns:
      `worker_step(params, state) -> (gradients, state, report)`, a pure function. If the algorithm learns at
      the newest parameters, the segment itself takes the place of the gradients.
    """
    learn = make_learn(algorithm, **rewards)

    def worker_step(params: Any, state: WorkerState) -> tuple[Any, WorkerState, SegmentReport]:
        fresh_carry = algorithm.initialize_carry(len(state.episode_return))

        def policy(key: Array, observation: Any, carry: Any) -> tuple[Array, Array, Any]:
            return algorithm.act(params, key, observation, carry, state.own)

        state, trajectory, episodes = rollout.unroll(environment, policy, state, t_max, fresh_carry)
        return learn(params, state, trajectory, episodes)

    return worker_step


def make_learn(
    algorithm: Algorithm, *, discount: Any, reward_clip: Any = None, terminal_reward: Any = None
) -> Learn:
    """Makes the second half of a worker's step: from a segment to the gradients of its loss.

    Args:
      algorithm: what to minimise.
      discount: the discount factor gamma, per step, of the returns whose deviation normalises rewards.
      reward_clip: if given, the loss sees rewards clipped to [-reward_clip, reward_clip].
      terminal_reward: if given, it takes the place of the reward of each step that terminated an episode, before clipping.

    Returns:
      `learn(params, state, trajectory, episodes) -> (gradients, state, report)`, a pure function. Its state is
      the one at the segment's end.
    """
    differentiate = make_differentiate(algorithm)

    def learn(
        params: Any,
        state: WorkerState,
        trajectory: rollout.Trajectory,
        episodes: rollout.Episodes,
    ) -> tuple[Any, WorkerState, SegmentReport]:
        # If the parameters hold running moments, the gradients carry the moments of this segment.
        running_moments = normalization.get_statistics(params)
        segment_moments: dict[str, Any] = {}
        if "observation" in running_moments:
            segment_moments["observation"] = normalization.batch_moments(
                trajectory.observation_tm1, num_batch_dims=2
            )
        reward_t = trajectory.reward_t
        if "reward" in running_moments:
            state, segment_moments["reward"] = _moments_of_returns(state, trajectory, discount)
            reward_t = normalization.scale_to_unit_variance(reward_t, running_moments["reward"])
        if terminal_reward is not None:
            reward_t = jnp.where(trajectory.terminated_t, terminal_reward, reward_t)
        if reward_clip is not None:
            reward_t = jnp.clip(reward_t, -reward_clip, reward_clip)

        segment = Segment(trajectory._replace(reward_t=reward_t), state.own, segment_moments)
        gradients, metrics = (
            (segment, {}) if algorithm.learns_at_newest else differentiate(params, segment)
        )
        num_episodes = jnp.sum(episodes.ended, dtype=jnp.int32)
        return gradients, state, SegmentReport(metrics, episodes, num_episodes)

    return learn


def make_differentiate(algorithm: Algorithm) -> Differentiate:
    """Makes `differentiate(params, segment) -> (gradients, metrics)`, a pure function.

    The gradients are a tree like the parameters without what the algorithm shares.
    """

    def differentiate(params: Any, segment: Segment) -> tuple[Any, Metrics]:
        weights, shared = split_shared(params)

        def loss(weights: Any) -> tuple[Array, Metrics]:
            params = join_shared(weights, shared)
            return algorithm.loss(params, segment.trajectory, segment.own)

        gradients, metrics = jax.grad(loss, has_aux=True)(weights)
        squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)]
        metrics = {**metrics, "gradient_norm": jnp.sqrt(sum(squares))}
        if segment.moments:
            gradients = {**gradients, normalization.STATISTICS: segment.moments}
        return gradients, metrics

    return differentiate


def _moments_of_returns(
    state: WorkerState, trajectory: rollout.Trajectory, discount: float
) -> tuple[WorkerState, normalization.Moments]:
    """Continues the discounted return of each running episode over a segment.

    Returns:
      The state with the returns at the segment's end, and the moments of the returns at all its steps.
    """

    def step(running: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, ended = step
        running = discount * running + reward
        return jnp.where(ended, 0.0, running), running

    ended_t = trajectory.terminated_t | trajectory.truncated_t
    last, returns = jax.lax.scan(step, state.discounted_return, (trajectory.reward_t, ended_t))
    moments = normalization.batch_moments(returns, num_batch_dims=2)
    return state._replace(discounted_return=last), moments
