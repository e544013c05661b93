"""Pictures of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from a3c_jax.metrics import EpisodeLog


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last `window` values at each point; of all so far where there are fewer."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - window, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)


def learning_curve(
    path: Path,
    episodes: EpisodeLog,
    *,
    title: str,
    window: int = 100,
    solved: float | None = None,
    random_return: float | None = None,
    over_episodes: bool = False,
) -> None:
    """Draws every episode's return as a point, and their running mean as a line.

    Args:
      path: where the picture goes.
      episodes: what to draw.
      title: the picture's title.
      window: number of episodes in the running mean.
      solved: height of the line that marks the task as solved, if any.
      random_return: mean return of the random policy, if known.
      over_episodes: whether the horizontal axis counts episodes instead of environment steps.
    """
    count = len(episodes.episode_return)
    x = np.arange(1, count + 1) if over_episodes else episodes.environment_steps
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    workers = np.unique(episodes.worker)
    apart = 1 < len(workers) <= 4
    colours = ("tab:blue", "tab:orange", "tab:green", "tab:purple")
    for index, worker in enumerate(workers if apart else [None]):
        which = slice(None) if worker is None else episodes.worker == worker
        axes.scatter(
            x[which],
            episodes.episode_return[which],
            s=5,
            alpha=float(np.clip(800 / max(count, 1), 0.06, 0.4)),
            linewidths=0,
            color=colours[index],
            rasterized=True,
        )
        if apart:
            axes.scatter([], [], s=14, color=colours[index], label=f"episodes of worker {worker}")
        else:
            axes.scatter([], [], s=14, color=colours[index], label="episodes")
    if count:
        mean = running_mean(episodes.episode_return, window)
        axes.plot(x, mean, color="black", linewidth=1.8, label=f"mean of the last {window}")
    if solved is not None:
        axes.axhline(
            solved, color="tab:red", linestyle="--", linewidth=1, label=f"solved: {solved:g}"
        )
    if random_return is not None:
        label = f"random policy: {random_return:.1f}"
        axes.axhline(random_return, color="grey", linestyle=":", linewidth=1.2, label=label)
    axes.set_xlabel("episode" if over_episodes else "environment steps, all workers")
    axes.set_ylabel("episode return")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    if not over_episodes:
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    figure.savefig(path, dpi=130)
    plt.close(figure)


class Curves(NamedTuple):
    """Runs of one task that differ in their seeds.

    Attributes:
      title: the task's name.
      runs: the episodes of each.
      reference: a published return to show beside them, and its name; None shows none.
    """

    title: str
    runs: Sequence[EpisodeLog]
    reference: tuple[float, str] | None = None


def learning_curves(path: Path, panels: Sequence[Curves], *, points: int = 100) -> None:
    """Draws the return against the steps for several tasks: each seed as a thin line, their mean as a thick one.

    Args:
      path: where the picture goes.
      panels: the tasks.
      points: how many equal intervals of steps the episodes are averaged over.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.2 * rows), layout="constrained", squeeze=False
    )
    for axes, panel in zip(grid.flat, panels, strict=False):
        end = max(run.environment_steps[-1] for run in panel.runs)
        edges = np.linspace(0, end, points + 1)
        lines = np.array([_mean_in_intervals(run, edges) for run in panel.runs])
        for line in lines:
            axes.plot(edges[1:], line, color="tab:blue", linewidth=0.8, alpha=0.5)
        axes.plot(edges[1:], lines.mean(0), color="tab:blue", linewidth=2)
        if panel.reference is not None:
            value, name = panel.reference
            axes.axhline(
                value, color="grey", linestyle=":", linewidth=1.2, label=f"{name}: {value:g}"
            )
            axes.legend(frameon=False, fontsize=8)
        axes.set_title(panel.title)
        axes.set_xlabel("environment steps")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    for row in grid:
        row[0].set_ylabel("episode return")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _mean_in_intervals(run: EpisodeLog, edges: np.ndarray) -> np.ndarray:
    """The mean return of the episodes that ended in each interval; the one before where none did."""
    index = np.clip(np.searchsorted(edges, run.environment_steps, side="left") - 1, 0, None)
    count = np.bincount(index, minlength=len(edges) - 1)
    total = np.bincount(index, run.episode_return, minlength=len(edges) - 1)
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    for i in range(1, len(means)):
        if np.isnan(means[i]):
            means[i] = means[i - 1]
    return means


