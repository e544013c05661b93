"""What a run reports: exact counters, the log of every episode, and the sinks that show them."""

import json
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from a3c_jax.columns import Columns

Row = dict[str, float]


class EpisodeLog(NamedTuple):
    """Every episode that ended during a run, in the order of the updates that reported them.

    Attributes:
      worker: who played it, `[E]` int32.
      episode_return: the undiscounted sum of the environment's own rewards, `[E]` float64.
      length: its number of steps, `[E]` int32.
      environment_steps: steps of all workers together when it was reported, `[E]` int64.
      seconds: since the threads started, `[E]` float64.
    """

    worker: np.ndarray
    episode_return: np.ndarray
    length: np.ndarray
    environment_steps: np.ndarray
    seconds: np.ndarray


class Counters:
    """The exact totals of a run and its episodes. Written under the store's lock, so that they belong to its cut.

    Args:
      steps_per_update: environment steps that each update reports.
      window: number of episodes in the running mean.
    """

    def __init__(self, steps_per_update: int, window: int) -> None:
        self.updates = 0
        self.episodes = 0
        self.environment_steps = 0
        self.mean_return: float | None = None
        """Mean return of the last `window` episodes; None before there are so many."""
        self._steps_per_update = steps_per_update
        self._recent: deque[float] = deque(maxlen=window)
        self._staleness = 0
        self._max_staleness = 0
        self._metrics: Callable[[], dict[str, Any]] = dict
        self._started = time.perf_counter()
        self._last_row = (self._started, 0, 0, 0)
        self._reported = 0
        self._log = Columns(EpisodeLog, np.int32, np.float64, np.int32, np.int64, np.float64)

    def start_clock(self, seconds: float = 0.0) -> None:
        """Sets the clock to `seconds`."""
        self._started = time.perf_counter() - seconds
        self._last_row = (
            time.perf_counter(),
            self.environment_steps,
            self.updates,
            self._staleness,
        )

    @property
    def seconds(self) -> float:
        """Seconds on the clock."""
        return time.perf_counter() - self._started

    def restore(self, updates: int, staleness: np.ndarray, log: EpisodeLog, seconds: float) -> None:
        """Goes on from the totals of an earlier run: its updates, their staleness, its episodes, its clock."""
        self.updates = updates
        self.environment_steps = updates * self._steps_per_update
        self.episodes = self._reported = len(log.episode_return)
        self._staleness = int(staleness.sum())
        self._max_staleness = int(staleness.max(initial=0))
        self._log.extend(self.episodes, *log)
        self._recent.extend(log.episode_return[-(self._recent.maxlen or 0) :].tolist())
        self._update_mean_return()
        self.start_clock(seconds)

    def record(
        self,
        worker: int,
        staleness: int,
        metrics: Callable[[], dict[str, Any]],
        returns: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        """Counts one update and the episodes that ended in its segment. Metrics are read when a row is made."""
        self.updates += 1
        self.environment_steps += self._steps_per_update
        self._staleness += staleness
        self._max_staleness = max(self._max_staleness, staleness)
        self._metrics = metrics
        if not returns.size:
            return
        count = returns.size
        seconds = time.perf_counter() - self._started
        self._log.extend(count, worker, returns, lengths, self.environment_steps, seconds)
        self.episodes += count
        self._recent.extend(returns.tolist())
        self._update_mean_return()

    def _update_mean_return(self) -> None:
        if len(self._recent) == self._recent.maxlen:
            self.mean_return = sum(self._recent) / len(self._recent)

    def row(self) -> Row:
        """The totals so far and the rates since the last call, as one row for the sinks."""
        now, steps, updates, staleness = (
            time.perf_counter(), self.environment_steps, self.updates, self._staleness,
        )  # fmt: skip
        then, steps_then, updates_then, staleness_then = self._last_row
        self._last_row = (now, steps, updates, staleness)
        recent = self._recent.copy()  # at once: another thread may append
        row = {
            "seconds": now - self._started,
            "environment_steps": steps,
            "episodes": self.episodes,
            "updates": updates,
            "steps_per_second": (steps - steps_then) / max(now - then, 1e-9),
            "mean_return": sum(recent) / len(recent) if recent else float("nan"),
            "staleness": (staleness - staleness_then) / max(updates - updates_then, 1),
            "max_staleness": self._max_staleness,
        }
        return row | {name: float(value) for name, value in self._metrics().items()}

    def new_episodes(self) -> EpisodeLog:
        """The episodes since the last call."""
        episodes = self._log.rows(self._reported)
        self._reported += len(episodes.worker)
        return episodes

    def log(self) -> EpisodeLog:
        """The log of episodes so far."""
        return self._log.rows()


class Sink(Protocol):
    """Somewhere to send rows to. `train` calls a sink from one thread only."""

    def write(self, row: Row, episodes: EpisodeLog) -> None:
        """Takes the totals so far and the episodes since the last call: a few times a second, and at the end."""
        ...

    def close(self) -> None:
        """Called once, however the run ended."""
        ...


class JsonLines:
    """Appends each row to a file as one JSON object a line; NaN and infinity become null."""

    def __init__(self, path: str | Path) -> None:
        self._file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, row: Row, episodes: EpisodeLog) -> None:
        values = {k: v if np.isfinite(v) else None for k, v in row.items()}
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class ProgressBar:
    """A progress bar over environment steps, with rates, episodes, mean return, updates and staleness.

    Args:
      max_steps: where the bar is full; None shows no bar, only the numbers.
      window: number of episodes in the mean, for the label.
      **options: passed on to tqdm.
    """

    def __init__(self, max_steps: int | None, window: int = 100, **options: Any) -> None:
        self._window = window
        form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}"
        self._bar = tqdm(
            total=max_steps,
            unit_scale=True,
            dynamic_ncols=True,
            bar_format=form if max_steps else "{desc}: {n_fmt} steps{postfix}",
            **options,
        )

    def write(self, row: Row, episodes: EpisodeLog) -> None:
        self._bar.set_postfix_str(
            f"{row['environment_steps'] / row['seconds']:,.0f} steps/s, "
            f"{row['episodes']:,} episodes, mean of last {self._window} {row['mean_return']:.1f}, "
            f"{row['updates']:,} updates, staleness {row['staleness']:.2f}",
            refresh=False,
        )
        self._bar.n = row["environment_steps"]
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()
