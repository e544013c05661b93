"""Pictures of a run."""

from pathlib import Path

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
