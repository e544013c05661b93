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


class SegmentReport(NamedTuple):
    """What a worker reports of a segment.

    Attributes:
      metrics: what the loss reports of itself, and `gradient_norm`, scalars by name; empty if the algorithm learns at
        the newest parameters, because they come with the update then.
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


WorkerStep: TypeAlias = Callable[
    [Any, rollout.RolloutState], tuple[Any, rollout.RolloutState, SegmentReport]
]


def make_worker_step(
    environment: Environment, algorithm: Algorithm, *, t_max: int, **rewards: Any
) -> WorkerStep:
    """Makes the function that each worker calls again and again.

    Args:
      environment: what to play.
      algorithm: how to choose actions, and what to minimise.
      t_max: the number of steps played in each environment between two updates.
      **rewards: see `learn`.

    Returns:
      `worker_step(params, state) -> (gradients, state, report)`, a pure function. If the algorithm learns at
      the newest parameters, the segment itself takes the place of the gradients.
    """

    def worker_step(
        params: Any, state: rollout.RolloutState
    ) -> tuple[Any, rollout.RolloutState, SegmentReport]:
        fresh_carry = algorithm.initialize_carry(len(state.episode_return))

        def policy(key: Array, observation: Any, carry: Any) -> tuple[Array, Array, Any]:
            return algorithm.act(params, key, observation, carry, state.own)

        state, trajectory, episodes = rollout.unroll(environment, policy, state, t_max, fresh_carry)
        return learn(algorithm, params, state, trajectory, episodes, **rewards)

    return worker_step


def learn(
    algorithm: Algorithm,
    params: Any,
    state: rollout.RolloutState,
    trajectory: rollout.Trajectory,
    episodes: rollout.Episodes,
    *,
    normalizing_discount: Any,
    reward_clip: Any = None,
    terminal_reward: Any = None,
) -> tuple[Any, rollout.RolloutState, SegmentReport]:
    """The second half of a worker's step: from a segment to the gradients of its loss.

    Args:
      algorithm: what to minimise.
      params: the parameters that the segment was played with.
      state: the worker's state at the segment's end.
      trajectory: the segment.
      episodes: the episodes that ended in it.
      normalizing_discount: the discount factor gamma, per step, of the returns whose deviation normalises rewards. The loss has
        its own.
      reward_clip: if given, the loss sees rewards clipped to [-reward_clip, reward_clip].
      terminal_reward: if given, it takes the place of the reward of each step that terminated an episode, before clipping.

    Returns:
      The gradients, or the segment itself if the algorithm learns at the newest parameters; the state; the report.
    """
    # If the parameters hold running moments, the gradients carry the moments of this segment.
    running_moments = normalization.get_statistics(params)
    segment_moments: dict[str, Any] = {}
    if "observation" in running_moments:
        segment_moments["observation"] = normalization.batch_moments(
            trajectory.observation_tm1, num_batch_dims=2, valid=trajectory.valid_tm1
        )
    reward_t = trajectory.reward_t
    if "reward" in running_moments:
        state, segment_moments["reward"] = _moments_of_returns(
            state, trajectory, normalizing_discount
        )
        reward_t = normalization.scale_to_unit_variance(reward_t, running_moments["reward"])
    if terminal_reward is not None:
        reward_t = jnp.where(trajectory.terminated_t, terminal_reward, reward_t)
    if reward_clip is not None:
        reward_t = jnp.clip(reward_t, -reward_clip, reward_clip)

    segment = Segment(trajectory._replace(reward_t=reward_t), state.own, segment_moments)
    num_episodes = jnp.sum(episodes.ended, dtype=jnp.int32)
    if algorithm.learns_at_newest:
        return segment, state, SegmentReport({}, episodes, num_episodes)
    gradients, metrics = differentiate(algorithm, params, segment)
    return gradients, state, SegmentReport(metrics, episodes, num_episodes)


def differentiate(algorithm: Algorithm, params: Any, segment: Segment) -> tuple[Any, Metrics]:
    """The gradients of the algorithm's loss of a segment, and what it reports.

    The gradients are a tree like the parameters without what the algorithm shares.
    """
    weights, shared = split_shared(params)

    def loss(weights: Any) -> tuple[Array, Metrics]:
        return algorithm.loss(join_shared(weights, shared), segment.trajectory, segment.own)

    gradients, metrics = jax.grad(loss, has_aux=True)(weights)
    squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)]
    metrics = {**metrics, "gradient_norm": jnp.sqrt(sum(squares))}
    if segment.moments:
        gradients = {**gradients, normalization.STATISTICS: segment.moments}
    return gradients, metrics


def _moments_of_returns(
    state: rollout.RolloutState, trajectory: rollout.Trajectory, discount: float
) -> tuple[rollout.RolloutState, normalization.Moments]:
    """Continues the discounted return of each running episode over a segment.

    Returns:
      The state with the returns at the segment's end, and the moments of the returns at all its steps.
    """

    def add(running: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, ended = step
        running = discount * running + reward
        begins_anew = ended | ~jnp.isfinite(running)  # the latter only if such updates are skipped
        return jnp.where(begins_anew, 0.0, running), running

    ended_t = trajectory.terminated_t | trajectory.truncated_t
    last, returns = jax.lax.scan(add, state.discounted_return, (trajectory.reward_t, ended_t))
    moments = normalization.batch_moments(returns, num_batch_dims=2, valid=trajectory.valid_tm1)
    return state._replace(discounted_return=last), moments
