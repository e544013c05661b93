"""Measure what staleness costs: `python -m experiments.measurements.staleness`.

Every update of a run is computed from the parameters of d updates ago (`a3c_jax.fixed_delay`), for each delay d, each
optimizer and each algorithm. No thread runs: many seeds and learning rates are simulated side by side (`a3c_jax.make_simulation`).

The score of a run is the mean return of the episodes that ended in the last tenth of its updates, and of its last 100
episodes if fewer ended there. First, seeds that are not reported choose learning rates by their mean score: for each line of
the picture the best one at the smallest delay, and the best one at each delay. Of rates whose scores are within 1 % of the
best, which ten seeds cannot tell apart, the smallest is taken. Then fresh seeds are scored with both. Shown are their
interquartile mean and a 95 % interval from a bootstrap over the seeds. It prints the table, and leaves `staleness.json`,
`staleness.png` and `staleness.pdf` in its run folder. A command that was killed goes on if it is given again with its `--run-dir`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from a3c_jax.config import A3CConfig, Optimizer
from experiments.command_line import exit_on_bad_input, parse
from experiments.compilation_cache import CompilationCache
from experiments.measurements.simulated import (
    COLOURS,
    OPTIMIZERS,
    STYLES,
    TUNING_SEED,
    Run,
    Score,
    Scores,
    check,
    drawing,
    start_or_go_on,
    summarize,
)
from experiments.run_folder import write_json

RATES: dict[str, tuple[float, ...]] = {
    "adam": (3e-4, 1e-3, 3e-3, 1e-2),
    "shared_rmsprop": (3e-4, 1e-3, 3e-3, 1e-2),
    "rmsprop": (3e-4, 1e-3, 3e-3, 1e-2),
    "momentum": (3e-3, 1e-2, 3e-2, 1e-1),  # its steps add up to ten times the rate
}
"""Learning rates to choose from."""

NEARLY = 0.01
"""Share of the best score by which another rate's may be lower and yet count as good."""

SPELLED_OUT = {
    "a3c": "A3C",
    "a3c?learns_at_newest=True": "A3C's loss at the newest parameters",
    "vtrace": "V-trace",
    "ppo": "PPO's clipped loss",
}
"""What algorithms are called in the picture."""

