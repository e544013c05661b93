"""The store: the one set of parameters that all workers share, and the optimizer's state beside it."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import optax

from a3c_jax import _compiled
from a3c_jax.asynchrony.records import Schedule, make_schedule_log
from a3c_jax.optimizers import OptimizerState, Updater, explain_nonfinite, make_updater

T = TypeVar("T")


class Snapshot(NamedTuple):
    """The parameters at one moment.

    Attributes:
      params: the parameters. They are immutable, so that a snapshot is a reference and never a copy.
      version: the number of updates that led to them, skipped ones included.
    """

    params: Any
    version: int


class StoreState(NamedTuple):
    """What a store holds at one moment between two updates, besides its schedule.

    Attributes:
      snapshot: the parameters and their version.
      optimizer_state: the optimizer's state.
      skipped: how many updates were not finite and changed nothing.
      in_flight: the snapshots from which workers are computing gradients, by worker.
    """

    snapshot: Snapshot
    optimizer_state: Any
    skipped: int
    in_flight: dict[int, Snapshot]


class Update(NamedTuple):
    """An update that is about to become visible.

    Attributes:
      worker: who computed the gradients.
      staleness: how many updates others applied since that worker pulled.
      snapshot: the parameters that the update leads to, and their version.
      metrics: what the loss reports of itself if it was differentiated in the update, as the updater returned it;
        empty otherwise.
    """

    worker: int
    staleness: int
    snapshot: Snapshot
    metrics: Any


class NonFiniteError(ArithmeticError):
    """An update was refused because it, or its gradients' norm, is not finite. The parameters are as before.

    Attributes:
      metrics: what the loss reports of itself if it was differentiated in the update; empty otherwise.
    """

    metrics: Any = {}  # noqa: RUF012 (never changed)


class SharedParameters:
    """Parameters, optimizer state and version, replaced together under one lock.

    JAX arrays are immutable, so that a reader never sees a half-written update. Nothing is donated,
    because another thread may still hold any version.

    >>> import jax.numpy as jnp, optax
    >>> store = SharedParameters(jnp.zeros(2), optax.sgd(0.5))
    >>> params, version = store.pull()
    >>> store.apply(jnp.ones(2), version)
    0
    >>> store.pull()
    Snapshot(params=Array([-0.5, -0.5], dtype=float32), version=1)

    Args:
      params: the initial parameters, any tree of arrays.
      optimizer: an optax transformation, or an `Updater` whose functions are compiled already. If the
        transformation's update takes the extra argument `worker`, it learns who sent the gradients.
      num_workers: how many workers there are; None accepts any number.
      skip_nonfinite: what to do with an update that is not finite. False refuses it with an error. True
        counts it in the version and the schedule, and leaves the parameters as they are.

    Attributes:
      log: who made each update, and from which version.
    """

    def __init__(
        self,
        params: Any,
        optimizer: optax.GradientTransformation | Updater,
        num_workers: int | None = None,
        *,
        skip_nonfinite: bool = False,
    ) -> None:
        if not isinstance(optimizer, Updater):
            init, update = make_updater(optimizer)
            optimizer = Updater(jax.jit(init), jax.jit(update))
        self._update = optimizer.update
        self._num_workers = num_workers
        self._skip_nonfinite = skip_nonfinite
        self._skipped = 0
        self.log = make_schedule_log()
        self._in_flight: dict[int, Snapshot] = {}
        # A block that is part of an update holds the lock, and may use the store.
        self._lock = threading.RLock()
        # One tuple, replaced as a whole, so that it can be read without the lock.
        self._current: tuple[Snapshot, Any] = (Snapshot(params, 0), optimizer.init(params))

    def pull(self, worker: int | None = None) -> Snapshot:
        """The current parameters and their version, consistent with each other. Needs no lock.

        Args:
          worker: who pulls. If it is given, the store remembers what this worker has pulled until it applies its
            gradients, so that a checkpoint in between can hold it.
        """
        while True:
            snapshot = self._current[0]
            if worker is None:
                return snapshot
            self._in_flight[worker] = snapshot
            # An update between the two lines above would let a checkpoint miss what this worker plays with.
            if snapshot is self._current[0]:
                return snapshot

    def apply(self, gradients: Any, pulled_version: int, worker: int = 0) -> int:
        """Moves the parameters along one worker's gradients; see `applying`.

        Returns:
          The staleness: how many updates others applied since the pull.
        """
        with self.applying(gradients, pulled_version, worker) as update:
            return update.staleness

    def applying(self, gradients: Any, pulled_version: int, worker: int = 0) -> "Applying":
        """Moves the parameters along one worker's gradients, and runs a block as part of the update.

        >>> store = SharedParameters(jax.numpy.zeros(2), optax.sgd(0.5))
        >>> with store.applying(jax.numpy.ones(2), pulled_version=0) as update:
        ...     print(update.staleness, update.snapshot.version)
        0 1

        The block runs with the lock held, just before the update becomes visible. What it writes down
        therefore belongs to the same consistent moment of the run. If it raises, there is no update.

        Args:
          gradients: a tree like the parameters, or a segment if the updater differentiates the loss itself. They must be
            computed already (`jax.block_until_ready`), so that nobody waits for them with the lock held.
          pulled_version: the version of the snapshot that the gradients were computed from.
          worker: who computed them.

        Returns:
          A context manager, which gives the `Update`.

        Raises:
          ValueError: if `pulled_version` is not a version so far, or if there is no such worker.
          NonFiniteError: when the block is entered, if the gradients, their norm, or what the update makes of
            them, are not finite.
        """
        self._check(pulled_version, worker)
        return Applying(self, gradients, pulled_version, worker)

    @property
    def optimizer_state(self) -> Any:
        """The optimizer's state, as optax keeps it."""
        return _compiled.unpack(self._current[1]).state

    @property
    def schedule(self) -> Schedule:
        """The schedule of updates so far."""
        return self.log.read(0, self.atomically(self.log.seal))

    def atomically(self, read: Callable[[], T]) -> T:
        """What `read()` returns, called between two updates. Others wait meanwhile, so it must not take long."""
        with self._lock:
            return read()

    def freeze(self, read: Callable[[], T]) -> tuple[StoreState, T]:
        """The store's state, and what `read()` returns, as of the same moment between two updates."""

        def freeze() -> tuple[StoreState, T]:
            (snapshot, optimizer_state), in_flight = self._current, self._in_flight.copy()
            self.log.seal()  # so that the schedule can be read up to this version
            return StoreState(snapshot, optimizer_state, self._skipped, in_flight), read()

        return self.atomically(freeze)

    def restore(self, state: StoreState, schedule: Schedule | np.ndarray) -> None:
        """Goes on from a state that `freeze` gave. Call it before any thread uses the store.

        Args:
          state: the state. What was in flight is not restored: workers begin anew.
          schedule: the updates until then.
        """
        self.log.restore(schedule)
        self._current = (state.snapshot, state.optimizer_state)
        self._skipped = state.skipped

    def _move(
        self, gradients: Any, basis: tuple[Snapshot, Any], worker: int
    ) -> tuple[Any, OptimizerState, Any, bool]:
        """What an update makes of the parameters and the optimizer's state, its metrics, and whether it is finite."""
        (params, _), optimizer_state = basis
        params, optimizer_state, metrics = self._update(gradients, optimizer_state, params, worker)
        return params, optimizer_state, metrics, bool(optimizer_state.finite)

    def _check(self, pulled_version: int, worker: int) -> None:
        if self._num_workers is not None and not 0 <= worker < self._num_workers:
            raise ValueError(
                f"worker must lie in [0, {self._num_workers - 1}], got {worker}; make the store with "
                "a larger num_workers."
            )
        version = self._current[0].version
        if not 0 <= pulled_version <= version:
            raise ValueError(
                f"pulled_version must lie in [0, {version}], the versions so far, got "
                f"{pulled_version}; pass the version of the snapshot that was pulled."
            )


