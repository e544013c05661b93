"""The configuration of a run: one frozen dataclass, checked when it is made.

No JAX work happens here, so that a command line can show its help, and refuse bad input, at once.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

Optimizer = Literal["adam", "momentum", "shared_rmsprop", "rmsprop"]
LearningRateSchedule = Literal["constant", "linear"]
NonFinite = Literal["stop", "skip"]
Torso = Literal["auto", "mlp", "conv"]
Core = Literal["lstm", "gru"]
ActionBounds = Literal["clip", "tanh"]
Activation = Literal["relu", "tanh", "elu", "silu", "gelu"]


def available_cores() -> int:
    """The number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class A3CConfig:
    """Everything that defines a run. Two runs with one worker and equal configurations are equal bit for bit.

    Attributes:
      environment: Name of a gymnax environment, or CartPole-v0, which is CartPole-v1 with a limit of 200 steps.
        Parameters may follow as in a URL. An environment that your own module registers is named module:id.
      seed: Seed of every random number in the run: the initial parameters, each worker, the evaluation.
      num_workers: Number of worker threads, each with its own environments. The default is the number of cores.
      envs_per_worker: Environments that each worker plays side by side. The paper's workers play one.
      t_max: Steps that a worker plays in each of its environments between two updates. The paper's value is 5.
      max_concurrent_workers: Largest number of workers that run at the same time. Waiting workers take turns,
        first come first served. None lets the program choose when it is compiled.
      discount: Discount factor gamma, per step.
      gae_lambda: Lambda of generalised advantage estimation, in [0, 1]. At 1 it is A3C's n-step return.
      critic_cost: Weight of the critic's loss, which is half the mean squared error.
      entropy_cost: Weight of the entropy bonus, which rewards exploration; the paper's beta.
      normalize_observations: Subtract the observations' running mean and divide by their running standard
        deviation, both taken over all workers, before the network sees them.
      normalize_rewards: Divide rewards by the running standard deviation of the discounted return, for
        learning only.
      reward_clip: Clip rewards to [-reward_clip, reward_clip], for learning only; the paper's value for Atari
        is 1. None never clips. Reported returns are always the environment's own.
      terminal_reward: Replace the reward of a step that terminates an episode, for learning only; the article's
        value is -1. None keeps the environment's reward. Reaching a time limit is no termination.
      optimizer: Adam; SGD with momentum; RMSProp with statistics that all workers share, which is the paper's
        choice; or RMSProp with statistics for each worker.
      learning_rate: Step size of the optimizer, or its initial value if the schedule is linear.
      learning_rate_schedule: Keep the learning rate constant, or anneal it linearly to zero over max_steps, as
        in the paper.
      adam_epsilon: Adam's epsilon, outside the square root.
      momentum: Decay of the velocity of SGD with momentum.
      rmsprop_decay: Decay of RMSProp's running mean of squared gradients; the paper's alpha.
      rmsprop_epsilon: RMSProp's epsilon, inside the square root. The paper's authors reported 0.1 for Atari.
      max_gradient_norm: Scale gradients of a larger global norm down to this norm. None never scales.
      nonfinite: What to do if an update contains a NaN or an infinity: stop with an error, or skip the update
        and count it. It never reaches the parameters.
      torso: First part of the network: mlp flattens the observation; conv is one 3x3 convolution followed by
        dense layers, as in MinAtar's paper; auto takes conv for images of 10x10 and mlp otherwise.
      hidden_sizes: Width of each dense hidden layer.
      activation: Non-linearity of the hidden layers. The article and the paper use relu.
      shared_torso: Let actor and critic share the hidden layers, as in the paper, instead of having separate
        ones, as in the article.
      core: Recurrent core between torso and heads, for tasks that need memory: lstm, as in the paper, or gru.
        None is a feed-forward network.
      core_size: Width of the recurrent core. The paper's value is 256.
      forget_bias: Initial bias of the forget gate. Larger values make a new core remember longer.
      action_bounds: How continuous actions are fitted into the environment's bounds: clipped, or squashed by
        tanh. The log-probability is that of the number before.
      state_dependent_scale: Let the standard deviation of a continuous policy be the softplus of a layer, as in
        the paper, instead of one free parameter for each dimension.
      max_steps: Stop after this many environment steps of all workers together. None sets no limit.
      max_episodes: Stop after this many episodes of all workers together. None sets no limit.
      solved_return: Stop as soon as the mean return of the last solved_window episodes reaches this value. None
        never stops for it.
      solved_window: Number of episodes in that mean.

    Raises:
      ValueError: if a field has a value outside its range.
      TypeError: if a field has a value of the wrong type.
    """

    environment: str = "CartPole-v1"
    seed: int = 0
    num_workers: int = dataclasses.field(default_factory=available_cores)
    envs_per_worker: int = 8
    t_max: int = 16
    max_concurrent_workers: int | None = None

    discount: float = 0.99
    gae_lambda: float = 1.0
    critic_cost: float = 0.5
    entropy_cost: float = 0.01
    normalize_observations: bool = False
    normalize_rewards: bool = False
    reward_clip: float | None = None
    terminal_reward: float | None = None

    optimizer: Optimizer = "adam"
    learning_rate: float = 2e-3
    learning_rate_schedule: LearningRateSchedule = "constant"
    adam_epsilon: float = 1e-5
    momentum: float = 0.9
    rmsprop_decay: float = 0.99
    rmsprop_epsilon: float = 1e-5
    max_gradient_norm: float | None = 0.5
    nonfinite: NonFinite = "stop"

    torso: Torso = "auto"
    hidden_sizes: tuple[int, ...] = (128,)
    activation: Activation = "tanh"
    shared_torso: bool = False
    core: Core | None = None
    core_size: int = 256
    forget_bias: float = 1.0
    action_bounds: ActionBounds = "clip"
    state_dependent_scale: bool = True

    max_steps: int | None = 2_000_000
    max_episodes: int | None = None
    solved_return: float | None = None
    solved_window: int = 100

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            rule.check(name, getattr(self, name))
        object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))
        if self.max_steps is None and self.max_episodes is None and self.solved_return is None:
            raise ValueError(
                "A3CConfig.max_steps, max_episodes and solved_return are all None, so that the run "
                "would never end; set at least one."
            )
        if self.learning_rate_schedule == "linear" and self.max_steps is None:
            raise ValueError(
                "A3CConfig.learning_rate_schedule 'linear' anneals to zero over max_steps, got "
                "max_steps None; set max_steps, or use 'constant'."
            )

    @property
    def steps_per_update(self) -> int:
        """Environment steps in one segment: what one update learns from."""
        return self.t_max * self.envs_per_worker

    @property
    def max_updates(self) -> int | None:
        """The smallest number of updates that play at least `max_steps`; None without that limit."""
        return None if self.max_steps is None else -(-self.max_steps // self.steps_per_update)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold."""
        return dataclasses.asdict(self)


def default_of(field: str) -> Any:
    """The default of a field of `A3CConfig`."""
    return A3CConfig.__dataclass_fields__[field].default


def changes_needing_compilation(before: A3CConfig, now: A3CConfig) -> dict[str, tuple[Any, Any]]:
    """The differences between two configurations that need another compiled program.

    A seed, a budget or a number of workers can change without compiling anything again, as long as neither the
    learning rate's schedule nor the optimizer's state depends on it.

    Returns:
      The values before and now, by the field's name. It is empty if the same program can run both.
    """
    run_only = {
        "seed", "max_episodes", "solved_return", "solved_window", "max_concurrent_workers", "nonfinite",
    }  # fmt: skip
    if before.learning_rate_schedule == "constant":  # a linear one is annealed over max_steps
        run_only.add("max_steps")
    if before.optimizer != "rmsprop":  # which keeps statistics for each worker
        run_only.add("num_workers")
    old, new = before.as_dict(), now.as_dict()
    return {k: (old[k], new[k]) for k in old if old[k] != new[k] and k not in run_only}


class _Rule(NamedTuple):
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


def _optional(rule: _Rule) -> _Rule:
    return rule._replace(
        has_type=lambda x: x is None or rule.has_type(x), holds=lambda x: x is None or rule.holds(x)
    )


def _integer(minimum: int, maximum: float = float("inf")) -> _Rule:
    bound = f" and < {maximum + 1}" if maximum < float("inf") else ""
    return _Rule(
        f"must be an integer >= {minimum}{bound}",
        f"use {minimum} or more" if not bound else "use a number in that range",
        lambda x: type(x) is int,
        lambda x: minimum <= x <= maximum,
    )


def _number(text: str, remedy: str, holds: Callable[[float], bool] = lambda x: True) -> _Rule:
    return _Rule(
        f"must be {text}",
        f"use {remedy}",
        lambda x: isinstance(x, int | float) and not isinstance(x, bool),
        # Of an integer, too, that no float can hold; a NaN fails every comparison.
        lambda x: abs(x) <= sys.float_info.max and holds(x),
    )


def _choice(options: Any) -> _Rule:
    choices = get_args(options)
    return _Rule(
        f"must be one of {', '.join(map(str, choices))}",
        f"use {choices[0]!r}",
        lambda x: True,
        lambda x: x in choices,
    )


def _flag(default: bool) -> _Rule:
    return _Rule("must be True or False", f"use {default}", lambda x: isinstance(x, bool))


_FINITE = "a finite number"
_COUNT = _integer(1)
_FRACTION = "a number in [0, 1]"
_DECAY = "a number in [0, 1)"
_WEIGHT = "a finite number >= 0"
_POSITIVE = "a finite number > 0"

_RULES = {
    "environment": _Rule(
        "must be a name that is not empty", "use 'CartPole-v1'", lambda x: isinstance(x, str), bool
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
    "hidden_sizes": _Rule(
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
