"""`train`: runs a program in worker threads, shows what happens, and saves it."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from a3c_jax.asynchrony.checkpoint_files import Checkpoint
from a3c_jax.asynchrony.checkpoints import CheckpointFolder
from a3c_jax.asynchrony.metrics import Report, Row, Sink
from a3c_jax.asynchrony.program import Program, as_program
from a3c_jax.asynchrony.records import EpisodeLog
from a3c_jax.asynchrony.result import TrainResult
from a3c_jax.asynchrony.run import Run
from a3c_jax.asynchrony.signals import noted_signals
from a3c_jax.asynchrony.sinks import CallFunction
from a3c_jax.asynchrony.threads import WorkerError, WorkerThreads
from a3c_jax.config import A3CConfig


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C, or SIGTERM, during `train`.

    Attributes:
      result: the result so far.
      signal: the signal's number.
    """

    def __init__(self, result: TrainResult, number: int) -> None:
        super().__init__("training was interrupted")
        self.result = result
        self.signal = number


class SinkError(RuntimeError):
    """A sink failed during `train`; `__cause__` is its exception.

    Attributes:
      result: the result so far; it is that of the whole run if the sink failed at the end. None if it failed
        before the training began.
    """

    result: TrainResult | None = None


def train(
    config: A3CConfig | Program,
    *,
    environment: Any = None,
    network: Any = None,
    loss: Any = None,
    optimizer: Any = None,
    algorithm: Any = None,
    params: Any = None,
    sinks: Sequence[Sink] = (),
    on_progress: Callable[[Row], Any] | None = None,
    interval: float = 0.5,
    updates_per_row: int | None = None,
    checkpoints: CheckpointFolder | None = None,
    resume: Checkpoint | None = None,
) -> TrainResult:
    """Trains an actor-critic by asynchronous advantage actor-critic (A3C).

    >>> from a3c_jax import A3CConfig, train
    >>> train(A3CConfig(num_workers=2, max_steps=100)).version
    1

    Args:
      config: the configuration, or a program that `build` made of one.
      environment: what to play instead of the environment that the configuration names: an object with
        gymnax's interface, or one of the protocol `a3c_jax.environments.Environment`.
      network: what to train instead of the network that the configuration describes: a module like
        `a3c_jax.networks.ActorCritic`, or anything with `init` and `apply`
        (`a3c_jax.networks.network_functions`).
      loss: what to minimise instead of A3C's loss: `loss(params, apply_fn, trajectory) -> (scalar, metrics)`,
        like `a3c_jax.losses.a3c_loss`.
      optimizer: an optax transformation of the parameter tree instead of the optimizer that the
        configuration describes, or a function that makes one of the learning rate.
      algorithm: what the workers do instead of the algorithm that the configuration names:
        `algorithm(config, environment, network) -> a3c_jax.algorithm.Algorithm`.
      params: the parameters to start from; by default they are drawn with the configuration's seed.
      sinks: where to send rows of metrics. There are none by default, so that the call is silent. They
        are closed at the end, however the run ends.
      on_progress: a function that gets each row as well, a dict of numbers.
      interval: seconds between two rows, and between two looks at whether a checkpoint is due.
      updates_per_row: if given, there is a row for every so many updates instead of one every `interval`
        seconds. They are still sent every `interval` seconds, several at a time.
      checkpoints: where to save the run: at its start, whenever it is due, and however it ends.
      resume: a checkpoint to go on from (`a3c_jax.find_checkpoint`). Only the budgets of the
        configuration may differ from the checkpoint's.

    Returns:
      The final and the best parameters, and how they came about.

    Raises:
      ValueError: if the environment is unknown or not supported, if environment, network and
        configuration do not fit together, if the configuration differs from the checkpoint's, or if both
        `params` and `resume` are given.
      WorkerError: if a worker failed. Its cause is the worker's exception, and its `result` what was
        reached until then.
      SinkError: if a sink failed. Its cause is the sink's exception, and its `result` what was reached until then.
        The other sinks get their last rows, and all are closed.
      TrainingInterrupted: on Ctrl-C or SIGTERM: a KeyboardInterrupt that carries the result so far.
      CheckpointError: if another run is using the folder of checkpoints, or if it has checkpoints that this run
        would make useless.

    Warns:
      RuntimeWarning: if a checkpoint cannot be written. Training goes on, and the next one is tried.
    """
    if on_progress is not None:
        sinks = [*sinks, CallFunction(on_progress)]
    single_kernel = None if resume is None else resume.single_kernel
    objects = {"environment": environment, "network": network}
    objects |= {"loss": loss, "optimizer": optimizer, "algorithm": algorithm}
    with noted_signals() as noted:
        outlets = _Outlets(sinks)
        try:
            program = as_program(config, single_kernel, **objects)
            run = _start(program, params, resume, updates_per_row)
            with (
                contextlib.nullcontext()
                if checkpoints is None
                else checkpoints.keeping(run.logs, resume)
            ):
                error = _run_threads(
                    run, outlets, checkpoints, interval, saves_first=resume is None
                )
                result = run.result()
        except BaseException as unexpected:
            outlets.close()
            outlets.add_failure_to(unexpected)
            raise
        outlets.close()
        if error is None and noted:  # too late to interrupt the training
            error = KeyboardInterrupt(noted[0])
        if isinstance(error, KeyboardInterrupt):
            error = TrainingInterrupted(result, *error.args[:1] or (2,))
        if error is None and outlets.failure is None:
            return result
        error = outlets.add_failure_to(error)
        if not isinstance(error, TrainingInterrupted):
            error.result = result  # type: ignore[attr-defined]
        raise error