class Applying:
    """What `SharedParameters.applying` returns. A generator in its place would cost each update a microsecond more."""

    __slots__ = (
        "_finite",
        "_gradients",
        "_optimizer_state",
        "_pulled_version",
        "_store",
        "_update",
        "_worker",
    )

    def __init__(
        self, store: SharedParameters, gradients: Any, pulled_version: int, worker: int
    ) -> None:
        self._store = store
        self._gradients = gradients
        self._pulled_version = pulled_version
        self._worker = worker

    def __enter__(self) -> Update:
        """Computes what the update leads to, and takes the lock."""
        store, worker = self._store, self._worker
        # The new parameters are computed before the lock is taken, because most of the time nobody else
        # comes in between. If somebody did, they are computed again from what is there now.
        basis = store._current
        moved = store._move(self._gradients, basis, worker)
        store._lock.acquire()
        try:
            if basis is not store._current:
                basis = store._current
                moved = store._move(self._gradients, basis, worker)
            params, self._optimizer_state, metrics, self._finite = moved
            version = basis[0].version
            if not self._finite and not store._skip_nonfinite:
                why = explain_nonfinite(_compiled.unpack(self._gradients))
                error = NonFiniteError(f"the update of version {version} by worker {worker} {why}")
                error.metrics = metrics
                raise error
        except BaseException:
            store._lock.release()
            raise
        snapshot = Snapshot(params, version + 1)
        self._update = Update(worker, version - self._pulled_version, snapshot, metrics)
        return self._update

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Makes the update visible, or leaves it out if the block raised, and releases the lock."""
        store = self._store
        try:
            if kind is None:
                store.log.append(self._worker, self._pulled_version)
                store._skipped += not self._finite
                store._current = (self._update.snapshot, self._optimizer_state)
                store._in_flight.pop(self._worker, None)
        finally:
            store._lock.release()
