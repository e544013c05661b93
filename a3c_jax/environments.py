"""Environments by name: one small protocol over gymnax.

gymnax describes one environment; a worker plays several side by side, so the protocol here is
batched: every array has a leading dimension N, the number of environments.
"""

import difflib
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from a3c_jax import runtime

runtime.configure()  # before gymnax, which starts JAX's backend
runtime.defer_import("matplotlib.pyplot")  # gymnax needs them to render, and only then
runtime.defer_import("seaborn")

import gymnax  # noqa: E402
from gymnax.environments import spaces  # noqa: E402

Array = jax.Array

_VARIANTS = {"CartPole-v0": ("CartPole-v1", {"max_steps_in_episode": 200})}


class Transition(NamedTuple):
    """What follows an action in each of N environments. An environment whose episode ended has been reset.

    Attributes:
      observation: what to act upon next, `[N, ...]`: after an episode's end, the next one's first.
      state: the environment's state to carry on, a tree of `[N, ...]`.
      reward: `[N]` float32.
      terminated: the episode ended by itself: the future is worth nothing, `[N]` bool.
      truncated: the episode was cut by a time limit: the future is worth `V(final_observation)`, `[N]` bool.
      final_observation: the observation that followed the action, before any reset, `[N, ...]`.
    """

    observation: Array
    state: Any
    reward: Array
    terminated: Array
    truncated: Array
    final_observation: Array


class Environment(Protocol):
    """What the rest of the package asks of an environment. Both methods are pure and may be traced."""

    name: str
    num_actions: int
    observation_shape: tuple[int, ...]

    def reset(self, key: Array, num_envs: int) -> tuple[Array, Any]:
        """Starts `num_envs` episodes: their first observations `[N, ...]` and states."""
        ...

    def step(self, key: Array, state: Any, action: Array) -> Transition:
        """Applies one action `[N]` int32 to each environment."""
        ...


class GymnaxEnvironment:
    """N copies of a gymnax environment.

    A step does what gymnax's own `step` does, operation for operation (a test compares them), but draws
    the states to reset to only when at least one of the N episodes ended.
    """

    def __init__(self, name: str, environment: Any, params: Any) -> None:
        self.name = name
        self._environment = environment
        self._params = params
        observation_space = environment.observation_space(params)
        action_space = environment.action_space(params)
        if not isinstance(action_space, spaces.Discrete):
            raise ValueError(
                f"environment {name!r} has the action space {action_space}, but only discrete actions "
                "are supported; use a discrete environment, for instance 'CartPole-v1'."
            )
        self.num_actions = int(action_space.n)
        self._categories: int | None = None
        if isinstance(observation_space, spaces.Discrete):
            self._categories = int(observation_space.n)
            self.observation_shape: tuple[int, ...] = (self._categories,)
        elif isinstance(observation_space, spaces.Box):
            self.observation_shape = tuple(observation_space.shape)
        else:
            raise ValueError(
                f"environment {name!r} has the observation space {observation_space}, but only Box and "
                "Discrete observations are supported; flatten them into one array first."
            )

    def __repr__(self) -> str:
        return f"GymnaxEnvironment({self.name!r})"

    def reset(self, key: Array, num_envs: int) -> tuple[Array, Any]:
        keys = jax.random.split(key, num_envs)
        observation, state = jax.vmap(self._environment.reset_env, (0, None))(keys, self._params)
        return self._encode(observation), state

    def step(self, key: Array, state: Any, action: Array) -> Transition:
        keys = jax.vmap(jax.random.split)(jax.random.split(key, action.shape[0]))
        final_observation, next_state, reward, terminated, _ = jax.vmap(
            self._environment.step_env, (0, 0, 0, None)
        )(keys[:, 0], state, action, self._params)
        truncated = jax.vmap(self._environment.is_truncated, (0, None))(next_state, self._params)
        done = terminated | truncated

        def reset() -> tuple[Array, Any]:
            fresh = jax.vmap(self._environment.reset_env, (0, None))(keys[:, 1], self._params)
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

    def _encode(self, observation: Array) -> Array:
        """One-hot where the observation is a category; unchanged otherwise."""
        if self._categories is None:
            return observation
        return jax.nn.one_hot(observation, self._categories)


def make(name: str, **params: Any) -> GymnaxEnvironment:
    """Makes an environment from its name.

    Args:
      name: the id of a registered gymnax environment, or `CartPole-v0`.
      **params: fields of the environment's gymnax `EnvParams` to change, `max_steps_in_episode` for
        instance.

    Returns:
      The environment, for any number of copies side by side.

    Raises:
      ValueError: where no such environment is registered (with the nearest names), where it has no such
        parameter, or where its spaces are not supported.
    """
    base, variant = _VARIANTS.get(name, (name, {}))
    known = [*gymnax.registered_envs, *_VARIANTS]
    if base not in known:
        lowered = {k.lower(): k for k in known}
        near = [
            lowered[k] for k in difflib.get_close_matches(str(name).lower(), lowered, cutoff=0.5)
        ]
        remedy = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}."
        raise ValueError(
            f"environment must be a registered gymnax environment, got {name!r}; {remedy}"
        )
    environment, defaults = gymnax.make(base)
    try:
        env_params = defaults.replace(**{**variant, **params})
    except TypeError as error:
        fields = ", ".join(defaults.__dataclass_fields__)
        raise ValueError(
            f"environment {name!r} has the parameters {fields}, got {', '.join(params)}; use one of those."
        ) from error
    return GymnaxEnvironment(name, environment, env_params)


def _expand(flags: Array, ndim: int) -> Array:
    """Adds trailing dimensions of one to `[N]` flags."""
    return flags.reshape(flags.shape + (1,) * (ndim - 1))