def _run_threads(
    run: Run,
    outlets: "_Outlets",
    checkpoints: CheckpointFolder | None,
    interval: float,
    *,
    saves_first: bool,
) -> BaseException | None:
    """Runs the worker threads to their end, whatever it is, and saves and shows how it ended.

    Returns:
      The exception that ended them, if one did.
    """
    reports = _Reports(run, outlets, checkpoints)
    if saves_first:
        reports.save()  # so that there is something to go on from, whatever happens next
    program = run.program
    error: BaseException | None = None
    threads = WorkerThreads(
        program.step,
        run.store,
        run.states,
        read_report=Report,
        on_update=run.on_update,
        max_updates=run.remaining_updates,
        max_running=_max_running(program, run),
    )
    run.start_clock()
    try:
        threads.run(reports.tick, interval)
    except KeyboardInterrupt as interruption:
        error = interruption
        run.stop("interrupted")
    except BaseException as failure:
        error = failure
        run.stop("failed")
        if isinstance(failure, WorkerError):
            run.explain(failure)
    else:
        run.stop(run.stop_reason or "max_steps")
    reports.save()
    reports.show(last=True)
    return error


def _start(
    program: Program, params: Any, resume: Checkpoint | None, updates_per_row: int | None
) -> Run:
    """A run at its start, or where the checkpoint left it."""
    if params is not None and resume is not None:
        raise ValueError(
            "params must not be given with resume, whose checkpoint holds the parameters; leave one of them out."
        )
    run = Run(program, params, updates_per_row)
    if resume is not None:
        run.restore(resume)
    return run


def _max_running(program: Program, run: Run) -> int | None:
    """How many workers may play at the same time."""
    config = program.config
    if config.max_concurrent_workers is not None:
        return config.max_concurrent_workers
    params = run.store.pull().params
    return program.max_concurrent_calls(config.num_workers, params, run.states[0])


class _Outlets:
    """The sinks of a run. One that fails does not keep the others from getting their rows, nor from being closed.

    Attributes:
      failure: what the first one that failed raised; None if none has.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks
        self.failure: SinkError | None = None

    def write(self, row: Row, episodes: EpisodeLog) -> None:
        for sink in self._sinks:
            with self._noting_failure(sink, "write"):
                sink.write(row, episodes)

    def close(self) -> None:
        for sink in self._sinks:
            with self._noting_failure(sink, "close"):
                sink.close()

    def add_failure_to(self, error: BaseException | None) -> BaseException:
        """The error that ended a run, with a note if a sink failed as well; the sink's if there is no other."""
        if error is None:
            assert self.failure is not None
            return self.failure
        if self.failure not in (None, error):
            error.add_note(f"As well, {self.failure}")
        return error

    @contextlib.contextmanager
    def _noting_failure(self, sink: Sink, method: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self.failure is None:
                self.failure = SinkError(
                    f"{type(sink).__name__}.{method} failed with {type(error).__name__}: {error}"
                )
                self.failure.__cause__ = error


class _Reports:
    """What a run shows and saves while it goes on.

    Args:
      run: the run.
      outlets: where rows go.
      checkpoints: where it is saved, if anywhere.
    """

    def __init__(self, run: Run, outlets: _Outlets, checkpoints: CheckpointFolder | None) -> None:
        self._run, self._outlets, self._checkpoints = run, outlets, checkpoints

    def tick(self) -> None:
        """Shows what is new, and saves a checkpoint if one is due.

        Raises:
          SinkError: if a sink failed.
        """
        self.show()
        if self._checkpoints is not None and self._checkpoints.due(self._run.version):
            self.save()
        if self._outlets.failure is not None:
            raise self._outlets.failure

    def show(self, *, last: bool = False) -> None:
        """Sends the new rows and episodes to every sink, and writes the logs to their files, if they have files."""
        # Taken even if there is no sink, so that they do not pile up.
        for row, episodes in self._run.take_rows(last=last):
            self._outlets.write(row, episodes)
        with contextlib.suppress(OSError):  # the rows wait in memory, and saving a checkpoint warns
            self._run.flush()

    def save(self) -> None:
        """Saves a checkpoint; warns if it cannot be written."""
        if self._checkpoints is None:
            return
        try:
            self._checkpoints.make_again()
            self._checkpoints.save(self._run.checkpoint())
        except OSError as error:
            warnings.warn(
                f"the checkpoint of update {self._run.version:,} cannot be written to "
                f"{self._checkpoints.path} ({error.strerror}); training goes on, and earlier "
                "checkpoints stay.",
                RuntimeWarning,
                stacklevel=2,
            )
