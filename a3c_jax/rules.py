"""What each field of `A3CConfig` must be, and what an error says if it is not."""

import numbers
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

Optimizer = Literal["adam", "momentum", "shared_rmsprop", "rmsprop"]
LearningRateSchedule = Literal["constant", "linear"]
NonFinite = Literal["stop", "skip"]
Torso = Literal["auto", "mlp", "conv", "atari"]
Core = Literal["lstm", "gru"]
ActionBounds = Literal["clip", "tanh"]
Activation = Literal["relu", "tanh", "elu", "silu", "gelu"]


class Rule(NamedTuple):
    """What a field must be.

    Attributes:
      text: the rule, as in 'must be > 0'.
      remedy: what to write instead, as in 'use 2e-3'.
      has_type: whether a value has the right type.
      holds: whether a value of that type is in range.
      remedy_for_type: what to do about a value of another type, if that is something else.
    """

    text: str
    remedy: str
    has_type: Callable[[Any], bool]
    holds: Callable[[Any], bool] = lambda value: True
    remedy_for_type: str = ""

    def check(self, name: str, value: Any) -> None:
        """Raises a TypeError or a ValueError if the value breaks the rule."""
        has_type = self.has_type(value)
        if has_type and self.holds(value):
            return
        remedy = self.remedy if has_type else self.remedy_for_type or self.remedy
        integer = _as_integer(value)
        if integer is not None and self.has_type(integer) and self.holds(integer):
            remedy = f"use {integer:_}"
        kind = ValueError if has_type else TypeError
        raise kind(f"A3CConfig.{name} {self.text}, got {value!r}; {remedy}.")


def check_int(name: str, value: Any, minimum: int) -> int:
    """The value as an integer.

    Raises:
      TypeError: if it is no integer.
      ValueError: if it is smaller than the minimum.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        remedy = max(minimum, _as_integer(value) or minimum)
        raise TypeError(f"{name} must be an integer >= {minimum}, got {value!r}; use {remedy:_}.")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}; use {minimum} or more.")
    return int(value)


def _as_integer(value: Any) -> int | None:
    """The integer that a float such as 1e6 stands for, if it is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else None


def _optional(rule: Rule) -> Rule:
    return rule._replace(
        has_type=lambda x: x is None or rule.has_type(x), holds=lambda x: x is None or rule.holds(x)
    )


def _integer(minimum: int, maximum: float = float("inf")) -> Rule:
    bound = f" and < {maximum + 1}" if maximum < float("inf") else ""
    return Rule(
        f"must be an integer >= {minimum}{bound}",
        f"use {minimum} or more" if not bound else "use a number in that range",
        lambda x: type(x) is int,
        lambda x: minimum <= x <= maximum,
    )


def _number(text: str, remedy: str, holds: Callable[[float], bool] = lambda x: True) -> Rule:
    return Rule(
        f"must be {text}",
        f"use {remedy}",
        lambda x: isinstance(x, int | float) and not isinstance(x, bool),
        # Of an integer, too, that no float can hold; a NaN fails every comparison.
        lambda x: abs(x) <= sys.float_info.max and holds(x),
    )


def _choice(options: Any) -> Rule:
    choices = get_args(options)
    return Rule(
        f"must be one of {', '.join(map(str, choices))}",
        f"use {choices[0]!r}",
        lambda x: isinstance(x, str),
        lambda x: x in choices,
    )


def _flag(default: bool) -> Rule:
    return Rule("must be True or False", f"use {default}", lambda x: isinstance(x, bool))


def _name(default: str) -> Rule:
    return Rule(
        "must be a name that is not empty", f"use {default!r}", lambda x: isinstance(x, str), bool
    )


def _or_object(rule: Rule, argument: str) -> Rule:
    """The rule of a name, in place of which `train` takes an object as an argument."""
    return rule._replace(
        remedy_for_type=f"use a name, or pass the object to train(..., {argument}=...)"
    )


_FINITE = "a finite number"
_COUNT = _integer(1)
_FRACTION = "a number in [0, 1]"
_DECAY = "a number in [0, 1)"
_WEIGHT = "a finite number >= 0"
_POSITIVE = "a finite number > 0"

RULES = {
    "environment": _or_object(_name("CartPole-v1"), "environment"),
    "algorithm": _or_object(_name("a3c"), "algorithm"),
    "seed": _integer(0, 2**32 - 1),
    "num_workers": _COUNT,
    "envs_per_worker": _COUNT,
    "t_max": _COUNT,
    "max_concurrent_workers": _optional(_COUNT),
    "discount": _number(_FRACTION, "0.99", lambda x: 0 <= x <= 1),
    "gae_lambda": _number(_FRACTION, "1.0", lambda x: 0 <= x <= 1),
    "critic_cost": _number(_WEIGHT, "0.5, or 0 for none", lambda x: x >= 0),
    "entropy_cost": _number(_WEIGHT, "0.01, or 0 for none", lambda x: x >= 0),
    "normalize_observations": _flag(False),
    "normalize_rewards": _flag(False),
    "reward_clip": _optional(_number(_POSITIVE, "None for no limit", lambda x: x > 0)),
    "terminal_reward": _optional(_number(_FINITE, "None for the environment's own")),
    "optimizer": _or_object(_choice(Optimizer), "optimizer"),
    "learning_rate": _number(_POSITIVE, "2e-3", lambda x: x > 0),
    "learning_rate_schedule": _choice(LearningRateSchedule),
    "adam_epsilon": _number(_POSITIVE, "1e-5", lambda x: x > 0),
    "momentum": _number(_DECAY, "0.9", lambda x: 0 <= x < 1),
    "rmsprop_decay": _number(_DECAY, "0.99", lambda x: 0 <= x < 1),
    "rmsprop_epsilon": _number(_POSITIVE, "1e-5", lambda x: x > 0),
    "max_gradient_norm": _optional(_number(_POSITIVE, "None for no limit", lambda x: x > 0)),
    "nonfinite": _choice(NonFinite),
    "torso": _choice(Torso),
    "hidden_sizes": Rule(
        "must be a tuple of positive integers",
        "use (128,)",
        lambda x: isinstance(x, tuple | list) and all(type(n) is int for n in x),
        lambda x: all(n > 0 for n in x),
    ),
    "activation": _choice(Activation),
    "shared_torso": _flag(False),
    "core": _optional(_choice(Core)),
    "core_size": _COUNT,
    "forget_bias": _number(_FINITE, "1.0"),
    "action_bounds": _choice(ActionBounds),
    "state_dependent_scale": _flag(True),
    "max_steps": _optional(_COUNT),
    "max_episodes": _optional(_COUNT),
    "solved_return": _optional(_number(_FINITE, "None never to stop for it")),
    "solved_window": _COUNT,
}
