"""Workers in processes of their own, on one machine or on many: Ray starts the processes and takes messages to them.

The store, the schedule, the checkpoints and the loop of each worker (`a3c_jax.asynchrony.threads`) stay in the process
that calls `train`. Only the step is elsewhere: the worker's thread sends the parameters to a process, and waits until
gradients, new state and report come back. A step is a pure function, and the thread commits the new state together with
the gradients. So if the process dies, the same call is made again in another one, and nothing is lost.
"""

import contextlib
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax

from a3c_jax.asynchrony.program import Program
from a3c_jax.asynchrony.ray_cluster import (
    RayOptions,
    check_installed,
    cluster,
    get,
    is_done,
    lost_errors,
)
from a3c_jax.asynchrony.ray_nodes import Nodes, StepProcessOnRay, TimedReport
from a3c_jax.asynchrony.signals import raise_noted
from a3c_jax.asynchrony.step_process import Forms, recipe_of
from a3c_jax.asynchrony.thread_pools import BLAS, XLA, thread_counts
from a3c_jax.asynchrony.threads import Step, StepAbandoned

_POLL = 0.1
"""Seconds between two looks at whether a process is ready."""
_CLOSE_SECONDS = 15.0
"""How long to wait until the processes have closed their environments."""


class _Place:
    """One of the processes. If it dies, another takes its place.

    Args:
      make: makes an actor.
      recipe: what it builds, an object of Ray's.
      max_deaths: how many times in a row it may die.
      stopping: set when no other shall take its place any more.

    Attributes:
      deaths: how many times in a row it has died.
      node: the name of the machine where it was when it was last ready.
    """

    node = ""

    def __init__(self, make: Any, recipe: Any, max_deaths: int, stopping: threading.Event) -> None:
        self._make, self._recipe, self._max_deaths = make, recipe, max_deaths
        self._stopping = stopping
        self._lock = threading.Lock()
        self.deaths = 0
        self._start()

    def _start(self) -> None:
        self._since, self._ready = time.monotonic(), None
        actor = self._make()
        # One tuple, replaced as a whole, because threads read it without the lock.
        self._process = actor, actor.arrive.remote(), actor.build.remote(self._recipe)

    def ready(self, seconds: float = 0.0) -> Any:
        """The process, if it can step now or after a while; None if not. Raises what was raised while it was built."""
        actor, arrived, built = self._process
        if self._ready is not actor and is_done(built, seconds):
            try:
                get(built)
                self.node = get(arrived)
                self._ready = actor
            except lost_errors() as error:
                self.replace(actor, error)
        return actor if self._ready is actor else None

    def is_waiting(self, patience: float) -> bool:
        """Whether it has waited for a place in the cluster for long."""
        return time.monotonic() - self._since > patience and not is_done(self._process[1])

    def replace(self, actor: Any, error: Exception) -> None:
        """Starts another process instead of one that died, unless that was done already."""
        import ray

        with self._lock:
            if self._stopping.is_set():
                raise StepAbandoned
            if self._process[0] is not actor:
                return
            self.deaths += 1
            if self.deaths > self._max_deaths:
                raise RuntimeError(
                    f"its process died {self.deaths} times in a row without finishing a step; the last time: {error}"
                )
            with contextlib.suppress(Exception):
                ray.kill(actor)
            self._start()

    def close(self) -> Any:
        """Asks it to close its environments; returns a reference to wait for, None if there is nothing to close."""
        return None if self._ready is None else self._ready.close.remote()

    def kill(self) -> None:
        """Ends it."""
        import ray

        with contextlib.suppress(Exception):
            ray.kill(self._process[0])


