"""Workers in processes of their own, on one machine or on many: Ray starts the processes and takes messages to them.

The store, the schedule, the checkpoints and the loop of each worker (`a3c_jax.asynchrony.threads`) stay in the process
that calls `train`. Only the step is elsewhere: the worker's thread sends the parameters to a process, and waits until
gradients, new state and report come back. A step is a pure function, and the thread commits the new state together with
the gradients. So if the process dies, the same call is made again in another one, and nothing is lost.
"""

import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a3c_jax import _compiled
from a3c_jax.asynchrony.program import Program, compile_step, rehearse
from a3c_jax.asynchrony.signals import raise_noted
from a3c_jax.asynchrony.thread_pools import BLAS, XLA, start_with, thread_counts
from a3c_jax.asynchrony.threads import Step, StepAbandoned

_POLL = 0.1
"""Seconds between two looks at whether a process is ready."""
_CLOSE_SECONDS = 15.0
"""How long to wait until the processes have closed their environments."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayOptions:
    """How workers are played on Ray.

    Attributes:
      address: "auto" takes the cluster at hand (`RAY_ADDRESS`, or one that runs on this machine), or starts one on
        this machine if there is none; "local" always starts one; anything else is the address of a cluster.
      workers_per_process: how many workers share a process. Each is a thread in it.
      cpus_per_process: how many CPUs each process takes in Ray's accounts; Ray starts no more than fit.
      patience: for how many seconds a process may wait for a place in the cluster, before its workers play in the
        other processes until there is one.
      max_deaths: how many times in a row a process may die without having finished a step.
    """

    address: str = "auto"
    workers_per_process: int = 1
    cpus_per_process: float = 1.0
    patience: float = 30.0
    max_deaths: int = 10

    def __post_init__(self) -> None:
        for name, least in (("workers_per_process", 1), ("cpus_per_process", 0), ("patience", 0), ("max_deaths", 0)):  # fmt: skip
            value = getattr(self, name)
            if not value >= least:
                raise ValueError(
                    f"RayOptions.{name} must be >= {least}, got {value}; leave it out for the default."
                )


class _Form:
    """How trees like an example pass between processes: as bare arrays, because both ends know their structure."""

    def __init__(self, example: Any) -> None:
        self._packed = _compiled.packed_type(example)
        leaves, self._structure = jax.tree.flatten(_compiled.unpack(example))
        self._impls = [jax.random.key_impl(x) if _is_key(x) else None for x in leaves]

    def bare(self, tree: Any) -> Any:
        """The tree's arrays on the host: one vector if it is packed, a list otherwise."""
        if isinstance(tree, _compiled.Packed):
            return tree.host
        leaves = jax.tree.leaves(tree)
        return [np.asarray(jax.random.key_data(x) if _is_key(x) else x) for x in leaves]

    def dressed(self, bare: Any) -> Any:
        """The tree again."""
        if self._packed is not None and isinstance(bare, np.ndarray):
            return self._packed(jnp.asarray(bare))
        leaves = [
            jnp.asarray(x) if impl is None else jax.random.wrap_key_data(x, impl=impl)
            for x, impl in zip(bare, self._impls, strict=True)
        ]
        return jax.tree.unflatten(self._structure, leaves)


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


class StepProcess:
    """What runs in each of Ray's processes: the program, compiled once, and the newest states of its workers.

    Args:
      threads: the numbers of threads that the process of the run computes with.
    """

    def __init__(self, threads: dict[str, str]) -> None:
        start_with(threads)
        self._states: dict[int, Any] = {}

    def arrive(self) -> None:
        """Returns as soon as the process has a place."""

    def build(self, recipe: bytes) -> None:
        """Compiles the worker step."""
        import cloudpickle

        config, describe, single_kernel = cloudpickle.loads(recipe)
        blueprint = describe(config)
        state = _compiled.compile_for_few_calls(blueprint.start)(
            np.uint32(config.seed), np.int32(0)
        )
        init = _compiled.compile_for_few_calls(blueprint.init)
        params = init(np.uint32(config.seed), state.observation)
        self._step = compile_step(blueprint.worker_step, params, state, single_kernel)
        gradients, _, report = rehearse(self._step, params, state)
        self._params, self._state = _Form(params), _Form(state)
        self._gradients, self._report = _Form(gradients), _Form(report)

    def step(self, worker: int, params: Any, state: Any = None) -> tuple[Any, Any, Any, float]:
        """One step of a worker.

        Args:
          worker: which worker.
          params: the parameters, bare.
          state: the worker's state, bare; None if it is the one that this worker's last step here led to.

        Returns:
          Gradients, state and report, bare, and the seconds that the step took.
        """
        if state is not None:
            self._release(worker)
            self._states[worker] = self._state.dressed(state)
        dressed = self._params.dressed(params)
        began = time.perf_counter()
        gradients, new_state, report = self._step(dressed, self._states[worker])
        seconds = time.perf_counter() - began
        self._states[worker] = new_state
        return (
            self._gradients.bare(gradients),
            self._state.bare(new_state),
            self._report.bare(report),
            seconds,
        )

    def close(self) -> None:
        """Closes the environments."""
        for worker in list(self._states):
            self._release(worker)

    def _release(self, worker: int) -> None:
        state = self._states.pop(worker, None)
        if state is not None and hasattr(self._step, "release"):
            self._step.release(state)


