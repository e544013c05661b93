"""Schedules made without a run: who makes each update, and how stale it is."""

import heapq
from collections.abc import Sequence

import numpy as np

from a3c_jax.asynchrony.records import Schedule
from a3c_jax.rules import check_int


def round_robin(num_workers: int, num_updates: int) -> Schedule:
    """A schedule in which workers take turns: each pulls right after its own update, and waits for the others.

    The staleness is `num_workers - 1` from the second round on. In the first round all start from version 0.

    >>> round_robin(3, 5).pulled_version.tolist()
    [0, 0, 0, 1, 2]

    Args:
      num_workers: W, at least 1.
      num_updates: how many updates to make.

    Raises:
      TypeError: if a number is no integer.
      ValueError: if a number is too small.
    """
    return fixed_delay(
        check_int("num_workers", num_workers, 1) - 1, num_updates, num_workers=num_workers
    )


def fixed_delay(delay: int, num_updates: int, num_workers: int = 1) -> Schedule:
    """A schedule in which every update is computed from the parameters of `delay` updates ago.

    The first updates start from version 0, because there are not yet so many versions.

    >>> fixed_delay(2, 5).pulled_version.tolist()
    [0, 0, 0, 1, 2]

    Args:
      delay: the staleness, at least 0. One worker with delay 0 is plain training.
      num_updates: how many updates to make.
      num_workers: workers that take turns; each has its own environments.
    """
    check_int("delay", delay, 0)
    k = np.arange(check_int("num_updates", num_updates, 1))
    worker = k % check_int("num_workers", num_workers, 1)
    return Schedule(worker.astype(np.int32), np.maximum(k - delay, 0))


def random_delays(
    probabilities: Sequence[float] | np.ndarray,
    num_updates: int,
    rng: np.random.Generator,
    num_workers: int = 1,
) -> Schedule:
    """A schedule in which the staleness of every update is drawn at random.

    The first updates are less stale if there are not yet so many versions. To mimic a run, give its histogram:
    `random_delays(np.bincount(result.schedule.staleness), ...)`.

    Args:
      probabilities: of the delays 0, 1, 2 and so on, `[D]`. Their sum need not be 1.
      num_updates: how many updates to make.
      rng: where the draws come from.
      num_workers: workers that take turns; each has its own environments.

    Raises:
      ValueError: if the probabilities are not a vector of finite numbers >= 0 with a positive sum.
    """
    weights = np.asarray(probabilities, np.float64)
    if weights.ndim != 1 or not np.all(np.isfinite(weights) & (weights >= 0)) or not weights.any():
        raise ValueError(
            f"probabilities must be a vector of finite numbers >= 0, not all 0, got {probabilities}; "
            "give one for each delay from 0 on."
        )
    now, _ = fixed_delay(0, num_updates, num_workers)
    delays = rng.choice(len(weights), size=num_updates, p=weights / weights.sum())
    return Schedule(now, np.maximum(np.arange(num_updates) - delays, 0))


def straggler(num_workers: int, slowness: float, num_updates: int) -> Schedule:
    """A schedule in which worker 0 takes `slowness` times as long for a segment as each of the others.

    No worker waits for another. If several end a segment at the same time, the one with the lowest number
    updates first, so that slowness 1 is `round_robin`. The straggler's updates are
    `slowness * (num_workers - 1)` updates stale, and the others' about `num_workers - 2 + 1 / slowness`.

    >>> straggler(2, 2.0, 6).worker.tolist(), straggler(2, 2.0, 6).pulled_version.tolist()
    ([1, 0, 1, 1, 0, 1], [0, 0, 1, 3, 2, 4])

    Args:
      num_workers: W, at least 1.
      slowness: how many times slower worker 0 is, at least 1.
      num_updates: how many updates to make.

    Raises:
      ValueError: if `slowness` is not a finite number >= 1.
    """
    check_int("num_workers", num_workers, 1)
    check_int("num_updates", num_updates, 1)
    if not 1 <= slowness < np.inf:
        raise ValueError(
            f"slowness must be >= 1 and finite, got {slowness}; use 1 for no straggler."
        )
    duration = np.ones(num_workers)
    duration[0] = slowness
    segments = np.ones(num_workers, np.int64)  # each worker's so far, the running one included
    ends = [(duration[w], w) for w in range(num_workers)]
    heapq.heapify(ends)
    pulled = np.zeros(num_workers, np.int64)
    schedule = Schedule(np.zeros(num_updates, np.int32), np.zeros(num_updates, np.int64))
    for k in range(num_updates):
        _, worker = heapq.heappop(ends)
        schedule.worker[k], schedule.pulled_version[k] = worker, pulled[worker]
        pulled[worker] = k + 1
        segments[worker] += 1
        heapq.heappush(ends, (segments[worker] * duration[worker], worker))
    return schedule
