"""Environments by name, and objects with gymnax's or Gymnasium's interface, in one small batched protocol."""

import difflib
import numbers
from typing import Any

import jax
import numpy as np

from a3c_jax.gymnasium_environments import make_host_environment
from a3c_jax.gymnax_environment import GymnaxEnvironment
from a3c_jax.host_environment import HostEnvironment, check_option
from a3c_jax.names import import_named, parse_name
from a3c_jax.protocol import Environment, Transition

import gymnax  # isort: skip  (the module above sets up the process first)

__all__ = ["Environment", "GymnaxEnvironment", "HostEnvironment", "Transition", "adapt", "make"]

_VARIANTS = {"CartPole-v0": ("CartPole-v1", {"max_steps_in_episode": 200})}

_NUMBERS = (numbers.Number, np.generic, np.ndarray, jax.Array)
_PROTOCOL = ("num_actions", "continuous", "observation_shape", "reset", "step")
_INTERFACE = ("reset", "step", "observation_space", "action_space")


def adapt(environment: Any, action_bounds: str = "clip") -> Environment:
    """Turns an object into an `Environment`. One that is an `Environment` already is returned as it is.

    Args:
      environment: an object with gymnax's interface; a `gymnasium.vector.VectorEnv`, or a function `make(num_envs)`
        that makes one (`HostEnvironment`).
      action_bounds: how continuous actions are fitted into their bounds, `clip` or `tanh`.

    Raises:
      TypeError: if the object lacks a part of both interfaces.
      ValueError: if its spaces are not supported.
    """
    kind = type(environment).__name__
    if isinstance(environment, str):
        raise TypeError(
            f"environment must be an object, got the name {environment!r}; name it in A3CConfig(environment=...), or make "
            "it with a3c_jax.environments.make."
        )
    if isinstance(environment, type) and hasattr(environment, "reset"):
        raise TypeError(
            f"environment must be an object, got the class {environment.__name__}; make an object of it, or give a "
            "function that makes a gymnasium.vector.VectorEnv of so many."
        )
    if isinstance(environment, HostEnvironment):
        return environment  # type: ignore[return-value]
    makes_one = callable(environment) and not hasattr(environment, "reset")
    if makes_one or hasattr(environment, "single_observation_space"):
        name = getattr(environment, "__name__", kind)
        return HostEnvironment(name, environment, action_bounds=action_bounds)  # type: ignore[return-value]
    if hasattr(environment, "observation_shape"):
        missing = [name for name in _PROTOCOL if not hasattr(environment, name)]
        if missing:
            raise TypeError(
                f"environment must have {', '.join(_PROTOCOL)}, got {kind} without {', '.join(missing)}; "
                "add what is missing."
            )
        return environment
    missing = [name for name in _INTERFACE if not hasattr(environment, name)]
    if missing:
        raise TypeError(
            f"environment must have gymnax's interface, got {kind} without {', '.join(missing)}; "
            "README.md has an example."
        )
    not_methods = [name for name in _INTERFACE if not callable(getattr(environment, name))]
    if not_methods:
        raise TypeError(
            f"environment must have gymnax's interface or be a gymnasium.vector.VectorEnv, got {kind}, whose "
            f"{not_methods[0]} is no method, as in Gymnasium's single environments; give a function that makes a "
            "vector of them, such as lambda num_envs: gymnasium.make_vec('CartPole-v1', num_envs)."
        )
    params = getattr(environment, "default_params", None)
    return GymnaxEnvironment(getattr(environment, "name", kind), environment, params, action_bounds)


def make(name: str, *, action_bounds: str = "clip", **params: Any) -> Any:
    """Makes an environment from its name.

    >>> make("MemoryChain-bsuite?memory_length=10&num_bits=3").observation_shape
    (5,)

    Args:
      name: the id of a registered gymnax environment, or `CartPole-v0`. `gymnax.register` adds one's own;
        `module:id` imports the module first, which registers it. Parameters may follow as in a URL: fields
        of its gymnax `EnvParams`, such as `max_steps_in_episode`, or arguments of its constructor. With
        `sticky_action_prob`, each step repeats the action before it with this probability, as the original MinAtar does
        with 0.1. Names that begin with `gymnasium:` or `ale:` are those of `a3c_jax.gymnasium_environments`.
      action_bounds: how continuous actions are fitted into their bounds, `clip` or `tanh`.
      **params: more of these parameters.

    Returns:
      The environment, a `GymnaxEnvironment` or a `HostEnvironment`, for any number of copies side by side.

    Raises:
      ValueError: if no such environment is registered (the message names the nearest), if it has no such
        parameter or the value is of another kind, or if its spaces are not supported.
    """
    if str(name).startswith(("gymnasium:", "ale:")):
        return make_host_environment(name, action_bounds, **params)
    module, base, named = parse_name(
        "environment", name, "MemoryChain-bsuite?memory_length=10&num_bits=3"
    )
    params = named | params
    stickiness = params.pop("sticky_action_prob", None)
    if module:
        import_named("environment", name, module)
    base, variant = _VARIANTS.get(base, (base, {}))
    if base not in gymnax.registered_envs:
        raise ValueError(
            f"environment must be a registered gymnax environment, got {name!r}; {_near(base)}"
        )
    defaults = gymnax.make(base)[1]
    fields = set(getattr(defaults, "__dataclass_fields__", ()))
    options = {k: v for k, v in params.items() if k not in fields}
    try:
        environment, defaults = gymnax.make(base, **options)
    except TypeError as error:
        raise ValueError(
            f"environment {name!r} has the parameters {', '.join(sorted(fields))}, got "
            f"{', '.join(options)}; use one of those, or an argument of its constructor ({error})."
        ) from error
    changed = variant | {k: v for k, v in params.items() if k in fields}
    for key, value in changed.items():
        default = getattr(defaults, key)
        if isinstance(default, int | float):
            _check_number(str(name), key, value)
        if type(value) is int and isinstance(default, float):
            changed[key] = float(value)  # some of gymnax's arithmetic takes no integer there
    if changed:
        defaults = defaults.replace(**changed)
    if stickiness is not None:
        environment = _sticky(environment, stickiness)
    return GymnaxEnvironment(str(name), environment, defaults, action_bounds)


def _check_number(name: str, key: str, value: Any) -> None:
    """Refuses a parameter that is no number where its default is one."""
    is_number = isinstance(value, _NUMBERS)
    if key == "max_steps_in_episode":
        is_right = is_number and value >= 1 and value % 1 == 0
        check_option(name, key, value, is_right, "a positive integer")
    else:
        check_option(name, key, value, is_number, "a number")


def _sticky(environment: Any, probability: Any) -> Any:
    """The environment, in which each step repeats the action before it with this probability."""
    from gymnax.wrappers.purerl import StickyActionWrapper

    try:
        return StickyActionWrapper(environment, probability)
    except ValueError as error:
        raise ValueError(
            "sticky_action_prob must lie in [0, 1], and needs an environment with one discrete action, got "
            f"{probability!r} for {environment.name} ({error}); give 0.1, or leave it out."
        ) from error


def _near(name: str) -> str:
    known = {k.lower(): k for k in [*gymnax.registered_envs, *_VARIANTS]}
    near = [known[k] for k in difflib.get_close_matches(name.lower(), known, cutoff=0.5)]
    found = (
        f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known.values())}."
    )
    return f"{found} Gymnasium's are named gymnasium:id, and Atari's games ale:game."
