"""What a run reports: exact counters, the log of every episode, and the sinks that show them."""

import json
import time
from collections import deque
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from a3c_jax.asynchrony.parameters import Update
from a3c_jax.asynchrony.tables import Table

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


class Totals(NamedTuple):
    """The counters of a run as of one update.

    Attributes:
      updates: how many updates were made.
      environment_steps: how many steps were played for them, all workers together.
      episodes: how many episodes ended.
      staleness: the sum of the updates' staleness.
      max_staleness: the largest one.
    """

    updates: int = 0
    environment_steps: int = 0
    episodes: int = 0
    staleness: int = 0
    max_staleness: int = 0


class Counters:
    """The exact totals of a run, and its episodes.

    Updates are counted under the store's lock, so that the totals belong to the same moment as the
    parameters. They are replaced as a whole, so that a row read from another thread is consistent.

    Args:
      steps_per_update: environment steps that each update reports.
      window: number of episodes in the running mean.
      updates_per_row: if given, a row is made after every so many updates, to be taken with `take_rows`.

    Raises:
      ValueError: if `updates_per_row` is less than 1.
    """

    def __init__(
        self, steps_per_update: int, window: int, updates_per_row: int | None = None
    ) -> None:
        if updates_per_row is not None and updates_per_row < 1:
            raise ValueError(
                f"updates_per_row must be >= 1, got {updates_per_row}; use None for rows by seconds."
            )
        self._updates_per_row = updates_per_row
        self._rows: deque[tuple[Row, EpisodeLog]] = deque()
        self.totals = Totals()
        self.mean_return: float | None = None
        """Mean return of the last `window` episodes; None before there are so many."""
        self._steps_per_update = steps_per_update
        self._recent: deque[float] = deque(maxlen=window)
        self._last_report: Any = None
        self._started = time.perf_counter()
        self._last_row = (self._started, self.totals)
        self._num_written = 0
        self._log = Table(EpisodeLog, np.int32, np.float64, np.int32, np.int64, np.float64)

    def start_clock(self, seconds: float = 0.0) -> None:
        """Sets the clock to `seconds`."""
        now = time.perf_counter()
        self._started = now - seconds
        self._last_row = (now, self.totals)

    @property
    def seconds(self) -> float:
        """Seconds on the clock."""
        return time.perf_counter() - self._started

    def restore(self, updates: int, staleness: np.ndarray, log: EpisodeLog, seconds: float) -> None:
        """Goes on from an earlier run.

        Args:
          updates: how many updates it made.
          staleness: of each of them, `[updates]`.
          log: its episodes.
          seconds: what its clock showed.
        """
        self.totals = Totals(
            updates,
            updates * self._steps_per_update,
            len(log.worker),
            int(staleness.sum()),
            int(staleness.max(initial=0)),
        )
        self._num_written = self.totals.episodes
        self._log.extend(self.totals.episodes, *log)
        self._recent.extend(log.episode_return[-(self._recent.maxlen or 0) :].tolist())
        self._update_mean_return()
        self.start_clock(seconds)

    def count(self, update: Update, report: Any) -> None:
        """Counts one update and the episodes that ended in its segment.

        Args:
          update: the update.
          report: what its segment reported. The metrics in it are read when a row is made.
        """
        before = self.totals
        num_episodes = int(report.num_episodes)
        self.totals = Totals(
            before.updates + 1,
            before.environment_steps + self._steps_per_update,
            before.episodes + num_episodes,
            before.staleness + update.staleness,
            max(before.max_staleness, update.staleness),
        )
        self._last_report = report
        if num_episodes:
            self._log_episodes(update.worker, report.episodes)
        if self._updates_per_row is not None and not self.totals.updates % self._updates_per_row:
            self._rows.append((self.row(), self.new_episodes()))

    def _log_episodes(self, worker: int, episodes: Any) -> None:
        returns, lengths = episodes
        steps, seconds = self.totals.environment_steps, self.seconds
        self._log.extend(len(returns), worker, returns, lengths, steps, seconds)
        self._recent.extend(returns.tolist())
        self._update_mean_return()

    def _update_mean_return(self) -> None:
        if len(self._recent) == self._recent.maxlen:
            self.mean_return = sum(self._recent) / len(self._recent)

    def row(self) -> Row:
        """The totals so far and the rates since the last call, as one row for the sinks."""
        now, totals, report = time.perf_counter(), self.totals, self._last_report
        (then, before), self._last_row = self._last_row, (now, totals)
        recent = self._recent.copy()  # in one go, because another thread may append
        updates = totals.updates - before.updates
        steps = totals.environment_steps - before.environment_steps
        row = {
            "seconds": now - self._started,
            "environment_steps": totals.environment_steps,
            "episodes": totals.episodes,
            "updates": totals.updates,
            "steps_per_second": steps / max(now - then, 1e-9),
            "mean_return": sum(recent) / len(recent) if recent else float("nan"),
            "staleness": (totals.staleness - before.staleness) / max(updates, 1),
            "max_staleness": totals.max_staleness,
        }
        return row | ({} if report is None else segment_metrics(report))

    def take_rows(self, *, last: bool = False) -> list[tuple[Row, EpisodeLog]]:
        """The rows to send now, each with the episodes since the one before it.

        Args:
          last: whether the run has ended, so that there has to be a row of its last update.
        """
        rows = [self._rows.popleft() for _ in range(len(self._rows))]
        if self._updates_per_row is None or (last and self._last_row[1] != self.totals):
            rows.append((self.row(), self.new_episodes()))
        return rows

    def new_episodes(self) -> EpisodeLog:
        """The episodes since the last call."""
        episodes = self._log.rows(self._num_written)
        self._num_written += len(episodes.worker)
        return episodes

    def log(self) -> EpisodeLog:
        """The log of episodes so far."""
        return self._log.rows()


