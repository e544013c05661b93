"""The connection to a Ray cluster, and Ray's calls and errors in this package's terms.

Ray is imported only inside functions, so that the package does without it.
"""

import contextlib
import dataclasses
import logging
import math
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from a3c_jax.rules import check_int

_CONNECT_SECONDS = 10.0
"""How long an address may take to answer."""


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
        check_int("RayOptions.workers_per_process", self.workers_per_process, 1)
        least_of = {"cpus_per_process": 0, "patience": 0, "max_deaths": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if not value >= least:
                raise ValueError(
                    f"RayOptions.{name} must be >= {least}, got {value}; leave it out for the default."
                )


def check_installed() -> None:
    """Imports Ray.

    Raises:
      ImportError: if it is not installed.
    """
    try:
        with _keeping_signals():
            import ray  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "workers on Ray need Ray, which is not installed; pip install -e '.[ray]'."
        ) from error


@contextlib.contextmanager
def cluster(options: RayOptions, num_processes: int) -> Iterator[None]:
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
            _check_answers(options.address)
            try:
                ray.init(address=options.address, logging_level=logging.WARNING)
                return
            except ConnectionError:
                if options.address != "auto" or os.environ.get("RAY_ADDRESS"):
                    raise
        cpus = math.ceil(num_processes * options.cpus_per_process)
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, logging_level=logging.WARNING
        )


def _check_answers(address: str) -> None:
    """Tries whether something listens at an address, because Ray waits for minutes where nothing does.

    Raises:
      ConnectionError: if nothing does.
    """
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, _, port = named.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():
        return  # no address, or one that Ray looks up
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        source = "RAY_ADDRESS" if address == "auto" else "RayOptions.address"
        raise ConnectionError(
            f"{source} must be that of a running Ray cluster, got {named!r}, where nothing answers ({error}); "
            'start one with `ray start --head`, or give "local".'
        ) from error


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
            if handler is not None:  # not set from Python
                signal.signal(number, handler)


def is_done(reference: Any, seconds: float = 0.0) -> bool:
    """Whether a call has returned or raised, now or after a while."""
    import ray

    return bool(ray.wait([reference], timeout=seconds, fetch_local=False)[0])


def get(reference: Any) -> Any:
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


def lost_errors() -> tuple[type[Exception], ...]:
    """What Ray raises if a process, or its machine, is gone, or cannot be reached."""
    from ray import exceptions

    return (
        exceptions.RayActorError,
        exceptions.ObjectLostError,
        exceptions.NodeDiedError,
        exceptions.WorkerCrashedError,
    )
