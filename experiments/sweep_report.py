"""What the runs of a sweep reached: a table, and a picture with a curve for each configuration."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from a3c_jax import EpisodeLog, find_checkpoint
from experiments.aggregate import in_words
from experiments.plotting import Panel, learning_curves
from experiments.run_folder import read_json
from experiments.sweep_processes import Run

COLUMNS = ["configuration", "runs", "failed", "solved", "steps to solved", "return of the last 100 episodes"]  # fmt: skip


def table(runs: Sequence[Run]) -> str:
    """A row for each configuration: how many runs came to their end, failed and were solved, and what they reached.

    The steps to solved are the median over all runs. Runs that were not solved, or failed, count as later than all
    others, so that there is no median if half of the runs are such.
    """
    rows = [COLUMNS]
    for label, group in _by_label(runs).items():
        ended = [run for run in group if run.has_ended]
        failed = sum(run.has_failed for run in group)
        steps = [_steps_to_solved(run) for run in ended] + [math.inf] * failed
        median = float(np.median(steps)) if steps else math.inf
        solved = "-" if group[0].config.solved_return is None else str(np.isfinite(steps).sum())
        last = [_episodes(run).episode_return[-100:] for run in ended]
        rows.append(
            [
                *(label, str(len(ended)), str(failed), solved),
                f"{median:,.0f}" if math.isfinite(median) else "-",
                in_words([float(returns.mean()) for returns in last if len(returns)]),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def draw(runs: Sequence[Run], path: Path) -> bool:
    """Draws the learning curves of all runs that came to their end, with a panel for each environment.

    Returns:
      Whether there was anything to draw.
    """
    panels: dict[str, Any] = {}
    for label, group in _by_label(runs).items():
        episodes = [_episodes(run) for run in group if run.has_ended]
        episodes = [log for log in episodes if len(log.episode_return)]
        if episodes:
            panels.setdefault(group[0].config.environment, {})[label] = episodes
    if panels:
        learning_curves(path, {name: Panel(groups) for name, groups in panels.items()})
    return bool(panels)


def _by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def _steps_to_solved(run: Run) -> float:
    summary = read_json(run.folder / "summary.json") or {}
    return summary["environment_steps"] if summary.get("stop_reason") == "solved" else math.inf


def _episodes(run: Run) -> EpisodeLog:
    return find_checkpoint(run.folder).episodes
