"""Whether more workers learn faster: `python -m experiments.measurements.data_efficiency`.

The experiment of the paper's Table 2. A3C and the paper's three other methods learn the same task, and nothing is varied but
the number of workers. A worker has one environment and segments of 5 steps, as in the paper. A run ends when the mean
return of its last 100 training episodes reaches a fixed value. That may take fewer environment steps with more workers,
and they may play more steps per second. The two are measured apart:

- *Simulated* workers take turns, each one turn late by every other worker (`a3c_jax.make_simulation`). How many steps are
  needed depends on nothing else there. If every worker had a core of its own, W workers would be W times this gain faster.
- *Threads* share the cores of this machine, and as many of them as there are cores play at a time, in turns. Their seconds
  are their steps divided by their steps per second.

Other seeds than the reported ones choose a learning rate for each method, in the middle of the numbers of workers. A run
that is not solved counts as if it had been solved at its end; the picture shows a point with such a run hollow. On CartPole,
where each step earns 1, no run can be solved before 100 times the value. Shown are the interquartile mean over seeds, and
a 95 % bootstrap interval. It prints the table, and leaves `data_efficiency.json`, `.png` and `.pdf` in its run folder. A command
that was killed goes on if it is given again with its `--run-dir`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from a3c_jax.config import A3CConfig
from experiments.command_line import exit_on_bad_input, parse
from experiments.compilation_cache import CompilationCache
from experiments.measurements.simulated import (
    COLOURS,
    STYLES,
    TUNING_SEED,
    Records,
    Run,
    Scores,
    check,
    drawing,
    start_or_go_on,
)
from experiments.run_folder import write_json

if TYPE_CHECKING:
    from a3c_jax import SimulationResult

EXPLORATION = "?target_interval=500&exploration_steps=20_000&final_epsilons=(0.01,)&epsilon_probabilities=(1.0,)"
"""How the value methods explore: all workers alike, and so little at the end that their returns show what they have learned."""

METHODS = {
    "a3c": "A3C",
    "n_step_q": "n-step Q",
    "one_step_sarsa": "one-step Sarsa",
    "one_step_q": "one-step Q",
}
"""What the methods are called in the table and the picture."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to compare."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Algorithms to compare, as A3CConfig names them; the paper's other three explore until 20,000 steps unless they say so."""
    workers: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of workers, the smallest of which the others are compared with."""
    threads: bool = True
    """Whether to measure with threads, too."""
    environment: str = "CartPole-v1"
    """What is played."""
    solved_return: float = 195.0
    """A run ends when the mean return of its last 100 episodes reaches this value."""
    envs_per_worker: int = 1
    """Environments that each worker plays side by side."""
    t_max: int = 5
    """Steps of a segment."""
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates to choose from."""
    seeds: int = 10
    """Number of seeds reported for each point."""
    tuning_seeds: int = 10
    """Number of other seeds, which choose the learning rates."""
    max_steps: int = 500_000
    """A run that is not solved ends after so many environment steps."""
    batch: int = 10
    """Number of runs simulated in one compiled call."""
    run_dir: Path | None = None
    """Folder for the results. By default a new one under runs/. If it holds the same command's, that one goes on."""

    def __post_init__(self) -> None:
        check(self, "methods", "workers", "rates", seeds=2, tuning_seeds=1, batch=1)
        object.__setattr__(self, "workers", tuple(sorted(self.workers)))
        for method in self.methods:  # refuses what cannot be
            for rate in self.rates:
                self.config(method, self.workers[0], rate)

    def config(self, method: str, num_workers: int, learning_rate: float) -> A3CConfig:
        """The configuration of the runs."""
        return A3CConfig(
            environment=self.environment,
            algorithm=method + EXPLORATION if method in METHODS and method != "a3c" else method,
            num_workers=num_workers,
            envs_per_worker=self.envs_per_worker,
            t_max=self.t_max,
            learning_rate=learning_rate,
            max_steps=self.max_steps,
            solved_return=self.solved_return,
            nonfinite="skip",
        )


class Point(NamedTuple):
    """What one method reached with one number of workers.

    Attributes:
      learning_rate: the one that was chosen for the method.
      simulated: environment steps of the simulated runs, `[seeds]`.
      steps: environment steps of the runs in threads, `[seeds]`; None if there were none.
      seconds: their seconds of training, `[seeds]`.
      staleness: their mean staleness, `[seeds]`.
    """

    method: str
    workers: int
    learning_rate: float
    simulated: list[float]
    steps: list[float] | None
    seconds: list[float] | None
    staleness: list[float] | None

    def steps_in(self, threads: bool) -> list[float]:
        """Environment steps of the runs in threads, if there were any, or of the simulated ones."""
        return self.steps if threads and self.steps else self.simulated


