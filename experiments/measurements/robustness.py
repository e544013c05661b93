"""How much the learning rate matters to each optimizer: `python -m experiments.measurements.robustness`.

The experiment of the paper's figures 2 and S7 to S11. For each environment and optimizer it draws learning rates from a
log-uniform distribution, and trains once with each, from another random start. No thread runs: 16 workers that take
turns, as in the paper, are simulated (`a3c_jax.make_simulation`), many runs side by side. All optimizers get the same
draws, momentum SGD ten times as large ones, because its steps add up to ten times the rate.

A run's score is the mean return of the episodes that ended in the last tenth of its updates, and of its last 100 episodes
if fewer ended there. A draw is *good* if its score
is within 10 % of the best of all optimizers, on a scale that begins at what a run scores that learns nothing. The table
shows the share of good draws with a 95 % bootstrap interval, and over how many factors of ten they would reach if
they lay side by side. It leaves `robustness.json`, `robustness.png` and `robustness.pdf` in its run folder. A command
that was killed goes on if it is given again with its `--run-dir`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from a3c_jax.config import A3CConfig, Optimizer, default_of
from experiments import minatar
from experiments.aggregate import mean
from experiments.command_line import exit_on_bad_input, parse
from experiments.compilation_cache import CompilationCache
from experiments.measurements.simulated import (
    COLOURS,
    OPTIMIZERS,
    Run,
    Scores,
    check,
    drawing,
    start_or_go_on,
    summarize,
)
from experiments.run_folder import write_json

TASKS = {
    "CartPole-v1": A3CConfig(max_steps=300_000),
    "Acrobot-v1": A3CConfig(max_steps=1_000_000),
    "Catch-bsuite": A3CConfig(max_steps=200_000),
    "Breakout-MinAtar": dataclasses.replace(
        minatar.PRESETS["breakout"],
        envs_per_worker=8,
        torso="mlp",
        entropy_cost=0.01,
        learning_rate_schedule="constant",
        max_steps=1_000_000,
    ),
}
"""The settings for each environment. Others are played with those of CartPole-v1."""

NOTHING = 1e-12
"""A learning rate at which nothing is learned."""
NUM_NOTHING = 5
"""How many runs that learn nothing are averaged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to simulate."""

    environments: tuple[str, ...] = tuple(TASKS)
    """What is played."""
    optimizers: tuple[Optimizer, ...] = tuple(OPTIMIZERS)
    """Optimizers to compare."""
    draws: int = 50
    """How many learning rates to draw for each optimizer."""
    low: float = 1e-5
    """The smallest learning rate."""
    high: float = 1e-1
    """The largest learning rate."""
    rmsprop_epsilon: float = default_of("rmsprop_epsilon")
    """RMSProp's epsilon, inside the square root, with and without shared statistics."""
    num_workers: int = 16
    """How many workers take turns."""
    max_steps: int | None = None
    """Environment steps of each run. By default each environment has its own number."""
    batch: int = 25
    """Number of runs simulated in one compiled call."""
    run_dir: Path | None = None
    """Folder for the results. By default a new one under runs/. If it holds the same command's, that one goes on."""

    def __post_init__(self) -> None:
        check(self, "environments", "optimizers", draws=3, batch=1)
        if not 0 < self.low < self.high < np.inf:
            raise ValueError(
                f"low and high must be positive, and low the smaller one, got {self.low} and {self.high}; exchange them."
            )
        for environment in self.environments:
            self.config(environment, self.optimizers[0])  # refuses what cannot be

    def config(self, environment: str, optimizer: Optimizer) -> A3CConfig:
        """The configuration of the runs. One that diverges goes on with its last finite parameters."""
        task = TASKS.get(environment, TASKS["CartPole-v1"])
        return dataclasses.replace(
            task,
            environment=environment,
            optimizer=optimizer,
            rmsprop_epsilon=self.rmsprop_epsilon,
            num_workers=self.num_workers,
            max_steps=self.max_steps or task.max_steps,
            nonfinite="skip",
        )

    def rates(self, optimizer: Optimizer) -> list[float]:
        """The learning rates that are drawn for an optimizer."""
        drawn = np.random.default_rng(0).uniform(np.log(self.low), np.log(self.high), self.draws)
        factor = 10.0 if optimizer == "momentum" else 1.0
        return [float(rate) for rate in factor * np.exp(drawn)]


class Found(NamedTuple):
    """What one optimizer reached in one environment.

    Attributes:
      rates: the learning rates, `[draws]`.
      scores: what the runs with them scored, `[draws]`.
      threshold: the score from which on a draw is good.
      share: the share of good draws.
      interval: its 95 % interval; None without rliable.
    """

    environment: str
    optimizer: Optimizer
    rates: list[float]
    scores: list[float]
    threshold: float
    share: float
    interval: list[float] | None


