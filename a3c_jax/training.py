"""`train`: wires the layers below together, and nothing else."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from a3c_jax import environments
from a3c_jax.agent import evaluation_key, make_agent
from a3c_jax.config import A3CConfig
from a3c_jax.metrics import Counters, EpisodeLog, Sink
from a3c_jax.parameters import Schedule, SharedParameters, Snapshot
from a3c_jax.threads import WorkerThreads
from a3c_jax.worker import PackedWorkerStep


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
      schedule: which worker made each update, from which version.
      stop_reason: `solved`, `max_steps`, `max_episodes` or `interrupted`.
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
    stop_reason: str
    wall_clock: dict[str, float]

    @property
    def evaluation_key(self) -> jax.Array:
        """A key for evaluation that no worker has used."""
        return evaluation_key(self.config)


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C during `train`.

    Attributes:
      result: what the run came to until then.
    """

    def __init__(self, result: TrainResult) -> None:
        super().__init__("training was interrupted")
        self.result = result


def train(
    config: A3CConfig,
    *,
    environment: environments.Environment | None = None,
    network: nn.Module | None = None,
    sinks: Sequence[Sink] = (),
    interval: float = 0.5,
) -> TrainResult:
    """Trains an actor-critic by asynchronous advantage actor-critic (A3C).

    >>> from a3c_jax import A3CConfig, train
    >>> train(A3CConfig(num_workers=2, max_steps=100)).version
    20

    Args:
      config: the configuration.
      environment: what to play instead of the environment that the configuration names: an object of the
        protocol `a3c_jax.environments.Environment`.
      network: what to train instead of the network that the configuration describes: a module like
        `a3c_jax.networks.ActorCritic`.
      sinks: where to send rows of metrics; none by default, so that the call is silent. They are closed
        at the end.
      interval: seconds between two rows.

    Returns:
      The final and the best parameters, and the record of how they came about.

    Raises:
      ValueError: where the environment is unknown or not supported.
      WorkerError: where a worker failed; its cause is the worker's exception.
      TrainingInterrupted: a KeyboardInterrupt that carries the result so far.
    """
    try:
        return _train(config, environment, network, sinks, interval)
    finally:
        for sink in sinks:
            sink.close()


def _train(
    config: A3CConfig,
    environment: environments.Environment | None,
    network: nn.Module | None,
    sinks: Sequence[Sink],
    interval: float,
) -> TrainResult:
    clock = _Clock()
    agent = make_agent(config, environment=environment, network=network)
    clock.lap("setup")

    step = PackedWorkerStep(agent.worker_step, agent.params, agent.states[0])
    packed_states = [step.pack_state(state) for state in agent.states]
    store = SharedParameters(step.flatten(agent.params), agent.optimizer, config.num_workers)
    gradients, _, _ = step(store.pull().params, packed_states[0])  # compiles; nothing is applied
    store.compile(gradients)
    clock.lap("compile")

    counters = Counters(config.steps_per_update, config.solved_window)
    best: tuple[float | None, Snapshot] = (None, store.pull())
    stop_reason = "max_steps"

    def on_commit(worker: int, snapshot: Snapshot, staleness: int, report: Any) -> None:
        nonlocal best, stop_reason
        returns, lengths = step.episodes(report)
        counters.record(worker, staleness, lambda: step.metrics(report), returns, lengths)
        mean_return = counters.mean_return
        if not returns.size or stop_reason != "max_steps":
            return
        if mean_return is not None:
            if best[0] is None or mean_return > best[0]:
                best = (mean_return, snapshot)
            if config.solved_return is not None and mean_return >= config.solved_return:
                stop_reason = "solved"
                threads.stop()
        if config.max_episodes is not None and counters.episodes >= config.max_episodes:
            stop_reason = "max_episodes"
            threads.stop()

    def write() -> None:
        row, episodes = counters.row(), counters.new_episodes()
        for sink in sinks:
            sink.write(row, episodes)

    threads = WorkerThreads(
        step, store, packed_states, on_commit=on_commit, max_updates=config.max_updates
    )

    def result() -> TrainResult:
        final = store.pull()
        best_params = final.params if best[0] is None else best[1].params
        return TrainResult(
            config=config,
            environment=agent.environment,
            network=agent.network,
            params=step.unflatten(final.params),
            best_params=step.unflatten(best_params),
            best_mean_return=best[0],
            opt_state=store.opt_state,
            version=final.version,
            environment_steps=counters.environment_steps,
            overshoot=max(0, counters.environment_steps - config.max_steps)
            if config.max_steps
            else 0,
            episodes=counters.log(),
            schedule=store.schedule,
            stop_reason=stop_reason,
            wall_clock=clock.laps,
        )

    counters.start_clock()
    try:
        threads.run(write if sinks else None, interval)
    except KeyboardInterrupt:
        stop_reason = "interrupted"
        clock.lap("train")
        write()
        raise TrainingInterrupted(result()) from None
    clock.lap("train")
    write()
    return result()


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
