"""The one set of parameters that all workers share, and the optimizers that move it."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from a3c_jax import kernels
from a3c_jax.columns import Columns
from a3c_jax.packing import Packing

T = TypeVar("T")


class Snapshot(NamedTuple):
    """The parameters at one moment.

    Attributes:
      params: the parameter tree. It is immutable: a snapshot is a reference, never a copy.
      version: the number of updates applied to it.
    """

    params: Any
    version: int


class Schedule(NamedTuple):
    """Which worker made each update, and from which version: row k led from version k to k + 1.

    Attributes:
      worker: `[updates]` int32.
      pulled_version: `[updates]` int64. The update's staleness is k minus this.
    """

    worker: np.ndarray
    pulled_version: np.ndarray

    @property
    def staleness(self) -> np.ndarray:
        """How many updates others applied between each update's pull and its apply, `[updates]` int64."""
        return np.arange(len(self.worker)) - self.pulled_version

    def check(self, num_workers: int) -> None:
        """Checks that so many workers may have made these updates.

        Raises:
          ValueError: where the columns do not go together, or a row names a worker or a version that there
            cannot be.
        """
        worker, pulled = np.asarray(self.worker), np.asarray(self.pulled_version)
        if worker.ndim != 1 or worker.shape != pulled.shape:
            raise ValueError(
                f"a schedule must be two vectors of one length, got {worker.shape} and {pulled.shape}; "
                "give a worker and a version for each update."
            )
        if not worker.size:
            return
        if worker.min() < 0 or worker.max() >= num_workers:
            raise ValueError(
                f"schedule.worker must lie in [0, {num_workers - 1}], got {worker.min()} to "
                f"{worker.max()}; give the num_workers of the run that made it."
            )
        if pulled.min() < 0 or np.any(pulled > np.arange(len(pulled))):
            raise ValueError(
                "schedule.pulled_version must name a version that exists when the update is made: row k at "
                "most k, and at least 0; give the schedule from the run's first update on."
            )


class StoreState(NamedTuple):
    """Everything that a store holds at one moment between two updates.

    Attributes:
      snapshot: the parameters and their version.
      opt_state: the optimizer's state as one vector of words, `[S]` uint32.
      schedule: the updates so far, as many as the version says.
      skipped: how many of them were not finite, and changed nothing.
    """

    snapshot: Snapshot
    opt_state: jax.Array
    schedule: Schedule
    skipped: int


class NonFiniteError(ArithmeticError):
    """A NaN or an infinity was about to reach the parameters. They are as they were before."""