def main(arguments: Sequence[str] | None = None) -> Path:
    """Simulates, prints the table and draws the picture; returns the run folder."""
    with exit_on_bad_input():
        parsed = parse("measurements.robustness", Arguments, __doc__, arguments)
        from a3c_jax import environments  # loads JAX, --help does not

        for environment in parsed.environments:
            environments.make(environment)
        run_dir = start_or_go_on("robustness", parsed)
    CompilationCache().use()
    from tqdm import tqdm

    scores = Scores(run_dir / "scores.jsonl", parsed.batch)
    total = len(parsed.environments) * (len(parsed.optimizers) * parsed.draws + NUM_NOTHING)
    with tqdm(total=total, unit=" runs") as bar:
        found = [f for name in parsed.environments for f in play(parsed, name, scores, bar)]
    write_json(
        run_dir / "robustness.json",
        {
            "configs": {
                name: parsed.config(name, parsed.optimizers[0]).as_dict()  # but for the optimizer
                for name in parsed.environments
            },
            "found": [f._asdict() for f in found],
        },
    )
    print_table(parsed, found)
    draw([run_dir / "robustness.png", run_dir / "robustness.pdf"], parsed, found)
    print(f"\nrun folder: {run_dir}")
    return run_dir


def play(parsed: Arguments, environment: str, scores: Scores, bar: Any) -> list[Found]:
    """Simulates all runs in one environment."""
    bar.set_description(environment)
    delay = parsed.num_workers - 1
    first = parsed.optimizers[0]
    score = functools.partial(scores.of, done=bar.update)
    name = functools.partial("{} {}".format, environment)
    idle = [Run(delay, NOTHING, seed) for seed in range(NUM_NOTHING)]
    nothing = score(name(first), parsed.config(environment, first), idle).mean()
    reached = {}
    for optimizer in parsed.optimizers:
        runs = [Run(delay, rate, seed) for seed, rate in enumerate(parsed.rates(optimizer))]
        reached[optimizer] = score(name(optimizer), parsed.config(environment, optimizer), runs)
    best = max(float(own.max()) for own in reached.values())
    threshold = float(nothing + 0.9 * (best - nothing))
    return [
        Found(
            environment,
            optimizer,
            parsed.rates(optimizer),
            own.tolist(),
            threshold,
            *summarize((own >= threshold).astype(float), statistic=mean)[1:],
        )
        for optimizer, own in reached.items()
    ]


def print_table(parsed: Arguments, found: Sequence[Found]) -> None:
    """Prints a line for each environment and optimizer."""
    decades = np.log10(parsed.high / parsed.low)
    print(
        f"\n{parsed.draws} learning rates for each optimizer, log-uniform from {parsed.low:g} to {parsed.high:g} "
        f"(momentum SGD: ten times that), {parsed.num_workers} workers\n"
        f"{'environment':<18} {'optimizer':<15} {'best':>7} {'good from':>9}  share of good draws [95 %]  factors of ten"
    )
    for f in found:
        interval = "" if f.interval is None else f" [{f.interval[0]:.2f}, {f.interval[1]:.2f}]"
        print(
            f"{f.environment:<18} {OPTIMIZERS[f.optimizer]:<15} {max(f.scores):7.1f} {f.threshold:9.1f}  "
            f"{f.share:.2f}{interval:<22} {f.share * decades:14.1f}"
        )


def draw(paths: Sequence[Path], parsed: Arguments, found: Sequence[Found]) -> None:
    """Draws every run's score over its learning rate: a row for each environment, a column for each optimizer."""
    rows, columns = len(parsed.environments), len(parsed.optimizers)
    size = (1.2 + 1.6 * columns, 0.7 + 1.25 * rows)
    with drawing(paths, rows, columns, size, sharex="col", sharey="row") as (figure, panels):
        for axes, f in zip(panels.flat, found, strict=True):
            colour = COLOURS[list(OPTIMIZERS).index(f.optimizer)]
            line = axes.axhline(f.threshold, color="0.6", linewidth=0.8, linestyle=":")
            axes.plot(f.rates, f.scores, "o", markersize=2.5, color=colour, alpha=0.8)
            axes.set_xscale("log")
            axes.set_title(f"{f.share:.0%}", loc="right", color=colour, weight="bold")
        for axes, optimizer in zip(panels[0], parsed.optimizers, strict=True):
            axes.set_title(OPTIMIZERS[optimizer], loc="left")
        for axes, environment in zip(panels[:, 0], parsed.environments, strict=True):
            axes.set_ylabel(environment)
        figure.supxlabel("learning rate", fontsize=8)
        figure.supylabel("mean return", fontsize=8)
        meaning = "nine tenths of the way to the best run of its row; the share of runs that reach it is above each panel"
        figure.legend([line], [meaning], loc="outside upper center", frameon=False)


if __name__ == "__main__":
    main()
