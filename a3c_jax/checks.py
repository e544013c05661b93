"""Refuses wrong set-ups that would otherwise train without a word: when a run is built, before anything is compiled.

What can be seen from shapes is found by tracing alone (`jax.eval_shape`). Whether an environment resets itself
can only be seen by playing it: see `a3c_jax.reset_check`.
"""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a3c_jax.action_values import EpsilonGreedy
from a3c_jax.config import A3CConfig, default_of
from a3c_jax.distributions import Categorical, DiagonalGaussian, MultiCategorical
from a3c_jax.gymnax_environment import GymnaxEnvironment
from a3c_jax.host_environment import HostEnvironment
from a3c_jax.networks import ActorCritic, NetworkFunctions, network_functions
from a3c_jax.normalization import is_shape
from a3c_jax.protocol import Environment
from a3c_jax.reset_check import check_environment_resets

Array = jax.Array

_NETWORK_FIELDS = (
    "torso", "hidden_sizes", "activation", "shared_torso", "core", "core_size", "forget_bias",
    "state_dependent_scale",
)  # fmt: skip
_FEED_FORWARD_METHODS = ("init", "apply")
_RECURRENT_METHODS = ("init", "apply", "initialize_carry", "act", "value", "unroll")
_DISTRIBUTION_METHODS = ("sample", "log_prob", "entropy", "mode")


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
    num_envs = config.envs_per_worker
    key = jax.eval_shape(lambda: jax.random.key(0))
    observation, state = jax.eval_shape(lambda key: environment.reset(key, num_envs), key)
    _check_observation(environment, observation, num_envs)
    if not network_given:
        _check_torso(config, environment)
    action = _check_network(environment, network, observation, num_envs)
    if isinstance(environment, HostEnvironment):  # what its step returns is seen when it is made
        environment.check_copies(config.num_workers, num_envs)
        return
    transition = jax.eval_shape(environment.step, key, state, action)
    _check_transition(environment, transition, observation, num_envs)
    if environment_given:
        check_environment_resets(environment, action)


def _check_environment_options(config: A3CConfig, environment: Environment) -> None:
    name = _name(environment)
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
                f"num_actions of environment {_name(environment)!r} must be a positive integer, or a tuple of "
                f"them for several discrete actions, got {found!r} with continuous={environment.continuous}; "
                "correct it."
            )


def _check_methods(what: str, value: Any, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not hasattr(value, name)]
    if missing:
        raise TypeError(
            f"{what} must have {', '.join(names)}, got {type(value).__name__} without "
            f"{', '.join(missing)}; add what is missing."
        )


def _check_observation(environment: Environment, observation: Any, num_envs: int) -> None:
    name = _name(environment)
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


def _check_torso(config: A3CConfig, environment: Environment) -> None:
    """Checks that the built-in network can read the observations."""
    shape = environment.observation_shape
    sizes = [math.prod(part) for part in jax.tree.leaves(shape, is_leaf=is_shape)]
    if sum(sizes) == 0:
        raise ValueError(
            f"observation_shape of environment {_name(environment)!r} must have at least one number for the "
            f"built-in network, got {shape}; show a constant, jnp.zeros(1), if there is nothing to see."
        )
    is_image = is_shape(shape) and len(shape) == 3 and min(shape[:2]) >= 3
    if config.torso == "conv" and not is_image:
        raise ValueError(
            "A3CConfig.torso must be 'mlp' or 'auto' unless observations are images [height, width, channels] "
            f"of at least 3x3, got 'conv' for observations of shape {shape}; use 'auto'."
        )