def segment_metrics(report: Any) -> dict[str, float]:
    """The metrics of a segment's report, by name, as Python numbers."""
    return {name: float(value) for name, value in report.metrics.items()}


class Report:
    """What a segment reports, as a run reads it.

    The episodes that ended are read at once: a worker makes its report before it takes the store's lock, so
    that no other worker waits for it. The metrics are read only if somebody asks for them.

    Args:
      statistics: what the worker step returned, `a3c_jax.worker.Statistics`.

    Attributes:
      num_episodes: how many episodes ended.
      episodes: their returns and their lengths, two vectors; None if there are none.
    """

    __slots__ = ("_statistics", "episodes", "num_episodes")

    def __init__(self, statistics: Any) -> None:
        self._statistics = statistics
        self.num_episodes = int(statistics.num_episodes)
        self.episodes: tuple[np.ndarray, np.ndarray] | None = None
        if self.num_episodes:
            ended, returns, lengths = map(np.asarray, statistics.episodes)
            self.episodes = returns[ended], lengths[ended]

    @property
    def metrics(self) -> Any:
        """The metrics of the segment, by name."""
        return self._statistics.metrics


class Sink(Protocol):
    """Somewhere to send rows to. `train` calls a sink from one thread only."""

    def write(self, row: Row, episodes: EpisodeLog) -> None:
        """Takes the totals so far and the episodes since the last call.

        It is called a few times a second, and once at the end.
        """
        ...

    def close(self) -> None:
        """Called once, however the run ended."""
        ...


class JsonLines:
    """Appends each row to a file as one JSON object a line; NaN and infinity become null.

    Args:
      path: the file. It is made if it does not exist.
    """

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
      max_steps: where the bar is full; None shows the numbers without a bar.
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
        self._bar.update(row["environment_steps"] - self._bar.n)  # shown a few times a second

    def close(self) -> None:
        self._bar.close()
