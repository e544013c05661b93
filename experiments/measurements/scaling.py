"""Measure how the speed of A3C changes with its size: `python -m experiments.measurements.scaling`.

It varies one factor at a time: workers, environments per worker, steps in a segment, and the width of the hidden
layer. It draws environment steps per second over each. The dotted lines over the number of workers are what one
worker makes, times the number of workers that have a core to themselves: what would be reached if workers did not
disturb each other. It leaves `scaling.json` and `scaling.png` in its run folder.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from a3c_jax.config import A3CConfig, available_cores
from experiments.command_line import exit_on_bad_input, parse
from experiments.compilation_cache import CompilationCache
from experiments.run_folder import make_run_dir, write_json

DEFAULTS = A3CConfig()

Point = tuple[int, int, int, int]  # workers, environments per worker, t_max, width
Lines = dict[str, list[Point]]  # by a label for the legend

AXES = {
    "workers": (0, "worker threads (legend: environments × steps)"),
    "envs": (1, f"environments per worker (segments of {DEFAULTS.t_max} steps)"),
    "t_max": (2, f"steps in a segment ({DEFAULTS.envs_per_worker} environments)"),
    "width": (3, "units of the hidden layer"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to vary, and how long to measure."""

    workers: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of worker threads."""
    segments: tuple[str, ...] = ("1x5", "8x5", "8x16", "64x20")
    """Segments (environments x steps) to vary the number of workers at."""
    envs: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    """Numbers of environments per worker, with one worker and with the most that have a core each."""
    t_max: tuple[int, ...] = (5, 16, 32, 64, 128)
    """Numbers of steps in a segment, likewise."""
    width: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Widths of the hidden layer, likewise."""
    rounds: int = 3
    """How often each point is measured."""
    seconds: float = 1.0
    """About how long each measurement runs."""
    run_dir: Path | None = None
    """Folder for the results, which must not exist yet. By default a new one under runs/."""


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measures, prints, writes; returns the run folder."""
    with exit_on_bad_input():
        parsed = parse("measurements.scaling", Arguments, __doc__, arguments)
        from experiments.measurements import timing  # it loads JAX, --help does not

        sweeps = plan(parsed, [timing.parse_segment(text, "segments") for text in parsed.segments])
        lines = [line for lines in sweeps.values() for line in lines.values()]
        points = list(dict.fromkeys(point for line in lines for point in line))
        timing.check(parsed, points if all(lines) else [])
        run_dir = make_run_dir("scaling", parsed.run_dir)
    CompilationCache().use()
    surroundings = timing.surroundings()
    print(f"compiling for {len(points)} points", file=sys.stderr, flush=True)
    runs = {p: timing.asynchronous(timing.program(*p[:3], hidden_sizes=(p[3],))) for p in points}
    measured = timing.interleave(runs, parsed.rounds, parsed.seconds)
    summaries = {point: timing.summarize(rounds) for point, rounds in measured.items()}
    results = {
        "surroundings": surroundings,
        "options": {k: v for k, v in dataclasses.asdict(parsed).items() if k != "run_dir"},
        "sweeps": sweeps,
        "points": [
            {"workers": w, "envs_per_worker": n, "t_max": t, "width": width, **summary}
            for (w, n, t, width), summary in summaries.items()
        ],
    }
    write_json(run_dir / "scaling.json", results)
    rates = {point: summary["steps_per_second"] for point, summary in summaries.items()}
    draw(run_dir / "scaling.png", sweeps, rates)
    print_table(sweeps, rates)
    print(f"\nrun folder: {run_dir}")
    return run_dir


def plan(parsed: Arguments, segments: list[tuple[int, int]]) -> dict[str, Lines]:
    """The lines to measure for each factor, each a label and its points."""
    envs, t_max, (width,) = DEFAULTS.envs_per_worker, DEFAULTS.t_max, DEFAULTS.hidden_sizes
    few_and_many = sorted({1, min(max(parsed.workers), available_cores())})
    labels = {w: f"{w} worker{'s' * (w > 1)}" for w in few_and_many}

    def for_each(points: Callable[[int], list[Point]]) -> Lines:
        return {label: points(workers) for workers, label in labels.items()}

    return {
        "workers": {
            f"{n} × {t}": [(w, n, t, width) for w in sorted(set(parsed.workers))]
            for n, t in segments
        },
        "envs": for_each(lambda w: [(w, n, t_max, width) for n in sorted(set(parsed.envs))]),
        "t_max": for_each(lambda w: [(w, envs, t, width) for t in sorted(set(parsed.t_max))]),
        "width": for_each(lambda w: [(w, envs, t_max, n) for n in sorted(set(parsed.width))]),
    }


def print_table(sweeps: dict[str, Lines], rates: dict[Point, dict[str, float]]) -> None:
    """Prints the median of each point: a table for each factor, a row for each line."""
    print("\nCartPole-v1, environment steps/s, medians")
    for factor, lines in sweeps.items():
        axis, _ = AXES[factor]
        header = [point[axis] for point in next(iter(lines.values()))]
        print(f"\n{factor:16}" + "".join(f"{value:12,}" for value in header))
        for label, points in lines.items():
            print(f"{label:16}" + "".join(f"{rates[p]['median']:12,.0f}" for p in points))


def draw(path: Path, sweeps: dict[str, Lines], rates: dict[Point, dict[str, float]]) -> None:
    """Draws steps per second over one factor at a time, on logarithmic axes."""
    import matplotlib.pyplot as plt

    from experiments.measurements.simulated import COLOURS, STYLES
    from experiments.measurements.timing import error_bars, tidy

    figure, grid = plt.subplots(2, 2, figsize=(11, 8), sharey=True, layout="constrained")
    for axes, (factor, lines) in zip(grid.ravel(), sweeps.items(), strict=True):
        axis, title = AXES[factor]
        for index, (label, points) in enumerate(lines.items()):
            colour, style = COLOURS[index % len(COLOURS)], STYLES[index % len(STYLES)]
            x = [point[axis] for point in points]
            medians, errors = error_bars([rates[point] for point in points])
            axes.errorbar(x, medians, errors, fmt=style, capsize=3, color=colour, label=label)
            if factor == "workers":
                busy = np.minimum(x, available_cores())
                axes.plot(x, medians[0] * busy / busy[0], ":", color=colour)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(x, [f"{value:,}" for value in x])
        axes.set_xlabel(title)
        axes.set_ylabel("environment steps per second")
        tidy(axes, "y")
        axes.legend(frameon=False, fontsize="small", ncols=2, loc="upper left")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, 3 * top)  # room for the legends
    figure.suptitle(f"A3C on CartPole-v1, {available_cores()} cores")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
