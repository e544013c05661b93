"""What the benchmarks share: A3C and the synchronous loop run for some seconds, and time stamps of a run."""

import dataclasses
import functools
import importlib.metadata
import os
import platform
import resource
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from a3c_jax.agent import Agent, make_agent
from a3c_jax.config import A3CConfig, available_cores
from a3c_jax.metrics import Counters
from a3c_jax.parameters import SharedParameters, Snapshot
from a3c_jax.threads import WorkerThreads
from a3c_jax.training import max_running
from a3c_jax.worker import PackedWorkerStep, Record
from experiments import synchronous

Program = Callable[..., Any]

PARTS = ("pull", "dispatch", "compute", "update", "lock wait", "lock held", "bookkeeping")
"""What a worker's time divides into (`Trace.parts`)."""


class Measurement(NamedTuple):
    """What one run came to.

    Attributes:
      seconds: wall-clock from the start of the threads until all have ended.
      environment_steps: exact, all workers together.
      updates: exact, all workers together.
      staleness: mean over the updates.
      cpu_seconds: processor time of the whole process, XLA's thread pool included.
      context_switches: voluntary ones, of the whole process: a thread waited for something.
    """

    seconds: float
    environment_steps: int
    updates: int
    staleness: float
    cpu_seconds: float
    context_switches: int

    @property
    def steps_per_second(self) -> float:
        """Environment steps, all workers together."""
        return self.environment_steps / self.seconds

    @property
    def updates_per_second(self) -> float:
        """Updates, all workers together."""
        return self.updates / self.seconds


class Asynchronous:
    """A3C, put together as `a3c_jax.train` does and compiled once, to be run again and again.

    Args:
      config: what to run. Its budgets are not looked at.
      trace: where to note time stamps, if anywhere. They cost a microsecond or two an update.
    """

    def __init__(self, config: A3CConfig, trace: "Trace | None" = None) -> None:
        agent = _agent(config)
        packed = _packed_step(dataclasses.replace(config, num_workers=1))
        self.config = config
        self.step = packed
        self.states = [packed.pack_state(state) for state in agent.states]
        params = packed.flatten(agent.params)
        store = SharedParameters if trace is None else functools.partial(_TracedParameters, trace)
        self.store = store(params, agent.optimizer, config.num_workers)
        self._traced_step = packed.play if trace is None else trace.step(packed.play)
        self._trace = trace
        self.gradients, _, _ = packed(params, self.states[0])
        self.store.compile(self.gradients, fused=not packed.fused)
        self._start = self.store.cut(lambda: None)[0]
        self._max_running = max_running(config, packed, params, self.states[0])

    def measure(self, seconds: float) -> Measurement:
        """Trains from the initial parameters and states for so long."""
        self.store.restore(self._start)
        if self._trace is not None:
            self._trace.clear()
        counters = Counters(self.config.steps_per_update, self.config.solved_window)
        best: float | None = None

        # What `train` does at each update, with the lock held.
        def on_commit(worker: int, snapshot: Snapshot, staleness: int, record: Record) -> None:
            nonlocal best
            report, returns, lengths = record
            counters.record(worker, staleness, lambda: self.step.metrics(report), returns, lengths)
            mean = counters.mean_return
            if returns.size and mean is not None and (best is None or mean > best):
                best = mean

        threads = WorkerThreads(
            self._traced_step,
            self.store,
            self.states,
            on_commit=on_commit,
            max_running=self._max_running,
        )
        usage = resource.getrusage(resource.RUSAGE_SELF)
        counters.start_clock()
        began = time.perf_counter()
        threads.run(threads.stop, seconds)
        elapsed = time.perf_counter() - began
        row = counters.row()
        return Measurement(
            elapsed,
            counters.environment_steps,
            counters.updates,
            row["staleness"],
            *_used_since(usage),
        )