class _Report:
    """A report, with the times of the exchange among its metrics."""

    def __init__(self, report: Any, step_seconds: float, all_seconds: float) -> None:
        self.num_episodes, self.episodes = report.num_episodes, report.episodes
        self._report, self._times = report, (step_seconds, all_seconds)

    @property
    def metrics(self) -> dict[str, Any]:
        """See `a3c_jax.worker.SegmentReport`."""
        step, everything = self._times
        return {
            **self._report.metrics,
            "step_milliseconds": 1e3 * step,
            "exchange_milliseconds": 1e3 * (everything - step),
        }


class _Place:
    """One of the processes. If it dies, another takes its place.

    Args:
      make: makes an actor.
      recipe: what it builds, an object of Ray's.
      max_deaths: how many times in a row it may die.
    """

    def __init__(self, make: Any, recipe: Any, max_deaths: int) -> None:
        self._make, self._recipe, self._max_deaths = make, recipe, max_deaths
        self._lock = threading.Lock()
        self.deaths = 0
        self._start()

    def _start(self) -> None:
        self.since = time.monotonic()
        self.actor = self._make()
        self._arrived, self._built = (
            self.actor.arrive.remote(),
            self.actor.build.remote(self._recipe),
        )
        self._is_ready = False

    def is_ready(self, seconds: float = 0.0) -> bool:
        """Whether it can step, now or after a while. Raises what was raised while it was built."""
        ready, actor, built = self._is_ready, self.actor, self._built
        if not ready and _is_done(built, seconds):
            try:
                _get(built)
            except _lost() as error:
                self.replace(actor, error)
                return False
            with self._lock:
                ready = self._is_ready = self.actor is actor
        return ready

    def is_waiting(self, patience: float) -> bool:
        """Whether it has waited for a place in the cluster for long."""
        return time.monotonic() - self.since > patience and not _is_done(self._arrived)

    def replace(self, actor: Any, error: Exception) -> None:
        """Starts another process instead of one that died, unless that was done already."""
        import ray

        with self._lock:
            if self.actor is not actor:
                return
            self.deaths += 1
            if self.deaths > self._max_deaths:
                raise RuntimeError(
                    f"its process died {self.deaths} times in a row without finishing a step; the last time: {error}"
                )
            with contextlib.suppress(Exception):
                ray.kill(actor)
            self._start()


def _is_done(reference: Any, seconds: float = 0.0) -> bool:
    import ray

    return bool(ray.wait([reference], timeout=seconds, fetch_local=False)[0])


