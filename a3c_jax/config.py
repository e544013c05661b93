"""The configuration of a run: one frozen dataclass, checked when it is made.

No JAX work happens here, so that a command line can show its help, and refuse bad input, at once.
"""

import dataclasses
import os
import sys
from typing import Any, Literal, get_args

Optimizer = Literal["adam", "momentum", "shared_rmsprop", "rmsprop"]
Schedule = Literal["constant", "linear"]
NonFinite = Literal["stop", "skip"]
Torso = Literal["auto", "mlp", "conv"]
Core = Literal["lstm", "gru"]
ActionBounds = Literal["clip", "tanh"]
Activation = Literal["relu", "tanh", "elu", "silu", "gelu"]


def available_cores() -> int:
    """The number of cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class A3CConfig:
    """Everything that defines a run. Two runs with one worker and equal configurations are equal bit for bit.

    Raises:
      ValueError: where a value breaks its rule.
      TypeError: where a value has the wrong type.
    """

    environment: str = "CartPole-v1"
    """Name of a gymnax environment, or `CartPole-v0` (CartPole-v1 with a limit of 200 steps)."""
    seed: int = 0
    """Seed of every random number of the run: the initial parameters, each worker, the evaluation."""
    num_workers: int = dataclasses.field(default_factory=available_cores)
    """Worker threads, each with its own environments; by default the number of cores."""
    envs_per_worker: int = 8
    """Environments that each worker plays side by side: 1 is the paper's actor-learner, more is the batched form."""
    t_max: int = 16
    """Steps that a worker plays in each of its environments between two updates; the paper's is 5."""
    max_concurrent_workers: int | None = None
    """How many workers may play at the same time; the others wait for a turn of 20 ms. None sets no limit where XLA's thread pool computes the segments; where they are so small that each is computed in its worker's thread, as many as there are cores, or fewer where they take less than 80 us for each, but 2 at least."""

    discount: float = 0.99
    """The discount factor gamma, per step."""
    gae_lambda: float = 1.0
    """Lambda of generalised advantage estimation, in [0, 1]; 1 is A3C's n-step return."""
    critic_cost: float = 0.5
    """Weight of the critic's loss, which is half the mean squared error."""
    entropy_cost: float = 0.01
    """Weight of the entropy bonus, the paper's beta."""
    normalize_observations: bool = False
    """Show the network observations less their running mean and over their running standard deviation, of all workers together."""
    normalize_rewards: bool = False
    """Divide rewards by the running standard deviation of the discounted return, for learning only."""
    reward_clip: float | None = None
    """If given, rewards are clipped to [-reward_clip, reward_clip] for learning; 1 in the paper. Reported returns are the environment's own."""
    terminal_reward: float | None = None
    """If given, replaces the reward of a step that terminates an episode (-1 in the article), for learning only: reported returns never contain it, and a time limit is no termination."""

    optimizer: Optimizer = "adam"
    """Adam; momentum SGD; RMSProp with statistics shared by all workers (the paper's choice); or RMSProp with statistics for each worker."""
    learning_rate: float = 2e-3
    """The optimizer's step size, or its initial value where the schedule is linear."""
    learning_rate_schedule: Schedule = "constant"
    """Constant, or annealed linearly to zero over max_steps, as in the paper."""
    adam_epsilon: float = 1e-5
    """Adam's epsilon, outside the square root."""
    momentum: float = 0.9
    """Momentum SGD's decay of the velocity."""
    rmsprop_decay: float = 0.99
    """RMSProp's decay of the squared gradients; the paper's alpha."""
    rmsprop_epsilon: float = 1e-5
    """RMSProp's epsilon, inside the square root; the paper's authors reported 0.1 for Atari."""
    max_gradient_norm: float | None = 0.5
    """Gradients of a larger global norm are scaled down to it; None never scales."""

    nonfinite: NonFinite = "stop"
    """What to do when an update holds a NaN or an infinity: stop with an error, or skip it and count it. It never reaches the parameters."""

    torso: Torso = "auto"
    """What comes first in the network: an mlp over the flattened observation, or one 3x3 convolution and then dense layers (MinAtar's network); auto takes conv for images of 10x10 and mlp otherwise."""
    hidden_sizes: tuple[int, ...] = (128,)
    """Width of each dense hidden layer."""
    activation: Activation = "tanh"
    """The hidden layers' non-linearity; the article's and the paper's is relu."""
    shared_torso: bool = False
    """Actor and critic share the hidden layers (the paper) instead of each having their own (the article)."""

    core: Core | None = None
    """A recurrent core between torso and heads, for tasks that need memory: lstm (the paper's) or gru; None is feed-forward."""
    core_size: int = 256
    """Width of the recurrent core; 256 in the paper."""
    forget_bias: float = 1.0
    """Where the bias of the gate starts that keeps what the core remembers (the LSTM's forget gate, the GRU's update gate): for longer memories, more; 0 keeps half at every step."""
    action_bounds: ActionBounds = "clip"
    """How a continuous action fits the environment's bounds: clipped, or squashed by tanh. Its log-probability is that of the number before."""
    state_dependent_scale: bool = True
    """A continuous policy's standard deviation is the softplus of a layer (the paper) instead of one free parameter for each dimension."""

    max_steps: int | None = 2_000_000
    """Budget in environment steps, all workers together; None sets no limit."""
    max_episodes: int | None = None
    """Budget in episodes, all workers together; None sets no limit."""
    solved_return: float | None = None
    """Stop as soon as the mean return of the last solved_window episodes reaches this; None never stops for it."""
    solved_window: int = 100
    """Number of episodes in the running mean."""

    def __post_init__(self) -> None:
        for name, minimum in (
            ("seed", 0),
            ("num_workers", 1),
            ("envs_per_worker", 1),
            ("t_max", 1),
            ("core_size", 1),
            ("solved_window", 1),
        ):
            self._check_int(name, minimum)
        for name in ("max_steps", "max_episodes", "max_concurrent_workers"):
            if getattr(self, name) is not None:
                self._check_int(name, 1)
        if self.seed >= 2**32:
            self._fail("seed", "must be < 2**32", "use a smaller seed")

        for name, default in (("discount", 0.99), ("gae_lambda", 1.0)):
            self._check_float(name, lambda x: 0 <= x <= 1, "must lie in [0, 1]", f"use {default}")
        for name, default in (("critic_cost", 0.5), ("entropy_cost", 0.01)):
            self._check_float(
                name, lambda x: x >= 0, "must be >= 0", f"use {default}, or 0 for none"
            )
        self._check_float("forget_bias", lambda _: True, "must be a number", "use 1.0")
        self._check_float("learning_rate", lambda x: x > 0, "must be > 0", "use 2e-3")
        for name, default in (("momentum", 0.9), ("rmsprop_decay", 0.99)):
            self._check_float(name, lambda x: 0 <= x < 1, "must lie in [0, 1)", f"use {default}")
        for name in ("adam_epsilon", "rmsprop_epsilon"):
            self._check_float(name, lambda x: x > 0, "must be > 0", "use 1e-5")
        for name in ("max_gradient_norm", "reward_clip"):
            if getattr(self, name) is not None:
                self._check_float(name, lambda x: x > 0, "must be > 0", "use None for no limit")
        for name in ("terminal_reward", "solved_return"):
            if getattr(self, name) is not None:
                self._check_float(name, lambda _: True, "must be a number", "use None for none")

        self._check_choice("optimizer", get_args(Optimizer))
        self._check_choice("learning_rate_schedule", get_args(Schedule))
        self._check_choice("nonfinite", get_args(NonFinite))
        self._check_choice("activation", get_args(Activation))
        self._check_choice("torso", get_args(Torso))
        self._check_choice("core", (None, *get_args(Core)))
        self._check_choice("action_bounds", get_args(ActionBounds))
        if not isinstance(self.environment, str):
            self._fail("environment", "must be a name", "use 'CartPole-v1'", TypeError)
        if not self.environment:
            self._fail("environment", "must not be empty", "use 'CartPole-v1'")
        for name, default in (
            ("shared_torso", False),
            ("state_dependent_scale", True),
            ("normalize_observations", False),
            ("normalize_rewards", False),
        ):
            if not isinstance(getattr(self, name), bool):
                self._fail(name, "must be True or False", f"use {default}", TypeError)
        sizes = self.hidden_sizes
        if not isinstance(sizes, tuple | list) or not all(type(n) is int for n in sizes):
            self._fail("hidden_sizes", "must be a tuple of integers", "use (128,)", TypeError)
        if not all(n > 0 for n in sizes):
            self._fail("hidden_sizes", "must be positive", "use (128,)")
        object.__setattr__(self, "hidden_sizes", tuple(sizes))

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
        """The fewest updates that play at least `max_steps`; None where there is no such limit."""
        return None if self.max_steps is None else -(-self.max_steps // self.steps_per_update)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold."""
        return dataclasses.asdict(self)

    def _fail(self, name: str, rule: str, remedy: str, kind: type[Exception] = ValueError) -> None:
        raise kind(f"A3CConfig.{name} {rule}, got {getattr(self, name)!r}; {remedy}.")

    def _check_int(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if type(value) is not int:
            self._fail(
                name, f"must be an integer >= {minimum}", f"use {minimum} or more", TypeError
            )
        if value < minimum:
            self._fail(name, f"must be >= {minimum}", f"use {minimum} or more")

    def _check_float(self, name: str, holds: Any, rule: str, remedy: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._fail(name, rule, remedy, TypeError)
        finite = abs(value) <= sys.float_info.max  # also of an integer that no float can hold
        if not finite or not holds(value):
            self._fail(name, rule if finite else "must be finite", remedy)

    def _check_choice(self, name: str, choices: tuple[str | None, ...]) -> None:
        if getattr(self, name) not in choices:
            self._fail(
                name, f"must be one of {', '.join(map(str, choices))}", f"use {choices[0]!r}"
            )
