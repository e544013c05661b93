"""`replay`: repeats in one thread, bit for bit, what a run with any number of workers did."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from a3c_jax import _compiled
from a3c_jax.asynchrony.checkpoint_files import Checkpoint
from a3c_jax.asynchrony.checkpoints import restore_tree
from a3c_jax.asynchrony.metrics import Report
from a3c_jax.asynchrony.parameters import Snapshot
from a3c_jax.asynchrony.program import Program, as_program
from a3c_jax.asynchrony.records import Schedule
from a3c_jax.asynchrony.result import TrainResult
from a3c_jax.asynchrony.run import Run
from a3c_jax.asynchrony.thread_pools import warn_if_different
from a3c_jax.asynchrony.threads import WorkerError
from a3c_jax.config import A3CConfig


def replay(
    config: A3CConfig | Program,
    schedule: Schedule,
    *,
    environment: Any = None,
    network: Any = None,
    loss: Any = None,
    optimizer: Any = None,
    algorithm: Any = None,
    params: Any = None,
    single_kernel: bool | None = None,
    versions: Mapping[str, str] | None = None,
    start: Checkpoint | None = None,
    until: int | None = None,
    on_update: Callable[[int, Snapshot, Any, dict[str, float]], None] | None = None,
) -> TrainResult:
    """Repeats, in the calling thread, what a run with any number of workers did: bit for bit.

    All randomness comes from the seed, and all asynchrony from the order of the updates, so that the
    schedule is enough. It takes the same versions of the libraries and the same kind of processor.

    >>> from a3c_jax import A3CConfig, replay, train
    >>> config = A3CConfig(num_workers=4, max_steps=10_000)
    >>> result = train(config)
    >>> again = replay(config, result.schedule)
    >>> bool((again.episodes.episode_return == result.episodes.episode_return).all())
    True

    Args:
      config: the run's configuration, or a program that `build` made of it.
      schedule: the run's schedule, or any other: the asynchrony of one's choice.
      environment: what the run played, if it was given as an object.
      network: what the run trained, if it was given as an object.
      loss: what the run minimised, if it was given.
      optimizer: the run's optimizer, if it was given.
      algorithm: what the run's workers did, if it was given.
      params: the parameters that the run started from, if they were given.
      single_kernel: the run's `TrainResult.single_kernel`, or its checkpoint's, if it was made by another program; see
        `build`. It has no effect if a program is given.
      versions: the run's `Checkpoint.versions`, if it was made in another process: there is a warning if it had
        another number of XLA threads than this one.
      start: a checkpoint of the run to begin at, instead of at its first update.
      until: which update to end at, counted from the run's first; None makes all of the schedule.
      on_update: called as `on_update(k, snapshot, gradients, metrics)` after update k, counted from zero,
        with the parameters that it led to, its gradients as a tree, and the metrics of its segment.

    Returns:
      What `train` returned, but for the times and the `stop_reason`, which is `replayed`.

    Raises:
      ValueError: if the schedule names a worker or a version that cannot exist, if it is not the one that led to
        `start`, or if `until` is negative or before `start`.
      WorkerError: if the run failed, at the same update.

    Warns:
      RuntimeWarning: if the run had another number of XLA threads than this process.
    """
    if until is not None and until < 0:
        raise ValueError(f"until must be >= 0, got {until}; use None for all updates.")
    if start is not None and params is not None:
        raise ValueError(
            "params must not be given with start, whose parameters they would replace."
        )
    program = as_program(
        config,
        single_kernel,
        start,
        environment=environment,
        network=network,
        loss=loss,
        optimizer=optimizer,
        algorithm=algorithm,
    )
    schedule = Schedule(*(np.asarray(column)[:until] for column in schedule))
    schedule.check(program.config.num_workers)
    run = Run(program, params)
    warn_if_different(versions or {})
    if start is not None:
        _check_leads_to(start, schedule)
        run.restore(start)
    needed = _Versions(run, schedule, start)
    run.start_clock()
    with contextlib.closing(run):
        for k, worker, pulled in needed.updates():
            gradients = _repeat_update(run, worker, pulled, needed.take(k, pulled))
            snapshot = run.store.pull()
            needed.add(snapshot)
            if on_update is not None:
                snapshot = Snapshot(_compiled.unpack(snapshot.params), snapshot.version)
                on_update(k, snapshot, _compiled.unpack(gradients), run.counters.last_metrics())
        return run.finish("replayed")


def _check_leads_to(start: Checkpoint, schedule: Schedule) -> None:
    """Checks that a schedule begins with the updates that led to a checkpoint."""
    if start.version > len(schedule.worker):
        raise ValueError(
            f"start must not lie after the last update to replay, {len(schedule.worker):,}, got a checkpoint of "
            f"update {start.version:,}; give an earlier one, or a larger until."
        )
    before = Schedule(*(column[: start.version] for column in schedule))
    pairs = zip(before.parts(), start.schedule.parts(), strict=True)
    if not all(
        np.array_equal(a, b)
        for (ours, _), (theirs, _) in pairs
        for a, b in zip(ours, theirs, strict=True)
    ):
        raise ValueError(
            "start must be a checkpoint of the run whose schedule is given, got one with other updates."
        )


class _Versions:
    """The parameters from which later updates start, and no others: memory does not grow with the schedule.

    Args:
      run: the run, at its start.
      schedule: what to replay.
      start: the checkpoint that the run starts from, if any.
    """

    def __init__(self, run: Run, schedule: Schedule, start: Checkpoint | None) -> None:
        self._schedule, self._begin = schedule, run.version
        _, self._max_staleness = schedule.summarize_staleness()
        snapshot = run.store.pull()
        self._params = {snapshot.version: snapshot.params}
        self._last_use: dict[int, int] = {}
        if start is not None:
            self._params |= {
                version: restore_tree("in_flight", named, _compiled.unpack(snapshot.params))
                for version, named in start.in_flight.items()
            }

    def updates(self) -> Iterator[tuple[int, int, int]]:
        """The updates to make: which one, by which worker, and from which version."""
        k = self._begin
        for part, _ in self._schedule.parts(self._begin):
            self._look_ahead(k, k + len(part.worker))
            for worker, pulled in zip(*(column.tolist() for column in part), strict=True):
                yield k, worker, pulled
                k += 1

    def take(self, k: int, version: int) -> Any:
        """The parameters that update k starts from. They are dropped if no later update does."""
        if version not in self._params:
            raise ValueError(
                f"update {k:,} starts from the parameters of update {version:,}, which the checkpoint does not "
                "hold; start from an earlier checkpoint."
            )
        params = self._params[version]
        if self._last_use.get(version, -1) <= k:
            del self._params[version]
        return params

    def add(self, snapshot: Snapshot) -> None:
        """Keeps the parameters if a later update starts from them."""
        if snapshot.version in self._last_use:
            self._params[snapshot.version] = snapshot.params

    def _look_ahead(self, begin: int, end: int) -> None:
        """Notes which updates are the last to start from the versions that updates `begin` to `end` make."""
        last = end + self._max_staleness + 1  # no later update starts from any of them
        pulled = self._schedule.pulled_version[begin:last].tolist()
        self._last_use = {version: k for k, version in enumerate(pulled, begin)}
        for version in [v for v in self._params if v not in self._last_use]:
            del self._params[version]


def _repeat_update(run: Run, worker: int, pulled_version: int, params: Any) -> Any:
    """Makes one update as a worker thread does, and returns its gradients."""
    report, state = None, None
    try:
        gradients, state, segment_report = run.program.step(params, run.states[worker])
        report = Report(segment_report)
        with run.store.applying(gradients, pulled_version, worker) as update:
            run.on_update(update, report)
            run.states[worker] = state
    except Exception as error:
        failure = WorkerError(worker, error, pulled_version, report, state)
        run.explain(failure)
        failure.result = run.finish("failed")
        raise failure from error
    return gradients
