"""What the losses demand of their arrays, so that nothing is broadcast or converted in silence."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

Array = jax.Array


def as_floats(**arrays: Any) -> list[Array]:
    """Arrays as JAX's; an AssertionError unless all have one shape `[T, ...]` and one floating-point dtype."""
    values = [jnp.asarray(x) for x in arrays.values()]
    names = " and ".join(arrays)
    pairs = zip(arrays.items(), values, strict=True)
    found = ", ".join(f"{n}: {v.shape} {getattr(x, 'dtype', v.dtype)}" for (n, x), v in pairs)
    try:
        chex.assert_equal_shape(values)
    except AssertionError as error:
        raise AssertionError(
            f"{names} must be float arrays of one shape [T, ...], got {found}; nothing is broadcast, "
            "since an [N] against an [N, 1] would silently give [N, N]."
        ) from error
    try:
        chex.assert_type(values, float)
        chex.assert_type(values, values[0].dtype)
    except AssertionError as error:
        raise AssertionError(
            f"{names} must be float arrays of one dtype, got {found}; use astype(jnp.float32)."
        ) from error
    if not values[0].ndim or not values[0].size:
        raise AssertionError(
            f"{names} must have a leading time dimension [T, ...] and at least one element, got shape "
            f"{values[0].shape}."
        )
    return values


def as_valid_floats(valid_tm1: Array | None, **arrays: Any) -> list[Array]:
    """Arrays of floats with zeros at invalid steps, so that what stands there reaches neither a value nor a gradient."""
    values = as_floats(**arrays)
    if valid_tm1 is None:
        return values
    check_mask(valid_tm1, values[0])
    return [jnp.where(valid_tm1, x, 0.0) for x in values]


def check_mask(valid_tm1: Any, x: Array) -> None:
    """An AssertionError unless `valid_tm1` says of each number of `x` whether it counts."""
    found = jnp.asarray(valid_tm1)
    if found.shape != x.shape or found.dtype != bool:
        raise AssertionError(
            f"valid_tm1 must be a bool array of shape {x.shape}, one for each step, got {found.shape} {found.dtype}; "
            "nothing is broadcast."
        )


def check_scalars(**numbers: Any) -> None:
    """An AssertionError unless each is one number."""
    for name, number in numbers.items():
        if jnp.ndim(number):
            raise AssertionError(
                f"{name} must be a scalar, the same at every step, got shape {jnp.shape(number)}; if it should differ from "
                "step to step, add the parts of the loss up yourself."
            )
