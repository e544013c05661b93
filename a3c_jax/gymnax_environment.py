"""gymnax's environments, and those with gymnax's interface, in the package's batched protocol."""

from typing import Any

import jax
import jax.numpy as jnp

from a3c_jax import _compiled, spaces
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
        self.observation_shape = spaces.observation_shape(name, self.observation_space)
        self._actions = environment.action_space(params)
        self.continuous = hasattr(self._actions, "low")
        self.num_actions = spaces.num_actions(name, self._actions)
        self.resets_in_gymnax = resets_in_gymnax(environment)

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
        keys = jax.random.split(key, action.shape[0])
        step = self._step_in_parts if self.resets_in_gymnax else self._step_whole
        return step(keys, state, self.own_action(action))

    def own_action(self, action: Array) -> Any:
        """Actions of a policy, `[N]` or `[N, D]`, as the environment itself takes them."""
        if self.continuous:
            return spaces.fit(self._actions, action, self.action_bounds)
        return spaces.decode(self._actions, action)

    def random_action(self, key: Array, num_envs: int) -> Array:
        """See `a3c_jax.environments.Environment`."""
        return spaces.random_action(self, key, num_envs)

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

    def _encode(self, observation: Any) -> Any:
        return spaces.encode(self.observation_space, observation)


def resets_in_gymnax(environment: Any) -> bool:
    """Whether gymnax's base class starts the next episode of an environment when one has ended."""
    kind = type(environment)  # a wrapper has the parts too, but they are those of what it wraps
    is_base = isinstance(environment, GymnaxBase)
    return is_base and (kind.step, kind.reset) == (GymnaxBase.step, GymnaxBase.reset)


def _expand(flags: Array, ndim: int) -> Array:
    """Adds trailing dimensions of one to `[N]` flags."""
    return flags.reshape(flags.shape + (1,) * (ndim - 1))