def _check_network(
    environment: Environment, network: Any, observation: Any, num_envs: int
) -> jax.ShapeDtypeStruct:
    """Checks the network's outputs for observations of `num_envs` environments. Returns its actions' shape and dtype."""
    if hasattr(network, "initialize_carry") and not hasattr(network, "is_recurrent"):
        raise TypeError(
            "network must say by an attribute is_recurrent whether it is recurrent if it has "
            f"initialize_carry, got {type(network).__name__} without it; add is_recurrent = True."
        )
    is_recurrent = getattr(network, "is_recurrent", False)
    methods = _RECURRENT_METHODS if is_recurrent else _FEED_FORWARD_METHODS
    _check_methods("network", network, methods)
    functions = network_functions(network)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def outputs(key: Array, observation: Any) -> Array:
        return _outputs(environment, network, functions, key, observation, num_envs)

    return jax.eval_shape(outputs, key, observation)


def _outputs(
    environment: Environment,
    network: Any,
    functions: NetworkFunctions,
    key: Array,
    observation: Any,
    num_envs: int,
) -> Array:
    params = network.init(key, observation)
    carry = functions.initialize_carry(num_envs)
    distribution, _ = functions.act(params, observation, carry)
    _check_distribution(environment, distribution, num_envs)
    _check_value(functions.value(params, observation, carry), (num_envs,))
    segment = jax.tree.map(lambda x: x[None], observation)
    starts = jnp.zeros((1, num_envs), bool)
    _, value, _ = functions.unroll(params, segment, carry, starts)
    _check_value(value, (1, num_envs))
    action = distribution.sample(key)
    _check_action(environment, action, num_envs)
    return action


def _check_distribution(environment: Environment, distribution: Any, num_envs: int) -> None:
    _check_methods("the network's distribution", distribution, _DISTRIBUTION_METHODS)
    name, number = _name(environment), environment.num_actions
    kind = "continuous" if environment.continuous else "discrete"
    wrong_kinds = (Categorical, MultiCategorical) if environment.continuous else DiagonalGaussian
    if isinstance(distribution, wrong_kinds):
        raise ValueError(
            f"network must give a distribution over the {kind} actions of environment {name!r}, got "
            f"{type(distribution).__name__}; set the network's continuous to {environment.continuous}."
        )
    arrays = {
        "mean": DiagonalGaussian,
        "logits": Categorical | MultiCategorical,
        "values": EpsilonGreedy,
    }
    name_of_array = next((n for n, kind in arrays.items() if isinstance(distribution, kind)), None)
    if name_of_array is None:  # one of the user's own
        return
    array = getattr(distribution, name_of_array)
    found = getattr(distribution, "num_actions", array.shape[-1])
    expected = [num_envs, int(np.sum(number))]
    if list(array.shape) != expected:
        raise ValueError(
            f"network must give a distribution over the {number} actions of environment {name!r}, an array "
            f"{expected} for {num_envs} observations, got {list(array.shape)}; set the network's num_actions "
            f"to {number}."
        )
    if found != number:  # as many logits, but of other actions
        raise ValueError(
            f"network must give a distribution over the {number} actions of environment {name!r}, got a "
            f"{type(distribution).__name__} over {found}; set the network's num_actions to {number}."
        )


def _check_action(environment: Environment, action: Array, num_envs: int) -> None:
    """Checks what a distribution of several discrete actions draws, which may be one of the user's own."""
    if not isinstance(environment.num_actions, tuple):
        return
    expected = (num_envs, len(environment.num_actions))
    if action.shape != expected or not jnp.issubdtype(action.dtype, jnp.integer):
        raise ValueError(
            f"network must give a distribution whose actions for environment {_name(environment)!r} are "
            f"int32{list(expected)}, one column for each of the {environment.num_actions} actions, got "
            f"{action.dtype.name}{list(action.shape)}; use a3c_jax.distributions.MultiCategorical."
        )


def _check_value(value: Array, expected: tuple[int, ...]) -> None:
    if value.shape != expected:
        raise ValueError(
            f"network must give one value for each observation, an array {list(expected)} for observations "
            f"{list(expected)}, got {list(value.shape)}; squeeze the last dimension of the value's layer."
        )


def _check_transition(
    environment: Environment, transition: Any, observation: Any, num_envs: int
) -> None:
    name = _name(environment)
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


def _name(environment: Any) -> str:
    return getattr(environment, "name", type(environment).__name__)
