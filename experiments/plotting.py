"""Learning curves: of one run, and of groups of runs."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from a3c_jax import EpisodeLog
from experiments.aggregate import aggregate

_MAX_POINTS = 50_000
"""How many episodes a picture shows at most: a run of days may have more of them than the memory holds."""


def running_mean(values: np.ndarray, window: int, every: int = 1) -> np.ndarray:
    """The mean of the last `window` values, or of all so far if there are fewer, at every so many points."""
    if every > 1:  # in constant memory
        points = range(1, len(values) + 1, every)
        return np.array([values[max(0, end - window) : end].mean() for end in points])
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

    Of a great many episodes it draws every second, third and so on.

    Args:
      path: where the picture goes.
      episodes: what to draw.
      title: the picture's title.
      window: number of episodes in the running mean.
      solved: height of the line that marks the task as solved, if any.
      random_return: mean return of the random policy, if known.
      over_episodes: whether the horizontal axis counts episodes instead of environment steps.
    """
    every = -(-len(episodes.episode_return) // _MAX_POINTS) or 1
    mean = running_mean(episodes.episode_return, window, every)
    episodes = EpisodeLog(*(column[::every] for column in episodes))
    returns = episodes.episode_return
    x = np.arange(len(returns)) * every + 1 if over_episodes else episodes.environment_steps
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    alpha = float(np.clip(800 / max(len(returns), 1), 0.06, 0.4))
    for (label, which), colour in zip(_by_worker(episodes).items(), COLOURS, strict=False):
        axes.scatter(
            x[which], returns[which], s=5, alpha=alpha, linewidths=0, color=colour, rasterized=True
        )
        axes.scatter([], [], s=14, color=colour, label=label)  # for the legend: not transparent
    if len(returns):
        axes.plot(x, mean, color="black", linewidth=1.8, label=f"mean of the last {window}")
    if solved is not None:
        label = f"solved: {solved:g}"
        axes.axhline(solved, color="tab:red", linestyle="--", linewidth=1, label=label)
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


def _by_worker(episodes: EpisodeLog) -> dict[str, Any]:
    """Which episodes to draw in one colour: those of each worker, or all if there are many workers."""
    workers = np.unique(episodes.worker)
    if not 1 < len(workers) <= 4:
        return {"episodes": slice(None)}
    return {f"episodes of worker {w}": episodes.worker == w for w in workers}


COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:red", "tab:brown", "tab:pink")


class Panel(NamedTuple):
    """Runs of one environment.

    Attributes:
      groups: the episodes of the runs that differ in nothing but their seeds, by a label for the legend.
      reference: a published return to show beside them, and its name; None shows none.
    """

    groups: Mapping[str, Sequence[EpisodeLog]]
    reference: tuple[float, str] | None = None


def learning_curves(path: Path, panels: Mapping[str, Panel], *, points: int = 100) -> None:
    """Draws the return against the steps: each run as a thin line, and its group as a thick one with a band.

    The thick line is the interquartile mean of the runs and the band its 95 % bootstrap interval, or the mean without
    a band (`experiments.aggregate.aggregate`). The legend says which. A label has the same colour in all panels.

    Args:
      path: where the picture goes.
      panels: what to draw, by the name of the environment.
      points: how many equal intervals of steps the episodes are averaged over.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, layout="constrained", squeeze=False)
    labels = list(dict.fromkeys(label for panel in panels.values() for label in panel.groups))
    for axes, (title, panel) in zip(grid.flat, panels.items(), strict=False):
        edges = np.linspace(0, _last_step(panel), points + 1)
        for label, runs in panel.groups.items():
            _draw_group(axes, label, runs, edges, COLOURS[labels.index(label) % len(COLOURS)])
        if panel.reference is not None:
            value, name = panel.reference
            label = f"{name}: {value:g}"
            axes.axhline(value, color="grey", linestyle=":", linewidth=1.2, label=label)
        _draw_legend(axes)
        axes.set_title(title)
        axes.set_xlabel("environment steps")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    for row in grid:
        row[0].set_ylabel("episode return")
    legends = [axes.get_legend().get_texts() for axes in grid.flat if axes.get_legend()]
    lines = max(sum(t.get_text().count("\n") + 1 for t in texts) for texts in legends)
    figure.set_size_inches(4.6 * columns, (3.6 + 0.15 * lines) * rows)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_legend(axes: Any) -> None:
    """Draws the legend below a panel, where it covers no curve."""
    below_the_label = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "borderaxespad": 5.0}
    axes.legend(frameon=False, fontsize=8, **below_the_label)


def _last_step(panel: Panel) -> int:
    return max(run.environment_steps[-1] for runs in panel.groups.values() for run in runs)


def _draw_group(
    axes: Any, label: str, runs: Sequence[EpisodeLog], edges: np.ndarray, colour: str
) -> None:
    """Draws the runs of a group, and what they reached together as far as the shortest of them goes."""
    lines = np.array([mean_in_intervals(run, edges) for run in runs])
    together = aggregate(lines)
    legend = "1 run" if len(runs) == 1 else f"{together.name} of {len(runs)} runs (thin: each)"
    if together.interval is not None:
        legend += ", 95 % interval"
        axes.fill_between(edges[1:], *together.interval, color=colour, alpha=0.2, linewidth=0)
    for line in lines:
        axes.plot(edges[1:], line, color=colour, linewidth=0.6, alpha=0.4)
    legend = textwrap.fill(f"{label}: {legend}" if label else legend, 50)
    axes.plot(edges[1:], together.value, color=colour, linewidth=2, label=legend)


def mean_in_intervals(run: EpisodeLog, edges: np.ndarray) -> np.ndarray:
    """The mean return of a run's episodes in each interval of environment steps.

    Args:
      run: the episodes.
      edges: the intervals' ends, rising, `[N + 1]`. An episode belongs to the interval in which it ended.

    Returns:
      The means, `[N]`. If no episode ended in an interval, it has the mean of the one before. Before the run's
      first episode and after the interval of its last one they are NaN: a line ends where its run ended.
    """
    index = np.clip(np.searchsorted(edges, run.environment_steps, side="left") - 1, 0, None)
    count = np.bincount(index, minlength=len(edges) - 1)
    total = np.bincount(index, run.episode_return, minlength=len(edges) - 1)
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    for i in range(1, index[-1]):
        if count[i] == 0:
            means[i] = means[i - 1]
    return means