Threaded = tuple[list[float], list[float], list[float]]
"""The columns of a point that threads fill."""


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measures, prints the table and draws the picture; returns the run folder."""
    with exit_on_bad_input():
        parsed = parse("measurements.data_efficiency", Arguments, __doc__, arguments)
        from a3c_jax import algorithms, environments  # loads JAX, --help does not

        environments.make(parsed.environment)
        for method in parsed.methods:
            algorithms.find_algorithm(method)
        run_dir = start_or_go_on("data-efficiency", parsed)
    CompilationCache().use()
    rates, simulated = simulate(parsed, run_dir)
    threaded = train(parsed, run_dir, rates) if parsed.threads else {}
    points = [
        Point(m, w, rates[m], simulated[m, w].tolist(), *threaded.get((m, w), (None,) * 3))
        for m in parsed.methods
        for w in parsed.workers
    ]
    write_json(
        run_dir / "data_efficiency.json",
        {
            "configs": {m: parsed.config(m, 1, rates[m]).as_dict() for m in parsed.methods},
            "points": [point._asdict() for point in points],
        },
    )
    print_table(parsed, points)
    draw([run_dir / f"data_efficiency.{kind}" for kind in ("png", "pdf")], parsed, points)
    print(f"\nrun folder: {run_dir}")
    return run_dir


Case = tuple[str, int]  # method, workers


def simulate(parsed: Arguments, run_dir: Path) -> tuple[dict[str, float], dict[Case, np.ndarray]]:
    """The learning rate of each method, and the environment steps of its simulated runs, `[seeds]`."""
    from tqdm import tqdm

    steps_per_update = parsed.envs_per_worker * parsed.t_max

    def steps_to_solve(result: "SimulationResult") -> Any:
        return result.updates_to_solve(parsed.solved_return) * steps_per_update

    scores = Scores(run_dir / "scores.jsonl", parsed.batch, steps_to_solve)
    middle = parsed.workers[(len(parsed.workers) - 1) // 2]
    tuning = range(TUNING_SEED, TUNING_SEED + parsed.tuning_seeds)
    rates, found = {}, {}
    total = len(parsed.rates) * parsed.tuning_seeds + len(parsed.workers) * parsed.seeds
    with tqdm(total=len(parsed.methods) * total, unit=" runs") as bar:

        def score(method: str, workers: int, runs: list[Run]) -> np.ndarray:
            bar.set_description(f"{_name(method)}, {workers} simulated")
            config = parsed.config(method, workers, 1.0)
            steps = scores.of(f"{method} {workers}", config, runs, bar.update)
            return np.minimum(steps, parsed.max_steps)

        for method in parsed.methods:
            runs = [Run(middle - 1, rate, seed) for rate in parsed.rates for seed in tuning]
            steps = score(method, middle, runs).reshape(len(parsed.rates), -1)
            if np.all(steps >= parsed.max_steps):
                raise SystemExit(
                    f"error: {_name(method)} was solved with no learning rate; raise --max-steps, or lower --solved-return."
                )
            rate = rates[method] = parsed.rates[int(steps.mean(axis=1).argmin())]
            for workers in parsed.workers:
                runs = [Run(workers - 1, rate, seed) for seed in range(parsed.seeds)]
                found[method, workers] = score(method, workers, runs)
    return rates, found


def train(parsed: Arguments, run_dir: Path, rates: dict[str, float]) -> dict[Case, Threaded]:
    """What the runs in threads took, by method and number of workers."""
    from tqdm import tqdm

    import a3c_jax

    records = Records(run_dir / "threads.jsonl")
    program = functools.cache(
        lambda method: a3c_jax.build(parsed.config(method, max(parsed.workers), rates[method]))
    )
    # The seeds in the outer loop, so that a slow minute of the machine touches all cases.
    keys = [(m, w, s) for s in range(parsed.seeds) for m in parsed.methods for w in parsed.workers]
    for method, workers, seed in tqdm(keys, desc="threads", unit=" runs"):
        key = (method, workers, rates[method], seed)
        if key not in records:
            run = a3c_jax.train(program(method).replace(num_workers=workers, seed=seed))
            staleness = float(run.schedule.staleness.mean())
            records.add([key], [[run.environment_steps, run.wall_clock["train"], staleness]])
    found: dict[Case, Any] = {}
    for m, w, _ in keys:
        columns = np.array([records[m, w, rates[m], s] for s in range(parsed.seeds)]).T
        found[m, w] = tuple(columns.tolist())
    return found


def _name(method: str) -> str:
    return METHODS.get(method, method.partition("?")[0].rpartition(":")[2])


class Value(NamedTuple):
    """An interquartile mean over seeds, or a quotient of two, and its interval; NaN if there are too few seeds for one."""

    value: float
    low: float
    high: float


def quotient(numerator: Sequence[float], denominator: Sequence[float]) -> Value:
    """The quotient of two interquartile means over seeds."""
    from experiments.aggregate import aggregate, interquartile_mean

    def of(scores: np.ndarray) -> np.ndarray:
        above, below = interquartile_mean(scores)
        return np.array([above / below])

    scores = np.stack([numerator, denominator], axis=1)
    interval = aggregate(scores, statistic=of).interval
    low, high = [np.nan, np.nan] if interval is None else interval[:, 0].tolist()
    return Value(of(scores).item(), low, high)


class Gain(NamedTuple):
    """What more workers changed.

    Attributes:
      steps: how many environment steps were needed.
      efficiency: by what factor that is less than with the smallest number of workers.
      speed_up: by what factor training took less time.
    """

    steps: Value
    efficiency: Value
    speed_up: Value


def gain(points: Sequence[Point], point: Point, threads: bool) -> Gain:
    """What a point's workers changed, in threads or simulated."""
    first = next(p for p in points if p.method == point.method)
    if point is first:  # its own quotient would get an interval, because both sides are drawn anew
        steps = point.steps_in(threads)
        same = Value(1.0, 1.0, 1.0)
        return Gain(quotient(steps, np.ones(len(steps)).tolist()), same, same)
    one = np.ones(len(point.simulated)).tolist()
    if threads and point.steps and point.seconds and first.steps and first.seconds:
        return Gain(
            quotient(point.steps, one),
            quotient(first.steps, point.steps),
            quotient(first.seconds, point.seconds),
        )
    efficiency = quotient(first.simulated, point.simulated)
    cores = point.workers / first.workers
    speed_up = Value(*(cores * number for number in efficiency))
    return Gain(quotient(point.simulated, one), efficiency, speed_up)


