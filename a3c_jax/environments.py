"""Environments by name: one small protocol over gymnax.

gymnax describes one environment; a worker plays several side by side, so the protocol here is
batched: every array has a leading dimension N, the number of environments.
"""

import ast
import difflib
import math
import urllib.parse
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from a3c_jax import runtime

runtime.configure()  # before gymnax, which starts JAX's backend
runtime.defer_import("matplotlib.pyplot")  # gymnax needs them to render, and only then
runtime.defer_import("seaborn")

import gymnax  # noqa: E402
from gymnax.environments.environment import Environment as GymnaxBase  # noqa: E402

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
    """What the rest of the package asks of an environment. The methods are pure and may be traced.

    Attributes:
      name: for people.
      num_actions: number of discrete actions, or of a continuous action's dimensions.
      continuous: whether actions are continuous.
      observation_shape: of one observation.
    """

    name: str
    num_actions: int
    continuous: bool
    observation_shape: tuple[int, ...]

    def reset(self, key: Array, num_envs: int) -> tuple[Array, Any]:
        """Starts `num_envs` episodes: their first observations `[N, ...]` and states."""
        ...

    def step(self, key: Array, state: Any, action: Array) -> Transition:
        """Applies one action to each environment: `[N]` int32, or `[N, D]` float32, any real numbers."""
        ...

    def random_action(self, key: Array, num_envs: int) -> Array:
        """Actions drawn uniformly."""
        ...


class GymnaxEnvironment:
    """N copies of a gymnax environment, or of one that has gymnax's interface.

    A step does what gymnax's own `step` does, operation for operation (a test compares them), but draws
    the states to reset to only when at least one of the N episodes ended. Where `reset` and the six-value
    `step` are not those of gymnax's base class, they are called as they are.

    Attributes:
      gymnax: the environment itself.
      params: what its methods take last.

    A continuous action is any real number to the policy, whose log-probability is that of the number it
    drew. The environment gets it fitted into its bounds: -1 and 1 become the lower and the upper bound,
    and what lies beyond is clipped, or everything is squashed by tanh. Where there are no bounds it is passed on.
    """

    def __init__(
        self, name: str, environment: Any, params: Any, action_bounds: str = "clip"
    ) -> None:
        self.name = name
        self.gymnax = environment
        self.params = params
        self._squash = {"clip": lambda x: jnp.clip(x, -1.0, 1.0), "tanh": jnp.tanh}[action_bounds]
        observation_space = environment.observation_space(params)
        self._actions = environment.action_space(params)
        if hasattr(self._actions, "n"):
            self.continuous = False
            self.num_actions = int(self._actions.n)
        elif hasattr(self._actions, "low"):
            self.continuous = True
            self.num_actions = math.prod(self._actions.shape)
        else:
            raise ValueError(
                f"environment {name!r} has the action space {self._actions}, but only Discrete and Box "
                "actions are supported; flatten them into one of those first."
            )
        self._categories: int | None = None
        if hasattr(observation_space, "n"):
            self._categories = int(observation_space.n)
            self.observation_shape: tuple[int, ...] = (self._categories,)
        elif hasattr(observation_space, "low"):
            self.observation_shape = tuple(observation_space.shape)
        else:
            raise ValueError(
                f"environment {name!r} has the observation space {observation_space}, but only Box and "
                "Discrete observations are supported; flatten them into one array first."
            )
        kind = type(environment)  # a wrapper has the parts too, of what it wraps
        self._in_parts = isinstance(environment, GymnaxBase) and (
            (kind.step, kind.reset) == (GymnaxBase.step, GymnaxBase.reset)
        )

    def __repr__(self) -> str:
        return f"GymnaxEnvironment({self.name!r})"

    def reset(self, key: Array, num_envs: int) -> tuple[Array, Any]:
        keys = jax.random.split(key, num_envs)
        reset = self.gymnax.reset_env if self._in_parts else self.gymnax.reset
        observation, state = jax.vmap(reset, (0, None))(keys, self.params)
        return self._encode(observation), state

    def step(self, key: Array, state: Any, action: Array) -> Transition:
        if self.continuous:
            action = self._fit(action)
        if not self._in_parts:
            return self._step_whole(key, state, action)
        keys = jax.vmap(jax.random.split)(jax.random.split(key, action.shape[0]))
        final_observation, next_state, reward, terminated, _ = jax.vmap(
            self.gymnax.step_env, (0, 0, 0, None)
        )(keys[:, 0], state, action, self.params)
        truncated = jax.vmap(self.gymnax.is_truncated, (0, None))(next_state, self.params)
        done = terminated | truncated

        def reset() -> tuple[Array, Any]:
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

    def random_action(self, key: Array, num_envs: int) -> Array:
        if not self.continuous:
            return jax.random.randint(key, (num_envs,), 0, self.num_actions)
        uniform = jax.random.uniform(key, (num_envs, self.num_actions), minval=-1.0, maxval=1.0)
        return jnp.arctanh(0.999999 * uniform) if self._squash is jnp.tanh else uniform

    def _step_whole(self, key: Array, state: Any, action: Array) -> Transition:
        keys = jax.random.split(key, action.shape[0])
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
        return jnp.where(bounded, middle + half * self._squash(action), action)

    def _encode(self, observation: Array) -> Array:
        """One-hot where the observation is a category; unchanged otherwise."""
        if self._categories is None:
            return observation
        return jax.nn.one_hot(observation, self._categories)


