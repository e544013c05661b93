"""`replay`: repeats in one thread, bit for bit, what a run with any number of workers did."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from a3c_jax import _compiled
from a3c_jax.asynchrony.metrics import Report, segment_metrics
from a3c_jax.asynchrony.parameters import Schedule, Snapshot
from a3c_jax.asynchrony.program import Program, as_program
from a3c_jax.asynchrony.run import Run, TrainResult
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
      single_kernel: the run's `TrainResult.single_kernel`, or its checkpoint's, if it was made in another
        process; see `build`.
      versions: the run's `Checkpoint.versions`, if it was made in another process: there is a warning if it had
        another number of XLA threads than this one.
      until: how many updates to make; None makes all.
      on_update: called as `on_update(k, snapshot, gradients, metrics)` after update k, counted from zero,
        with the parameters that it led to, its gradients as a tree, and the metrics of its segment.

    Returns:
      What `train` returned, but for the times.

    Raises:
      ValueError: if the schedule names a worker or a version that cannot exist, or if `until` is
        negative.
      WorkerError: if the run failed, at the same update.

    Warns:
      RuntimeWarning: if the run had another number of XLA threads than this process.
    """
    if until is not None and until < 0:
        raise ValueError(f"until must be >= 0, got {until}; use None for all updates.")
    program = as_program(
        config,
        single_kernel,
        environment=environment,
        network=network,
        loss=loss,
        optimizer=optimizer,
        algorithm=algorithm,
    )
    schedule.check(program.config.num_workers)
    workers, pulled_versions = (np.asarray(column)[:until].tolist() for column in schedule)
    run = Run(program, params)
    warn_if_different(versions or {})
    last_use = {pulled: k for k, pulled in enumerate(pulled_versions)}
    versions = {0: run.store.pull().params}
    run.start_clock()
    for k, (worker, pulled) in enumerate(zip(workers, pulled_versions, strict=True)):
        gradients, report = _repeat_update(run, worker, pulled, versions[pulled])
        snapshot = run.store.pull()
        versions[k + 1] = snapshot.params
        for version in {pulled, k + 1}:  # what no later update starts from is dropped
            if last_use.get(version, -1) <= k:
                del versions[version]
        if on_update is not None:
            snapshot = Snapshot(_compiled.unpack(snapshot.params), snapshot.version)
            on_update(k, snapshot, _compiled.unpack(gradients), segment_metrics(report))
    return run.finish("replayed")


def _repeat_update(run: Run, worker: int, pulled_version: int, params: Any) -> tuple[Any, Any]:
    """Makes one update as a worker thread does; its gradients and its report."""
    report = None
    try:
        gradients, state, statistics = run.program.step(params, run.states[worker])
        report = Report(statistics)
        with run.store.applying(gradients, pulled_version, worker) as update:
            run.on_update(update, report)
            run.states[worker] = state
    except Exception as error:
        failure = WorkerError(worker, error, pulled_version, report)
        run.explain(failure)
        failure.result = run.finish("failed")
        raise failure from error
    return gradients, report
