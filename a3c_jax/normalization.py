"""Running mean and variance of observations and rewards, shared by all workers, to normalise them by.

The moments live in the parameter tree, under the key `statistics`, beside the network's `params`. The
gradients of a worker carry in that place the moments of its segment, and the optimizer merges them
instead of descending along them. So the moments change together with the weights, belong to the same
version of the parameters, and are part of every snapshot, checkpoint, evaluation and replay.
"""

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array

STATISTICS = "statistics"
"""The key of the moments in a parameter tree."""

_LIMIT = 10.0
"""Normalised values are clipped to this many standard deviations."""


class Moments(NamedTuple):
    """Number, mean and sum of squared deviations of the values seen so far, for each element of a value.

    Attributes:
      num_values: how many there were, a scalar, float32.
      mean: their mean, `[...]` float32.
      squared_deviations: the sum of their squared deviations from the mean, `[...]` float32.
    """

    num_values: Array
    mean: Array
    squared_deviations: Array


def initial_moments(shape: Any) -> Any:
    """The moments before any value was seen.

    Args:
      shape: the shape of one value; or a tree of shapes for values that are trees.

    Returns:
      `Moments`; or a tree of them.
    """
    return jax.tree.map(
        lambda shape: Moments(jnp.zeros(()), jnp.zeros(shape), jnp.zeros(shape)),
        shape,
        is_leaf=is_shape,
    )


def is_shape(value: Any) -> bool:
    """Whether a value is the shape of one array, and not a tree of several shapes."""
    return isinstance(value, tuple) and all(isinstance(size, numbers.Integral) for size in value)


def batch_moments(values: Any, num_batch_dims: int, valid: Array | None = None) -> Any:
    """The moments of a batch.

    Args:
      values: `[*batch, ...]`; or a tree of such arrays.
      num_batch_dims: the number of leading dimensions to take the moments over.
      valid: which values count, `[*batch]` bool. None counts all.

    Returns:
      `Moments` of `[...]`; or a tree of them.
    """

    def moments(values: Array) -> Moments:
        batch, shape = values.shape[:num_batch_dims], values.shape[num_batch_dims:]
        x = values.astype(jnp.float32).reshape(math.prod(batch), *shape)
        if valid is None:
            mean = jnp.mean(x, axis=0)
            return Moments(jnp.float32(len(x)), mean, jnp.sum(jnp.square(x - mean), axis=0))
        counts = valid.reshape(-1, *[1] * len(shape))
        number = jnp.sum(valid, dtype=jnp.float32)
        mean = jnp.sum(jnp.where(counts, x, 0.0), axis=0) / jnp.maximum(number, 1.0)
        return Moments(number, mean, jnp.sum(jnp.square(jnp.where(counts, x - mean, 0.0)), axis=0))

    return jax.tree.map(moments, values)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of the values of `a` and `b` together.

    Source: Chan, Golub & LeVeque 1983, Algorithms for computing the sample variance, equation 2.1.
    """
    num_values = a.num_values + b.num_values
    share = b.num_values / jnp.maximum(num_values, 1.0)
    delta = b.mean - a.mean
    squares = a.squared_deviations + b.squared_deviations
    spread = jnp.square(delta) * share * a.num_values
    return Moments(num_values, a.mean + share * delta, squares + spread)


def standard_deviation(moments: Moments, smallest: float = 1e-4) -> Array:
    """The standard deviation of each element, `[...]`; one if it is not above `smallest`, as of what never varied."""
    variance = moments.squared_deviations / jnp.maximum(moments.num_values, 1.0)
    least = smallest**2
    return jnp.where(variance > least, jnp.sqrt(jnp.maximum(variance, least)), 1.0)


def standardize(values: Array, moments: Moments) -> Array:
    """Subtracts the mean, divides by the standard deviation, and clips to ten standard deviations."""
    return jnp.clip((values - moments.mean) / standard_deviation(moments), -_LIMIT, _LIMIT)


def scale_to_unit_variance(values: Array, moments: Moments) -> Array:
    """Divides by the standard deviation and clips to ten of them. The mean stays, so that a reward keeps its sign."""
    return jnp.clip(values / standard_deviation(moments, smallest=1e-12), -_LIMIT, _LIMIT)


def get_statistics(params: Any) -> dict[str, Any]:
    """The moments in a parameter tree, by name: `observation`, `reward`. They are constants to the gradient."""
    return jax.lax.stop_gradient(params.get(STATISTICS, {})) if isinstance(params, dict) else {}


def normalize_observation(params: Any, observation: Any) -> Any:
    """The observation as the network sees it: standardised if the parameters hold the observations' moments."""
    statistics = get_statistics(params)
    if "observation" not in statistics:
        return observation
    return jax.tree.map(standardize, observation, statistics["observation"])


def merge_statistics(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that merges the moments in a parameter tree and moves everything else by `inner`.

    Args:
      inner: the optimizer of the weights. It sees the tree without its `statistics`.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        return inner.init(without_statistics(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "merge_statistics needs the parameters, got None; call update(gradients, state, params)."
            )
        moves, state = inner.update(
            without_statistics(updates), state, without_statistics(params), **extra
        )
        old, new = params[STATISTICS], updates[STATISTICS]
        merged = jax.tree.map(merge_moments, old, new, is_leaf=lambda x: isinstance(x, Moments))
        difference = jax.tree.map(jnp.subtract, merged, old)
        return {**moves, STATISTICS: difference}, state

    return optax.GradientTransformationExtraArgs(init, update)


def without_statistics(tree: Any) -> Any:
    """A parameter tree, or gradients, without the moments in it."""
    if not isinstance(tree, dict):
        return tree
    return {name: value for name, value in tree.items() if name != STATISTICS}
