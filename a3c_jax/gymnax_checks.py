"""Refuses environments of your own in gymnax's form that cannot be played as they are. It is found by tracing alone."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
from gymnax.environments.environment import EnvParams

from a3c_jax import spaces
from a3c_jax.gymnax_environment import GymnaxBase, GymnaxEnvironment, resets_in_gymnax
from a3c_jax.protocol import checked_values

_RETURNS = {
    "reset": ("observation", "state"),
    "reset_env": ("observation", "state"),
    "step": ("observation", "state", "reward", "terminated", "truncated", "info"),
    "step_env": ("observation", "state", "reward", "terminated", "info"),
}


def check_gymnax(environment: GymnaxEnvironment) -> None:
    """Checks the time limit of an environment of your own, and what its methods return. gymnax's own are left alone.

    Raises:
      ValueError: if nobody has chosen the limit, or if values are missing or, as far as one can see, in another order.
    """
    own = environment.gymnax
    while not isinstance(own, GymnaxBase) and hasattr(own, "_env"):
        own = own._env  # what a wrapper of gymnax wraps
    if type(own).__module__.startswith("gymnax."):
        return
    _check_limit(environment.name, own, environment.params)

    def call(method: str, *arguments: Any) -> Any:
        name = f"{method}_env" if environment.resets_in_gymnax else method
        function = getattr(environment.gymnax, name)
        values = jax.eval_shape(lambda *given: function(*given, environment.params), *arguments)
        space = environment.observation_space
        are_in_order = functools.partial(_are_in_order, space)
        return checked_values(environment.name, name, _RETURNS[name], values, are_in_order)

    def action(key: Any) -> Any:
        drawn = environment.own_action(environment.random_action(key, 1))
        return jax.tree.map(lambda x: x[0], drawn)

    key = jax.eval_shape(lambda: jax.random.key(0))
    _, state = call("reset", key)
    call("step", key, state, jax.eval_shape(action, key))


def _check_limit(name: str, own: Any, params: Any) -> None:
    """Refuses params that do not say where gymnax's base class should cut an episode.

    A class without `default_params` inherits gymnax's, which cut every episode after one step. Parameters of one's own that
    are built on gymnax's inherit its limit.
    """
    kind = type(own)
    is_cut = resets_in_gymnax(own) and kind.is_truncated is GymnaxBase.is_truncated
    is_gymnax_own = _has_gymnax_limit(kind, params)
    if is_cut and (is_gymnax_own or not hasattr(params, "max_steps_in_episode")):
        raise ValueError(
            f"environment {name!r} must have default_params of its own, which say after how many steps an episode is cut, "
            f"got {params}{' from gymnax, which cuts each after one step' if is_gymnax_own else ''}; write default_params = "
            "EnvParams(max_steps_in_episode=500) into its class, or another number."
        )


def _has_gymnax_limit(kind: type, params: Any) -> bool:
    if getattr(kind, "default_params", None) is GymnaxBase.default_params:
        return params == EnvParams()
    named_by = (
        c for c in type(params).__mro__ if "max_steps_in_episode" in inspect.get_annotations(c)
    )
    is_inherited = type(params) is not EnvParams and next(named_by, None) is EnvParams
    return is_inherited and params.max_steps_in_episode == EnvParams().max_steps_in_episode


def _are_in_order(space: Any, observation: Any, _: Any, *rest: Any) -> bool:
    if not spaces.is_like(space, observation):
        return False
    if not rest:  # of a reset
        return True
    reward, *flags, info = rest
    if not all(hasattr(x, "dtype") for x in (reward, *flags)):
        return False
    resets_itself = len(flags) == 2
    if resets_itself and not isinstance(info, Mapping):
        return False
    # Such a step may also return flags that are numbers, unless they have changed places with the reward.
    return (resets_itself and reward.dtype != bool) or all(flag.dtype == bool for flag in flags)