def adapt(environment: Any, action_bounds: str = "clip") -> Environment:
    """An object with gymnax's interface as this package's `Environment`; one that is already is returned as it is.

    Raises:
      TypeError: where it is neither.
    """
    if hasattr(environment, "observation_shape"):
        return environment
    missing = [
        name
        for name in ("reset", "step", "observation_space", "action_space")
        if not hasattr(environment, name)
    ]
    if missing:
        raise TypeError(
            f"environment must have gymnax's interface, got {type(environment).__name__} without "
            f"{', '.join(missing)}; README.md has an example."
        )
    params = getattr(environment, "default_params", None)
    name = getattr(environment, "name", type(environment).__name__)
    return GymnaxEnvironment(name, environment, params, action_bounds)


def make(name: str, *, action_bounds: str = "clip", **params: Any) -> GymnaxEnvironment:
    """Makes an environment from its name.

    >>> make("MemoryChain-bsuite?memory_length=10&num_bits=3").observation_shape
    (5,)

    Args:
      name: the id of a registered gymnax environment (`gymnax.register` adds one's own) or `CartPole-v0`.
        Parameters may follow as in a URL: fields of its gymnax `EnvParams`, `max_steps_in_episode` for
        instance, or arguments of its constructor.
      action_bounds: how continuous actions are fitted into their bounds, `clip` or `tanh`.
      **params: more of these parameters.

    Returns:
      The environment, for any number of copies side by side.

    Raises:
      ValueError: where no such environment is registered (with the nearest names), where it has no such
        parameter, or where its spaces are not supported.
    """
    base, _, query = str(name).partition("?")
    params = _parse(name, query) | params
    base, variant = _VARIANTS.get(base, (base, {}))
    if base not in gymnax.registered_envs:
        raise ValueError(
            f"environment must be a registered gymnax environment, got {name!r}; {_near(base)}"
        )
    fields = set(gymnax.make(base)[1].__dataclass_fields__)
    options = {k: v for k, v in params.items() if k not in fields}
    try:
        environment, defaults = gymnax.make(base, **options)
    except TypeError as error:
        raise ValueError(
            f"environment {name!r} has the parameters {', '.join(sorted(fields))}, got "
            f"{', '.join(options)}; use one of those, or an argument of its constructor ({error})."
        ) from error
    changed = variant | {k: v for k, v in params.items() if k in fields}
    for key, value in changed.items():
        if type(value) is int and isinstance(getattr(defaults, key), float):
            changed[key] = float(value)  # some of gymnax's arithmetic takes no integer there
    return GymnaxEnvironment(str(name), environment, defaults.replace(**changed), action_bounds)


def _parse(name: str, query: str) -> dict[str, Any]:
    """The parameters in a name, `a=1&b=2.5`, as Python's numbers and booleans."""
    try:
        pairs = urllib.parse.parse_qsl(query, strict_parsing=True) if query else []
        return {key: ast.literal_eval(value) for key, value in pairs}
    except (ValueError, SyntaxError) as error:
        raise ValueError(
            f"the parameters of environment {name!r} must be numbers, as in "
            f"'MemoryChain-bsuite?memory_length=10&num_bits=3'; {error}."
        ) from error


def _near(name: str) -> str:
    known = {k.lower(): k for k in [*gymnax.registered_envs, *_VARIANTS]}
    near = [known[k] for k in difflib.get_close_matches(name.lower(), known, cutoff=0.5)]
    return (
        f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known.values())}."
    )


def _expand(flags: Array, ndim: int) -> Array:
    """Adds trailing dimensions of one to `[N]` flags."""
    return flags.reshape(flags.shape + (1,) * (ndim - 1))
