"""Refuses networks that do not fit their environment. It is found by tracing alone."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a3c_jax.action_values import EpsilonGreedy
from a3c_jax.config import A3CConfig
from a3c_jax.distributions import Categorical, DiagonalGaussian, MultiCategorical
from a3c_jax.networks import network_functions
from a3c_jax.normalization import is_shape
from a3c_jax.protocol import Environment, kind_of
from a3c_jax.torsos import SMALLEST_FRAME, frames_first

Array = jax.Array

_FEED_FORWARD_METHODS = ("init", "apply")
_RECURRENT_METHODS = ("init", "apply", "initialize_carry", "act", "value", "unroll")
_DISTRIBUTION_METHODS = ("sample", "log_prob", "entropy", "mode")

_KEEP_LEADING = "keep the leading dimensions of observations, and flatten only the others"


def check_torso(config: A3CConfig, environment: Environment) -> None:
    """Checks that the built-in network can read the observations."""
    shape = environment.observation_shape
    sizes = [math.prod(part) for part in jax.tree.leaves(shape, is_leaf=is_shape)]
    if sum(sizes) == 0:
        raise ValueError(
            f"observation_shape of environment {name_of(environment)!r} must have at least one number for the "
            f"built-in network, got {shape}; show a constant, jnp.zeros(1), if there is nothing to see."
        )
    is_image = is_shape(shape) and len(shape) == 3 and min(shape[:2]) >= 3
    if config.torso == "conv" and not is_image:
        raise ValueError(
            "A3CConfig.torso must be 'mlp' or 'auto' unless observations are images [height, width, channels] "
            f"of at least 3x3, got 'conv' for observations of shape {shape}; use 'auto'."
        )
    are_frames = (
        is_shape(shape) and len(shape) == 3 and min(frames_first(shape)[1:]) >= SMALLEST_FRAME
    )
    if config.torso == "atari" and not are_frames:
        raise ValueError(
            "A3CConfig.torso must be 'mlp' or 'auto' unless observations are [frames, height, width] or [height, width, "
            f"colours] of at least {SMALLEST_FRAME}x{SMALLEST_FRAME} pixels, got 'atari' for observations of shape {shape}; "
            "use 'auto'."
        )


def check_network(
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
    _check_methods(
        "network",
        network,
        methods,
        "add what is missing; docs/build-your-own.md shows how to adapt modules of flax.nnx and Equinox",
    )
    functions = network_functions(network)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def outputs(key: Array, observation: Any) -> Array:
        params = network.init(key, observation)
        carry = functions.initialize_carry(num_envs)
        distribution, _ = functions.act(params, observation, carry)
        _check_distribution(environment, network, distribution, num_envs)
        _check_value(functions.value(params, observation, carry), (num_envs,))
        segment = jax.tree.map(lambda x: x[None], observation)
        starts = jnp.zeros((1, num_envs), bool)
        try:
            _, value, _ = functions.unroll(params, segment, carry, starts)
        except Exception as error:
            error.add_note(
                f"It was raised for observations [1, {num_envs}, ...]; those of shape [{num_envs}, ...] had passed. A network "
                f"is applied to segments as well: {_KEEP_LEADING}."
            )
            raise
        _check_value(value, (1, num_envs))
        action = distribution.sample(key)
        _check_action(environment, action, num_envs)
        return action

    return jax.eval_shape(outputs, key, observation)


def _check_distribution(
    environment: Environment, network: Any, distribution: Any, num_envs: int
) -> None:
    remedy = "add what is missing"
    if isinstance(distribution, Array):
        remedy = "return first a distribution, such as a3c_jax.distributions.Categorical(logits), and then the values"
    _check_methods("the network's distribution", distribution, _DISTRIBUTION_METHODS, remedy)
    name, number = name_of(environment), environment.num_actions
    kind = "continuous" if environment.continuous else "discrete"
    wrong_kinds = (Categorical, MultiCategorical) if environment.continuous else DiagonalGaussian
    if isinstance(distribution, wrong_kinds):
        remedy = _remedy(
            network, "continuous", environment.continuous, f"return one over {kind} actions"
        )
        raise ValueError(
            f"network must give a distribution over the {kind} actions of environment {name!r}, got "
            f"{type(distribution).__name__}; {remedy}."
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
        has_leading = array.shape[:-1] == (num_envs,)
        last_layer = f"let its last layer have {expected[-1]} outputs"
        remedy = (
            _remedy(network, "num_actions", number, last_layer) if has_leading else _KEEP_LEADING
        )
        raise ValueError(
            f"network must give a distribution over the {number} actions of environment {name!r}, an array "
            f"{expected} for {num_envs} observations, got {list(array.shape)}; {remedy}."
        )
    if found != number:  # as many logits, but of other actions
        remedy = _remedy(network, "num_actions", number, f"make it over {number}")
        raise ValueError(
            f"network must give a distribution over the {number} actions of environment {name!r}, got a "
            f"{type(distribution).__name__} over {found}; {remedy}."
        )


def _remedy(network: Any, attribute: str, value: Any, otherwise: str) -> str:
    """What to do about a network with other actions: set the attribute if it has it, as the built-in ones have."""
    return f"set the network's {attribute} to {value}" if hasattr(network, attribute) else otherwise


def _check_action(environment: Environment, action: Array, num_envs: int) -> None:
    """Checks what a distribution of several discrete actions draws, which may be one of the user's own."""
    if not isinstance(environment.num_actions, tuple):
        return
    expected = (num_envs, len(environment.num_actions))
    if action.shape != expected or not jnp.issubdtype(action.dtype, jnp.integer):
        raise ValueError(
            f"network must give a distribution whose actions for environment {name_of(environment)!r} are "
            f"int32{list(expected)}, one column for each of the {environment.num_actions} actions, got "
            f"{action.dtype.name}{list(action.shape)}; use a3c_jax.distributions.MultiCategorical."
        )


def _check_value(value: Array, expected: tuple[int, ...]) -> None:
    if value.shape != expected:
        remedy = "squeeze the last dimension of the value's layer"
        raise ValueError(
            f"network must give one value for each observation, an array {list(expected)} for observations "
            f"{list(expected)}, got {list(value.shape)}; {remedy if value.shape[:-1] == expected else _KEEP_LEADING}."
        )


def _check_methods(what: str, value: Any, names: tuple[str, ...], remedy: str) -> None:
    missing = [name for name in names if not hasattr(value, name)]
    if missing:
        raise TypeError(
            f"{what} must have {', '.join(names)}, got {kind_of(value)} without {', '.join(missing)}; {remedy}."
        )


def name_of(environment: Any) -> str:
    """What error messages call an environment."""
    return getattr(environment, "name", type(environment).__name__)
