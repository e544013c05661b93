"""Evaluation: whole episodes by a fixed policy, apart from training and with a key of its own."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from a3c_jax.environments import Environment

Array = jax.Array
Policy = Callable[[Any, Array, Array], Array]
"""`policy(params, key, observation) -> action`, from `[N, ...]` to `[N]`."""


class Evaluation(NamedTuple):
    """What the episodes came to.

    Attributes:
      returns: undiscounted, in the environment's own rewards, `[num_episodes]` float32.
      lengths: in steps, `[num_episodes]` int32.
    """

    returns: np.ndarray
    lengths: np.ndarray


@functools.cache
def greedy_policy(network: nn.Module) -> Policy:
    """The policy that takes the most probable action."""
    actor = _actor(network)
    return lambda params, key, observation: actor(params, observation).mode()


@functools.cache
def sampled_policy(network: nn.Module) -> Policy:
    """The policy that samples its actions, as in training."""
    actor = _actor(network)
    return lambda params, key, observation: actor(params, observation).sample(key)


@functools.cache
def random_policy(num_actions: int) -> Policy:
    """The policy that takes every action with equal probability: the baseline to beat."""
    return lambda params, key, observation: jax.random.randint(
        key, observation.shape[:1], 0, num_actions
    )


def evaluate(
    policy: Policy, params: Any, environment: Environment, key: Array, num_episodes: int = 100
) -> Evaluation:
    """Plays `num_episodes` fresh episodes, each in an environment of its own, from start to end.

    Each environment counts its first episode only. Counting the first `num_episodes` to end would
    favour short ones.

    Args:
      policy: `greedy_policy(network)`, `sampled_policy(network)`, `random_policy(num_actions)`, or your own.
      params: what the policy takes as its first argument.
      environment: what to play. Its episodes must end, by a time limit at the latest.
      key: a PRNG key; equal keys give equal episodes.
      num_episodes: how many.

    Raises:
      ValueError: where `num_episodes` is not positive.
    """
    if num_episodes < 1:
        raise ValueError(f"num_episodes must be >= 1, got {num_episodes}; use 100.")
    returns, lengths = _play(policy, environment, num_episodes, params, key)
    return Evaluation(np.asarray(returns), np.asarray(lengths))


def _actor(network: nn.Module) -> Callable[..., Any]:
    return functools.partial(network.apply, method="actor")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _play(
    policy: Policy, environment: Environment, num_episodes: int, params: Any, key: Array
) -> tuple[Array, Array]:
    key, reset_key = jax.random.split(key)
    observation, state = environment.reset(reset_key, num_episodes)

    def any_running(carry: Any) -> Array:
        return jnp.any(carry[3])

    def step(carry: Any) -> Any:
        key, observation, state, running, returns, lengths = carry
        key, action_key, environment_key = jax.random.split(key, 3)
        action = policy(params, action_key, observation)
        transition = environment.step(environment_key, state, action)
        returns += jnp.where(running, transition.reward, 0.0)
        lengths += running
        running &= ~(transition.terminated | transition.truncated)
        return key, transition.observation, transition.state, running, returns, lengths

    none = jnp.zeros(num_episodes, jnp.int32)
    carry = (key, observation, state, none == 0, none.astype(jnp.float32), none)
    return jax.lax.while_loop(any_running, step, carry)[4:]
