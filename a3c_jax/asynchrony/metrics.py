"""What a run reports: exact counters, the log of every episode, and the progress bar."""

import functools
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from a3c_jax import _compiled
from a3c_jax.asynchrony.parameters import Update
from a3c_jax.asynchrony.records import EpisodeLog, make_episode_log

Row = dict[str, float]


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


class Moment(NamedTuple):
    """What a row shows, all of it as of one update.

    Attributes:
      time: when it was, in seconds of `time.perf_counter`.
      totals: the counters.
      mean_return: the mean return of the last episodes, also if they are fewer than the window; NaN if there are none.
      metrics: gives the metrics of the last update, by name; none if there is no update.
    """

    time: float
    totals: Totals
    mean_return: float
    metrics: Callable[[], dict[str, float]]


class Counters:
    """The exact totals of a run, and its episodes.

    Updates are counted under the store's lock, so that the totals belong to the same moment as the
    parameters.

    Args:
      steps_per_update: environment steps that each update reports.
      window: number of episodes in the running mean.
      updates_per_row: if given, a row is made after every so many updates, to be taken with `take_moments`.

    Attributes:
      totals: the counters.
      mean_return: the mean return of the last `window` episodes; None before there are so many.
      last_metrics: gives the metrics of the last update, by name; none if there is no update.
      log: every episode that ended.
    """

    def __init__(
        self, steps_per_update: int, window: int, updates_per_row: int | None = None
    ) -> None:
        self._updates_per_row = updates_per_row
        self._moments: deque[Moment] = deque()
        self.totals = Totals()
        self.mean_return: float | None = None
        self.log = make_episode_log()
        self._steps_per_update = steps_per_update
        self._recent: deque[float] = deque(maxlen=window)
        self._mean_of_recent = float("nan")
        self.last_metrics: Callable[[], dict[str, float]] = dict
        self._started = time.perf_counter()
        self._last_row = (self._started, self.totals)
        self._last_taken: Totals | None = None

    def start_clock(self, seconds: float = 0.0) -> None:
        """Sets the clock to `seconds`."""
        now = time.perf_counter()
        self._started = now - seconds
        self._last_row = (now, self.totals)

    @property
    def seconds(self) -> float:
        """Seconds on the clock."""
        return time.perf_counter() - self._started

    def restore(self, totals: Totals, episodes: EpisodeLog | np.ndarray, seconds: float) -> None:
        """Goes on from an earlier run.

        Args:
          totals: its counters.
          episodes: its episodes.
          seconds: what its clock showed.
        """
        self.totals = totals
        self.log.restore(episodes)
        returns = self.log.read(max(0, totals.episodes - (self._recent.maxlen or 0))).episode_return
        self._add_returns(returns.tolist())
        self.start_clock(seconds)

    def count(self, update: Update, report: Any) -> None:
        """Counts one update and the episodes that ended in its segment. If it raises, nothing is counted.

        Args:
          update: the update.
          report: what its segment reported. The metrics in it are read when a row is made.
        """
        before = self.totals
        num_episodes = int(report.num_episodes)
        totals = Totals(
            before.updates + 1,
            before.environment_steps + self._steps_per_update,
            before.episodes + num_episodes,
            before.staleness + update.staleness,
            max(before.max_staleness, update.staleness),
        )
        if num_episodes:
            returns, lengths = report.episodes
            steps, seconds = totals.environment_steps, self.seconds
            self.log.extend(len(returns), update.worker, returns, lengths, steps, seconds)
            self._add_returns(returns.tolist())
        self.totals = totals
        self.last_metrics = functools.partial(metrics_of, report, update.metrics)
        if self._updates_per_row is not None and not totals.updates % self._updates_per_row:
            self._moments.append(self.moment())

    def _add_returns(self, returns: list[float]) -> None:
        self._recent.extend(returns)
        if self._recent:
            self._mean_of_recent = sum(self._recent) / len(self._recent)
        if len(self._recent) == self._recent.maxlen:
            self.mean_return = self._mean_of_recent

    def moment(self) -> Moment:
        """What a row of now shows."""
        return Moment(time.perf_counter(), self.totals, self._mean_of_recent, self.last_metrics)

    def take_moments(self, *, last: bool = False) -> list[Moment]:
        """What the rows to send now show. Call it between two updates (`SharedParameters.atomically`).

        Args:
          last: whether the run has ended, so that there has to be a row of its last update, and only one.
        """
        moments = list(self._moments)
        self._moments.clear()
        shown = moments[-1].totals if moments else self._last_taken
        is_due = shown != self.totals if last else self._updates_per_row is None
        if is_due:
            moments.append(self.moment())
        self._last_taken = moments[-1].totals if moments else self._last_taken
        self.log.seal()
        return moments

    def make_rows(self, moments: list[Moment]) -> list[tuple[Row, EpisodeLog]]:
        """The rows of these moments, each with the episodes since the one before it."""
        rows = []
        for moment in moments:
            begin, end = self._last_row[1].episodes, moment.totals.episodes
            rows.append((self._make_row(moment), self.log.read(begin, end)))
        return rows

    def _make_row(self, moment: Moment) -> Row:
        """The totals so far and the rates since the last row."""
        now, totals, mean_return, metrics = moment
        (then, before), self._last_row = self._last_row, (now, totals)
        updates = totals.updates - before.updates
        steps = totals.environment_steps - before.environment_steps
        row = {
            "seconds": now - self._started,
            "environment_steps": totals.environment_steps,
            "episodes": totals.episodes,
            "updates": totals.updates,
            "steps_per_second": steps / max(now - then, 1e-9),
            "mean_return": mean_return,
            "staleness": (totals.staleness - before.staleness) / max(updates, 1),
            "max_staleness": totals.max_staleness,
        }
        return row | metrics()


def metrics_of(report: Any, of_update: Any) -> dict[str, float]:
    """The metrics that a segment reported, and those of its update (`Update.metrics`), by name, as Python numbers."""
    metrics = {**report.metrics, **_compiled.unpack(of_update)}
    return {name: float(value) for name, value in metrics.items()}


class Report:
    """What a segment reports, as a run reads it.

    The episodes that ended are read at once: a worker makes its report before it takes the store's lock, so
    that no other worker waits for it. The metrics are read only if somebody asks for them.

    Args:
      segment_report: what the worker step returned, `a3c_jax.worker.SegmentReport`.

    Attributes:
      num_episodes: how many episodes ended.
      episodes: their returns and their lengths, two vectors; None if there are none.
    """

    __slots__ = ("_segment_report", "episodes", "num_episodes")

    def __init__(self, segment_report: Any) -> None:
        self._segment_report = segment_report
        self.num_episodes = int(segment_report.num_episodes)
        self.episodes: tuple[np.ndarray, np.ndarray] | None = None
        if self.num_episodes:
            ended, returns, lengths = map(np.asarray, segment_report.episodes)
            self.episodes = returns[ended], lengths[ended]

    @property
    def metrics(self) -> Any:
        """The metrics of the segment, by name."""
        return self._segment_report.metrics


class Sink(Protocol):
    """Somewhere to send rows to. `train` calls a sink from one thread only. If it raises, the run ends."""

    def write(self, row: Row, episodes: EpisodeLog) -> None:
        """Takes the totals so far and the episodes since the last call.

        It is called a few times a second, and once at the end.
        """
        ...

    def close(self) -> None:
        """Called once, however the run ended."""
        ...


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
