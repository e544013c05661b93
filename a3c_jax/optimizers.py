"""The optimizers, by name, and one update of the parameters as a pure function."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from a3c_jax import normalization
from a3c_jax.algorithm import Metrics, join_shared, split_shared
from a3c_jax.worker import Segment

Array = jax.Array


class OptimizerState(NamedTuple):
    """What an optimizer remembers from one update to the next.

    Attributes:
      state: the state of the optax transformation, any tree.
      finite: whether the last update was finite and so was made, a scalar bool.
    """

    state: Any
    finite: Array


class Updater(NamedTuple):
    """An optimizer as two pure functions that never put a NaN or an infinity into the parameters.

    Attributes:
      init: `init(params) -> OptimizerState`.
      update: `update(sent, optimizer_state, params, worker) -> (params, OptimizerState, metrics)`, with what the worker sent: its
        gradients, or its segment if the loss is differentiated in the update. If the
        gradients, their norm, or what the optimizer makes of them, are not finite, the parameters and the
        optimizer's state are returned unchanged, with `finite` False. The metrics are those of the loss if it is
        differentiated in the update; an empty dict otherwise.
    """

    init: Callable[[Any], OptimizerState]
    update: Callable[[Any, OptimizerState, Any, Any], tuple[Any, OptimizerState, Metrics]]


def make_updater(
    optimizer: optax.GradientTransformation,
    *,
    after_update: Callable[[Any], Any] | None = None,
    differentiate: Callable[[Any, Any], tuple[Any, Any]] | None = None,
) -> Updater:
    """Makes an `Updater` from an optax transformation.

    Args:
      optimizer: the transformation. If its `update` takes the extra argument `worker`, it is told which
        worker sent the gradients. It does not see what an algorithm shares besides the parameters.
      after_update: the algorithm's, see `a3c_jax.algorithm.Algorithm`.
      differentiate: `(params, segment) -> (gradients, metrics)`. If given, `update` gets a segment in place of
        the gradients, and differentiates it at the parameters that it is given.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> OptimizerState:
        weights, _ = split_shared(params)
        return OptimizerState(optimizer.init(weights), jnp.bool_(True))

    def update(
        sent: Any, optimizer_state: OptimizerState, params: Any, worker: Any
    ) -> tuple[Any, OptimizerState, Metrics]:
        gradients, metrics = (sent, {}) if differentiate is None else differentiate(params, sent)
        old_state = optimizer_state.state
        weights, shared = split_shared(params)
        updates, new_state = optimizer.update(gradients, old_state, weights, worker=worker)
        new_params = join_shared(optax.apply_updates(weights, updates), shared)
        if after_update is not None:
            new_params = after_update(new_params)
        # A norm can overflow though every element is finite. Clipping by it would then make every element zero.
        finite = all_finite((squared_norm(gradients), new_params, new_state))
        params, state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (new_params, new_state),
            (params, old_state),
        )
        return params, OptimizerState(state, finite), metrics

    return Updater(init, update)


def all_finite(tree: Any) -> Array:
    """Whether no floating-point number in the tree is NaN or infinite, a scalar bool."""
    # The difference is zero for a finite number and NaN otherwise, so that one sum tests all of them.
    vector = _float_vector(tree)
    return jnp.isfinite(jnp.sum(vector - vector))


def squared_norm(gradients: Any) -> Array:
    """The square of the gradients' global norm, a scalar. Moments that they carry are no part of it."""
    vector = _float_vector(normalization.without_statistics(gradients))
    return jnp.sum(jnp.square(vector.astype(jnp.promote_types(vector.dtype, jnp.float32))))


def _float_vector(tree: Any) -> Array:
    """All floating-point numbers of a tree. One vector costs a compiled program less than an operation for each leaf."""
    leaves = jax.tree.leaves(tree)
    floats = [x for x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    vector, _ = ravel_pytree(floats)
    return vector


def explain_nonfinite(gradients: Any) -> str:
    """Says why the update by these gradients was not finite, and what to do about it.

    Args:
      gradients: what the worker sent, a plain tree; or a `Segment` if the algorithm learns at the newest parameters.

    Returns:
      The end of a sentence that begins with "the update".
    """
    is_segment = isinstance(gradients, Segment)
    largest, where = 0.0, ""
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) or not jnp.size(leaf):
            continue
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        highest = float(jnp.max(jnp.abs(leaf)))  # NaN if there is one
        if not math.isfinite(highest):
            sent, remedy = (
                ("segment", "correct the environment, or ")
                if is_segment
                else ("gradients", "correct the environment if it shows or pays one, or ")
            )
            return (
                f"has a NaN or an infinity in its {sent}, in {name!r}; {remedy}lower the learning rate, or clip the "
                "gradients."
            )
        if highest > largest:
            largest, where = highest, name
    if not is_segment and not math.isfinite(squared_norm(gradients)):
        return (
            "has gradients whose norm is infinite, though each of their numbers is finite, up to "
            f"{largest:.2g} in {where!r}; make the rewards smaller, or lower the loss's costs."
        )
    made = "the gradients, the parameters" if is_segment else "the parameters"
    return (
        f"makes a NaN or an infinity of {made} or of the optimizer's state; lower the learning rate, or clip the "
        "gradients."
    )


def per_worker(
    inner: optax.GradientTransformation, num_workers: int
) -> optax.GradientTransformationExtraArgs:
    """Gives each worker its own state of an optimizer.

    Args:
      inner: the optimizer.
      num_workers: how many workers there are.

    Returns:
      An optimizer whose `update` takes the extra argument `worker`: whose gradients these are.
    """
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
    learning_rate: Any,
    anneal_over: int | None = None,
    max_gradient_norm: float | None = None,
    adam_epsilon: float = 1e-5,
    momentum: float = 0.9,
    rmsprop_decay: float = 0.99,
    rmsprop_epsilon: float = 1e-5,
    num_workers: int = 1,
) -> optax.GradientTransformation:
    r"""Makes an optimizer by its name, with gradient clipping and a learning-rate schedule.

    RMSProp is the paper's: epsilon is inside the root, and the running mean of the squares begins at zero.

    .. math::
      g \leftarrow \alpha g + (1 - \alpha) \Delta^2, \quad
      \theta \leftarrow \theta - \eta \Delta / \sqrt{g + \epsilon}

    Args:
      name: `adam`; `momentum`, which is SGD with heavy-ball momentum; `shared_rmsprop`, whose running
        mean all workers share; or `rmsprop`, which keeps one for each worker.
      learning_rate: the step size, or its initial value if it is annealed.
      anneal_over: the number of updates over which the step size falls linearly to zero; None keeps it
        constant.
      max_gradient_norm: gradients of a larger global norm are scaled down to this norm; None never scales.
      adam_epsilon: Adam's epsilon, outside the root.
      momentum: the decay of the velocity.
      rmsprop_decay: the decay of the running mean of the squares, alpha.
      rmsprop_epsilon: RMSProp's epsilon, inside the root.
      num_workers: the number of workers for which `rmsprop` keeps a running mean.

    Raises:
      ValueError: if there is no optimizer of this name.

    Source: Mnih et al. 2016, arXiv:1602.01783, section 4, and section 7 of its supplement.
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
