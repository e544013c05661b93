"""Synchronous A2C as one compiled loop: `python -m experiments.synchronous`.

What a user of purejaxrl would write: play a segment, take the gradients, move the parameters, and all of it
again inside one `lax.scan`, on the parameter tree as it is. It is built from the same pure functions as A3C
(`a3c_jax.agent.make_agent`) and has no threads, no lock and no call of a compiled program between updates:
the reference that `experiments.benchmark` measures the threads against.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import tyro

from a3c_jax.config import A3CConfig

if TYPE_CHECKING:
    from a3c_jax.agent import Agent


class State(NamedTuple):
    """What one update hands to the next.

    Attributes:
      params: the parameters, Flax variables.
      opt_state: the optimizer's state, over the tree.
      rollout: the environments' states (`a3c_jax.rollout.RolloutState`).
    """

    params: Any
    opt_state: Any
    rollout: Any


class Progress(NamedTuple):
    """The episodes that ended in each update's segment, `[updates]` each.

    Attributes:
      episodes: how many.
      mean_return: their mean return; 0 where none ended.
      mean_length: their mean number of steps; 0 where none ended.
    """

    episodes: Any
    mean_return: Any
    mean_length: Any


Run = Callable[[State], tuple[State, Progress]]


def synchronous_config(config: A3CConfig) -> A3CConfig:
    """The same work for one worker: it plays the environments of all workers side by side."""
    return dataclasses.replace(
        config, num_workers=1, envs_per_worker=config.num_workers * config.envs_per_worker
    )


def start(agent: "Agent") -> State:
    """The state before the first update."""
    return State(agent.params, agent.optimizer.init(agent.params), agent.states[0])


def make_run(agent: "Agent", num_updates: int) -> Run:
    """Makes `run(state) -> (state, progress)`: `num_updates` updates in one compiled call.

    Args:
      agent: what `make_agent` built of a configuration with one worker (`synchronous_config`).
      num_updates: how many updates a call makes.

    Raises:
      ValueError: where the agent has more than one worker.
    """
    import jax
    import jax.numpy as jnp
    import optax

    if agent.config.num_workers != 1:
        raise ValueError(
            f"the synchronous loop plays for one worker, got num_workers {agent.config.num_workers}; "
            "build the agent of synchronous_config(config)."
        )
    worker_step, optimizer = agent.worker_step, optax.with_extra_args_support(agent.optimizer)

    def update(state: State, _: None) -> tuple[State, Progress]:
        params, opt_state, rollout = state
        gradients, rollout, statistics = worker_step(params, rollout)
        episodes = statistics.episodes
        updates, opt_state = optimizer.update(gradients, opt_state, params, worker=0)
        count = jnp.sum(episodes.ended)

        def mean(values: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(episodes.ended, values, 0)) / jnp.maximum(count, 1)

        progress = Progress(count, mean(episodes.episode_return), mean(episodes.length))
        return State(optax.apply_updates(params, updates), opt_state, rollout), progress

    return jax.jit(lambda state: jax.lax.scan(update, state, length=num_updates))


def recent_return(progress: list[Progress], window: int) -> float | None:
    """Mean return of the last updates in which at least `window` episodes ended; None before there are so many."""
    count, total = 0, 0.0
    for chunk in reversed(progress):
        for episodes, mean in zip(chunk.episodes[::-1], chunk.mean_return[::-1], strict=True):
            count += int(episodes)
            total += float(episodes) * float(mean)
            if count >= window:
                return total / count
    return None


class Trained(NamedTuple):
    """What a run came to.

    Attributes:
      state: the final state.
      stop_reason: `solved`, `max_episodes` or `max_steps`.
      environment_steps: number of environment steps.
      episodes: number of episodes that ended.
      mean_return: see `recent_return`.
      seconds: wall-clock of the updates, and of compiling them.
    """

    state: State
    stop_reason: str
    environment_steps: int
    episodes: int
    mean_return: float | None
    seconds: dict[str, float]


def train(agent: "Agent", updates_per_call: int = 50, progress_bar: bool = False) -> Trained:
    """Trains until the budget or `solved_return` is reached, which is looked at between two calls.

    Args:
      agent: what `make_agent` built of a configuration with one worker.
      updates_per_call: updates in each compiled call: the run may pass its budget by fewer than these.
      progress_bar: whether to show one.
    """
    import time

    import jax
    from tqdm import tqdm

    config = agent.config
    began = time.perf_counter()
    state = start(agent)
    run = jax.jit(make_run(agent, updates_per_call)).lower(state).compile()
    compiled = time.perf_counter()
    steps = episodes = 0
    history: list[Progress] = []
    mean_return, stop_reason = None, ""
    with tqdm(
        total=config.max_steps, unit=" steps", unit_scale=True, disable=not progress_bar,
        desc=config.environment,
    ) as bar:  # fmt: skip
        while not stop_reason:
            state, arrays = run(state)
            history.append(Progress(*(np.asarray(array) for array in arrays)))
            steps += updates_per_call * config.steps_per_update
            episodes += int(history[-1].episodes.sum())
            mean_return = recent_return(history, config.solved_window)
            bar.set_postfix_str(
                f"{episodes:,} episodes, mean of last {config.solved_window} "
                f"{float('nan') if mean_return is None else mean_return:.1f}",
                refresh=False,
            )
            bar.update(updates_per_call * config.steps_per_update)
            solved, limit = config.solved_return, config.max_steps
            if solved is not None and mean_return is not None and mean_return >= solved:
                stop_reason = "solved"
            elif config.max_episodes is not None and episodes >= config.max_episodes:
                stop_reason = "max_episodes"
            elif limit is not None and steps >= limit:
                stop_reason = "max_steps"
    seconds = {"compile": compiled - began, "train": time.perf_counter() - compiled}
    return Trained(state, stop_reason, steps, episodes, mean_return, seconds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line: a configuration of A3C, whose workers' environments are played side by side."""

    config: Annotated[A3CConfig, tyro.conf.arg(name="")]
    updates_per_call: int = 50
    """Updates in each compiled call; whether to stop is looked at between two calls."""
    evaluation_episodes: int = 100
    """Fresh episodes of the greedy evaluation."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        for name in ("updates_per_call", "evaluation_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}; use 50 or so.")


DEFAULTS = A3CConfig(environment="CartPole-v1", solved_return=475.0)


def main(arguments: list[str] | None = None) -> None:
    """Trains, evaluates greedily, and prints what came out."""
    try:
        parsed = tyro.cli(
            Arguments, default=Arguments(config=DEFAULTS), description=__doc__, args=arguments
        )
        from a3c_jax.agent import make_agent  # after the command line: --help answers at once

        agent = make_agent(synchronous_config(parsed.config))
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    from a3c_jax.agent import evaluation_key
    from a3c_jax.evaluation import evaluate, greedy_policy

    config = agent.config
    trained = train(agent, parsed.updates_per_call, parsed.progress)
    mean = trained.mean_return
    print(
        f"\n{config.environment}, seed {config.seed}, {config.envs_per_worker} environments: stopped by "
        f"{trained.stop_reason} after {trained.environment_steps:,} steps, {trained.episodes:,} episodes\n"
        f"  mean return of the last {config.solved_window} episodes: "
        f"{'-' if mean is None else f'{mean:.1f}'}, "
        f"{trained.environment_steps / trained.seconds['train']:,.0f} steps/s\n"
        f"  seconds: compile {trained.seconds['compile']:.1f} + train {trained.seconds['train']:.1f}"
    )
    returns = evaluate(
        greedy_policy(agent.network), trained.state.params, agent.environment,
        evaluation_key(config), parsed.evaluation_episodes,
    ).returns  # fmt: skip
    print(
        f"  greedy evaluation: mean {returns.mean():.1f}, std {returns.std():.1f}, "
        f"min {returns.min():.1f}, max {returns.max():.1f}"
    )


if __name__ == "__main__":
    main()
