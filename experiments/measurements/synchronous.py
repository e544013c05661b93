"""Train synchronous A2C as one compiled loop: `python -m experiments.measurements.synchronous`.

It plays a segment, takes the gradients and moves the parameters, again and again inside one compiled `lax.scan`.
It uses the same pure functions as A3C, and has no threads, no lock and no calls between updates. That makes it the
loop that `experiments.measurements.throughput` compares the threads with. The environments of all workers are
played side by side by one worker.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import tyro

from a3c_jax.config import A3CConfig
from experiments.command_line import exit_on_bad_input, parse

if TYPE_CHECKING:
    from a3c_jax.blueprint import Blueprint


class State(NamedTuple):
    """What one update hands to the next: parameters, the optimizer's state, the state of the environments."""

    params: Any
    optimizer_state: Any
    rollout: Any


class Progress(NamedTuple):
    """The episodes that ended in each update's segment, `[updates]` each: how many, and the sum of their returns."""

    num_episodes: Any
    total_return: Any


def synchronous_config(config: A3CConfig) -> A3CConfig:
    """The same work for one worker, which plays the environments of all workers side by side."""
    return dataclasses.replace(
        config, num_workers=1, envs_per_worker=config.num_workers * config.envs_per_worker
    )


def start(config: A3CConfig, blueprint: "Blueprint") -> State:
    """The state before the first update."""
    rollout = blueprint.start(config.seed, 0)
    params = blueprint.init(config.seed, rollout.observation)
    return State(params, blueprint.optimizer(config.learning_rate).init(params), rollout)


def make_run(
    config: A3CConfig, blueprint: "Blueprint", num_updates: int
) -> Callable[[State], tuple[State, Progress]]:
    """Makes `run(state) -> (state, progress)`: `num_updates` updates, to be compiled as one call.

    Args:
      config: a configuration with one worker (`synchronous_config`).
      blueprint: what `a3c_jax.blueprint.make_blueprint` made of it.
      num_updates: how many updates a call makes.

    Raises:
      ValueError: if the configuration has more than one worker.
    """
    import jax
    import jax.numpy as jnp
    import optax

    if config.num_workers != 1:
        raise ValueError(
            f"the synchronous loop has one worker, got num_workers {config.num_workers}; "
            "give synchronous_config(config)."
        )
    optimizer = optax.with_extra_args_support(blueprint.optimizer(config.learning_rate))

    def update(state: State, _: None) -> tuple[State, Progress]:
        params, optimizer_state, rollout = state
        gradients, rollout, report = blueprint.worker_step(params, rollout)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params, worker=0)
        returns = jnp.where(report.episodes.ended, report.episodes.episode_return, 0.0)
        progress = Progress(report.num_episodes, jnp.sum(returns))
        return State(optax.apply_updates(params, updates), optimizer_state, rollout), progress

    return lambda state: jax.lax.scan(update, state, length=num_updates)


def recent_return(progress: Progress, window: int) -> float | None:
    """Mean return of the last updates in which at least `window` episodes ended; None if there are not so many."""
    counts, totals = (np.cumsum(np.asarray(column)[::-1]) for column in progress)
    k = int(np.searchsorted(counts, window))
    return float(totals[k] / counts[k]) if k < len(counts) else None


class Trained(NamedTuple):
    """The result of a run: `stop_reason` is `solved`, `max_episodes` or `max_steps`; for `mean_return` see `recent_return`."""

    state: State
    stop_reason: str
    environment_steps: int
    episodes: int
    mean_return: float | None
    seconds: dict[str, float]


def train(config: A3CConfig, blueprint: "Blueprint", updates_per_call: int = 50) -> Trained:
    """Trains until a budget is spent or `solved_return` is reached, which is looked at between two calls.

    Args:
      config: a configuration with one worker.
      blueprint: what `a3c_jax.blueprint.make_blueprint` made of it.
      updates_per_call: updates in each compiled call. The run may pass its budget by almost as many.
    """
    import jax

    began = time.perf_counter()
    state = start(config, blueprint)
    run = jax.jit(make_run(config, blueprint, updates_per_call)).lower(state).compile()
    compiled = time.perf_counter()
    steps = 0
    progress = Progress(np.zeros(0, np.int32), np.zeros(0))
    while True:
        state, new = run(state)
        progress = Progress(*(np.append(old, new) for old, new in zip(progress, new, strict=True)))
        steps += updates_per_call * config.steps_per_update
        episodes = int(progress.num_episodes.sum())
        mean_return = recent_return(progress, config.solved_window)
        reached = {
            "solved": (mean_return, config.solved_return),
            "max_episodes": (episodes, config.max_episodes),
            "max_steps": (steps, config.max_steps),
        }
        for reason, (value, limit) in reached.items():
            if value is not None and limit is not None and value >= limit:
                seconds = {"compile": compiled - began, "train": time.perf_counter() - compiled}
                return Trained(state, reason, steps, episodes, mean_return, seconds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line: a configuration of A3C, whose workers' environments are played side by side."""

    config: Annotated[A3CConfig, tyro.conf.arg(name="")] = A3CConfig(solved_return=475.0)
    updates_per_call: int = 50
    """Number of updates in each compiled call. Between two calls the program checks whether to stop."""

    def __post_init__(self) -> None:
        if self.updates_per_call < 1:
            raise ValueError(
                f"updates_per_call must be >= 1, got {self.updates_per_call}; use 50 or so."
            )


def main(arguments: Sequence[str] | None = None) -> Trained:
    """Trains, evaluates greedily, and prints what came out."""
    with exit_on_bad_input():
        parsed = parse("measurements.synchronous", Arguments, __doc__, arguments)
        from a3c_jax import evaluate, greedy_policy  # loads JAX: --help has answered by now
        from a3c_jax.blueprint import make_blueprint

        config = synchronous_config(parsed.config)
        blueprint = make_blueprint(config)
    trained = train(config, blueprint, parsed.updates_per_call)
    mean = "-" if trained.mean_return is None else f"{trained.mean_return:.1f}"
    seconds = trained.seconds
    print(
        f"{config.environment}, seed {config.seed}, {config.envs_per_worker} environments: stopped "
        f"({trained.stop_reason}) after {trained.environment_steps:,} steps, {trained.episodes:,} episodes\n"
        f"  mean return of the last {config.solved_window} episodes: {mean}, "
        f"{trained.environment_steps / seconds['train']:,.0f} steps/s\n"
        f"  seconds: compile {seconds['compile']:.1f} + train {seconds['train']:.1f}"
    )
    returns = evaluate(
        greedy_policy(blueprint.network),
        trained.state.params,
        blueprint.environment,
        blueprint.evaluation_key(config.seed),
        num_episodes=100,
    ).returns
    print(
        f"  greedy evaluation: mean {returns.mean():.1f}, std {returns.std():.1f}, "
        f"min {returns.min():.1f}, max {returns.max():.1f}"
    )
    return trained


if __name__ == "__main__":
    main()