PANELS = {
    "fixed": "learning rate chosen without delay",
    "own": "learning rate chosen at each delay",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to simulate."""

    optimizers: tuple[Optimizer, ...] = ("adam", "shared_rmsprop", "momentum")
    """Optimizers to compare."""
    algorithms: tuple[str, ...] = ("a3c",)
    """Algorithms to compare, as A3CConfig names them."""
    delays: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64)
    """Numbers of updates between the parameters that gradients are computed from and those that they move."""
    rates: tuple[float, ...] | None = None
    """Learning rates to choose from, the same for all optimizers. By default each has its own four."""
    seeds: int = 10
    """Number of seeds reported for each point."""
    first_seed: int = 0
    """The first of these seeds."""
    tuning_seeds: int = 10
    """Number of other seeds, which choose the learning rates."""
    environment: str = "CartPole-v1"
    """What is played."""
    max_steps: int = 300_000
    """Environment steps of each run."""
    batch: int = 20
    """Number of runs simulated in one compiled call."""
    run_dir: Path | None = None
    """Folder for the results. By default a new one under runs/. If it holds the same command's, that one goes on."""

    def __post_init__(self) -> None:
        lists = ("optimizers", "algorithms", "delays", "rates")
        check(self, *lists, seeds=2, tuning_seeds=1, batch=1)
        if min(self.delays) < 0:
            raise ValueError(f"delays must be >= 0, got {min(self.delays)}; use 0 for no delay.")
        object.__setattr__(self, "delays", tuple(sorted(self.delays)))
        for rate in self.rates or [1.0]:
            self.config(self.lines[0], rate)  # refuses what cannot be

    @property
    def lines(self) -> list["Line"]:
        """The lines of the picture."""
        return [Line(*pair) for pair in itertools.product(self.optimizers, self.algorithms)]

    def rates_of(self, optimizer: str) -> tuple[float, ...]:
        """The learning rates to choose from, rising."""
        return tuple(sorted(self.rates or RATES[optimizer]))

    def config(self, line: "Line", learning_rate: float) -> A3CConfig:
        """The configuration of the runs. One that diverges goes on with its last finite parameters."""
        return A3CConfig(
            environment=self.environment,
            num_workers=1,
            optimizer=line.optimizer,
            algorithm=line.algorithm,
            learning_rate=learning_rate,
            max_steps=self.max_steps,
            nonfinite="skip",
        )


class Line(NamedTuple):
    """What one line of the picture stands for."""

    optimizer: Optimizer
    algorithm: str


Point = dict[str, Any]
"""Of the picture: optimizer, algorithm, panel, delay, learning_rate, returns of the seeds, their mean, its interval's low and high."""


def main(arguments: Sequence[str] | None = None) -> Path:
    """Simulates, prints the table and draws the picture; returns the run folder."""
    with exit_on_bad_input():
        parsed = parse("measurements.staleness", Arguments, __doc__, arguments)
        from a3c_jax import algorithms, environments  # loads JAX, --help does not

        environments.make(parsed.environment)
        for algorithm in parsed.algorithms:
            algorithms.find_algorithm(algorithm)
        run_dir = start_or_go_on("staleness", parsed)
    CompilationCache().use()
    from tqdm import tqdm

    points: list[Point] = []
    tuning = {}
    scores = Scores(run_dir / "scores.jsonl", parsed.batch)
    for line in parsed.lines:
        name = name_line(parsed, line)
        with tqdm(desc=name, unit=" runs") as bar:
            config = parsed.config(line, 1.0)
            score = functools.partial(scores.of, name, config, done=bar.update)
            returns = tune(parsed, line, score)
            points += evaluate(parsed, line, score, returns)
        tuning[name] = {
            "rates": parsed.rates_of(line.optimizer),
            "returns": dict(zip(parsed.delays, returns.tolist(), strict=True)),
        }
    results = {
        "arguments": {k: v for k, v in dataclasses.asdict(parsed).items() if k != "run_dir"},
        "config": parsed.config(parsed.lines[0], 1.0).as_dict(),  # but for the line and the rate
        "tuning": tuning,
        "points": points,
    }
    write_json(run_dir / "staleness.json", results)
    print_table(parsed, points)
    draw([run_dir / "staleness.png", run_dir / "staleness.pdf"], parsed, points)
    print(f"\nrun folder: {run_dir}")
    return run_dir


def name_line(parsed: Arguments, line: Line) -> str:
    """What a line is called: by what it differs from the others in."""
    optimizer, algorithm = OPTIMIZERS[line.optimizer], line.algorithm.rpartition(":")[2]
    names = [optimizer] * (len(parsed.optimizers) > 1) + [algorithm] * (len(parsed.algorithms) > 1)
    return ", ".join(names) or optimizer


def tune(parsed: Arguments, line: Line, score: Score) -> np.ndarray:
    """The scores of the seeds that choose the learning rates, `[delays, rates, tuning_seeds]`."""
    rates = parsed.rates_of(line.optimizer)
    seeds = range(TUNING_SEED, TUNING_SEED + parsed.tuning_seeds)
    runs = [Run(d, rate, seed) for d in parsed.delays for rate in rates for seed in seeds]
    return score(runs).reshape(len(parsed.delays), len(rates), len(seeds))


def choose_rate(rates: Sequence[float], scores: np.ndarray) -> float:
    """The smallest of the rates, which rise, whose scores are within 1 % of the best one."""
    best = scores.max()
    return rates[int(np.argmax(scores >= best - NEARLY * abs(best)))]


def evaluate(parsed: Arguments, line: Line, score: Score, tuning: np.ndarray) -> list[Point]:
    """Scores fresh seeds with the learning rates that `tuning` chose."""
    delays, rates = parsed.delays, parsed.rates_of(line.optimizer)
    best = [choose_rate(rates, scores) for scores in tuning.mean(axis=2)]
    chosen = {"fixed": [best[0]] * len(delays), "own": best}
    pairs = sorted({pair for own in chosen.values() for pair in zip(delays, own, strict=True)})
    seeds = range(parsed.first_seed, parsed.first_seed + parsed.seeds)
    runs = [Run(d, rate, seed) for d, rate in pairs for seed in seeds]
    scores = dict(zip(pairs, score(runs).reshape(len(pairs), parsed.seeds), strict=True))
    scored = {}
    for pair, returns in scores.items():
        each, mean, interval = summarize(returns)
        low, high = interval or (None, None)
        scored[pair] = {"returns": each, "mean": mean, "low": low, "high": high}
    return [
        line._asdict() | {"panel": panel, "delay": d, "learning_rate": rate} | scored[d, rate]
        for panel, own in chosen.items()
        for d, rate in zip(delays, own, strict=True)
    ]


def print_table(parsed: Arguments, points: Sequence[Point]) -> None:
    """Prints a table for each panel: a row for each delay, a column for each line."""
    names = [name_line(parsed, line) for line in parsed.lines]
    print(
        f"\n{parsed.environment}, {parsed.max_steps:,} steps: mean return in the last tenth of the run, interquartile "
        f"mean over\n{parsed.seeds} seeds [95 % interval] (learning rate, chosen by {parsed.tuning_seeds} other seeds)"
    )
    for panel, title in PANELS.items():
        print(f"\n{title}\n{'delay':>5}" + "".join(f"  {name:^33}" for name in names))
        for delay in parsed.delays:
            cells = (
                f"  {p['mean']:6.1f}{_interval(p)} ({p['learning_rate']:g})"
                for p in points
                if (p["panel"], p["delay"]) == (panel, delay)
            )
            print(f"{delay:5d}" + "".join(f"{cell:35}" for cell in cells))


def _interval(point: Point) -> str:
    return "" if point["low"] is None else f" [{point['low']:.1f}, {point['high']:.1f}]"


def draw(paths: Sequence[Path], parsed: Arguments, points: Sequence[Point]) -> None:
    """Draws the interquartile mean over the delay, with its interval as a band, in the formats of the paths."""
    delays = sorted({point["delay"] for point in points})
    with drawing(paths, 1, len(PANELS), (7, 2.9), sharey=True) as (figure, (panels,)):
        for axes, (panel, title) in zip(panels, PANELS.items(), strict=True):
            for index, line in enumerate(parsed.lines):
                own = [
                    p
                    for p in points
                    if p["panel"] == panel and Line(p["optimizer"], p["algorithm"]) == line
                ]
                x, mean, low, high = zip(
                    *((p["delay"], p["mean"], p["low"], p["high"]) for p in own),
                    strict=True,
                )
                colour, style = COLOURS[index % len(COLOURS)], STYLES[index % len(STYLES)]
                name = name_line(parsed, line)
                label = SPELLED_OUT.get(name, name)
                axes.plot(x, mean, style, markersize=4, linewidth=1.4, color=colour, label=label)
                if None not in low:
                    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.set_title(title)
            axes.set_xlabel("staleness (updates)")
            axes.set_xscale("symlog", base=2, linthresh=1)
            axes.set_xticks(delays, [str(delay) for delay in delays])
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", color="0.92", linewidth=0.8)
        panels[0].set_ylabel("final return (IQM)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


if __name__ == "__main__":
    main()
