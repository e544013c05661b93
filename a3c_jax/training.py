"""`train`: wires the layers below together; and `replay`, which does again what a run did."""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from a3c_jax import environments
from a3c_jax.agent import evaluation_key, make_agent
from a3c_jax.checkpoints import (
    Checkpoint,
    CheckpointError,
    CheckpointFolder,
    check_same_run,
    library_versions,
)
from a3c_jax.config import A3CConfig, available_cores
from a3c_jax.metrics import Counters, EpisodeLog, Sink
from a3c_jax.parameters import (
    NonFiniteError,
    Schedule,
    SharedParameters,
    Snapshot,
    StoreState,
)
from a3c_jax.threads import WorkerError, WorkerThreads
from a3c_jax.worker import PackedWorkerStep, Record


class TrainResult(NamedTuple):
    """What a run leaves behind.

    Attributes:
      config: its configuration.
      environment: what was played, for evaluation for instance.
      network: the network; `network.apply(params, observation)` gives a distribution and values.
      params: the final parameters, Flax variables.
      best_params: those at the highest mean return of the last `config.solved_window` episodes; the
        final ones where fewer episodes ended.
      best_mean_return: that mean, or None.
      opt_state: the optimizer's state, over the parameters as one flat vector.
      version: number of updates.
      environment_steps: number of environment steps, all workers together.
      overshoot: how many of them were beyond `config.max_steps`: less than one segment.
      episodes: every episode that ended.
      schedule: which worker made each update, from which version: what `replay` needs.
      skipped: how many updates were not finite, and skipped (`config.nonfinite`).
      stop_reason: `solved`, `max_steps`, `max_episodes`, `interrupted`, `failed` or `replayed`.
      wall_clock: seconds spent on `setup` (environment, network, initial states), `compile` and `train`.
    """

    config: A3CConfig
    environment: environments.Environment
    network: nn.Module
    params: Any
    best_params: Any
    best_mean_return: float | None
    opt_state: Any
    version: int
    environment_steps: int
    overshoot: int
    episodes: EpisodeLog
    schedule: Schedule
    skipped: int
    stop_reason: str
    wall_clock: dict[str, float]

    @property
    def evaluation_key(self) -> jax.Array:
        """A key for evaluation that no worker has used."""
        return evaluation_key(self.config)


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C, or SIGTERM, during `train`.

    Attributes:
      result: what the run came to until then.
      signal: the signal's number.
    """

    def __init__(self, result: TrainResult, number: int) -> None:
        super().__init__("training was interrupted")
        self.result = result
        self.signal = number


def train(
    config: A3CConfig,
    *,
    environment: environments.Environment | None = None,
    network: nn.Module | None = None,
    sinks: Sequence[Sink] = (),
    interval: float = 0.5,
    checkpoints: CheckpointFolder | None = None,
    resume: Checkpoint | None = None,
) -> TrainResult:
    """Trains an actor-critic by asynchronous advantage actor-critic (A3C).

    >>> from a3c_jax import A3CConfig, train
    >>> train(A3CConfig(num_workers=2, max_steps=100)).version
    1

    Args:
      config: the configuration.
      environment: what to play instead of the environment that the configuration names: an object of the
        protocol `a3c_jax.environments.Environment`.
      network: what to train instead of the network that the configuration describes: a module like
        `a3c_jax.networks.ActorCritic`.
      sinks: where to send rows of metrics; none by default, so that the call is silent. They are closed
        at the end.
      interval: seconds between two rows, and between two looks at whether a checkpoint is due.
      checkpoints: where to save the run: at its start, whenever it is due, and however it ends.
      resume: a checkpoint to go on from (`a3c_jax.checkpoints.find`). Only the budgets of the
        configuration may differ from the checkpoint's.

    Returns:
      The final and the best parameters, and the record of how they came about.

    Raises:
      ValueError: where the environment is unknown or not supported, or the configuration differs from the
        checkpoint's.
      WorkerError: where a worker failed; its cause is the worker's exception, and its `result` what the run
        came to until then.
      TrainingInterrupted: a KeyboardInterrupt that carries the result so far.

    Warns:
      RuntimeWarning: where a checkpoint cannot be written. Training goes on, and the next one is tried.
    """
    try:
        return _train(config, environment, network, sinks, interval, checkpoints, resume)
    finally:
        for sink in sinks:
            sink.close()


def _train(
    config: A3CConfig,
    environment: environments.Environment | None,
    network: nn.Module | None,
    sinks: Sequence[Sink],
    interval: float,
    checkpoints: CheckpointFolder | None,
    resume: Checkpoint | None,
) -> TrainResult:
    run = _Run(config, environment, network, resume)
    limit = config.max_updates
    remaining = None if limit is None else max(0, limit - run.version)
    if run.stop_reason is not None:
        remaining = 0

    def on_commit(worker: int, snapshot: Snapshot, staleness: int, record: Record) -> None:
        run.record(worker, snapshot, staleness, record)
        if run.stop_reason is not None:
            threads.stop()

    threads = WorkerThreads(
        run.step.play,
        run.store,
        run.states,
        on_commit=on_commit,
        max_updates=remaining,
        max_running=max_running(config, run.step, run.store.pull().params, run.states[0]),
    )
    run.states = threads.states  # from here on the threads keep them

    def write() -> None:
        row, episodes = run.counters.row(), run.counters.new_episodes()
        for sink in sinks:
            sink.write(row, episodes)

    def save() -> None:
        if checkpoints is None:
            return
        try:
            checkpoints.save(run.checkpoint())
        except OSError as error:
            warnings.warn(
                f"the checkpoint of update {run.version:,} cannot be written to {checkpoints.path} "
                f"({error.strerror}); training goes on, and earlier checkpoints stay.",
                RuntimeWarning,
                stacklevel=2,
            )

    def tick() -> None:
        if sinks:
            write()
        if checkpoints is not None and checkpoints.due(run.version):
            save()

    if resume is None:
        save()  # so that there is something to go on from, whatever happens next
    run.start_clock()
    try:
        threads.run(tick if sinks or checkpoints else None, interval)
    except BaseException as error:
        run.finish("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        save()
        if isinstance(error, KeyboardInterrupt):
            write()
            raise TrainingInterrupted(run.result(), *error.args[:1] or (2,)) from None
        if isinstance(error, WorkerError):
            error.result = run.result()
            run.blame(error)
        raise
    run.finish(run.stop_reason or "max_steps")
    save()
    write()
    return run.result()


def replay(
    config: A3CConfig,
    schedule: Schedule,
    *,
    environment: environments.Environment | None = None,
    network: nn.Module | None = None,
    until: int | None = None,
    on_update: Callable[[int, Snapshot, Any, dict[str, float]], None] | None = None,
) -> TrainResult:
    """Does again, in this thread, what a run with any number of workers did: bit for bit.

    All randomness comes from the seed and all asynchrony from the order of the updates, so that the
    schedule is enough. It needs the same versions of the libraries and the same kind of processor.

    >>> from a3c_jax import A3CConfig, replay, train
    >>> config = A3CConfig(num_workers=4, max_steps=10_000)
    >>> result = train(config)
    >>> again = replay(config, result.schedule)
    >>> bool((again.episodes.episode_return == result.episodes.episode_return).all())
    True

    Args:
      config: the run's configuration.
      schedule: the run's schedule, or any other: the asynchrony of one's choice.
      environment: what the run played, where it was given as an object.
      network: what the run trained, where it was given as an object.
      until: how many updates to make; None makes all.
      on_update: called as `on_update(k, snapshot, gradients, metrics)` after update k, counted from zero:
        the parameters that it led to, its gradients as a tree, and the metrics of its segment.

    Returns:
      What `train` returned, but for the times.

    Raises:
      ValueError: where the schedule names a worker or a version that there cannot be, or `until` is negative.
      WorkerError: where the run failed, at the same update.
    """
    if until is not None and until < 0:
        raise ValueError(f"until must be >= 0, got {until}; use None for all updates.")
    schedule.check(config.num_workers)
    workers, pulled_versions = (np.asarray(column)[:until] for column in schedule)
    count = np.arange(len(workers))
    run = _Run(config, environment, network, None)
    last_use = dict(zip(pulled_versions.tolist(), count.tolist(), strict=True))
    versions = {0: run.store.pull().params}
    run.start_clock()
    for k, (worker, pulled) in enumerate(
        zip(workers.tolist(), pulled_versions.tolist(), strict=True)
    ):
        gradients, state, record = run.step.play(versions[pulled], run.states[worker])
        try:
            run.store.apply(gradients, pulled, worker)
        except NonFiniteError as error:
            failure = WorkerError(worker, error, pulled, record)
            failure.__cause__ = error
            run.blame(failure)
            run.finish("failed")
            failure.result = run.result()
            raise failure from error
        run.states[worker] = state
        snapshot = run.store.pull()
        run.record(worker, snapshot, k - pulled, record)
        versions[k + 1] = snapshot.params
        for version in {pulled, k + 1}:
            if last_use.get(version, -1) <= k:
                del versions[version]
        if on_update is not None:
            tree = run.step.unflatten
            on_update(
                k,
                Snapshot(tree(snapshot.params), snapshot.version),
                tree(gradients),
                run.step.metrics(record.report),
            )
    run.finish("replayed")
    return run.result()


_SECONDS_FOR_EACH = 80e-6
"""How long a segment has to take for each worker that plays at the same time as others."""


def max_running(
    config: A3CConfig, step: PackedWorkerStep, params: Any, state: Any, cores: int | None = None
) -> int | None:
    """How many workers may play at the same time; None sets no limit.

    A segment that is a single kernel is computed by its worker's own thread: more threads than cores only fight for
    the interpreter (16 workers with 8 environments on 2 cores are 1.9 times as fast in turns). Others are computed
    by XLA's thread pool, which more workers keep busy.

    Nor do short segments leave room for all cores. An update gives the interpreter lock back nine times, each array
    that dies once, and where someone always waits for it each costs a thread's sleep and waking. On 4 cores 3 of 4
    workers with 8 environments for 16 steps (230 us) make 1.7 times the steps of all 4, 2 of 4 with 8 for 5 (70 us)
    2.6 times; at 64 for 20 (900 us) all 4 are the fastest. Two may always play at the same time: less is not A3C.
    """
    if config.max_concurrent_workers is not None:
        return config.max_concurrent_workers
    if not step.fused:
        return None
    cores = available_cores() if cores is None else cores
    if min(cores, config.num_workers) <= 2:
        return cores
    return workers_at_once(segment_seconds(step, params, state), cores)


def workers_at_once(segment: float, cores: int) -> int:
    """How many workers may play at the same time segments of so many seconds, each a single kernel."""
    return min(cores, max(2, round(segment / _SECONDS_FOR_EACH)))


def segment_seconds(step: PackedWorkerStep, params: Any, state: Any) -> float:
    """What a segment takes while nobody else plays: the shortest of ten calls."""
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        step.play(params, state)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


class _Run:
    """A run taken apart: what the threads of `train` and the loop of `replay` both drive."""

    def __init__(
        self,
        config: A3CConfig,
        environment: environments.Environment | None,
        network: nn.Module | None,
        resume: Checkpoint | None,
    ) -> None:
        if resume is not None:
            check_same_run(resume.config, config)
        self._clock = _Clock()
        self.config = config
        self.agent = make_agent(config, environment=environment, network=network)
        self._clock.lap("setup")

        agent = self.agent
        self.step = PackedWorkerStep(agent.worker_step, agent.params, agent.states[0])
        self.states = [self.step.pack_state(state) for state in agent.states]
        self.store = SharedParameters(
            self.step.flatten(agent.params),
            agent.optimizer,
            config.num_workers,
            skip_nonfinite=config.nonfinite == "skip",
        )
        self.counters = Counters(config.steps_per_update, config.solved_window)
        self.stop_reason: str | None = None
        self._best: tuple[float | None, Any] = (None, self.store.pull().params)
        self._seconds = 0.0
        if resume is not None:
            self._restore(resume)
        gradients, _, _ = self.step(self.store.pull().params, self.states[0])  # compiles
        self.store.compile(gradients, fused=not self.step.fused)
        self._clock.lap("compile")

    @property
    def version(self) -> int:
        return self.store.pull().version

    def start_clock(self) -> None:
        self.counters.start_clock(self._seconds)

    def record(self, worker: int, snapshot: Snapshot, staleness: int, record: Record) -> None:
        """Counts an update, and decides whether it was the last. Called under the store's lock."""
        report, returns, lengths = record
        self.counters.record(worker, staleness, lambda: self.step.metrics(report), returns, lengths)
        if returns.size:
            self._judge(snapshot.params)

    def _judge(self, params: Any) -> None:
        config, mean_return = self.config, self.counters.mean_return
        if mean_return is not None and not np.isnan(mean_return):
            if self._best[0] is None or mean_return > self._best[0]:
                self._best = (mean_return, params)
            if config.solved_return is not None and mean_return >= config.solved_return:
                self.stop_reason = self.stop_reason or "solved"
        if config.max_episodes is not None and self.counters.episodes >= config.max_episodes:
            self.stop_reason = self.stop_reason or "max_episodes"

    def blame(self, error: WorkerError) -> None:
        """Adds to the error of an update that is not finite what went bad in its segment."""
        if isinstance(error.__cause__, NonFiniteError):
            metrics = self.step.metrics(error.record.report)
            bad = [name for name, value in metrics.items() if not np.isfinite(value)]
            error.args = (f"{error} Not finite in its segment: {', '.join(bad) or 'nothing'}.",)

    def finish(self, stop_reason: str) -> None:
        """Stops the clock."""
        self.stop_reason = stop_reason
        self._clock.lap("train")

    def checkpoint(self) -> Checkpoint:
        """The whole run as of one moment between two updates."""
        state, (states, episodes, best, seconds) = self.store.cut(
            lambda: (list(self.states), self.counters.log(), self._best, self.counters.seconds)
        )
        return Checkpoint(
            config=self.config,
            params=np.asarray(state.snapshot.params),
            opt_state=np.asarray(state.opt_state),
            schedule=state.schedule,
            skipped=state.skipped,
            states=np.stack([np.asarray(s) for s in states]),
            episodes=episodes,
            best_params=np.asarray(state.snapshot.params if best[0] is None else best[1]),
            best_mean_return=best[0],
            seconds=seconds,
            versions=library_versions(),
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        now = self.checkpoint()
        for name in ("params", "opt_state", "states"):
            have, want = getattr(checkpoint, name), getattr(now, name)
            if have.shape != want.shape or have.dtype != want.dtype:
                raise CheckpointError(
                    f"the checkpoint's {name} are {have.dtype}{list(have.shape)}, but this run needs "
                    f"{want.dtype}{list(want.shape)}; give the same environment and network, and the "
                    "same version of a3c_jax."
                )
        self.states = [jax.numpy.asarray(state) for state in checkpoint.states]
        self.store.restore(
            StoreState(
                Snapshot(jax.numpy.asarray(checkpoint.params), checkpoint.version),
                jax.numpy.asarray(checkpoint.opt_state),
                checkpoint.schedule,
                checkpoint.skipped,
            )
        )
        self._seconds = checkpoint.seconds
        self.counters.restore(
            checkpoint.version, checkpoint.schedule.staleness, checkpoint.episodes, self._seconds
        )
        self._best = (checkpoint.best_mean_return, jax.numpy.asarray(checkpoint.best_params))
        self._judge(self.store.pull().params)

    def result(self) -> TrainResult:
        state = self.store.cut(lambda: None)[0]
        params, version = state.snapshot
        best_mean_return, best_params = self._best
        steps, limit = self.counters.environment_steps, self.config.max_steps
        return TrainResult(
            config=self.config,
            environment=self.agent.environment,
            network=self.agent.network,
            params=self.step.unflatten(params),
            best_params=self.step.unflatten(params if best_mean_return is None else best_params),
            best_mean_return=best_mean_return,
            opt_state=self.store.opt_state,
            version=version,
            environment_steps=steps,
            overshoot=0 if limit is None else max(0, steps - limit),
            episodes=self.counters.log(),
            schedule=state.schedule,
            skipped=state.skipped,
            stop_reason=self.stop_reason or "max_steps",
            wall_clock=self._clock.laps,
        )


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
