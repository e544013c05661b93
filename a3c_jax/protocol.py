"""What the package asks of an environment.

A worker plays several copies of an environment side by side, so that every array has a leading dimension N, the
number of copies.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array


class Transition(NamedTuple):
    """What follows an action in each of N environments. An environment whose episode ended has been reset.

    Attributes:
      observation: what to act upon next, `[N, ...]`, or a dict or tuple of such arrays: after an episode's
        end, the first observation of the next one.
      state: the environment's state to go on from, a tree of `[N, ...]`.
      reward: `[N]` float32.
      terminated: whether the episode ended by itself, so that the future is worth nothing, `[N]` bool.
      truncated: whether a time limit cut the episode, so that the future is worth `V(final_observation)`,
        `[N]` bool.
      final_observation: the observation that followed the action, before any reset, like `observation`.
    """

    observation: Any
    state: Any
    reward: Array
    terminated: Array
    truncated: Array
    final_observation: Any


class Environment(Protocol):
    """N copies of an environment. The methods are pure functions and may be traced.

    Attributes:
      name: for people.
      num_actions: number of discrete actions; for several discrete actions at once a tuple of such numbers, one
        for each; for a continuous action the number of its dimensions.
      continuous: whether actions are continuous.
      observation_shape: the shape of one observation; a dict or tuple of shapes if observations are dicts or
        tuples.
    """

    name: str
    num_actions: int | tuple[int, ...]
    continuous: bool
    observation_shape: Any

    def reset(self, key: Array, num_envs: int) -> tuple[Any, Any]:
        """Starts `num_envs` episodes. Returns their first observations `[N, ...]` and their states."""
        ...

    def step(self, key: Array, state: Any, action: Array) -> Transition:
        """Applies one action to each environment.

        A discrete action is `[N]` int32, or `[N, D]` int32 for D discrete actions at once. A continuous action is
        `[N, D]` float32, any real numbers.
        """
        ...

    def random_action(self, key: Array, num_envs: int) -> Array:
        """Draws actions uniformly. Only `a3c_jax.random_policy` needs it."""
        ...


def checked_values(
    name: str,
    method: str,
    names: tuple[str, ...],
    values: Any,
    are_in_order: Callable[..., bool] = lambda *_: True,
) -> Any:
    """What a method of an environment of one's own has returned, if there are as many values as there should be.

    Args:
      name: the environment's.
      method: the method's.
      names: what it must return, in order; at least two.
      values: what it returned.
      are_in_order: whether so many values are in this order, as far as one can see.

    Raises:
      ValueError: if there are not, or if they are in another order.
    """
    found = values if isinstance(values, tuple | list) else [values]
    if len(found) != len(names) or not are_in_order(*found):
        raise ValueError(
            f"{method} of environment {name!r} must return ({', '.join(names)}) in this order, got "
            f"({', '.join(map(kind_of, found))}); correct it."
        )
    return values


def kind_of(value: Any) -> str:
    """What error messages call a value: its dtype and shape if it is an array, otherwise its type."""
    if type(value) is tuple:
        return f"({', '.join(map(kind_of, value))})"
    return f"{value.dtype}{[*value.shape]}" if hasattr(value, "dtype") else type(value).__name__