class SharedParameters:
    """Parameters, optimizer state and version, swapped whole under one lock.

    JAX arrays are immutable, so that a reader can never see a half-written update. Nothing is donated,
    since another thread may still hold any version.

    Args:
      params: the initial parameters, any tree (the training loop uses one flat vector).
      optimizer: an optax transformation. One whose update takes the extra argument `worker` learns which
        worker sent the gradients.
      num_workers: how many workers there are; None does not check who sends gradients.
      skip_nonfinite: what to do with an update that is not finite. False refuses it with an error; True
        counts it in the version and the schedule and otherwise leaves everything as it is.
      lock: what to hold instead of a new lock; one that measures, for instance.
    """

    def __init__(
        self,
        params: Any,
        optimizer: optax.GradientTransformation,
        num_workers: int | None = None,
        *,
        skip_nonfinite: bool = False,
        lock: contextlib.AbstractContextManager[Any] | None = None,
    ) -> None:
        self._num_workers = num_workers
        self._optimizer = optax.with_extra_args_support(optimizer)
        self._update: Callable[..., Any] = jax.jit(self._apply_gradients)
        self._lock = threading.Lock() if lock is None else lock

        def init(params: Any) -> tuple[Any, jax.Array]:
            return self._optimizer.init(params), jnp.bool_(True)

        self._packing = Packing(jax.eval_shape(init, params))
        """Of the optimizer's state and whether the last update was finite."""
        opt_state = jax.jit(lambda params: self._packing.pack(init(params)))(params)
        self._current = (Snapshot(params, 0), opt_state)
        """Replaced whole, so that it can be read without the lock."""
        self._skip_nonfinite = skip_nonfinite
        self._skipped = 0
        self._schedule = Columns(Schedule, np.int32, np.int64)

    def pull(self) -> Snapshot:
        """The current parameters and their version, consistent with each other. Needs no lock."""
        return self._current[0]

    def apply(
        self,
        gradients: Any,
        pulled_version: int,
        worker: int = 0,
        commit: Callable[[Snapshot, int], None] | None = None,
    ) -> int:
        """Moves the parameters along one worker's gradients.

        Args:
          gradients: a tree like the parameters. Wait for it (`jax.block_until_ready`) before the call,
            so that no one waits for it with the lock held.
          pulled_version: the version of the snapshot that the gradients were computed from.
          worker: who computed them.
          commit: called as `commit(new_snapshot, staleness)` with the lock held: whatever it records
            belongs to the same consistent cut of the run as the update.

        Returns:
          The staleness: how many updates were applied between the pull and this call.

        Raises:
          ValueError: where `pulled_version` is not the number of a version up to the current one, or
            there is no such worker.
          NonFiniteError: where the gradients, or what the update makes of them, are not finite.
        """
        if self._num_workers is not None and not 0 <= worker < self._num_workers:
            raise ValueError(
                f"worker must lie in [0, {self._num_workers - 1}], got {worker}; make the store with "
                "a larger num_workers."
            )
        basis = self._current
        if not 0 <= pulled_version <= basis[0].version:
            raise ValueError(
                f"pulled_version must lie in [0, {basis[0].version}], the versions so far, got "
                f"{pulled_version}; pass the version of the snapshot that was pulled."
            )
        # Computed before the lock is taken, and again under it where another worker was faster: 2 workers with
        # 64 environments hold it for 3 % of the time instead of 11 %, and 5 % of the updates are computed twice.
        params, opt_state, finite = self._compute(gradients, basis, worker)
        with self._lock:
            if basis is not self._current:
                basis = self._current
                params, opt_state, finite = self._compute(gradients, basis, worker)
            version = basis[0].version
            staleness = version - pulled_version
            if not finite:
                if not self._skip_nonfinite:
                    raise NonFiniteError(
                        f"the update of version {version} by worker {worker} has a NaN or an infinity "
                        "in its gradients, or makes one of the parameters; lower the learning rate, "
                        "or clip the gradients."
                    )
                self._skipped += 1
            snapshot = Snapshot(params, version + 1)
            self._current = (snapshot, opt_state)
            self._schedule.append(worker, pulled_version)
            if commit is not None:
                commit(snapshot, staleness)
        return staleness

    def compile(self, gradients: Any, *, fused: bool = False) -> None:
        """Compiles the update for gradients like these, without applying it.

        Args:
          gradients: like those to come.
          fused: compile it into a single kernel (`a3c_jax.kernels`). That pays where XLA's thread pool is
            busy with other workers' segments, behind which an update would wait: 2 workers with 64
            environments for 20 steps are 3 % faster so. Else it costs: 1 environment, 5 steps, 10 %.
        """
        snapshot, opt_state = self._current
        if fused and opt_state.size <= kernels.MAX_WORDS:
            arguments = (gradients, opt_state, snapshot.params, 0)
            self._update = kernels.compile_fused(self._apply_gradients, *arguments)
        self._compute(gradients, self._current, 0)

    @property
    def opt_state(self) -> Any:
        """The optimizer's state."""
        return jax.jit(self._packing.unpack)(self._current[1])[0]

    @property
    def schedule(self) -> Schedule:
        """The schedule of updates so far."""
        return self._schedule.rows()

    def cut(self, read: Callable[[], T]) -> tuple[StoreState, T]:
        """The store's state, and what `read()` returns, as of the same moment between two updates."""
        with self._lock:
            return StoreState(*self._current, self._schedule.rows(), self._skipped), read()

    def restore(self, state: StoreState) -> None:
        """Goes on from a state that `cut` gave. Call it before any thread uses the store."""
        snapshot, opt_state, schedule, self._skipped = state
        self._current = (snapshot, opt_state)
        self._schedule = Columns(Schedule, np.int32, np.int64)
        self._schedule.extend(len(schedule.worker), *schedule)

    def _compute(
        self, gradients: Any, basis: tuple[Snapshot, jax.Array], worker: int
    ) -> tuple[Any, jax.Array, bool]:
        """What an update makes of the parameters and the optimizer's state, and whether it is finite."""
        (params, _), opt_state = basis
        params, opt_state = self._update(gradients, opt_state, params, worker)
        return params, opt_state, bool(np.asarray(opt_state)[-1])

    def _apply_gradients(
        self, gradients: Any, packed_opt_state: jax.Array, params: Any, worker: Any
    ) -> tuple[Any, jax.Array]:
        # The optimizer's state is one vector between calls, and so is the flag: each array that enters or
        # leaves a call costs 1 to 2 us (Adam's three 16 us a call, one 11 us; the flag 5 us instead of 15).
        opt_state, _ = self._packing.unpack(packed_opt_state)
        updates, opt_state = self._optimizer.update(gradients, opt_state, params, worker=worker)
        new_params = optax.apply_updates(params, updates)
        finite = all_finite((gradients, new_params, opt_state))
        new = (new_params, self._packing.pack((opt_state, finite)))
        old = (params, packed_opt_state.at[-1].set(0))
        return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)


