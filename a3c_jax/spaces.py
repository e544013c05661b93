"""Spaces of observations and actions, as gymnax and Gymnasium describe them, in this package's terms.

The functions take `xp`, the library to compute with: `jax.numpy` inside a compiled program, `numpy` outside of one.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

_NARROW = {
    np.dtype(np.float64): np.float32,
    np.dtype(np.int64): np.int32,
    np.dtype(np.uint64): np.uint32,
}


def observation_shape(name: str, space: Any) -> Any:
    """The shape of an encoded observation; a dict or tuple of shapes if the space has parts.

    Args:
      name: the environment's name, for the error message.
      space: the space of one observation.

    Raises:
      ValueError: if the space is of another kind.
    """
    if _is_category(space):
        return (int(space.n),)
    if _is_array(space):
        return tuple(int(size) for size in space.shape)
    parts = _parts(space)
    if isinstance(parts, Mapping):
        return {key: observation_shape(name, part) for key, part in parts.items()}
    if isinstance(parts, tuple | list):
        return tuple(observation_shape(name, part) for part in parts)
    raise ValueError(
        f"environment {name!r} has the observation space {space}, but only Box, Discrete, Dict and Tuple "
        "observations are supported; turn them into one of those first."
    )


def encode(space: Any, observation: Any, xp: Any = jnp) -> Any:
    """Observations `[N, ...]` as the network sees them: categories are one-hot, and everything else is as it was."""
    if _is_category(space):
        index = xp.asarray(observation) - getattr(space, "start", 0)
        return (index[..., None] == xp.arange(int(space.n))).astype(xp.float32)
    if _is_array(space):
        return observation
    if isinstance(space.spaces, Mapping):
        return {key: encode(part, observation[key], xp) for key, part in space.spaces.items()}
    return tuple(
        encode(part, piece, xp) for part, piece in zip(space.spaces, observation, strict=True)
    )


def is_like(space: Any, observation: Any) -> bool:
    """Whether an observation is a dict, a tuple or one array, as its space says."""
    parts = _parts(space)
    if parts is None:
        return hasattr(observation, "dtype")
    return isinstance(observation, Mapping if isinstance(parts, Mapping) else tuple | list)


def check_like(name: str, observation: np.ndarray, shape: tuple[int, ...], dtype: Any) -> None:
    """Checks an array of encoded observations.

    Args:
      name: the environment's name, for the error message.
      observation: the array.
      shape: what its shape must be.
      dtype: what its values are converted to.

    Raises:
      ValueError: if it has another shape, or if its values do not fit into that dtype.
    """
    found = observation.dtype
    fits = found == dtype or np.can_cast(found, dtype, "same_kind")
    if observation.shape != shape or not fits:
        raise ValueError(
            f"environment {name!r} must show observations like its space in reset and step, {dtype}{[*shape]}, got "
            f"{found}{[*observation.shape]}; correct its space or its observations."
        )


def of_parts(function: Callable[[Any], Any], space: Any) -> Any:
    """What a function gives for a space; if the space has parts, a dict or tuple of what it gives for each."""
    parts = _parts(space)
    if parts is None:
        return function(space)
    if isinstance(parts, Mapping):
        return {key: of_parts(function, part) for key, part in parts.items()}
    return tuple(of_parts(function, part) for part in parts)


def num_actions(name: str, space: Any) -> int | tuple[int, ...]:
    """The `num_actions` of an environment with this action space; see `a3c_jax.protocol.Environment`.

    Raises:
      ValueError: if the space is of a kind that is not supported.
    """
    if _is_category(space):
        return int(space.n)
    if hasattr(space, "low"):
        return math.prod(space.shape)
    parts = _parts(space) or ()
    parts = list(parts.values() if isinstance(parts, Mapping) else parts)
    if all(_is_category(part) for part in parts):
        sizes = getattr(space, "nvec", [part.n for part in parts])
        if np.ndim(sizes) == 1 and len(sizes) > 0:
            return tuple(int(size) for size in sizes)
    raise ValueError(
        f"environment {name!r} has the action space {space}, but only Discrete and Box actions, Dict and Tuple "
        "of Discrete, and one-dimensional MultiDiscrete are supported; flatten them into one of those first."
    )


def decode(space: Any, action: Any) -> Any:
    """Discrete actions `[N]` or `[N, D]` as the environment's own."""
    parts = _parts(space)
    if isinstance(parts, Mapping):
        return {key: decode(part, action[:, d]) for d, (key, part) in enumerate(parts.items())}
    if parts is not None:
        return tuple(decode(part, action[:, d]) for d, part in enumerate(parts))
    # Gymnasium's spaces of integers may begin at another number than zero.
    return action + space.start if hasattr(space, "start") else action