class Synchronous:
    """The synchronous loop with as many environments as the configuration's workers have together."""

    def __init__(self, config: A3CConfig) -> None:
        agent = _agent(synchronous.synchronous_config(config))
        # Long enough that the call itself is nothing, short enough to stop in time.
        self._updates = max(2, 16_384 // agent.config.steps_per_update)
        self._steps = self._updates * agent.config.steps_per_update
        self._start = synchronous.start(agent)
        self._run = synchronous.make_run(agent, self._updates)
        jax.block_until_ready(self._run(self._start))

    def measure(self, seconds: float) -> Measurement:
        """Trains from the initial parameters and states for so long."""
        state, calls = self._start, 0
        usage = resource.getrusage(resource.RUSAGE_SELF)
        began = time.perf_counter()
        while calls == 0 or time.perf_counter() - began < seconds:
            state, progress = jax.block_until_ready(self._run(state))
            calls += 1
        elapsed = time.perf_counter() - began
        return Measurement(
            elapsed, calls * self._steps, calls * self._updates, 0.0, *_used_since(usage)
        )


def interleave(
    runs: dict[Any, Asynchronous | Synchronous], rounds: int, seconds: float
) -> dict[Any, list[Measurement]]:
    """Measures every run once in each round, so that a slow minute of the machine touches all of them."""
    measurements: dict[Any, list[Measurement]] = {key: [] for key in runs}
    for index in range(rounds):
        order = list(runs) if index % 2 == 0 else list(reversed(runs))
        for key in order:
            measurements[key].append(runs[key].measure(seconds))
        print(f"  round {index + 1} of {rounds}", file=sys.stderr, flush=True)
    return measurements


class Trace:
    """Time stamps of each worker's updates, in nanoseconds."""

    PULL, PULLED, CALL, RETURNED, WANTED, HELD, RELEASED = range(7)

    def __init__(self) -> None:
        self.own = _Own()
        self.lock = _StampedLock(self.own)
        self.by_worker: dict[int, array[int]] = {}

    def clear(self) -> None:
        """Forgets all of them."""
        self.by_worker.clear()

    def step(self, step: Program) -> Program:
        """The step function, stamped."""
        own = self.own

        def stamped(params: Any, state: Any) -> Any:
            stamps = own.stamps
            stamps.append(time.perf_counter_ns())
            result = step(params, state)
            stamps.append(time.perf_counter_ns())
            return result

        return stamped

    def stamps(self) -> dict[int, np.ndarray]:
        """Each worker's stamps, `[updates, 7]` int64: one row an update, in the order of the names above."""
        return {
            worker: np.array(stamps, np.int64).reshape(-1, 7)
            for worker, stamps in sorted(self.by_worker.items())
        }


def intervals(stamps: np.ndarray) -> dict[str, np.ndarray]:
    """A worker's stamps as intervals to draw, `[N, 2]` each: begin and end in nanoseconds."""

    def between(begin: int, end: int) -> np.ndarray:
        return stamps[:, [begin, end]]

    loop = np.stack([stamps[:-1, Trace.RELEASED], stamps[1:, Trace.PULL]], axis=1)
    return {
        "pull": between(Trace.PULL, Trace.PULLED),
        "step call": between(Trace.CALL, Trace.RETURNED),
        "update": between(Trace.RETURNED, Trace.WANTED),
        "waiting for the lock": between(Trace.WANTED, Trace.HELD),
        "lock held": between(Trace.HELD, Trace.RELEASED),
        "bookkeeping": np.concatenate([between(Trace.PULLED, Trace.CALL), loop]),
    }


def parts(stamps: np.ndarray, dispatch: float) -> dict[str, float]:
    """What a worker's seconds went into, from its first pull to the last release of the lock.

    Args:
      stamps: a worker's stamps (`Trace.stamps`).
      dispatch: seconds that a call of an empty program of the same shapes takes (`empty_step_seconds`).
        The rest of the call is `compute`: the program, and waiting for the interpreter lock to come back.
    """
    t = stamps.astype(np.float64) / 1e9
    call = float(np.sum(t[:, Trace.RETURNED] - t[:, Trace.CALL]))
    dispatched = min(dispatch * len(t), call)
    return {
        "pull": float(np.sum(t[:, Trace.PULLED] - t[:, Trace.PULL])),
        "dispatch": dispatched,
        "compute": call - dispatched,
        "update": float(np.sum(t[:, Trace.WANTED] - t[:, Trace.RETURNED])),
        "lock wait": float(np.sum(t[:, Trace.HELD] - t[:, Trace.WANTED])),
        "lock held": float(np.sum(t[:, Trace.RELEASED] - t[:, Trace.HELD])),
        "bookkeeping": float(
            np.sum(t[:, Trace.CALL] - t[:, Trace.PULLED])
            + np.sum(t[1:, Trace.PULL] - t[:-1, Trace.RELEASED])
        ),
    }


def empty_step_seconds(run: Asynchronous) -> float:
    """Seconds of a call with a worker step's arguments and results that computes next to nothing."""
    params, state = run.store.pull().params, run.states[0]
    _, _, report = run.step(params, state)

    @jax.jit
    def empty(params: Any, state: Any) -> tuple[Any, Any, Any]:
        return params + 1, state + 1, jnp.full(report.shape, state[0]).astype(report.dtype)

    return call_seconds(lambda: np.asarray(empty(params, state)[2]))


def update_seconds(run: Asynchronous) -> tuple[float, float]:
    """Seconds of an optimizer's update alone, and of an empty program with its arguments and results."""
    state = run.store.cut(lambda: None)[0]
    arguments = run.gradients, state.opt_state, state.snapshot.params

    @jax.jit
    def empty(gradients: Any, opt_state: Any, params: Any, worker: Any) -> tuple[Any, Any]:
        return params + gradients + worker, opt_state + 1

    return (
        call_seconds(lambda: run.store.compile(run.gradients)),
        call_seconds(lambda: jax.block_until_ready(empty(*arguments, 0))),
    )


def call_seconds(call: Callable[[], Any], seconds: float = 0.1) -> float:
    """Median seconds of a call, after the first, which compiles."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def peak_memory() -> int:
    """The most memory this process has had resident, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss begins with that of the process that started this one
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def summary(values: Iterable[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    values = list(values)
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}


def surroundings() -> dict[str, Any]:
    """Versions and machine, for the record."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": available_cores(),
        "load_average": list(os.getloadavg()),
    }


def describe(surroundings: dict[str, Any]) -> str:
    """The same in a line, and a second one where other programs were running."""
    load = surroundings["load_average"][0]
    line = (
        f"{surroundings['date']}, Python {surroundings['python']}, jax {surroundings['jax']}, "
        f"{surroundings['machine']}, {surroundings['cores']} cores, load average at the start {load:.1f}"
    )
    if load > surroundings["cores"] / 2:
        line += "\nOther programs are running: the figures below are too low, and not to be quoted."
    return line


def check_positive(name: str, values: Any, example: Any) -> None:
    """Refuses a value, or a list with one, that is not positive, and an empty list.

    Raises:
      ValueError: with the name, the rule, the value and an example.
    """
    many = values if isinstance(values, tuple) else (values,)
    if not many:
        raise ValueError(f"{name} must not be empty; give {example}.")
    for value in many:
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}; give {example}.")


class _Own(threading.local):
    """A thread's own stamps."""

    def __init__(self) -> None:
        self.stamps: array[int] = array("q")


class _StampedLock:
    """A lock that notes when it was wanted, held and released."""

    def __init__(self, own: _Own) -> None:
        self._own = own
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        stamps = self._own.stamps
        stamps.append(time.perf_counter_ns())
        self._lock.acquire()
        stamps.append(time.perf_counter_ns())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()
        self._own.stamps.append(time.perf_counter_ns())


class _TracedParameters(SharedParameters):
    """A store that notes when its methods were called."""

    def __init__(self, trace: Trace, params: Any, optimizer: Any, num_workers: int) -> None:
        super().__init__(params, optimizer, num_workers, lock=trace.lock)
        self._trace = trace

    def pull(self) -> Snapshot:
        stamps = self._trace.own.stamps
        stamps.append(time.perf_counter_ns())
        snapshot = super().pull()
        stamps.append(time.perf_counter_ns())
        return snapshot

    def apply(
        self,
        gradients: Any,
        pulled_version: int,
        worker: int = 0,
        commit: Callable[[Snapshot, int], None] | None = None,
    ) -> int:
        self._trace.by_worker[worker] = self._trace.own.stamps
        return super().apply(gradients, pulled_version, worker, commit)


@functools.cache
def _agent(config: A3CConfig) -> Agent:
    return make_agent(config)


@functools.cache
def _packed_step(config: A3CConfig) -> PackedWorkerStep:
    """One worker's compiled step: it is the same for any number of workers."""
    agent = _agent(config)
    return PackedWorkerStep(agent.worker_step, agent.params, agent.states[0])


def _used_since(usage: resource.struct_rusage) -> tuple[float, int]:
    """Processor seconds and voluntary context switches of this process since then."""
    now = resource.getrusage(resource.RUSAGE_SELF)
    seconds = now.ru_utime + now.ru_stime - usage.ru_utime - usage.ru_stime
    return seconds, now.ru_nvcsw - usage.ru_nvcsw