class Rate(NamedTuple):
    """Steps per second over some rounds."""

    median: float
    min: float
    max: float


class Comparison(NamedTuple):
    """A3C and the synchronous loop at the same work; the ratio is A3C's speed over the loop's."""

    workers: int
    envs_per_worker: int
    t_max: int
    asynchronous: Rate
    synchronous: Rate
    ratio: float


def throughput(path: Path, comparisons: Sequence[Comparison], *, title: str) -> None:
    """Draws steps per second of A3C and of the synchronous loop, a row for each case.

    Args:
      path: where the picture goes.
      comparisons: the cases; those of one `t_max` share a panel.
      title: the picture's title.
    """
    t_maxes = sorted({c.t_max for c in comparisons})
    rows = max(sum(c.t_max == t_max for c in comparisons) for t_max in t_maxes)
    figure, panels = plt.subplots(
        1, len(t_maxes), figsize=(2 + 4.6 * len(t_maxes), 1.7 + 0.42 * rows),
        sharex=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    styles = (
        ("asynchronous", "A3C, threads", {"marker": "o", "color": "tab:blue"}),
        (
            "synchronous",
            "synchronous A2C, one compiled loop (ratio: A3C over this)",
            {"marker": "D", "color": "tab:orange", "markerfacecolor": "white"},
        ),
    )
    for axes, t_max in zip(panels[0], t_maxes, strict=True):
        here = sorted(
            (c for c in comparisons if c.t_max == t_max),
            key=lambda c: (c.envs_per_worker, c.workers),
        )
        heights: list[float] = []
        for index, c in enumerate(here):
            apart = index > 0 and c.envs_per_worker != here[index - 1].envs_per_worker
            heights.append(heights[-1] + 1 + 0.6 * apart if heights else 0.0)
            ends = [c.asynchronous.median, c.synchronous.median]
            axes.plot(ends, [heights[-1]] * 2, color="lightgrey", linewidth=3, zorder=0)
            axes.text(
                1.01, heights[-1], f"{c.ratio:.2f}", transform=axes.get_yaxis_transform(),
                va="center", color="tab:blue" if c.ratio > 1 else "tab:orange",
            )  # fmt: skip
        axes.text(1.01, 1.01, "ratio", transform=axes.transAxes, va="bottom", fontsize="small")
        for field, label, style in styles:
            rates = [getattr(c, field) for c in here]
            medians = np.array([r.median for r in rates])
            errors = [medians - [r.min for r in rates], np.array([r.max for r in rates]) - medians]
            axes.errorbar(
                medians, heights, xerr=errors, linestyle="none", capsize=2, elinewidth=1,
                markersize=7, label=label, **style,
            )  # fmt: skip
        axes.set_yticks(
            heights,
            [
                f"{c.envs_per_worker} env{'s' * (c.envs_per_worker > 1)} × "
                f"{c.workers} worker{'s' * (c.workers > 1)}"
                for c in here
            ],
        )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.set_ylim(heights[-1] + 0.6, -0.6)
        axes.set_title(f"segments of {t_max} steps", fontsize="medium")
        axes.set_xlabel("environment steps per second")
        _tidy(axes, "x")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


COLOURS = {
    "step call": "tab:blue",
    "update": "tab:green",
    "lock held": "tab:orange",
    "waiting for the lock": "tab:red",
    "bookkeeping": "silver",
    "pull": "black",
}
"""Of a worker's activities in the timeline."""


class Lanes(NamedTuple):
    """What the workers of one run did.

    Attributes:
      title: what was run.
      workers: for each worker and activity, when: `[N, 2]`, begin and end in nanoseconds.
    """

    title: str
    workers: dict[int, dict[str, np.ndarray]]


def timeline(path: Path, rows: Sequence[Sequence[Lanes]], *, title: str, updates: int = 4) -> None:
    """Draws some milliseconds from the middle of each run: a lane for each worker, coloured by activity.

    Args:
      path: where the picture goes.
      rows: the runs. Those of a row show the same length of time.
      title: the picture's title.
      updates: about how many updates of the slowest worker to show.
    """
    columns = max(len(row) for row in rows)
    lanes = [max(len(run.workers) for run in row) for row in rows]
    figure, panels = plt.subplots(
        len(rows), columns, figsize=(7 * columns, 1.6 + sum(1.3 + 0.45 * n for n in lanes)),
        height_ratios=[2.2 + n for n in lanes], squeeze=False, layout="constrained",
    )  # fmt: skip
    for row, row_panels in zip(rows, panels, strict=True):
        length = max(
            float(np.median(np.diff(calls["step call"][:, 0]))) if len(calls["step call"]) > 1
            else float(np.ptp(calls["step call"]))
            for run in row for calls in run.workers.values()
        ) * updates  # fmt: skip
        for axes in row_panels[len(row) :]:
            axes.set_axis_off()
        for run, axes in zip(row, row_panels, strict=False):
            every = np.concatenate([calls["step call"].ravel() for calls in run.workers.values()])
            begin = float(np.median(every))
            for lane, activities in enumerate(run.workers.values()):
                for name, colour in COLOURS.items():
                    spans = activities[name]
                    seen = spans[(spans[:, 1] > begin) & (spans[:, 0] < begin + length)]
                    edges = (np.clip(seen, begin, begin + length) - begin) / 1e3
                    axes.broken_barh(
                        np.stack([edges[:, 0], edges[:, 1] - edges[:, 0]], axis=1),
                        (lane - 0.4, 0.8),
                        facecolors=colour,
                    )
            axes.set_xlim(0, length / 1e3)
            axes.set_ylim(max(len(other.workers) for other in row) - 0.4, -0.6)
            axes.set_yticks(range(len(run.workers)), [f"worker {w}" for w in run.workers])
            axes.set_title(run.title, fontsize="medium")
            axes.set_xlabel("microseconds")
            axes.spines[["top", "right"]].set_visible(False)
    handles: list[Any] = [plt.Rectangle((0, 0), 1, 1, color=c) for c in COLOURS.values()]
    figure.legend(handles, COLOURS, loc="outside lower center", ncols=len(COLOURS), frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


class Line(NamedTuple):
    """Steps per second over one factor.

    Attributes:
      label: what it shows, for the legend; None for none.
      x: the factor's values.
      rates: measured at each of them.
      model: predicted at each of them, if it was.
    """

    label: str | None
    x: Sequence[int]
    rates: Sequence[Rate]
    model: Sequence[float] | None = None


def scaling(path: Path, panels: Sequence[tuple[str, str, Sequence[Line]]], *, title: str) -> None:
    """Draws steps per second over one factor at a time, both on logarithmic axes.

    Args:
      path: where the picture goes.
      panels: for each factor its name, what is held fixed, and the lines.
      title: the picture's title.
    """
    columns = 2
    figure, grid = plt.subplots(
        -(-len(panels) // columns), columns, figsize=(11, 4 * -(-len(panels) // columns)),
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    rates = [rate for _, _, lines in panels for line in lines for rate in line.rates]
    lowest, highest = min(r.min for r in rates), max(r.max for r in rates)
    for axes, (factor, fixed, lines) in zip(grid.ravel(), panels, strict=False):
        for index, line in enumerate(lines):
            medians = np.array([r.median for r in line.rates])
            errors = [
                medians - [r.min for r in line.rates],
                np.array([r.max for r in line.rates]) - medians,
            ]
            axes.errorbar(
                line.x, medians, yerr=errors, marker="o", capsize=3, color=f"C{index}",
                label=line.label,
            )  # fmt: skip
            if line.model is not None:
                axes.plot(line.x, line.model, ":", color=f"C{index}", linewidth=1.5)
        if any(line.model is not None for line in lines):
            axes.plot([], [], ":", color="grey", label="the model, for this machine's cores")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        values = sorted({x for line in lines for x in line.x})
        axes.set_xticks(values, [f"{x:,}" for x in values])
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 3)))
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.yaxis.set_tick_params(labelleft=True)
        axes.set_ylim(lowest / 2, highest * 5)  # room for the legends
        axes.set_xlabel(factor)
        axes.set_ylabel("environment steps per second")
        axes.set_title(fixed, fontsize="medium")
        _tidy(axes, "y")
        if any(line.label for line in lines):
            axes.legend(frameon=False, fontsize="small", loc="upper left", ncols=2)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _tidy(axes: Any, axis: str) -> None:
    """A light grid along one axis, labelled as 10k and 1M."""
    getattr(axes, f"{axis}axis").set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    axes.grid(axis=axis, color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