def fit(space: Any, action: Any, action_bounds: str, xp: Any = jnp) -> Any:
    """Real numbers `[N, D]` as the environment's own continuous actions `[N, *shape]`.

    -1 and 1 become the lower and the upper bound. What lies beyond is clipped, or everything is squashed by tanh.
    Without bounds an action is passed on; with one of them, it is clipped there.

    Args:
      space: the action space, with `low` and `high`.
      action: the numbers.
      action_bounds: `clip` or `tanh`.
      xp: `jax.numpy` or `numpy`.
    """
    shape = space.shape
    low, high = (xp.broadcast_to(bound, shape) for bound in (space.low, space.high))
    action = action.reshape(action.shape[0], *shape)
    bounded = xp.isfinite(low) & xp.isfinite(high)
    with np.errstate(invalid="ignore"):  # where it is not bounded
        # Halved first, because integers and large floats would overflow.
        middle = xp.where(bounded, high / 2 + low / 2, 0)
        half = xp.where(bounded, high / 2 - low / 2, 1)
    fitted = xp.tanh(action) if action_bounds == "tanh" else xp.clip(action, -1.0, 1.0)
    # Rounding may lead beyond a bound.
    return xp.clip(xp.where(bounded, middle + half * fitted, action), low, high)


def is_wide(space: Any) -> bool:
    """Whether integers of a space need more than 32 bits."""
    if getattr(space, "dtype", None) not in (np.int64, np.uint64) or not hasattr(space, "low"):
        return False
    limits = np.iinfo(np.int32 if space.dtype == np.int64 else np.uint32)
    return bool((space.low < limits.min).any() or (space.high > limits.max).any())


def narrow(x: Any, is_wide: bool) -> np.ndarray:
    """An array of at most 32 bits."""
    x = np.asarray(x)
    if x.dtype not in _NARROW:
        return x
    return x.astype(np.float32 if is_wide else _NARROW[x.dtype])


def random_action(environment: Any, key: Array, num_envs: int) -> Array:
    """Draws actions of an environment uniformly, as a policy would give them.

    Args:
      environment: anything with `num_actions`, `continuous` and `action_bounds`.
      key: a PRNG key.
      num_envs: N, how many.

    Returns:
      `[N]` or `[N, D]`.
    """
    number = environment.num_actions
    if not environment.continuous:
        shape = (num_envs, *np.shape(number))
        return jax.random.randint(key, shape, 0, jnp.asarray(number))
    uniform = jax.random.uniform(key, (num_envs, number), minval=-1.0, maxval=1.0)
    return jnp.arctanh(0.999999 * uniform) if environment.action_bounds == "tanh" else uniform


def _parts(space: Any) -> Any:
    """The spaces in a Dict or a Tuple; None for any other space. OneOf has some, too, but shows only one of them."""
    return None if type(space).__name__ == "OneOf" else getattr(space, "spaces", None)


def _is_category(space: Any) -> bool:
    """Whether a value of the space is one of n; Gymnasium's MultiBinary has an `n`, too, but a shape."""
    return hasattr(space, "n") and tuple(getattr(space, "shape", ())) == ()


def _is_array(space: Any) -> bool:
    return hasattr(space, "low") or hasattr(space, "nvec") or hasattr(space, "n")