def print_table(parsed: Arguments, points: Sequence[Point]) -> None:
    """Prints a row for each method and number of workers."""
    print(
        f"\n{parsed.environment}, {parsed.envs_per_worker} x {parsed.t_max}, until the mean return of the last 100 "
        f"episodes reaches {parsed.solved_return:g}; interquartile mean over {parsed.seeds} seeds [95 % interval]\n"
        "data efficiency and speed-up: times those of the smallest number of workers; simulated: with a core for each"
    )
    for threads in (False, True) if parsed.threads else (False,):
        print(
            f"\n{'threads' if threads else 'simulated':<15} {'rate':>7} workers  solved  "
            f"{'steps':<29} {'data efficiency':<21} {'speed-up':<22}"
            + "steps/s staleness"
            * threads
        )
        for p in points:
            steps = p.steps_in(threads)
            solved = sum(step < parsed.max_steps for step in steps)
            found = gain(points, p, threads)
            rate = ""
            if threads and p.seconds and p.staleness:
                rate = f"{sum(steps) / sum(p.seconds):9,.0f} {np.mean(p.staleness):9.1f}"
            print(
                f"{_name(p.method):<15} {p.learning_rate:7g} {p.workers:7d} {solved:4d}/{parsed.seeds:<3d} "
                f"{_format(found.steps, ',.0f'):<29} {_format(found.efficiency, '.2f'):<21} "
                f"{_format(found.speed_up, '.2f'):<20}{rate}"
            )


def _format(value: Value, form: str) -> str:
    text = format(value.value, form)
    return text if np.isnan(value.low) else f"{text} [{value.low:{form}}, {value.high:{form}}]"


def draw(paths: Sequence[Path], parsed: Arguments, points: Sequence[Point]) -> None:
    """Draws data efficiency and speed-up over the number of workers, with a core for each and in threads."""
    panels_of = {"efficiency": "data efficiency", "speed_up": "speed-up, computed: a core each"}
    both = [(False, field, title) for field, title in panels_of.items()]
    kinds = [*both, (True, "speed_up", "speed-up, threads here")] if parsed.threads else both
    size = (0.4 + 2.4 * len(kinds), 2.9)
    with drawing(paths, 1, len(kinds), size, sharey=True) as (figure, (panels,)):
        for axes, (threads, field, title) in zip(panels, kinds, strict=True):
            for index, method in enumerate(parsed.methods):
                own = [p for p in points if p.method == method]
                value, low, high = zip(
                    *(getattr(gain(points, p, threads), field) for p in own), strict=True
                )
                colour, style = COLOURS[index % len(COLOURS)], STYLES[index % len(STYLES)]
                axes.plot(
                    parsed.workers, value, style, color=colour, markersize=4, label=_name(method)
                )
                axes.fill_between(parsed.workers, low, high, color=colour, alpha=0.15, linewidth=0)
                for p, y in zip(own, value, strict=True):
                    if max(p.steps_in(threads)) >= parsed.max_steps:
                        axes.plot(p.workers, y, style[0], color=colour, mfc="white", markersize=4)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks(parsed.workers, [str(workers) for workers in parsed.workers])
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_xlabel("workers")
            axes.set_title(title)
            axes.grid(axis="y", color="0.92", linewidth=0.8)
        panels[0].set_ylabel(f"times {parsed.workers[0]} worker's")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


if __name__ == "__main__":
    main()
