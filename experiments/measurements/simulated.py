"""What measurements by simulation share: many runs in one compiled call, and a file that keeps their scores.

A command that was interrupted or killed goes on from its file of scores.
"""

import contextlib
import dataclasses
import functools
import json
import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from a3c_jax.config import A3CConfig, Optimizer, available_cores
from experiments.run_folder import make_run_dir, read_json, write_json

if TYPE_CHECKING:
    from a3c_jax import SimulationResult

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # of Okabe and Ito
STYLES = ("o-", "s--", "^-.", "D:", "v-", "P--")  # for those who print in grey
TUNING_SEED = 1_000_000  # the first of the seeds that choose settings; those reported begin at 0
OPTIMIZERS: dict[Optimizer, str] = {
    "momentum": "momentum SGD",
    "rmsprop": "RMSProp",
    "shared_rmsprop": "Shared RMSProp",
    "adam": "Adam",
}
"""What optimizers are called in tables and pictures."""


class Run(NamedTuple):
    """One run to simulate. Its workers take turns, and every update is `delay` updates stale."""

    delay: int
    learning_rate: float
    seed: int


Score = Callable[[Sequence[Run]], np.ndarray]
Measure = Callable[["SimulationResult"], Any]


def late_return(result: "SimulationResult") -> Any:
    """The mean return of the episodes that ended in the last tenth of the updates, or of the last 100 if fewer did."""
    return result.final_return(least_episodes=100)


class Records:
    """What has been measured, in a file that survives a kill: a JSON array a line, the value at its end.

    Args:
      path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._known: dict[tuple[Any, ...], Any] = {}
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            if not line.endswith(b"\n"):
                break  # what a killed process was writing
            *key, value = json.loads(line)
            self._known[tuple(key)] = value
            whole += len(line)
        if path.exists():
            os.truncate(path, whole)

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._known

    def __getitem__(self, key: tuple[Any, ...]) -> Any:
        return self._known[key]

    def add(self, keys: Sequence[tuple[Any, ...]], values: Sequence[Any]) -> None:
        """Keeps new values, from any thread."""
        with self._lock, open(self._path, "ab") as file:
            for key, value in zip(keys, values, strict=True):
                self._known[key] = value
                file.write(json.dumps([*key, value]).encode() + b"\n")


class Scores:
    """The scores of simulated runs, in a file. A run whose score is there is not simulated again.

    Args:
      path: the file: name, delay, learning rate, seed, score.
      batch: how many runs to simulate in one compiled call.
      measure: what a run scores.
    """

    def __init__(self, path: Path, batch: int, measure: Measure = late_return) -> None:
        self._records, self._batch, self._measure = Records(path), batch, measure

    def of(
        self,
        name: str,
        config: A3CConfig,
        runs: Sequence[Run],
        done: Callable[[int], Any],
        **objects: Any,
    ) -> np.ndarray:
        """The scores of some runs, `[runs]`.

        Args:
          name: tells these runs from those with other configurations.
          config: the configuration. Its seed and its learning rate are not used.
          runs: what to simulate.
          done: called with a number of runs whenever so many more have a score.
          **objects: an environment, a network, a loss and so on in place of the configuration's.
        """
        missing = [run for run in dict.fromkeys(runs) if (name, *run) not in self._records]
        done(len(runs) - len(missing))
        if missing:
            delays = [run.delay for run in missing]
            # Workers that take turns do not see each other's updates of the same round.
            at_once = config.num_workers if min(delays) >= config.num_workers - 1 else 1
            own = (self._measure, tuple(objects.items()))
            simulate = _simulation(config, max(delays), at_once, self._batch, *own)
            batches = [missing[i : i + self._batch] for i in range(0, len(missing), self._batch)]

            def score(batch: Sequence[Run]) -> None:
                scores = simulate(batch)
                if np.isnan(scores).any():
                    raise SystemExit(
                        "error: no episode ended in a run, and their returns are what scores it; raise --max-steps."
                    )
                self._records.add([(name, *run) for run in batch], scores.tolist())
                done(len(batch))

            with ThreadPoolExecutor(available_cores()) as pool:
                list(pool.map(score, batches))
        return np.array([self._records[name, *run] for run in runs])


@functools.lru_cache(maxsize=1)
def _simulation(
    config: A3CConfig,
    max_delay: int,
    at_once: int,
    batch: int,
    measure: Measure,
    objects: tuple[tuple[str, Any], ...],
) -> Score:
    """Compiles what simulates up to `batch` runs at once."""
    import jax

    from a3c_jax import fixed_delay, make_simulation

    num_updates = config.max_updates or 0
    own = {"workers_at_once": at_once, **dict(objects)}
    simulate = jax.vmap(make_simulation(config, max_delay, **own))

    def inputs(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray, Any]:
        padded = [*runs, *[runs[-1]] * (batch - len(runs))]
        schedules = [fixed_delay(run.delay, num_updates, config.num_workers) for run in padded]
        return (
            np.array([run.seed for run in padded], np.uint32),
            np.array([run.learning_rate for run in padded], np.float32),
            jax.tree.map(lambda *columns: np.stack(columns).astype(np.int32), *schedules),
        )

    function = jax.jit(lambda *arguments: measure(simulate(*arguments)))
    compiled = function.lower(*inputs([Run(max_delay, 1.0, 0)])).compile()
    return lambda runs: np.asarray(compiled(*inputs(runs)))[: len(runs)]


def check(arguments: Any, *lists: str, **minima: int) -> None:
    """Refuses numbers that are too small, and lists that are empty or name something twice.

    Args:
      arguments: the arguments of a command.
      *lists: the names of those that hold several values; None passes.
      **minima: the smallest value of each of these.

    Raises:
      ValueError: with the name, the rule, the value and a remedy.
    """
    for name, minimum in minima.items():
        if (value := getattr(arguments, name)) < minimum:
            raise ValueError(f"{name} must be >= {minimum}, got {value}; use more.")
    for name in lists:
        values = getattr(arguments, name)
        if values is not None and (not values or len(set(values)) < len(values)):
            raise ValueError(
                f"{name} must be one or more, each once, got {values}; remove the repetitions."
            )


def check_known(name: str, values: Collection[str], known: Collection[str]) -> None:
    """Refuses values that are not known.

    Raises:
      ValueError: with the name, the rule and the values.
    """
    if unknown := [value for value in values if value not in known]:
        raise ValueError(f"{name} must be among {', '.join(known)}, got {unknown}.")


def as_plain(arguments: Any) -> dict[str, Any]:
    """The arguments of a command as plain values that JSON can hold."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(arguments), default=str))
    return plain


