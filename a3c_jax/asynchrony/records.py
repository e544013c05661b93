"""What a run notes: who made each update and from which version, and every episode that ended."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from a3c_jax.asynchrony.logs import Log

_PART = 1 << 18


class Schedule(NamedTuple):
    """Which worker made each update, and from which version: row k led from version k to version k + 1.

    Attributes:
      worker: `[updates]` int32.
      pulled_version: `[updates]` int64. The staleness of update k is k minus this.
    """

    worker: np.ndarray
    pulled_version: np.ndarray

    @property
    def staleness(self) -> np.ndarray:
        """How many updates others applied between each update's pull and its apply, `[updates]` int64."""
        return np.arange(len(self.worker)) - self.pulled_version

    def parts(self, begin: int = 0) -> Iterator[tuple["Schedule", np.ndarray]]:
        """The updates from `begin` on in parts, with the staleness of each: a schedule may be larger than the memory."""
        for first in range(begin, len(self.worker), _PART):
            part = Schedule(*(np.asarray(column)[first : first + _PART] for column in self))
            yield part, np.arange(first, first + len(part.worker)) - part.pulled_version

    def summarize_staleness(self) -> tuple[int, int]:
        """The sum of the staleness of all updates, and the largest."""
        total = largest = 0
        for _, staleness in self.parts():
            total, largest = total + int(staleness.sum()), max(largest, int(staleness.max()))
        return total, largest

    def check(self, num_workers: int) -> None:
        """Checks that `num_workers` workers can have made these updates.

        Raises:
          ValueError: if the columns differ in length, or if a row names a worker or a version that
            cannot exist.
        """
        worker, pulled = np.asarray(self.worker), np.asarray(self.pulled_version)
        if worker.ndim != 1 or worker.shape != pulled.shape:
            raise ValueError(
                f"a schedule must be two vectors of equal length, got {worker.shape} and {pulled.shape}; "
                "give a worker and a version for each update."
            )
        if not worker.size:
            return
        if worker.min() < 0 or worker.max() >= num_workers:
            raise ValueError(
                f"schedule.worker must lie in [0, {num_workers - 1}], got {worker.min()} to "
                f"{worker.max()}; give the num_workers of the run that made it."
            )
        if any(part.pulled_version.min() < 0 or late.min() < 0 for part, late in self.parts()):
            raise ValueError(
                "schedule.pulled_version must name a version that exists when the update is made: at least 0, "
                "and at most k in row k; give the schedule from the run's first update on."
            )


def make_schedule_log() -> Log[Schedule]:
    """A log of updates, without any."""
    return Log(Schedule, np.int32, np.int64)


class EpisodeLog(NamedTuple):
    """Every episode that ended during a run, in the order of the updates that reported them.

    Attributes:
      worker: who played it, `[E]` int32.
      episode_return: the undiscounted sum of the environment's own rewards, `[E]` float64.
      length: its number of steps, `[E]` int32.
      environment_steps: steps of all workers together when it was reported, `[E]` int64.
      seconds: of training until then, those before a resume included, `[E]` float64.
    """

    worker: np.ndarray
    episode_return: np.ndarray
    length: np.ndarray
    environment_steps: np.ndarray
    seconds: np.ndarray


def make_episode_log() -> Log[EpisodeLog]:
    """A log of episodes, without any."""
    return Log(EpisodeLog, np.int32, np.float64, np.int32, np.int64, np.float64)
