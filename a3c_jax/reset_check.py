"""Whether an environment resets itself after an episode's end, found by playing it at random."""

import contextlib
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from a3c_jax.gymnax_environment import GymnaxEnvironment
from a3c_jax.protocol import Environment, Transition

Array = jax.Array

_NUM_ENVS = 32
_MAX_STEPS = 2000
_ENOUGH_ENDS = 8

_known_to_reset: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""Environments that were played already, by their id."""


def check_environment_resets(environment: Environment, action: jax.ShapeDtypeStruct) -> None:
    """Refuses an environment whose `step` does not start the next episode when one has ended.

    An environment that resets itself returns two observations at an episode's end: the last one of that episode,
    and the first one of the next. If they are the same at every end, and the episodes have more than one step,
    then either of two signs tells that there was no reset: none of these observations is one that `reset`
    gives, or after the first end every step is an end.

    Args:
      environment: the environment.
      action: shape and dtype of an action of a number of environments.

    Raises:
      ValueError: if the environment does not reset itself.
    """
    if isinstance(environment, GymnaxEnvironment) and environment.resets_in_gymnax:
        return
    played = getattr(environment, "gymnax", environment)
    if _known_to_reset.get(id(played)) is played:
        return
    progress = jax.device_get(
        jax.jit(lambda key: _play(environment, action, key))(jax.random.key(0))
    )
    lasting = progress.first_length > 1  # of those whose first episode is longer than one step
    only_ends = (progress.num_not_ended == 0).all()
    has_not_reset = (
        not progress.shows_reset
        and progress.num_ends.sum() > 0
        and lasting[progress.num_ends > 0].all()
        and (
            not progress.any_like_first or (only_ends and (progress.num_ends >= _ENOUGH_ENDS).all())
        )
    )
    if has_not_reset:
        name = getattr(environment, "name", type(environment).__name__)
        raise ValueError(
            f"environment {name!r} must reset itself in step when an episode has ended, and return the next "
            "episode's first observation and state, got the observation before the reset; return those of reset there, "
            "and the other as final_observation, or derive its class from gymnax's, which does so."
        )
    # An object that allows no weak references is played again next time.
    with contextlib.suppress(TypeError):
        _known_to_reset[id(played)] = played


class _Progress(NamedTuple):
    """What was seen so far, for each of the environments played.

    Attributes:
      first_length: number of steps of the first episode, `[N]`.
      num_ends: how often an episode ended, `[N]`.
      num_not_ended: how many steps after the first end were none, `[N]`.
      shows_reset: whether the two observations differed at any end, a scalar.
      any_like_first: whether at any end they were the same and one that `reset` may give, a scalar.
    """

    first_length: Array
    num_ends: Array
    num_not_ended: Array
    shows_reset: Array
    any_like_first: Array


def _play(environment: Environment, action: jax.ShapeDtypeStruct, key: Array) -> _Progress:
    reset_key, play_key = jax.random.split(key)
    firsts, state = environment.reset(reset_key, _NUM_ENVS)

    def step(state: Any, key: Array) -> Transition:
        action_key, step_key = jax.random.split(key)
        return environment.step(step_key, state, _random_action(environment, action, action_key))

    def proceed(carry: Any) -> Array:
        _, num_steps, progress = carry
        enough = progress.shows_reset | jnp.all(progress.num_ends >= _ENOUGH_ENDS)
        return (num_steps < _MAX_STEPS) & ~enough

    def play(carry: Any) -> Any:
        state, num_steps, progress = carry
        transition = step(state, jax.random.fold_in(play_key, num_steps))
        return transition.state, num_steps + 1, _observe(progress, transition, firsts)

    # A loop keeps its types, and a state may begin as plain numbers that become others in the first step.
    kept = jax.eval_shape(step, state, play_key).state
    state = jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), state, kept)
    zeros = jnp.zeros(_NUM_ENVS, jnp.int32)
    progress = _Progress(zeros, zeros, zeros, jnp.bool_(False), jnp.bool_(False))
    return jax.lax.while_loop(proceed, play, (state, 0, progress))[2]


def _observe(progress: _Progress, transition: Transition, firsts: Any) -> _Progress:
    ended = transition.terminated | transition.truncated
    differs, like_first = jnp.zeros_like(ended), jnp.ones_like(ended)
    leaves = (
        jax.tree.leaves(x) for x in (transition.observation, transition.final_observation, firsts)
    )
    for after, final, first in zip(*leaves, strict=True):
        axes = tuple(range(1, after.ndim))
        differs |= jnp.any(after != final, axes)
        in_range = (after >= first.min(0)) & (after <= first.max(0))
        like_first &= jnp.all(in_range, axes)
    had_ended = progress.num_ends > 0
    return _Progress(
        progress.first_length + ~had_ended,
        progress.num_ends + ended,
        progress.num_not_ended + (had_ended & ~ended),
        progress.shows_reset | jnp.any(ended & differs),
        progress.any_like_first | jnp.any(ended & ~differs & like_first),
    )


def _random_action(environment: Environment, action: jax.ShapeDtypeStruct, key: Array) -> Array:
    shape = (_NUM_ENVS, *action.shape[1:])
    if jnp.issubdtype(action.dtype, jnp.integer):
        return jax.random.randint(key, shape, 0, jnp.asarray(environment.num_actions), action.dtype)
    return jax.random.normal(key, shape, action.dtype)
