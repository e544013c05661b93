"""Refuses wrong set-ups that would otherwise train without a word: when a run is built, before anything is compiled.

What can be seen from shapes is found by tracing alone (`jax.eval_shape`). Whether an environment resets itself
can only be seen by playing it: see `a3c_jax.reset_check`.
"""

import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from a3c_jax.config import A3CConfig, default_of
from a3c_jax.gymnax_checks import check_gymnax
from a3c_jax.gymnax_environment import GymnaxEnvironment
from a3c_jax.host_environment import HostEnvironment
from a3c_jax.network_checks import check_network, check_torso, name_of
from a3c_jax.networks import ActorCritic
from a3c_jax.normalization import is_shape
from a3c_jax.protocol import Environment
from a3c_jax.reset_check import check_environment_resets

Array = jax.Array

_NETWORK_FIELDS = (
    "torso", "hidden_sizes", "activation", "shared_torso", "core", "core_size", "forget_bias",
    "state_dependent_scale",
)  # fmt: skip


def check_setup(
    config: A3CConfig,
    environment: Environment,
    network: Any,
    *,
    environment_given: bool = False,
    network_given: bool = False,
) -> None:
    """Checks that configuration, environment and network go together.

    Args:
      config: the configuration.
      environment: what will be played.
      network: what will be trained.
      environment_given: whether the environment was passed in as an object, not named by the configuration.
      network_given: whether the network was passed in as an object, not described by the configuration.

    Raises:
      ValueError: if an option contradicts an object that was passed in; if the environment's observations are
        not what it declares, or its `num_actions` not numbers of actions; if the network's actions or values are
        not those that the environment needs; or if the environment does not reset itself after an episode's end.
      TypeError: if the network or its distribution lacks a method.
    """
    if environment_given:
        _check_environment_options(config, environment)
    if network_given:
        _check_network_options(config, network)
    _check_num_actions(environment)
    if isinstance(environment, GymnaxEnvironment):
        check_gymnax(environment)
    num_envs = config.envs_per_worker
    key = jax.eval_shape(lambda: jax.random.key(0))
    observation, state = jax.eval_shape(lambda key: environment.reset(key, num_envs), key)
    _check_observation(environment, observation, num_envs)
    if not network_given:
        check_torso(config, environment)
    action = check_network(environment, network, observation, num_envs)
    if isinstance(environment, HostEnvironment):  # what its step returns is seen when it is made
        environment.check_copies(config.num_workers, num_envs)
        return
    transition = jax.eval_shape(environment.step, key, state, action)
    _check_transition(environment, transition, observation, num_envs)
    if environment_given:
        check_environment_resets(environment, action)


def _check_environment_options(config: A3CConfig, environment: Environment) -> None:
    name = name_of(environment)
    if config.environment not in (default_of("environment"), name):
        raise ValueError(
            f"A3CConfig.environment must be {name!r} or stay at its default beside environment={name}, got "
            f"{config.environment!r}; leave it out, or pass no environment."
        )
    bounds = getattr(environment, "action_bounds", None)
    if config.action_bounds not in (default_of("action_bounds"), bounds):
        raise ValueError(
            f"A3CConfig.action_bounds must be {bounds or default_of('action_bounds')!r} beside "
            f"environment={name}, which fits its actions itself, got {config.action_bounds!r}; leave it out, "
            "or make the environment with it."
        )


def _check_network_options(config: A3CConfig, network: Any) -> None:
    for field in _NETWORK_FIELDS:
        value, default = getattr(config, field), default_of(field)
        is_same = isinstance(network, ActorCritic) and getattr(network, field) == value
        if value != default and not is_same:
            raise ValueError(
                f"A3CConfig.{field} describes the built-in network and must stay {default!r} beside "
                f"network={type(network).__name__}, got {value!r}; leave it out, and build it into your network."
            )


def _check_num_actions(environment: Environment) -> None:
    found: Any = environment.num_actions
    several = isinstance(found, tuple) and len(found) > 0 and not environment.continuous
    for number in found if several else (found,):
        if not isinstance(number, numbers.Integral) or number < 1:
            raise ValueError(
                f"num_actions of environment {name_of(environment)!r} must be a positive integer, or a tuple of "
                f"them for several discrete actions, got {found!r} with continuous={environment.continuous}; "
                "correct it."
            )


def _check_observation(environment: Environment, observation: Any, num_envs: int) -> None:
    name = name_of(environment)
    if isinstance(environment, GymnaxEnvironment):
        key = jax.eval_shape(lambda: jax.random.key(0))
        raw, _ = jax.eval_shape(lambda key: environment.raw_reset(key, num_envs), key)
        # Two of gymnax's own environments declare another dtype than they have.
        own = type(environment.gymnax).__module__.startswith("gymnax.")
        _check_space(name, environment.observation_space, raw, num_envs, check_dtype=not own)
    declared = environment.observation_shape
    expected = jax.tree.map(lambda shape: (num_envs, *shape), declared, is_leaf=is_shape)
    found = jax.tree.map(lambda x: x.shape, observation)
    if found != expected:
        raise ValueError(
            f"observations of {num_envs} environments {name!r} must have shape [{num_envs}, ...] of "
            f"observation_shape {declared}, got {found}; correct the one or the other."
        )


def _check_space(name: str, space: Any, raw: Any, num_envs: int, check_dtype: bool) -> None:
    """Checks an observation as the environment shows it against the space that it declares."""
    parts = getattr(space, "spaces", None)
    if parts is not None:
        pairs = (
            [(part, raw[key]) for key, part in parts.items()]
            if isinstance(parts, Mapping)
            else zip(parts, raw, strict=True)
        )
        for part, piece in pairs:
            _check_space(name, part, piece, num_envs, check_dtype)
        return
    is_category = hasattr(space, "n")
    if raw.shape != (num_envs, *space.shape):
        raise ValueError(
            f"an observation of environment {name!r} must have shape {tuple(space.shape)}, as its space "
            f"{space} says, got shape {raw.shape[1:]}; correct the observation or the space."
        )
    is_integer = jnp.issubdtype(raw.dtype, jnp.integer)
    if (is_category and not is_integer) or (check_dtype and raw.dtype != jnp.dtype(space.dtype)):
        raise ValueError(
            f"an observation of environment {name!r} must have dtype {jnp.dtype(space.dtype).name}, as its "
            f"space {space} says, got dtype {raw.dtype.name}; correct the observation or the space."
        )


def _check_transition(
    environment: Environment, transition: Any, observation: Any, num_envs: int
) -> None:
    name = name_of(environment)
    for field in ("observation", "final_observation"):
        after = getattr(transition, field)
        expected, found = (
            jax.tree.map(lambda x: f"{x.dtype.name}{list(x.shape)}", tree)
            for tree in (observation, after)
        )
        if expected != found:
            raise ValueError(
                f"environment {name!r} must return observations from step as from reset, {expected}, got "
                f"{found} for {field}; make them alike."
            )
    for field, dtype in (
        ("reward", jnp.floating),
        ("terminated", jnp.bool_),
        ("truncated", jnp.bool_),
    ):
        array = getattr(transition, field)
        if array.shape != (num_envs,) or not jnp.issubdtype(array.dtype, dtype):
            expected = "float32" if field == "reward" else "bool"
            raise ValueError(
                f"environment {name!r} must return {field} as {expected}[{num_envs}] for {num_envs} "
                f"environments, got {array.dtype.name}{list(array.shape)}; return one number for each."
            )
