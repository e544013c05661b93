"""Evaluation: whole episodes by a fixed policy, apart from training and with a key of its own."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from a3c_jax.asynchrony.signals import raise_noted
from a3c_jax.environments import Environment
from a3c_jax.host_environment import HostEnvironment
from a3c_jax.network_checks import name_of
from a3c_jax.networks import network_functions

Array = jax.Array

_ON_HOST_AT_A_TIME = 32
"""How many environments on the host are evaluated side by side."""

_MANY_STEPS = 100_000
"""Steps of an episode after which a warning says that it may never end."""

_STEPS_AT_A_TIME = 2_500
"""Steps of one compiled call. Between two of them Ctrl-C is noticed."""


class Policy(NamedTuple):
    """How to act.

    Attributes:
      act: `act(params, key, observation, carry) -> (action, carry)`, on `[N, ...]`.
      initialize_carry: `(num_envs) -> carry` at an episode's start.
    """

    act: Callable[[Any, Array, Array, Any], tuple[Array, Any]]
    initialize_carry: Callable[[int], Any]


class Evaluation(NamedTuple):
    """The returns and lengths of the episodes.

    Attributes:
      returns: undiscounted, in the environment's own rewards, `[num_episodes]` float32.
      lengths: in steps, `[num_episodes]` int32.
    """

    returns: np.ndarray
    lengths: np.ndarray


def _made_once(make: Callable[[Any], Policy]) -> Callable[[Any], Policy]:
    """The function, which gives the same policy again for the same object, so that it is compiled once."""
    made: dict[Any, tuple[Any, Policy]] = {}

    @functools.wraps(make)
    def find(thing: Any) -> Policy:
        key = thing if _is_hashable(thing) else id(thing)
        if key not in made:
            made[key] = thing, make(thing)  # which keeps the object, and so its identity
        return made[key][1]

    return find


def _is_hashable(thing: Any) -> bool:
    try:
        hash(thing)
    except TypeError:
        return False
    return True


@_made_once
def greedy_policy(network: Any) -> Policy:
    """The policy that takes the most probable action."""
    return _policy(network, lambda distribution, key: distribution.mode())


@_made_once
def sampled_policy(network: Any) -> Policy:
    """The policy that samples its actions, as in training."""
    return _policy(network, lambda distribution, key: distribution.sample(key))


@_made_once
def random_policy(environment: Environment) -> Policy:
    """The policy that draws every action uniformly: the baseline to beat."""
    return Policy(
        lambda params, key, observation, carry: (
            environment.random_action(key, jax.tree.leaves(observation)[0].shape[0]),
            carry,
        ),
        lambda num_envs: (),
    )


def evaluate(
    policy: Policy, params: Any, environment: Environment, key: Array, num_episodes: int = 100
) -> Evaluation:
    """Plays fresh episodes, each in an environment of its own, from start to end.

    Only the first episode of each environment counts, because counting the first `num_episodes` to end
    would favour short ones.

    Args:
      policy: `greedy_policy(network)`, `sampled_policy(network)`, `random_policy(environment)`, or a `Policy` of
        your own.
      params: what the policy takes as its first argument.
      environment: what to play. Its episodes must end, by a time limit at the latest.
      key: a PRNG key; equal keys give equal episodes.
      num_episodes: how many.

    Raises:
      ValueError: if `num_episodes` is not positive.
      TypeError: if the policy is no `Policy`, or the key no PRNG key.
    """
    if not isinstance(policy, Policy):
        raise TypeError(
            f"policy must be an a3c_jax.asynchrony.evaluation.Policy, got {type(policy).__name__}; give "
            "greedy_policy(network), or Policy(act, initialize_carry)."
        )
    if isinstance(key, int):
        raise TypeError(f"key must be a PRNG key, got {key}; give jax.random.key({key}).")
    if num_episodes < 1:
        raise ValueError(f"num_episodes must be >= 1, got {num_episodes}; use 100.")
    if isinstance(environment, HostEnvironment):
        return _run_episodes_on_host(policy, environment, num_episodes, params, key)
    return _run_episodes(policy, environment, num_episodes, params, key)


def _policy(network: Any, choose: Callable[[Any, Array], Array]) -> Policy:
    functions = network_functions(network)

    def act(params: Any, key: Array, observation: Array, carry: Any) -> tuple[Array, Any]:
        distribution, carry = functions.act(params, observation, carry)
        return choose(distribution, key), carry

    return Policy(act, functions.initialize_carry)


class _Episodes(NamedTuple):
    """What one step of the evaluation hands to the next; leading axis `num_episodes`."""

    key: Array
    observation: Any
    state: Any
    carry: Any
    running: Array
    returns: Array
    lengths: Array


def _run_episodes(
    policy: Policy, environment: Environment, num_episodes: int, params: Any, key: Array
) -> Evaluation:
    """The returns and lengths of the first episode of each environment."""
    last = _STEPS_AT_A_TIME
    now = _begin_episodes(policy, environment, num_episodes, params, key, last)
    while now.running.any():
        raise_noted()
        if last == _MANY_STEPS:
            _warn_of_long_episodes(environment)
        last += _STEPS_AT_A_TIME
        now = _go_on(policy, environment, params, now, last)
    return Evaluation(np.asarray(now.returns), np.asarray(now.lengths))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _begin_episodes(
    policy: Policy,
    environment: Environment,
    num_episodes: int,
    params: Any,
    key: Array,
    last: int,
) -> _Episodes:
    """An episode of each environment, until it ends or has so many steps."""
    key, reset_key = jax.random.split(key)
    observation, state = environment.reset(reset_key, num_episodes)
    none = jnp.zeros(num_episodes, jnp.int32)
    carry = policy.initialize_carry(num_episodes)
    start = _Episodes(key, observation, state, carry, none == 0, none.astype(jnp.float32), none)
    return _go_on(policy, environment, params, start, last)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _go_on(
    policy: Policy, environment: Environment, params: Any, start: _Episodes, last: int
) -> _Episodes:
    """The episodes that have not ended, until they end or have so many steps."""

    def step(now: _Episodes) -> _Episodes:
        key, action_key, environment_key = jax.random.split(now.key, 3)
        action, carry = policy.act(params, action_key, now.observation, now.carry)
        transition = environment.step(environment_key, now.state, action)
        return _Episodes(
            key=key,
            observation=transition.observation,
            state=transition.state,
            carry=carry,  # never reset, because only the first episode counts
            running=now.running & ~(transition.terminated | transition.truncated),
            returns=now.returns + jnp.where(now.running, transition.reward, 0.0),
            lengths=now.lengths + now.running,
        )

    def goes_on(now: _Episodes) -> Array:
        return jnp.any(now.running) & (jnp.max(now.lengths) < last)

    return jax.lax.while_loop(goes_on, step, start)


def _warn_of_long_episodes(environment: Any) -> None:
    warnings.warn(
        f"after {_MANY_STEPS:,} steps of an evaluation some episodes of environment {name_of(environment)!r} have not ended; "
        "if they never do, give it a time limit, as by gymnasium's max_episode_steps or gymnax's max_steps_in_episode.",
        RuntimeWarning,
        stacklevel=4,
    )


def _run_episodes_on_host(
    policy: Policy, environment: HostEnvironment, num_episodes: int, params: Any, key: Array
) -> Evaluation:
    """The returns and lengths of the first episodes, a few environments at a time."""
    fixed = environment.fixed_num_envs
    at_a_time = fixed or _ON_HOST_AT_A_TIME
    # An environment that was given as an object always plays as many episodes as it has copies.
    played = -(-num_episodes // fixed) * fixed if fixed else num_episodes
    returns, lengths = np.zeros(played, np.float32), np.zeros(played, np.int32)
    act = jax.jit(policy.act)
    for first in range(0, played, at_a_time):
        group = slice(first, min(played, first + at_a_time))
        num_envs = group.stop - first
        key, seed_key, action_key = jax.random.split(key, 3)
        with environment.playing(num_envs, jax.random.key_data(seed_key)) as player:
            observation = environment.begin(player, np.zeros(num_envs, np.int32))
            carry, running, step = policy.initialize_carry(num_envs), np.ones(num_envs, bool), 0
            while running.any():
                raise_noted()
                step_key = jax.random.fold_in(action_key, step)
                action, carry = act(params, step_key, observation, carry)
                stepped = player.step(environment.decode(np.asarray(action)))
                returns[group] += np.where(running, stepped.reward, 0.0)
                lengths[group] += running
                running &= ~(stepped.terminated | stepped.truncated)
                observation, step = environment.encode(stepped.observation), step + 1
                if step == _MANY_STEPS and running.any():
                    _warn_of_long_episodes(environment)
    return Evaluation(returns[:num_episodes], lengths[:num_episodes])
