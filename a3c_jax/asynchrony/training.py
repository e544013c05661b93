"""`train`: runs a program in worker threads, shows what happens, and saves it."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from a3c_jax.asynchrony.checkpoint_files import Checkpoint
from a3c_jax.asynchrony.checkpoints import CheckpointFolder
from a3c_jax.asynchrony.metrics import Report, Row, Sink
from a3c_jax.asynchrony.program import Program, as_program
from a3c_jax.asynchrony.ray_cluster import RayOptions
from a3c_jax.asynchrony.ray_workers import steps_on_ray
from a3c_jax.asynchrony.reporting import Outlets, Progress
from a3c_jax.asynchrony.result import TrainResult
from a3c_jax.asynchrony.run import Run
from a3c_jax.asynchrony.signals import noted_signals, number_of
from a3c_jax.asynchrony.sinks import CallFunction
from a3c_jax.asynchrony.thread_pools import warn_if_different
from a3c_jax.asynchrony.threads import Step, WorkerError, WorkerThreads
from a3c_jax.config import A3CConfig
from a3c_jax.rules import check_int


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
    ray: str | RayOptions | None = None,
) -> TrainResult:
    """Trains an actor-critic by asynchronous advantage actor-critic (A3C).

    >>> from a3c_jax import A3CConfig, train
    >>> train(A3CConfig(num_workers=2, max_steps=100)).version
    1

    Args:
      config: the configuration, or a program that `build` made of one.
      environment: what to play instead of the environment that the configuration names: an object with
        gymnax's interface, or one of the protocol `a3c_jax.environments.Environment`; a
        `gymnasium.vector.VectorEnv`, or a function `make(num_envs)` that makes one.
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
        configuration, and `max_concurrent_workers`, may differ from the checkpoint's.
      ray: where to play: None plays in this process. "auto" plays in processes of the Ray cluster at hand, or of
        one that is started on this machine and ended afterwards, if there is none; "local" always starts one; any
        other string is a cluster's address. `a3c_jax.RayOptions` says more. The result is the same as that of a run
        in this process, and `replay` repeats it in one thread.

    Returns:
      The final and the best parameters, and how they came about.

    Raises:
      ValueError: if the environment is unknown or not supported, if environment, network and
        configuration do not fit together, if the configuration differs from the checkpoint's, or if both
        `params` and `resume` are given.
      ImportError: if `ray` is given and Ray is not installed.
      ConnectionError: if `ray` names a cluster that cannot be reached.
      TypeError: if an argument is of another kind, or if `ray` is given, and an object that was passed in cannot be
        sent to another process.
      WorkerError: if a worker failed. Its cause is the worker's exception, and its `result` what was
        reached until then.
      SinkError: if a sink failed. Its cause is the sink's exception, and its `result` what was reached until then.
        The other sinks get their last rows, and all are closed.
      TrainingInterrupted: on Ctrl-C or SIGTERM: a KeyboardInterrupt that carries the result so far.
      CheckpointError: if another run is using the folder of checkpoints, or if it has checkpoints that this run
        would make useless.

    Warns:
      RuntimeWarning: if a checkpoint cannot be written. Training goes on, and the next one is tried. And if the
        run to go on with had another number of XLA threads than this process.
    """
    sinks = _check_sinks(sinks)
    if on_progress is not None:
        sinks = [*sinks, CallFunction(on_progress)]
    objects = {"environment": environment, "network": network}
    objects |= {"loss": loss, "optimizer": optimizer, "algorithm": algorithm}
    with noted_signals() as noted:
        with Outlets(sinks) as outlets:
            _check_arguments(checkpoints, params, resume, interval, updates_per_row)
            single_kernel = None if resume is None else resume.single_kernel
            program = as_program(config, single_kernel, resume, **objects)
            run = Run(program, params, updates_per_row)
            if resume is not None:
                run.restore(resume)
                warn_if_different(resume.versions)
            stopping = threading.Event()
            with (
                contextlib.closing(run),
                steps_on_ray(program, ray, stopping) as steps,
                contextlib.nullcontext()
                if checkpoints is None
                else checkpoints.keeping(run.logs, resume),
            ):
                threads = _make_threads(run, steps, stopping)
                progress = Progress(run, outlets, checkpoints)
                if resume is None:
                    progress.save()  # so that there is something to go on from, whatever happens next
                run.start_clock()
                error = _play(run, threads, progress, interval)
                result = run.result()
        if error is None and noted:  # too late to interrupt the threads
            error = KeyboardInterrupt(noted[0])
        if isinstance(error, KeyboardInterrupt):
            error = TrainingInterrupted(result, number_of(error))
        outlets.add_failure_to(error)
        error = error or outlets.failure
        if error is not None:
            error.result = result  # type: ignore[attr-defined]
            raise error
        return result


def _play(
    run: Run, threads: WorkerThreads, progress: Progress, interval: float
) -> BaseException | None:
    """Runs the threads. When they have ended, stops the run, saves it and shows its last rows.

    Returns:
      What was raised meanwhile, to be raised with the result.
    """
    error: BaseException | None = None
    try:
        threads.run(progress.tick, interval)
    except BaseException as raised:
        error = raised
    if error is None:
        run.stop(run.stop_reason or "max_steps")
    else:
        run.stop("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
    if isinstance(error, WorkerError):
        run.explain(error)
    progress.save()
    try:
        progress.show(last=True)
    except BaseException as raised:  # a sink may interrupt at its last row, too
        error = error or raised
    return error


def _check_sinks(sinks: Any) -> list[Sink]:
    """The sinks as a list.

    Raises:
      TypeError: if they are something else.
    """
    listed: list[Any] = list(sinks) if isinstance(sinks, Iterable) else [None]
    if not all(hasattr(sink, "write") and hasattr(sink, "close") for sink in listed):
        raise TypeError(
            f"sinks must be a list of objects with write and close, got {sinks!r}; put a single sink into a list, [sink], "
            "and pass a function as on_progress."
        )
    return listed


def _check_arguments(
    checkpoints: Any, params: Any, resume: Any, interval: Any, updates_per_row: Any
) -> None:
    """Refuses wrong arguments before anything is compiled."""
    if updates_per_row is not None:
        check_int("updates_per_row", updates_per_row, 1)
    if not isinstance(interval, int | float) or not interval > 0:
        raise ValueError(f"interval must be a number of seconds > 0, got {interval!r}; use 0.5.")
    if checkpoints is not None and not isinstance(checkpoints, CheckpointFolder):
        raise TypeError(
            f"checkpoints must be an a3c_jax.CheckpointFolder, got {checkpoints!r}; give CheckpointFolder(folder)."
        )
    if resume is not None and not isinstance(resume, Checkpoint):
        raise TypeError(
            f"resume must be an a3c_jax.Checkpoint, got {resume!r}; give a3c_jax.find_checkpoint(folder)."
        )
    if params is not None and resume is not None:
        raise ValueError(
            "params must not be given with resume, whose checkpoint holds the parameters; leave one of them out."
        )


def _make_threads(run: Run, steps: list[Step] | None, stopping: threading.Event) -> WorkerThreads:
    """The threads of a run, with a step for each, or all with the program's."""
    return WorkerThreads(
        run.program.step if steps is None else steps,
        run.store,
        run.states,
        read_report=Report,
        on_update=run.on_update,
        max_updates=run.remaining_updates,
        max_running=_max_running(run, steps is not None),
        stopping=stopping,
    )


def _max_running(run: Run, elsewhere: bool) -> int | None:
    """How many workers may play at the same time. If they play in other processes, as many as there are."""
    program, config = run.program, run.program.config
    if config.max_concurrent_workers is not None or elsewhere:
        return config.max_concurrent_workers
    params = run.store.pull().params
    return program.max_concurrent_calls(config.num_workers, params, run.states[0])
