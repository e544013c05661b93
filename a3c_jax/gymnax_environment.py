"""gymnax's environments, and those with gymnax's interface, in the package's batched protocol."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a3c_jax import _compiled
from a3c_jax.protocol import Transition

_compiled.prepare_process()  # before gymnax, which starts JAX's backend when it is imported
_compiled.import_gymnax()

from gymnax.environments.environment import Environment as GymnaxBase  # noqa: E402

Array = jax.Array


class GymnaxEnvironment:
    """N copies of a gymnax environment, or of one that has gymnax's interface.

    A step does what gymnax's own `step` does, operation for operation (a test compares them), but draws
    the states to reset to only if at least one of the N episodes ended. If `reset` and the six-value `step`
    are not those of gymnax's base class, they are called as they are.

    Observations of a Box space are passed on; those of a Discrete space become one-hot vectors; those of a
    Dict or Tuple space become a dict or tuple of these.

    Several discrete actions at once are one vector of integers to the policy, in the order in which the space
    lists them. The environment gets what its space describes: a dict or tuple of integers if the space is a Dict or
    Tuple of Discrete spaces, and a vector of integers if it has `nvec`, as Gymnasium's MultiDiscrete does.

    A continuous action is any real number to the policy, whose log-probability is that of the number it
    drew. The environment fits it into its bounds: -1 and 1 become the lower and the upper bound, and what
    lies beyond is clipped, or everything is squashed by tanh. Without bounds it is passed on.

    Attributes:
      name: for people.
      gymnax: the environment itself.
      params: what its methods take last.
      action_bounds: `clip` or `tanh`.
      num_actions: number of discrete actions; for several discrete actions at once a tuple of such numbers, one
        for each; for a continuous action the number of its dimensions.
      continuous: whether actions are continuous.
      observation_space: the space of one observation, as the environment declares it.
      observation_shape: the shape of one observation; a dict or tuple of shapes for a Dict or Tuple space.
      resets_in_gymnax: whether gymnax's base class starts the next episode when one has ended.
    """

    def __init__(
        self, name: str, environment: Any, params: Any, action_bounds: str = "clip"
    ) -> None:
        self.name = name
        self.gymnax = environment
        self.params = params
        self.action_bounds = action_bounds
        self.observation_space = environment.observation_space(params)
        self.observation_shape = _shape(name, self.observation_space)
        self._actions = environment.action_space(params)
        self.continuous = hasattr(self._actions, "low")
        self.num_actions = _num_actions(name, self._actions)
        kind = type(environment)  # a wrapper has the parts too, but they are those of what it wraps
        self.resets_in_gymnax = isinstance(environment, GymnaxBase) and (
            (kind.step, kind.reset) == (GymnaxBase.step, GymnaxBase.reset)
        )

    def __repr__(self) -> str:
        return f"GymnaxEnvironment({self.name!r})"

    def reset(self, key: Array, num_envs: int) -> tuple[Any, Any]:
        """See `a3c_jax.environments.Environment`."""
        observation, state = self.raw_reset(key, num_envs)
        return self._encode(observation), state

    def raw_reset(self, key: Array, num_envs: int) -> tuple[Any, Any]:
        """Like `reset`, but with the observations as the environment itself shows them."""
        keys = jax.random.split(key, num_envs)
        reset = self.gymnax.reset_env if self.resets_in_gymnax else self.gymnax.reset
        return jax.vmap(reset, (0, None))(keys, self.params)

    def step(self, key: Array, state: Any, action: Array) -> Transition:
        """See `a3c_jax.environments.Environment`."""
        num_envs = action.shape[0]
        action = self._fit(action) if self.continuous else _decode(self._actions, action)
        step = self._step_in_parts if self.resets_in_gymnax else self._step_whole
        return step(jax.random.split(key, num_envs), state, action)

    def random_action(self, key: Array, num_envs: int) -> Array:
        """See `a3c_jax.environments.Environment`."""
        num_actions: Any = self.num_actions
        if not self.continuous:
            shape = (num_envs, *np.shape(num_actions))
            return jax.random.randint(key, shape, 0, jnp.asarray(num_actions))
        uniform = jax.random.uniform(key, (num_envs, num_actions), minval=-1.0, maxval=1.0)
        return jnp.arctanh(0.999999 * uniform) if self.action_bounds == "tanh" else uniform

    def _step_in_parts(self, keys: Array, state: Any, action: Any) -> Transition:
        keys = jax.vmap(jax.random.split)(keys)
        final_observation, next_state, reward, terminated, _ = jax.vmap(
            self.gymnax.step_env, (0, 0, 0, None)
        )(keys[:, 0], state, action, self.params)
        truncated = jax.vmap(self.gymnax.is_truncated, (0, None))(next_state, self.params)
        done = terminated | truncated

        def reset() -> tuple[Any, Any]:
            fresh = jax.vmap(self.gymnax.reset_env, (0, None))(keys[:, 1], self.params)
            return jax.tree.map(
                lambda new, old: jnp.where(_expand(done, old.ndim), new, old).astype(old.dtype),
                fresh,
                (final_observation, next_state),
            )

        observation, next_state = jax.lax.cond(
            jnp.any(done), reset, lambda: (final_observation, next_state)
        )
        return Transition(
            self._encode(observation),
            next_state,
            reward.astype(jnp.float32),
            terminated,
            truncated,
            self._encode(final_observation),
        )

    def _step_whole(self, keys: Array, state: Any, action: Any) -> Transition:
        observation, state, reward, terminated, truncated, info = jax.vmap(
            self.gymnax.step, (0, 0, 0, None)
        )(keys, state, action, self.params)
        if "final_observation" not in info:
            raise ValueError(
                f"environment {self.name!r} must return the observation before the reset as "
                f"info['final_observation'], got only {sorted(info)}; add it, as gymnax 1.0 does."
            )
        return Transition(
            self._encode(observation),
            state,
            jnp.asarray(reward, jnp.float32),
            jnp.asarray(terminated, bool),
            jnp.asarray(truncated, bool),
            self._encode(info["final_observation"]),
        )

    def _fit(self, action: Array) -> Array:
        """Real numbers `[N, D]` as the environment's own actions `[N, *shape]`."""
        shape = self._actions.shape
        low, high = (
            jnp.broadcast_to(bound, shape) for bound in (self._actions.low, self._actions.high)
        )
        action = action.reshape(action.shape[0], *shape)
        bounded = jnp.isfinite(low) & jnp.isfinite(high)
        middle, half = (
            jnp.where(bounded, (high + low) / 2, 0),
            jnp.where(bounded, (high - low) / 2, 1),
        )
        fitted = jnp.tanh(action) if self.action_bounds == "tanh" else jnp.clip(action, -1.0, 1.0)
        return jnp.where(bounded, middle + half * fitted, action)

    def _encode(self, observation: Any) -> Any:
        return _encode(self.observation_space, observation)


