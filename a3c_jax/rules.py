"""What each field of `A3CConfig` must be, and what an error says if it is not."""

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
    """

    text: str
    remedy: str
    has_type: Callable[[Any], bool]
    holds: Callable[[Any], bool] = lambda value: True

    def check(self, name: str, value: Any) -> None:
        """Raises a TypeError or a ValueError if the value breaks the rule."""
        if self.has_type(value) and self.holds(value):
            return
        kind = ValueError if self.has_type(value) else TypeError
        raise kind(f"A3CConfig.{name} {self.text}, got {value!r}; {self.remedy}.")


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
        lambda x: True,
        lambda x: x in choices,
    )


def _flag(default: bool) -> Rule:
    return Rule("must be True or False", f"use {default}", lambda x: isinstance(x, bool))


_FINITE = "a finite number"
_COUNT = _integer(1)
_FRACTION = "a number in [0, 1]"
_DECAY = "a number in [0, 1)"
_WEIGHT = "a finite number >= 0"
_POSITIVE = "a finite number > 0"

RULES = {
    "environment": Rule(
        "must be a name that is not empty", "use 'CartPole-v1'", lambda x: isinstance(x, str), bool
    ),
    "algorithm": Rule(
        "must be a name that is not empty", "use 'a3c'", lambda x: isinstance(x, str), bool
    ),
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
    "optimizer": _choice(Optimizer),
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
