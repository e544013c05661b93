"""A worker as a pure function: play a segment, return the gradients of its loss.

(parameters, worker state)  ->  (gradients, worker state, statistics)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from a3c_jax import normalization, rollout
from a3c_jax.environments import Environment
from a3c_jax.networks import network_functions, trajectory_apply

Array = jax.Array
WorkerState = rollout.RolloutState
Loss = Callable[
    [Any, Callable[[Any, Any], Any], rollout.Trajectory], tuple[Array, dict[str, Array]]
]


class Statistics(NamedTuple):
    """What a worker reports of a segment.

    Attributes:
      metrics: what the loss reports of itself, and `gradient_norm`, scalars by name.
      episodes: the episodes that ended.
      num_episodes: how many episodes ended, a scalar, int32.
    """

    metrics: dict[str, Array]
    episodes: rollout.Episodes
    num_episodes: Array


WorkerStep = Callable[[Any, WorkerState], tuple[Any, WorkerState, Statistics]]


def make_worker_step(
    environment: Environment,
    network: Any,
    *,
    loss: Loss,
    t_max: int,
    discount: float,
    reward_clip: float | None = None,
    terminal_reward: float | None = None,
) -> WorkerStep:
    """Makes the function that each worker calls again and again.

    Args:
      environment: what to play.
      network: what to train; see `a3c_jax.networks.network_functions`.
      loss: `loss(params, apply_fn, trajectory) -> (loss, metrics)`: the scalar that the worker minimises and
        what to report about it, scalars by name. `a3c_jax.losses.a3c_loss` is one, and says what `apply_fn` is.
      t_max: the number of steps played in each environment between two updates.
      discount: the discount factor gamma, per step, of the returns whose deviation normalises rewards.
      reward_clip: if given, the loss sees rewards clipped to [-reward_clip, reward_clip].
      terminal_reward: if given, the loss sees it as the reward of each step that terminated an episode.

    Returns:
      `worker_step(params, state) -> (gradients, state, statistics)`, a pure function.
    """
    functions = network_functions(network)
    apply_fn = trajectory_apply(network)

    def worker_step(params: Any, state: WorkerState) -> tuple[Any, WorkerState, Statistics]:
        def policy(key: Array, observation: Any, carry: Any) -> tuple[Array, Array, Any]:
            distribution, carry = functions.act(params, observation, carry)
            action = distribution.sample(key)
            return action, distribution.log_prob(action), carry

        fresh_carry = functions.initialize_carry(len(state.episode_return))
        state, trajectory, episodes = rollout.unroll(environment, policy, state, t_max, fresh_carry)

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

        gradients, metrics = jax.grad(loss, has_aux=True)(
            params, apply_fn, trajectory._replace(reward_t=reward_t)
        )
        squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)]
        metrics = {**metrics, "gradient_norm": jnp.sqrt(sum(squares))}
        if segment_moments:
            gradients = {**gradients, normalization.STATISTICS: segment_moments}
        num_episodes = jnp.sum(episodes.ended, dtype=jnp.int32)
        return gradients, state, Statistics(metrics, episodes, num_episodes)

    return worker_step


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