def all_finite(tree: Any) -> jax.Array:
    """Whether no floating-point number in the tree is NaN or infinite, a scalar bool."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    # The difference is zero for a finite number and NaN otherwise; its sum is the cheapest test.
    return jnp.isfinite(sum((jnp.sum(x - x) for x in floats), jnp.float32(0.0)))


def per_worker(
    inner: optax.GradientTransformation, num_workers: int
) -> optax.GradientTransformationExtraArgs:
    """Gives each worker its own state of `inner`; `update` takes the extra argument `worker`."""
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        state = inner.init(params)
        return jax.tree.map(lambda x: jnp.stack([x] * num_workers), state)

    def update(updates: Any, state: Any, params: Any = None, *, worker: Any, **extra: Any) -> Any:
        own = jax.tree.map(lambda x: x[worker], state)
        updates, own = inner.update(updates, own, params, **extra)
        return updates, jax.tree.map(lambda x, y: x.at[worker].set(y), state, own)

    return optax.GradientTransformationExtraArgs(init, update)


def make_optimizer(
    name: str,
    *,
    learning_rate: float,
    anneal_over: int | None = None,
    max_gradient_norm: float | None = None,
    adam_epsilon: float = 1e-5,
    momentum: float = 0.9,
    rmsprop_decay: float = 0.99,
    rmsprop_epsilon: float = 1e-5,
    num_workers: int = 1,
) -> optax.GradientTransformation:
    r"""An optimizer by name, with clipping and a learning-rate schedule.

    RMSProp is the paper's, with epsilon inside the root and statistics that begin at zero:

    .. math::
      g \leftarrow \alpha g + (1 - \alpha) \Delta^2, \quad
      \theta \leftarrow \theta - \eta \Delta / \sqrt{g + \epsilon}

    Args:
      name: `adam`; `momentum`, SGD with heavy-ball momentum; `shared_rmsprop`, whose statistics all
        workers share; `rmsprop`, which keeps statistics for each worker.
      learning_rate: the step size, or the first one where it is annealed.
      anneal_over: number of updates over which it falls linearly to zero; None keeps it constant.
      max_gradient_norm: gradients of a larger global norm are scaled down to it; None never scales.
      adam_epsilon: Adam's epsilon, outside the root.
      momentum: the decay of the velocity.
      rmsprop_decay: the decay of the squared gradients, alpha.
      rmsprop_epsilon: epsilon.
      num_workers: how many workers `rmsprop` keeps statistics for.

    Raises:
      ValueError: where the name is unknown.

    Source: Mnih et al. 2016, arXiv:1602.01783, section 4 and its supplement, section 7.
    """
    rms = optax.scale_by_rms(decay=rmsprop_decay, eps=rmsprop_epsilon, eps_in_sqrt=True)
    directions = {
        "adam": optax.scale_by_adam(eps=adam_epsilon),
        "momentum": optax.trace(decay=momentum),
        "shared_rmsprop": rms,
        "rmsprop": per_worker(rms, num_workers),
    }
    if name not in directions:
        raise ValueError(
            f"optimizer must be one of {', '.join(directions)}, got {name!r}; use 'adam'."
        )
    rate = learning_rate
    if anneal_over is not None:
        rate = optax.linear_schedule(learning_rate, 0.0, anneal_over)
    clip = (
        optax.identity()
        if max_gradient_norm is None
        else optax.clip_by_global_norm(max_gradient_norm)
    )
    return optax.chain(clip, directions[name], optax.scale_by_learning_rate(rate))