def _get(reference: Any) -> Any:
    """What a call returned. Raises what it raised, as if it had been called here."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if not isinstance(cause, Exception) or isinstance(cause, ray.exceptions.RayError):
            raise
        cause.add_note(str(error))
        raise cause from None


def _lost() -> tuple[type[Exception], ...]:
    """What Ray raises if a process, or its machine, is gone, or cannot be reached."""
    from ray import exceptions

    return (
        exceptions.RayActorError,
        exceptions.ObjectLostError,
        exceptions.NodeDiedError,
        exceptions.WorkerCrashedError,
    )


class _Workers:
    """The processes of one run, and the steps of its workers in them."""

    def __init__(
        self, program: Program, recipe: bytes, options: RayOptions, stopping: threading.Event
    ) -> None:
        import ray

        self._options, self._stopping = options, stopping
        params, state = program.initial_params(), program.initial_states()[0]
        gradients, _, report = rehearse(program.step, params, state)
        self._params, self._state = _Form(params), _Form(state)
        self._gradients, self._report = _Form(gradients), _Form(report)
        self._newest: dict[int, tuple[Any, Any]] = {}  # by worker: an actor, and the state it has
        self._warned = False
        counts = thread_counts()
        remote = ray.remote(StepProcess).options(
            num_cpus=options.cpus_per_process,
            max_concurrency=options.workers_per_process,
            runtime_env={"env_vars": _variables(counts)},
        )
        stored = ray.put(recipe)
        self.places = [
            _Place(lambda: remote.remote(counts), stored, options.max_deaths)
            for _ in range(_num_processes(program, options))
        ]

    def wait(self) -> None:
        """Waits until every process can step, but for those that find no place."""
        patience = self._options.patience
        while True:
            ready = [place.is_ready() for place in self.places]
            waiting = [place.is_waiting(patience) for place in self.places]
            if any(ready) and all(r or w for r, w in zip(ready, waiting, strict=True)):
                return
            self._warn_if(any(waiting))
            raise_noted()
            time.sleep(_POLL)

    def step(self, worker: int, params: Any, state: Any) -> tuple[Any, Any, Any]:
        """One step of a worker, in whichever process, and as often as processes die."""
        began = time.perf_counter()
        sent = self._params.bare(params)
        while True:
            place = self._place_for(worker)
            actor = place.actor
            newest = self._newest.pop(worker, (None, None))
            is_there = newest[0] is actor and newest[1] is state
            try:
                bare = _get(
                    actor.step.remote(worker, sent, None if is_there else self._state.bare(state))
                )
            except _lost() as error:
                if self._stopping.is_set():
                    raise StepAbandoned from None
                place.replace(actor, error)
                continue
            place.deaths = 0
            gradients, state, report, seconds = bare
            state = self._state.dressed(state)
            self._newest[worker] = (actor, state)
            report = _Report(self._report.dressed(report), seconds, time.perf_counter() - began)
            return self._gradients.dressed(gradients), state, report

    def _place_for(self, worker: int) -> _Place:
        """The worker's own process, or another one as long as that finds no place in the cluster."""
        own = self.places[worker // self._options.workers_per_process]
        while not own.is_ready(_POLL):
            if self._stopping.is_set():
                raise StepAbandoned
            if own.is_waiting(self._options.patience):
                self._warn_if(True)
                others = [place for place in self.places if place is not own and place.is_ready()]
                if others:
                    return others[worker % len(others)]
        return own

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
            closing = [place.actor.close.remote() for place in self.places if place.is_ready()]
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_SECONDS)
        for place in self.places:
            with contextlib.suppress(Exception):
                ray.kill(place.actor)


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
    with _keeping_signals():
        _check_installed()
    recipe = _pickled(program)
    with _cluster(options, _num_processes(program, options)):
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


def _check_installed() -> None:
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "workers on Ray need Ray, which is not installed; pip install -e '.[ray]'."
        ) from error


def _pickled(program: Program) -> bytes:
    """What a process needs to compile the worker step."""
    import cloudpickle

    try:
        pickled: bytes = cloudpickle.dumps(
            (program.config, program.describe, program.single_kernel)
        )
        return pickled
    except Exception as error:
        given = ", ".join(f"{what} {name}" for what, name in program.objects.items())
        raise TypeError(
            f"a run on Ray sends what it plays and trains to other processes, but this cannot be pickled "
            f"({given or 'the configuration'}): {error}"
        ) from error


@contextlib.contextmanager
def _cluster(options: RayOptions, num_processes: int) -> Iterator[None]:
    """A connection to a Ray cluster. If there is one already, it stays."""
    import ray

    if ray.is_initialized():
        yield
        return
    with _keeping_signals():
        _connect(options, num_processes)
    try:
        yield
    finally:
        with _keeping_signals():
            ray.shutdown()


def _connect(options: RayOptions, num_processes: int) -> None:
    import ray

    with warnings.catch_warnings():
        # Ray's own processes are forked, and at once replaced by other programs, which is what JAX warns of.
        warnings.filterwarnings("ignore", message=".*os.fork")
        if options.address != "local":
            try:
                ray.init(address=options.address, logging_level="WARNING")
                return
            except ConnectionError:
                if options.address != "auto":
                    raise
        cpus = math.ceil(num_processes * options.cpus_per_process)
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, logging_level="WARNING"
        )


@contextlib.contextmanager
def _keeping_signals() -> Iterator[None]:
    """Gives Ctrl-C and SIGTERM back to whoever had them, because Ray takes them when it is imported and started."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


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