def start_or_go_on(name: str, parsed: Any) -> Path:
    """A new folder for results, or the one in which the same command was begun.

    Raises:
      FileExistsError: if the folder holds something else.
    """
    run_dir: Path | None = parsed.run_dir
    arguments = {k: v for k, v in as_plain(parsed).items() if k != "run_dir"}
    if run_dir is not None and run_dir.exists():
        begun = read_json(run_dir / "arguments.json")
        if begun != arguments:
            raise FileExistsError(
                f"run_dir must be new, or hold what the same command has begun, got {run_dir}; choose another name."
            )
        return run_dir
    run_dir = make_run_dir(name, run_dir)
    write_json(run_dir / "arguments.json", arguments)
    return run_dir


class Summary(NamedTuple):
    """What several seeds reached: their interquartile mean and its interval; None without rliable, or with too few seeds."""

    seeds: list[float]
    value: float
    interval: list[float] | None

    def text(self, form: str) -> str:
        """The value and its interval, each in this format."""
        text = format(self.value, form)
        if self.interval is None:
            return text
        low, high = self.interval
        return f"{text} [{low:{form}}, {high:{form}}]"

    def draw(self, axes: Any, y: int, colour: str) -> None:
        """Draws every seed, the value and its interval in a row of a panel."""
        axes.plot(self.seeds, [y] * len(self.seeds), "|", color="0.6", markersize=5)
        if self.interval is not None:
            axes.plot(self.interval, [y, y], "-", color=colour, linewidth=2)
        axes.plot(self.value, y, "o", color=colour, markersize=4)


def summarize(seeds: np.ndarray, **options: Any) -> Summary:
    """The interquartile mean over seeds, `[seeds]`, or another statistic (`experiments.aggregate.aggregate`)."""
    from experiments.aggregate import aggregate

    found = aggregate(seeds[:, None], **options)
    interval = None if found.interval is None else found.interval[:, 0].tolist()
    return Summary(seeds.tolist(), float(found.value[0]), interval)


@contextlib.contextmanager
def drawing(
    paths: Sequence[Path], rows: int, columns: int, size: tuple[float, float], **options: Any
) -> Iterator[tuple[Any, Any]]:
    """A figure and its panels, `[rows, columns]`, to draw in; then it is saved under each path, in the path's format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 8, "axes.titlesize": 8, "pdf.fonttype": 42}):
        figure, panels = plt.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained", **options
        )
        for axes in panels.flat:
            axes.spines[["top", "right"]].set_visible(False)
        yield figure, panels
        for path in paths:
            figure.savefig(path, dpi=200)
        plt.close(figure)
