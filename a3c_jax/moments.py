"""Running mean and variance of what a run meets, to normalise it: shared by all workers, merged exactly.

The moments live in the parameter tree, under `statistics`, beside the network's `params`. A worker's
gradients carry, in their place, the moments of its segment, and the optimizer merges those instead of
descending. So they change under the same lock as the weights, belong to the same version, and are in every
snapshot, checkpoint, evaluation and replay without further ado.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

Array = jax.Array

STATISTICS = "statistics"
"""The key of the moments in a parameter tree. It sorts after `params`, so that they are a flat vector's tail."""

_LIMIT = 10.0
"""What is normalised is clipped to this many standard deviations."""


class Moments(NamedTuple):
    """Number, mean, and sum of squared deviations from it, elementwise.

    Attributes:
      number: how many there were, a scalar, float32.
      mean: `[...]` float32.
      m2: `[...]` float32.
    """

    number: Array
    mean: Array
    m2: Array


def empty(shape: tuple[int, ...]) -> Moments:
    """The moments of nothing."""
    return Moments(jnp.zeros(()), jnp.zeros(shape), jnp.zeros(shape))


def of(values: Array, batch_ndim: int) -> Moments:
    """The moments of values `[*batch, ...]` over the `batch_ndim` leading dimensions."""
    x = values.astype(jnp.float32).reshape(-1, *values.shape[batch_ndim:])
    mean = jnp.mean(x, axis=0)
    return Moments(jnp.float32(len(x)), mean, jnp.sum(jnp.square(x - mean), axis=0))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both together.

    Source: Chan, Golub & LeVeque 1983, Algorithms for computing the sample variance, equation 2.1.
    """
    number = a.number + b.number
    share = b.number / jnp.maximum(number, 1.0)
    delta = b.mean - a.mean
    return Moments(
        number, a.mean + share * delta, a.m2 + b.m2 + jnp.square(delta) * share * a.number
    )


def standard_deviation(moments: Moments) -> Array:
    """`[...]`; one where nothing has varied yet."""
    variance = moments.m2 / jnp.maximum(moments.number, 1.0)
    return jnp.where(variance > 1e-8, jnp.sqrt(jnp.maximum(variance, 1e-8)), 1.0)


def normalize(values: Array, moments: Moments) -> Array:
    """Values `[..., *shape]` less their mean, over their standard deviation, within ten of those."""
    return jnp.clip((values - moments.mean) / standard_deviation(moments), -_LIMIT, _LIMIT)


def scale(values: Array, moments: Moments) -> Array:
    """Values over their standard deviation, within ten of those: the sign of a reward stays."""
    return jnp.clip(values / standard_deviation(moments), -_LIMIT, _LIMIT)


def held(params: Any) -> dict[str, Moments]:
    """The moments in a parameter tree, by name; constants to the gradient."""
    return jax.lax.stop_gradient(params.get(STATISTICS, {})) if isinstance(params, dict) else {}


def normalize_observation(params: Any, observation: Array) -> Array:
    """The observation as the network is to see it: normalised where the parameters hold its moments."""
    moments = held(params)
    return (
        normalize(observation, moments["observation"]) if "observation" in moments else observation
    )


def merging(
    inner: optax.GradientTransformation, statistics: Any
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of flat vectors that merges the moments in their tail, and moves the rest by `inner`.

    Args:
      inner: what moves the weights.
      statistics: moments like those in the tail, a dict of `Moments`.
    """
    inner = optax.with_extra_args_support(inner)
    flat, unravel = ravel_pytree(statistics)
    size = flat.size

    def init(params: Array) -> Any:
        return inner.init(params[:-size])

    def update(updates: Array, state: Any, params: Array | None = None, **extra: Any) -> Any:
        assert params is not None
        moves, state = inner.update(updates[:-size], state, params[:-size], **extra)
        now, new = unravel(params[-size:]), unravel(updates[-size:])
        merged = {name: merge(now[name], new[name]) for name in now}
        return jnp.concatenate([moves, ravel_pytree(merged)[0] - params[-size:]]), state

    return optax.GradientTransformationExtraArgs(init, update)