class _Workers:
    """The processes of one run, and the steps of its workers in them."""

    def __init__(
        self, program: Program, recipe: bytes, options: RayOptions, stopping: threading.Event
    ) -> None:
        import ray

        self._options, self._stopping = options, stopping
        params, state = program.initial_params(), program.initial_states()[0]
        self._forms = Forms.of(program.step, params, state)
        self._nodes = Nodes(program.config.steps_per_update)
        self._newest: dict[int, tuple[Any, Any]] = {}  # by worker: an actor, and the state it has
        self._warned = False
        counts = thread_counts()
        remote = ray.remote(StepProcessOnRay).options(
            num_cpus=options.cpus_per_process,
            max_concurrency=options.workers_per_process,
            runtime_env={"env_vars": _variables(counts)},
        )
        stored = ray.put(recipe)
        self.places = [
            _Place(lambda: remote.remote(counts, sys.path), stored, options.max_deaths, stopping)
            for _ in range(_num_processes(program, options))
        ]

    def wait(self) -> None:
        """Waits until every process can step, but for those that find no place."""
        patience = self._options.patience
        while True:
            ready = [place.ready() is not None for place in self.places]
            waiting = [place.is_waiting(patience) for place in self.places]
            if any(ready) and all(r or w for r, w in zip(ready, waiting, strict=True)):
                return
            self._warn_if(any(waiting))
            raise_noted()
            time.sleep(_POLL)

    def step(self, worker: int, params: Any, state: Any) -> tuple[Any, Any, Any]:
        """One step of a worker, in whichever process, and as often as processes die."""
        began = time.perf_counter()
        sent = self._forms.params.bare(params)
        while True:
            place, actor = self._find(worker)
            newest = self._newest.pop(worker, (None, None))
            is_there = newest[0] is actor and newest[1] is state
            known = None if is_there else self._forms.state.bare(state)
            try:
                bare = get(actor.step.remote(worker, sent, known))
            except lost_errors() as error:
                place.replace(actor, error)
                continue
            place.deaths = 0
            gradients, state, report, seconds = bare
            state = self._forms.state.dressed(state)
            self._newest[worker] = (actor, state)
            exchange = time.perf_counter() - began - seconds
            self._nodes.count(place.node, exchange)
            report = TimedReport(self._forms.report.dressed(report), seconds, exchange, self._nodes)
            return self._forms.gradients.dressed(gradients), state, report

    def _find(self, worker: int) -> tuple[_Place, Any]:
        """The worker's own process, or another one as long as that finds no place in the cluster."""
        own = self.places[worker // self._options.workers_per_process]
        while (actor := own.ready(_POLL)) is None:
            if self._stopping.is_set():
                raise StepAbandoned
            if own.is_waiting(self._options.patience):
                self._warn_if(True)
                for other in self.places:
                    if other is not own and (actor := other.ready()) is not None:
                        return other, actor
        return own, actor

    def _warn_if(self, is_short: bool) -> None:
        if is_short and not self._warned:
            self._warned = True
            warnings.warn(
                "the Ray cluster has no place for some of the run's processes: their workers play in the others until "
                "it has; add machines, or set fewer num_workers, or more RayOptions.workers_per_process.",
                RuntimeWarning,
                stacklevel=2,
            )

    def close(self) -> None:
        """Closes the environments and ends the processes."""
        import ray

        self._stopping.set()
        with contextlib.suppress(Exception):
            closing = [ref for place in self.places if (ref := place.close()) is not None]
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_SECONDS)
        for place in self.places:
            place.kill()


@contextlib.contextmanager
def steps_on_ray(
    program: Program, ray: str | RayOptions | None, stopping: threading.Event
) -> Iterator[list[Step] | None]:
    """Starts a run's processes for a block, and Ray as well if it does not run; ends what it has started.

    Args:
      program: what to run.
      ray: an address, or options; None starts nothing.
      stopping: set when the steps shall no longer wait for processes.

    Yields:
      A step for each worker; None if nothing was started.

    Raises:
      ImportError: if Ray is not installed.
      TypeError: if the program cannot be sent to another process.
    """
    if ray is None:
        yield None
        return
    options = ray if isinstance(ray, RayOptions) else RayOptions(address=ray)
    check_installed()
    recipe = recipe_of(program)
    with cluster(options, _num_processes(program, options)):
        workers = _Workers(program, recipe, options, stopping)
        try:
            workers.wait()
            yield [_step_of(workers, w) for w in range(program.config.num_workers)]
        finally:
            workers.close()


def _step_of(workers: _Workers, worker: int) -> Step:
    return lambda params, state: workers.step(worker, params, state)


def _num_processes(program: Program, options: RayOptions) -> int:
    return -(-program.config.num_workers // options.workers_per_process)


def _variables(counts: dict[str, str]) -> dict[str, str]:
    """Environment variables by which the processes compute as this one does."""
    named = {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_", "A3C_JAX_"))}
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir:
        named["JAX_COMPILATION_CACHE_DIR"] = settings.jax_compilation_cache_dir
        least = settings.jax_persistent_cache_min_compile_time_secs
        named["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(least)
    named |= {"JAX_PLATFORMS": jax.default_backend(), "PJRT_NPROC": counts[XLA]}
    return named | ({"OPENBLAS_NUM_THREADS": counts[BLAS]} if BLAS in counts else {})
