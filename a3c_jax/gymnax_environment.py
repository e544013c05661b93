"""gymnax's environments, and those with gymnax's interface, in the package's batched protocol."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from a3c_jax import _compiled, spaces
from a3c_jax.protocol import Transition, checked_values

_compiled.prepare_process()  # before gymnax, which starts JAX's backend when it is imported
_compiled.import_gymnax()

from gymnax.environments.environment import Environment as GymnaxBase  # noqa: E402
from gymnax.environments.environment import EnvParams  # noqa: E402

Array = jax.Array

_RETURNS = {
    "reset": ("observation", "state"),
    "reset_env": ("observation", "state"),
    "step": ("observation", "state", "reward", "terminated", "truncated", "info"),
    "step_env": ("observation", "state", "reward", "terminated", "info"),
}


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
        self.observation_space = self._call("observation_space")
        self.observation_shape = spaces.observation_shape(name, self.observation_space)
        self._actions = self._call("action_space")
        self.continuous = hasattr(self._actions, "low")
        self.num_actions = spaces.num_actions(name, self._actions)
        self.resets_in_gymnax = _resets_in_gymnax(environment)

    def __repr__(self) -> str:
        return f"GymnaxEnvironment({self.name!r})"

    def reset(self, key: Array, num_envs: int) -> tuple[Any, Any]:
        """See `a3c_jax.environments.Environment`."""
        observation, state = self.raw_reset(key, num_envs)
        return self._encode(observation), state

    def raw_reset(self, key: Array, num_envs: int) -> tuple[Any, Any]:
        """Like `reset`, but with the observations as the environment itself shows them."""
        keys = jax.random.split(key, num_envs)
        return self._call_each("reset_env" if self.resets_in_gymnax else "reset", keys)

    def step(self, key: Array, state: Any, action: Array) -> Transition:
        """See `a3c_jax.environments.Environment`."""
        num_envs = action.shape[0]
        if self.continuous:
            action = spaces.fit(self._actions, action, self.action_bounds)
        else:
            action = spaces.decode(self._actions, action)
        step = self._step_in_parts if self.resets_in_gymnax else self._step_whole
        return step(jax.random.split(key, num_envs), state, action)

    def random_action(self, key: Array, num_envs: int) -> Array:
        """See `a3c_jax.environments.Environment`."""
        return spaces.random_action(self, key, num_envs)

    def _step_in_parts(self, keys: Array, state: Any, action: Any) -> Transition:
        keys = jax.vmap(jax.random.split)(keys)
        final_observation, next_state, reward, terminated, _ = self._call_each(
            "step_env", keys[:, 0], state, action
        )
        truncated = jax.vmap(functools.partial(self._call, "is_truncated"))(next_state)
        done = terminated | truncated

        def reset() -> tuple[Any, Any]:
            return jax.tree.map(
                lambda new, old: jnp.where(_expand(done, old.ndim), new, old).astype(old.dtype),
                self._call_each("reset_env", keys[:, 1]),
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
        observation, state, reward, terminated, truncated, info = self._call_each(
            "step", keys, state, action
        )
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

    def _call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the environment. It takes the params last."""
        try:
            return getattr(self.gymnax, method)(*arguments, self.params)
        except AttributeError as error:
            if self.params is None and error.obj is None and error.name:
                raise ValueError(
                    f"environment {self.name!r} must have default_params with {error.name}, which its {method} reads, "
                    "got None; give its class some."
                ) from error
            raise

    def _call_each(self, method: str, *arguments: Any) -> Any:
        """Calls a method for each of the environments, and checks as far as possible that its values are in order."""
        values = jax.vmap(functools.partial(self._call, method))(*arguments)
        return checked_values(self.name, method, _RETURNS[method], values, self._are_in_order)

    def _are_in_order(self, observation: Any, _: Any, *rest: Any) -> bool:
        if not spaces.is_like(self.observation_space, observation):
            return False
        if not rest:  # of a reset
            return True
        reward, *flags, info = rest
        if not all(hasattr(x, "dtype") for x in (reward, *flags)):
            return False
        resets_itself = len(flags) == 2
        if resets_itself and not isinstance(info, Mapping):
            return False
        # Such a step may also return flags that are numbers, unless they have changed places with the reward.
        return (resets_itself and reward.dtype != bool) or all(flag.dtype == bool for flag in flags)


def check_limit(name: str, environment: Any, params: Any) -> None:
    """Refuses params that do not say where gymnax's base class should cut an episode.

    A class without `default_params` inherits gymnax's, which cut every episode after one step.

    Raises:
      ValueError: if they do not.
    """
    while not isinstance(environment, GymnaxBase) and hasattr(environment, "_env"):
        environment = environment._env  # what a wrapper of gymnax wraps
    kind = type(environment)
    is_cut = _resets_in_gymnax(environment) and kind.is_truncated is GymnaxBase.is_truncated
    inherited = getattr(kind, "default_params", None) is GymnaxBase.default_params
    is_gymnax_own = inherited and params == EnvParams()
    if is_cut and (is_gymnax_own or not hasattr(params, "max_steps_in_episode")):
        raise ValueError(
            f"environment {name!r} must have default_params of its own, which say after how many steps an episode is cut, "
            f"got {params}{' from gymnax, which cuts each after one step' if is_gymnax_own else ''}; write default_params = "
            "EnvParams(max_steps_in_episode=500) into its class, or another number."
        )


def _resets_in_gymnax(environment: Any) -> bool:
    kind = type(environment)  # a wrapper has the parts too, but they are those of what it wraps
    is_base = isinstance(environment, GymnaxBase)
    return is_base and (kind.step, kind.reset) == (GymnaxBase.step, GymnaxBase.reset)


def _expand(flags: Array, ndim: int) -> Array:
    """Adds trailing dimensions of one to `[N]` flags."""
    return flags.reshape(flags.shape + (1,) * (ndim - 1))
