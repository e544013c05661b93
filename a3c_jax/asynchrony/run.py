"""One run of a program: what `train` with its threads and `replay` with its loop have in common."""

import functools
import time
from typing import Any, TypeVar

import jax
import numpy as np

from a3c_jax import _compiled
from a3c_jax.asynchrony.checkpoint_files import Checkpoint, CheckpointError, library_versions
from a3c_jax.asynchrony.checkpoints import restore_tree
from a3c_jax.asynchrony.logs import Log, map_rows
from a3c_jax.asynchrony.metrics import Counters, Row, Totals, metrics_of
from a3c_jax.asynchrony.parameters import (
    NonFiniteError,
    SharedParameters,
    Snapshot,
    StoreState,
    Update,
)
from a3c_jax.asynchrony.program import Program
from a3c_jax.asynchrony.records import EpisodeLog
from a3c_jax.asynchrony.result import TrainResult
from a3c_jax.asynchrony.threads import WorkerError
from a3c_jax.asynchrony.trees import name_leaves, restore_leaves, stack_leaves

T = TypeVar("T")


class Run:
    """The store, the workers' states, the counters and the clock of one run.

    Args:
      program: what to run.
      params: the parameters to start from; None takes the program's initial ones.
      updates_per_row: if given, the counters make a row after every so many updates.

    Attributes:
      store: the shared parameters.
      states: each worker's state as of its last update.
      counters: the totals.
      logs: what grows with the run: its `schedule` and its `episodes`.
      stop_reason: why the run ended, or None while it may go on.
    """

    def __init__(
        self, program: Program, params: Any = None, updates_per_row: int | None = None
    ) -> None:
        began = time.perf_counter()
        config = program.config
        initial = program.initial_params() if params is None else _check_params(program, params)
        self.program = program
        self.states = program.initial_states()
        self.store = SharedParameters(
            initial,
            program.updater,
            config.num_workers,
            skip_nonfinite=config.nonfinite == "skip",
        )
        self.counters = Counters(config.steps_per_update, config.solved_window, updates_per_row)
        self.logs: dict[str, Log[Any]] = {"schedule": self.store.log, "episodes": self.counters.log}
        self.stop_reason: str | None = None
        self._best: tuple[float | None, Any] = (None, None)
        self._seconds_before = 0.0
        self._setup = time.perf_counter() - began

    @property
    def version(self) -> int:
        """Number of updates so far."""
        return self.store.pull().version

    @property
    def remaining_updates(self) -> int | None:
        """How many updates the budget of steps still allows; None if there is no such budget."""
        if self.stop_reason is not None:
            return 0
        limit = self.program.config.max_updates
        return None if limit is None else max(0, limit - self.version)

    @functools.cached_property
    def _versions(self) -> dict[str, str]:
        """What made the run. Looked up once, because counting threads takes milliseconds."""
        return library_versions()

    def start_clock(self) -> None:
        """Starts counting the seconds of training."""
        self._clock = time.perf_counter()
        self.counters.start_clock(self._seconds_before)

    def on_update(self, update: Update, report: Any) -> bool:
        """Counts an update, as part of it; True if it was the last one."""
        self.counters.count(update, report)
        if report.num_episodes:
            self._judge(update.snapshot.params)
        return self.stop_reason is not None

    def _judge(self, params: Any) -> None:
        """Notes the best parameters so far, and decides whether the run ends."""
        config, mean_return = self.program.config, self.counters.mean_return
        if mean_return is not None and np.isfinite(mean_return):
            if self._best[0] is None or mean_return > self._best[0]:
                self._best = (mean_return, params)
            if config.solved_return is not None and mean_return >= config.solved_return:
                self.stop_reason = self.stop_reason or "solved"
        episodes = self.counters.totals.episodes
        if config.max_episodes is not None and episodes >= config.max_episodes:
            self.stop_reason = self.stop_reason or "max_episodes"

    def take_rows(self, *, last: bool = False) -> list[tuple[Row, EpisodeLog]]:
        """The rows of metrics to show now, each of one moment, with the episodes since the one before it.

        Args:
          last: whether the run has ended.
        """
        moments = self.store.atomically(lambda: self.counters.take_moments(last=last))
        return self.counters.make_rows(moments)

    def flush(self) -> None:
        """Writes the logs to their files, if they are kept in files.

        Raises:
          OSError: if they cannot be written. Their rows wait in memory then.
        """
        for log in self.logs.values():
            log.flush()

    def close(self) -> None:
        """Closes the workers' environments, if they are on the host."""
        self.program.release(self.states)

    def stop(self, stop_reason: str) -> None:
        """Stops the clock, and notes why the run ended."""
        self._seconds_of_training = time.perf_counter() - self._clock
        self.stop_reason = stop_reason

    def finish(self, stop_reason: str) -> TrainResult:
        """Stops the clock and returns the result."""
        self.stop(stop_reason)
        return self.result()

    def result(self) -> TrainResult:
        """The result of a run that was stopped."""
        assert self.stop_reason is not None
        state, episodes = self.store.freeze(self.counters.log.seal)
        params, version = state.snapshot
        best_mean_return, best_params = self._best
        config, totals = self.program.config, self.counters.totals
        limit = config.max_steps
        seconds = self.program.seconds
        return TrainResult(
            config=config,
            environment=self.program.environment,
            network=self.program.network,
            params=_compiled.unpack(params),
            best_params=_compiled.unpack(params if best_mean_return is None else best_params),
            best_mean_return=best_mean_return,
            opt_state=_compiled.unpack(state.optimizer_state).state,
            version=version,
            environment_steps=totals.environment_steps,
            overshoot=0 if limit is None else max(0, totals.environment_steps - limit),
            episodes=self.counters.log.read(0, episodes),
            schedule=self.store.log.read(0, version),
            skipped=state.skipped,
            stop_reason=self.stop_reason,
            wall_clock={
                "setup": seconds["setup"] + self._setup,
                "compile": seconds["compile"],
                "train": self._seconds_of_training,
            },
            evaluation_key=self.program.evaluation_key(),
            single_kernel=self.program.single_kernel,
        )

    def explain(self, error: WorkerError) -> None:
        """Appends what was not finite to the message, if a NonFiniteError was the cause: rewards, observations, metrics."""
        if isinstance(error.__cause__, NonFiniteError) and error.report is not None:
            state, episodes = _compiled.unpack(error.state), error.report.episodes
            found = {
                # A sum of rewards is finite only if each of them is.
                "rewards of the environment": (state.episode_return, episodes and episodes[0]),
                "observations of the environment": state.observation,
                **metrics_of(error.report, error.__cause__.metrics),
            }
            bad = [name for name, value in found.items() if not _is_finite(value)]
            error.args = (f"{error} Not finite in its segment: {', '.join(bad) or 'nothing'}.",)

    def checkpoint(self) -> Checkpoint:
        """The whole run as of one moment between two updates.

        If the logs are kept in files, the rows until then are written to them first.

        Raises:
          OSError: if they cannot be written.
        """
        # Only references are taken while the workers wait.
        state, (states, episodes, best, seconds) = self.store.freeze(
            lambda: (
                self.states.copy(),
                self.counters.log.seal(),
                self._best,
                self.counters.seconds,
            )
        )
        version = state.snapshot.version
        ends = {"schedule": version, "episodes": episodes}
        logs = {
            name: stored
            for name, log in self.logs.items()
            if (stored := log.flush(ends[name], to_disk=True)) is not None
        }
        named = [name_leaves(_compiled.unpack(s)) for s in states]
        params = name_leaves(_compiled.unpack(state.snapshot.params))
        return Checkpoint(
            config=self.program.config,
            params=params,
            optimizer_state=name_leaves(_compiled.unpack(state.optimizer_state)),
            schedule=self.store.log.read(0, version),
            skipped=state.skipped,
            states=stack_leaves(named),
            episodes=self.counters.log.read(0, episodes),
            best_params=params if best[0] is None else name_leaves(_compiled.unpack(best[1])),
            best_mean_return=best[0],
            seconds=seconds,
            versions=self._versions,
            single_kernel=self.program.single_kernel,
            objects=self.program.objects,
            in_flight={
                snapshot.version: name_leaves(_compiled.unpack(snapshot.params))
                for snapshot in state.in_flight.values()
                if snapshot.version < version
            },
            logs=logs or None,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint of a run of the same program, as `as_program` has checked.

        Raises:
          CheckpointError: if its arrays do not fit the program's.
        """
        now, _ = self.store.freeze(lambda: None)
        like = _compiled.unpack(now.snapshot.params)
        params = restore_tree("params", checkpoint.params, like)
        best_params = restore_tree("best_params", checkpoint.best_params, like)
        like = _compiled.unpack(now.optimizer_state)
        optimizer_state = restore_tree("optimizer_state", checkpoint.optimizer_state, like)
        self.states[:] = [
            restore_tree("states", saved, _compiled.unpack(state))
            for saved, state in zip(
                _by_worker(checkpoint.states, len(self.states)), self.states, strict=True
            )
        ]
        try:
            checkpoint.schedule.check(len(self.states))
        except ValueError as error:
            raise CheckpointError(f"the checkpoint does not fit: {error}") from None
        state = StoreState(
            Snapshot(params, checkpoint.version),
            optimizer_state,
            checkpoint.skipped,
            in_flight={},
        )
        self.store.restore(state, _stored_rows(checkpoint, "schedule", self.store.log))
        totals = Totals(
            checkpoint.version,
            checkpoint.environment_steps,
            len(checkpoint.episodes.worker),
            *checkpoint.schedule.summarize_staleness(),
        )
        episodes = _stored_rows(checkpoint, "episodes", self.counters.log)
        self.counters.restore(totals, episodes, checkpoint.seconds)
        self._seconds_before = checkpoint.seconds
        self._best = (checkpoint.best_mean_return, best_params)
        self._judge(params)


def _is_finite(tree: Any) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def _stored_rows(checkpoint: Checkpoint, name: str, log: Log[Any]) -> Any:
    """A log of a checkpoint: mapped, if it is in a file, and as columns otherwise."""
    if checkpoint.logs is None:
        return getattr(checkpoint, name)
    return map_rows(checkpoint.logs[name], log.dtype)


def _by_worker(states: Any, num_workers: int) -> list[Any]:
    """The saved states of each worker.

    Raises:
      CheckpointError: if they are of another number of workers.
    """
    arrays = states if isinstance(states, dict) else {"": states}
    for name, array in arrays.items():
        if array.shape[:1] != (num_workers,):
            raise CheckpointError(
                f"the checkpoint does not fit: states {name!r} has the shape {list(array.shape)}, but "
                f"this run has {num_workers} workers; give a checkpoint of the same run."
            )
    if not isinstance(states, dict):
        return list(states)
    return [{name: array[w] for name, array in states.items()} for w in range(num_workers)]


def _check_params(program: Program, params: Any) -> Any:
    """Parameters to start from, as arrays of the program's own.

    Raises:
      ValueError: if their names, shapes or dtypes are not those of the network's parameters.
    """
    initial = program.initial_params()
    try:
        return restore_leaves("params", name_leaves(params), initial)
    except ValueError as error:
        raise ValueError(f"{error}; give parameters of the same network.") from None