def _shape(name: str, space: Any) -> Any:
    """The shape of an encoded observation; a dict or tuple of shapes if the space has parts."""
    if hasattr(space, "n"):
        return (int(space.n),)
    if hasattr(space, "low"):
        return tuple(int(size) for size in space.shape)
    parts = getattr(space, "spaces", None)
    if isinstance(parts, Mapping):
        return {key: _shape(name, part) for key, part in parts.items()}
    if isinstance(parts, tuple | list):
        return tuple(_shape(name, part) for part in parts)
    raise ValueError(
        f"environment {name!r} has the observation space {space}, but only Box, Discrete, Dict and Tuple "
        "observations are supported; turn them into one of those first."
    )


def _encode(space: Any, observation: Any) -> Any:
    """The observation as the network sees it: categories are one-hot, and everything else is as it was."""
    if hasattr(space, "n"):
        return jax.nn.one_hot(observation, int(space.n))
    if hasattr(space, "low"):
        return observation
    if isinstance(space.spaces, Mapping):
        return {key: _encode(part, observation[key]) for key, part in space.spaces.items()}
    return tuple(
        _encode(part, piece) for part, piece in zip(space.spaces, observation, strict=True)
    )


def _num_actions(name: str, space: Any) -> int | tuple[int, ...]:
    """The `num_actions` of an environment with this action space."""
    if hasattr(space, "n"):
        return int(space.n)
    if hasattr(space, "low"):
        return math.prod(space.shape)
    parts = getattr(space, "spaces", ())
    parts = list(parts.values() if isinstance(parts, Mapping) else parts)
    if all(hasattr(part, "n") for part in parts):
        sizes = getattr(space, "nvec", [part.n for part in parts])
        if np.ndim(sizes) == 1 and len(sizes) > 0:
            return tuple(int(size) for size in sizes)
    raise ValueError(
        f"environment {name!r} has the action space {space}, but only Discrete and Box actions, Dict and Tuple "
        "of Discrete, and one-dimensional MultiDiscrete are supported; flatten them into one of those first."
    )


def _decode(space: Any, action: Array) -> Any:
    """Discrete actions `[N]` or `[N, D]` as the environment's own."""
    parts = getattr(space, "spaces", None)
    if isinstance(parts, Mapping):
        return {key: _decode(part, action[:, d]) for d, (key, part) in enumerate(parts.items())}
    if parts is not None:
        return tuple(_decode(part, action[:, d]) for d, part in enumerate(parts))
    # Gymnasium's spaces of integers may begin at another number than zero.
    return action + space.start if hasattr(space, "start") else action


def _expand(flags: Array, ndim: int) -> Array:
    """Adds trailing dimensions of one to `[N]` flags."""
    return flags.reshape(flags.shape + (1,) * (ndim - 1))
