"""`TrainResult`: what a run leaves behind."""

from typing import Any, NamedTuple

import jax

from a3c_jax.asynchrony.records import EpisodeLog, Schedule
from a3c_jax.config import A3CConfig
from a3c_jax.environments import Environment


class TrainResult(NamedTuple):
    """What a run leaves behind.

    Attributes:
      config: its configuration.
      environment: what was played, for evaluation for instance.
      network: the network; `network.apply(params, observation)` gives a distribution and values.
      params: the final parameters, Flax variables.
      best_params: those at the highest mean return of the last `config.solved_window` episodes; the
        final ones if fewer episodes ended.
      best_mean_return: that mean, or None.
      opt_state: the optimizer's state, as optax keeps it.
      version: number of updates.
      environment_steps: number of environment steps, all workers together.
      overshoot: how many of them were beyond `config.max_steps`: less than one segment.
      episodes: every episode that ended.
      schedule: which worker made each update, from which version: what `replay` needs.
      skipped: how many updates were not finite, and skipped (`config.nonfinite`).
      stop_reason: `solved`, `max_steps`, `max_episodes`, `interrupted`, `failed` or `replayed`.
      wall_clock: seconds spent on `setup`, `compile` and `train`. The first two are those of building the
        program, which several runs may share.
      evaluation_key: a random key for evaluation, which no worker has used.
      single_kernel: whether the worker step was compiled into a single kernel, which a replay in another
        process has to do as well.
    """

    config: A3CConfig
    environment: Environment
    network: Any
    params: Any
    best_params: Any
    best_mean_return: float | None
    opt_state: Any
    version: int
    environment_steps: int
    overshoot: int
    episodes: EpisodeLog
    schedule: Schedule
    skipped: int
    stop_reason: str
    wall_clock: dict[str, float]
    evaluation_key: jax.Array
    single_kernel: bool
