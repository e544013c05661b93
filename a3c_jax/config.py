"""The configuration of a run: one frozen dataclass, checked when it is made.

No JAX work happens here, so that a command line can show its help, and refuse bad input, at once.
"""

import copy
import dataclasses
import os
from typing import Any

from a3c_jax.rules import (
    RULES,
    ActionBounds,
    Activation,
    Core,
    LearningRateSchedule,
    NonFinite,
    Optimizer,
    Torso,
)


def available_cores() -> int:
    """The number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class A3CConfig:
    """Everything that defines a run. With one worker a run repeats bit for bit; with more, `replay` repeats it.

    Attributes:
      environment: Name of a gymnax environment, or CartPole-v0, which is CartPole-v1 with a limit of 200 steps.
        Parameters may follow as in a URL. An environment that your own module registers is named module:id,
        one of Gymnasium gymnasium:id, and a game of Atari ale:game.
      algorithm: What the workers do: a3c, or one of the paper's other methods, one_step_q, one_step_sarsa and
        n_step_q. Arguments may follow as in a URL. One of your own is named module:function.
      seed: Seed of every random number in the run: the initial parameters, each worker, the evaluation.
      num_workers: Number of worker threads, each with its own environments. The default is the number of cores.
      envs_per_worker: Environments that each worker plays side by side. The paper's workers play one.
      t_max: Steps that a worker plays in each of its environments between two updates. The paper's value is 5.
      max_concurrent_workers: Largest number of workers that run at the same time. Waiting workers take turns,
        first come first served. None chooses before each run: as many as there are cores or fewer if segments are short, all
        of them if the environments are on the host or segments are too large for a single kernel.
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
        dense layers, as in MinAtar's paper; atari is the paper's two convolutions followed by dense layers, for
        frames [frames, height, width] or [height, width, colours]; auto takes conv for images of 10x10, atari for
        up to 16 frames of at least 36x36, and mlp otherwise.
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
      state_dependent_scale: Let the standard deviation of a continuous policy be the softplus of a layer, instead of one
        free parameter for each dimension.
      max_steps: Stop with the first update that reaches this many environment steps of all workers together. None
        sets no limit.
      max_episodes: Stop after this many episodes of all workers together. None sets no limit.
      solved_return: Stop as soon as the mean return of the last solved_window episodes reaches this value. None
        never stops for it.
      solved_window: Number of episodes in that mean.

    Raises:
      ValueError: if a field has a value outside its range.
      TypeError: if a field has a value of the wrong type.
    """

    environment: str = "CartPole-v1"
    algorithm: str = "a3c"
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
        for name, rule in RULES.items():
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

    def with_traced(self, **numbers: Any) -> "A3CConfig":
        """The same configuration with other numbers, which may be traced by JAX and so cannot be checked.

        Args:
          **numbers: fields of `TRACEABLE` that are not None.

        Raises:
          ValueError: if there is another field among them.
        """
        for name in numbers:
            if name not in TRACEABLE or getattr(self, name) is None:
                raise ValueError(
                    f"A3CConfig.{name} must be one of {', '.join(TRACEABLE)}, and not None, to be traced; give "
                    "it to the configuration."
                )
        traced = copy.copy(self)
        for name, number in numbers.items():
            object.__setattr__(traced, name, number)
        return traced

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold."""
        return dataclasses.asdict(self)


TRACEABLE = (
    "learning_rate", "discount", "gae_lambda", "critic_cost", "entropy_cost", "reward_clip", "terminal_reward",
    "max_gradient_norm", "adam_epsilon", "momentum", "rmsprop_decay", "rmsprop_epsilon",
)  # fmt: skip
"""The fields that are numbers in the compiled program, so that a simulation can be mapped over them."""


def default_of(field: str) -> Any:
    """The default of a field of `A3CConfig`."""
    return A3CConfig.__dataclass_fields__[field].default


LOSS_FIELDS = ("critic_cost", "entropy_cost", "gae_lambda")
"""The fields that belong to A3C's loss."""

OPTIMIZER_FIELDS = (
    "optimizer", "learning_rate", "learning_rate_schedule", "adam_epsilon", "momentum", "rmsprop_decay",
    "rmsprop_epsilon", "max_gradient_norm",
)  # fmt: skip
"""The fields that describe the optimizer. The worker step does not depend on them."""

OPTIMIZERS_READING = {
    "adam_epsilon": ("adam",),
    "momentum": ("momentum",),
    "rmsprop_decay": ("rmsprop", "shared_rmsprop"),
    "rmsprop_epsilon": ("rmsprop", "shared_rmsprop"),
}
"""The built-in optimizers that read a field, for the fields that not all of them read."""

BUILT_IN_OPTIMIZER_FIELDS = tuple(name for name in OPTIMIZER_FIELDS if name != "learning_rate")
"""Those that only the built-in optimizers read. One of your own may be a function of the learning rate."""

_RUN_FIELDS = (
    "seed", "num_workers", "max_steps", "max_episodes", "solved_return", "solved_window",
    "max_concurrent_workers", "nonfinite",
)  # fmt: skip


def changes_needing_compilation(before: A3CConfig, now: A3CConfig) -> dict[str, tuple[Any, Any]]:
    """The differences between two configurations that need another compiled worker step.

    A seed, a budget, a number of workers or an optimizer can change without compiling the worker step again.

    Returns:
      The values before and now, by the field's name. It is empty if the same worker step can run both.
    """
    old, new = before.as_dict(), now.as_dict()
    free = {*_RUN_FIELDS, *OPTIMIZER_FIELDS}
    return {k: (old[k], new[k]) for k in old if old[k] != new[k] and k not in free}


def is_same_optimizer(before: A3CConfig, now: A3CConfig) -> bool:
    """Whether two configurations describe the same optimizer, so that its compiled update can run both."""
    fields = [*OPTIMIZER_FIELDS]
    if now.learning_rate_schedule == "linear":
        fields.append("max_updates")  # over which it is annealed
    if now.optimizer == "rmsprop":
        fields.append("num_workers")  # for each of which it keeps statistics
    return all(getattr(before, field) == getattr(now, field) for field in fields)
