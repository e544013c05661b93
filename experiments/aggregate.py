"""What several runs reached together: their interquartile mean and its bootstrap interval, by rliable.

Agarwal et al. 2021 (arXiv:2108.13264) recommend both for reinforcement learning, where runs are few and some fail.
rliable is an extra, and it is imported only when there are runs enough for an interval.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

MIN_RUNS = 3
"""An interval is computed for at least so many runs. Two would say nothing about a third."""


class Aggregate(NamedTuple):
    """What several runs reached together, at each of several points.

    Attributes:
      name: what the value is: `IQM`, or `mean`.
      value: `[N]`; NaN where a run has no value.
      interval: its lower and its upper end, `[2, N]`; None if there is no interval.
    """

    name: str
    value: np.ndarray
    interval: np.ndarray | None = None


def mean(scores: np.ndarray) -> np.ndarray:
    """The mean over runs, `[runs, N] -> [N]`."""
    return scores.mean(axis=0)


def aggregate(
    scores: np.ndarray,
    *,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    resamples: int = 2_000,
) -> Aggregate:
    """The interquartile mean over runs, or another statistic, with its 95 % stratified bootstrap interval.

    The interval is computed for each point by itself, from resamples of the runs. With three or four runs it reaches
    from the lowest run to the highest. With few runs it contains the true value in fewer than 95 % of all cases.

    Args:
      scores: of each run at each point, `[runs, N]`; NaN where a run has no value.
      statistic: `mean`, or None for the interquartile mean.
      resamples: how often to draw as many runs as there are, with replacement. The draws are the same at each call.

    Returns:
      The statistic and its interval. If there are fewer than `MIN_RUNS` runs, or if rliable cannot be
      imported, the mean without an interval.
    """
    library = import_rliable() if len(scores) >= MIN_RUNS else None
    if library is None:
        return Aggregate("mean", mean(scores))
    statistic = statistic or interquartile_mean
    value, interval = np.full(scores.shape[1], np.nan), np.full((2, scores.shape[1]), np.nan)
    complete = np.isfinite(scores).all(axis=0)
    if complete.any():
        of_one_task = {"runs": scores[:, None, complete]}  # rliable wants [runs, tasks, points]
        state = np.random.get_state()
        np.random.seed(0)  # rliable 1.2 draws from here, whatever random_state it is given
        try:
            values, intervals = library.get_interval_estimates(
                of_one_task, lambda drawn: statistic(drawn[:, 0]), reps=resamples
            )
        finally:
            np.random.set_state(state)
        value[complete], interval[:, complete] = values["runs"], intervals["runs"]
    return Aggregate("mean" if statistic is mean else "IQM", value, interval)


def in_words(scores: Sequence[float]) -> str:
    """What several runs reached together, for people."""
    if not scores:
        return "-"
    together, digits = aggregate(np.array(scores)[:, None]), decimals(scores)
    text = f"{together.name} {together.value[0]:.{digits}f}"
    if together.interval is None:
        return text
    low, high = together.interval[:, 0]
    return f"{text}, 95 % interval {low:.{digits}f} to {high:.{digits}f}"


def decimals(returns: Any) -> int:
    """How many decimals returns are printed with: one, or two if all of them are small."""
    return 1 if np.max(np.abs(returns)) >= 10 else 2


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """The mean over runs without the lowest and the highest quarter of them.

    With fewer than four runs, none is left out. It is `rliable.metrics.aggregate_iqm` for many points at once.

    >>> interquartile_mean(np.array([[0.0], [1.0], [3.0], [100.0]]))
    array([2.])

    Args:
      scores: `[runs, N]`.

    Returns:
      `[N]`.
    """
    cut = len(scores) // 4
    return np.sort(scores, axis=0)[cut : len(scores) - cut].mean(axis=0)


@functools.cache
def import_rliable() -> Any:
    """The module `rliable.library`; None if it cannot be imported, which is said on stderr."""
    try:
        from rliable import library
    except Exception as error:  # its dependency arch raises a TypeError beside pandas 3
        print(
            f"rliable cannot be imported ({error}), so means are shown without intervals; "
            "run: pip install -e '.[rliable]'",
            file=sys.stderr,
        )
        return None
    return library
