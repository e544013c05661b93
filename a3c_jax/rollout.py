"""The n-step rollout: T steps of N environments in one scan, which the next segment continues."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from a3c_jax.cells import where_tree
from a3c_jax.environments import Environment

Array = jax.Array


class Trajectory(NamedTuple):
    """A segment of T steps of N environments: what the loss learns from.

    Episodes may end and others begin inside it.

    Attributes:
      observation_tm1: what was acted upon, `[T, N, ...]`, or a dict or tuple of such arrays.
      action_tm1: what was done, `[T, N]` int32, or `[T, N, D]` int32 for D discrete actions at once, or
        `[T, N, D]` float32 if actions are continuous.
      reward_t: what it earned, `[T, N]` float32. A loss sees it clipped, scaled or replaced, as the configuration says.
      terminated_t: whether nothing follows: the episode ended by itself, or a life was lost and that counts, `[T, N]` bool.
      truncated_t: whether a time limit then cut the episode, `[T, N]` bool; also True where `valid_tm1` is False.
      observation_t: what followed, before any reset, like `observation_tm1`.
      carry: what a recurrent network remembered at the segment's start, a tree of `[N, ...]`; `()` for a
        feed-forward network.
      log_prob_tm1: the log-probability of the action under the policy that chose it, `[T, N]` float32, in nats.
        A loss that compares that policy with the current one reads it. If the loss does not, the compiler leaves
        it out.
      valid_tm1: False at a step that only began an environment's next episode, so that its action did nothing and
        the losses leave it out, `[T, N]` bool. None if every step counts, as in all environments but those of
        Gymnasium that begin their episodes so (`a3c_jax.autoreset`).
    """

    observation_tm1: Any
    action_tm1: Array
    reward_t: Array
    terminated_t: Array
    truncated_t: Array
    observation_t: Any
    carry: Any = ()
    log_prob_tm1: Any = ()
    valid_tm1: Any = None


class Episodes(NamedTuple):
    """The episodes that ended inside a segment.

    Attributes:
      ended: whether an episode ended at this step, `[T, N]` bool.
      episode_return: the undiscounted sum of rewards from its first step on, `[T, N]` float32, in the
        environment's own rewards. It has a meaning only where `ended` is set.
      length: its number of steps, `[T, N]` int32. It has a meaning only where `ended` is set.
    """

    ended: Array
    episode_return: Array
    length: Array


class RolloutState(NamedTuple):
    """What the next segment needs to continue from this one.

    Attributes:
      key: the source of all randomness to come.
      environment: the environments' states, a tree of `[N, ...]`.
      observation: what to act upon next, `[N, ...]`, or a dict or tuple of such arrays.
      episode_return: the running episodes' returns so far, `[N]` float32.
      episode_length: their numbers of steps so far, `[N]` int32.
      carry: what a recurrent network remembers, a tree of `[N, ...]`.
      discounted_return: the discounted sum of the running episodes' rewards, `[N]` float32, if rewards are
        normalised by its deviation; `()` otherwise.
      own: what the algorithm keeps for this worker (`a3c_jax.algorithm.Algorithm`); `()` if nothing.
    """

    key: Array
    environment: Any
    observation: Any
    episode_return: Array
    episode_length: Array
    carry: Any = ()
    discounted_return: Any = ()
    own: Any = ()


def start(environment: Environment, key: Array, num_envs: int, carry: Any = ()) -> RolloutState:
    """Resets environments and makes the state at the first segment's start.

    Args:
      environment: what to play.
      key: the source of all randomness to come.
      num_envs: N, the number of environments.
      carry: what a recurrent network remembers at an episode's start, a tree of `[N, ...]`.
    """
    key, reset_key = jax.random.split(key)
    observation, state = environment.reset(reset_key, num_envs)
    return RolloutState(
        key, state, observation, jnp.zeros(num_envs), jnp.zeros(num_envs, jnp.int32), carry
    )


def unroll(
    environment: Environment,
    policy: Callable[[Array, Any, Any], tuple[Array, Array, Any]],
    state: RolloutState,
    num_steps: int,
    fresh_carry: Any = (),
) -> tuple[RolloutState, Trajectory, Episodes]:
    """Plays `num_steps` steps in each environment.

    Args:
      environment: what to play.
      policy: `policy(key, observation, carry) -> (action, log_prob, carry)`, on `[N, ...]`.
      state: the state at the segment's start.
      num_steps: T, a Python integer.
      fresh_carry: the carry at an episode's start. Where an episode ends, the carry is reset to it.

    Returns:
      The state at the segment's end, the trajectory, and the episodes that ended on the way.
    """
    key, segment_key = jax.random.split(state.key)
    first_carry = state.carry

    def step(state: RolloutState, key: Array) -> tuple[RolloutState, tuple[Trajectory, Episodes]]:
        action_key, environment_key = jax.random.split(key)
        action, log_prob, carry = policy(action_key, state.observation, state.carry)
        transition = environment.step(environment_key, state.environment, action)
        ended = transition.terminated | transition.truncated
        episode_return = state.episode_return + transition.reward
        episode_length = state.episode_length + 1
        trajectory = Trajectory(
            observation_tm1=state.observation,
            action_tm1=action,
            reward_t=transition.reward,
            terminated_t=transition.terminated,
            truncated_t=transition.truncated,
            observation_t=transition.final_observation,
            log_prob_tm1=log_prob,
        )
        next_state = state._replace(
            environment=transition.state,
            observation=transition.observation,
            episode_return=jnp.where(ended, 0.0, episode_return),
            episode_length=jnp.where(ended, 0, episode_length),
            carry=where_tree(ended, fresh_carry, carry),
        )
        return next_state, (trajectory, Episodes(ended, episode_return, episode_length))

    state, (trajectory, episodes) = jax.lax.scan(
        step, state._replace(key=key), jax.random.split(segment_key, num_steps)
    )
    return state, trajectory._replace(carry=first_carry), episodes
