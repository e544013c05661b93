"""Environments that run outside JAX, on the host: any `gymnasium.vector.VectorEnv`, stepped from Python.

A `HostEnvironment` describes such an environment, and makes its copies. It has no pure `step`. Its counterpart is
`a3c_jax.host_worker`, which steps the copies of one worker between compiled calls.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a3c_jax import spaces
from a3c_jax.autoreset import VectorPlayer
from a3c_jax.host_state import HostState, Live, WatchedPlayer

Array = jax.Array


class HostEnvironment:
    """N copies of an environment that is stepped from Python.

    Observations, discrete actions and continuous actions are translated as `GymnaxEnvironment` translates them. 64-bit
    observations become 32-bit ones, of floats if 32 bits cannot hold the space's integers; bytes stay bytes.

    Attributes:
      name: for people.
      action_bounds: `clip` or `tanh`.
      num_actions: see `a3c_jax.protocol.Environment`.
      continuous: whether actions are continuous.
      observation_space: the space of one observation.
      observation_shape: the shape of one observation; a dict or tuple of shapes for a Dict or Tuple space.
      life_loss: whether losing a life, by `info["lives"]`, counts as a termination for learning.
      step_seconds: how many seconds one step or reset may take before the worker fails, and the making of one copy; None waits
        for ever.
      episodes_per_seed: see `a3c_jax.autoreset.VectorPlayer`.
      marks_beginnings: whether some steps only begin the next episode (`a3c_jax.rollout.Trajectory.valid_tm1`).
    """

    def __init__(
        self,
        name: str,
        environment: Any,
        *,
        action_bounds: str = "clip",
        life_loss: bool = False,
        step_seconds: float | None = 60.0,
        episodes_per_seed: int = 1,
    ) -> None:
        """Looks at the spaces, of one copy if `environment` is a function.

        Args:
          name: for people.
          environment: a function `make(num_envs)` that gives a new `gymnasium.vector.VectorEnv`. Or such an
            environment itself, for one worker and for as many environments as it has; it is not closed at the end.
          action_bounds: how continuous actions are fitted into their bounds, `clip` or `tanh`.
          life_loss: see the attribute.
          step_seconds: see the attribute.
          episodes_per_seed: see the attribute.

        Raises:
          TypeError: if it is something else.
          ValueError: if the spaces are not supported, if the environment does not say how it begins anew, or if one of
            the last three arguments is none that it may be.
        """
        _check_options(name, life_loss, step_seconds, episodes_per_seed)
        self.name, self.action_bounds = name, action_bounds
        self.life_loss, self.step_seconds = life_loss, step_seconds
        self.episodes_per_seed = episodes_per_seed
        self._object = environment if hasattr(environment, "reset") else None
        self._lent = threading.Lock()
        self._made: weakref.WeakSet[Any] = weakref.WeakSet()
        self._make = environment
        example = self._object if self._object is not None else environment(1)
        with contextlib.ExitStack() as afterwards:
            if self._object is None:
                afterwards.callback(_close_quietly, getattr(example, "close", None))
            _check_parts(name, example)
            self.marks_beginnings = VectorPlayer(example).marks_beginnings
            self.observation_space = example.single_observation_space
            self._actions = example.single_action_space
        self.observation_shape = spaces.observation_shape(name, self.observation_space)
        self.continuous = hasattr(self._actions, "low")
        self.num_actions = spaces.num_actions(name, self._actions)
        self._is_wide = spaces.of_parts(spaces.is_wide, self.observation_space)

    @property
    def fixed_num_envs(self) -> int | None:
        """How many copies there are, if the environment was given as an object; None if any number can be made."""
        return None if self._object is None else int(self._object.num_envs)

    def __repr__(self) -> str:
        return f"HostEnvironment({self.name!r})"

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: a description is sent to another process, an open environment cannot be."""
        if self._object is not None:
            raise TypeError(
                f"environment {self.name!r} was given as one object, which cannot leave its process; give a function "
                "that makes one."
            )
        return {k: v for k, v in vars(self).items() if k not in ("_lent", "_made")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For pickle."""
        vars(self).update(state, _lent=threading.Lock(), _made=weakref.WeakSet())

    def reset(self, key: Array, num_envs: int) -> tuple[Any, "HostState"]:
        """The state before the first step: no environment is made yet, and the observations are zeros.

        It may be traced. The seeds of all episodes are derived from the key.
        """
        observation = jax.tree.map(
            lambda x: jnp.zeros((num_envs, *x.shape), x.dtype), self.observation_example()
        )
        action = self.action_example(num_envs)
        none = jnp.zeros((0, *action.shape), action.dtype)
        entropy = jax.random.key_data(key).astype(jnp.uint32)
        return observation, HostState(entropy, jnp.full(num_envs, -1, jnp.int32), none)

    def random_action(self, key: Array, num_envs: int) -> Array:
        """See `a3c_jax.protocol.Environment`."""
        return spaces.random_action(self, key, num_envs)

    def check_copies(self, num_workers: int, num_envs: int) -> None:
        """Checks that every worker can have its environments.

        Raises:
          ValueError: if the environment was given as an object, and there are several workers, or not as many
            environments for each as it has.
        """
        if self._object is None:
            return
        if num_workers != 1 or num_envs != self._object.num_envs:
            raise ValueError(
                f"environment {self.name!r} was given as one object with {self._object.num_envs} environments, which "
                f"only one worker can play, got num_workers {num_workers} and envs_per_worker {num_envs}; give a "
                "function that makes one, such as lambda num_envs: gymnasium.make_vec('CartPole-v1', num_envs)."
            )

    def make(self, num_envs: int, entropy: Any = ()) -> VectorPlayer:
        """Makes copies of the environment.

        Args:
          num_envs: how many.
          entropy: integers that the seeds of all episodes are derived from.

        Raises:
          ValueError: if the environment was given as an object that is in use, if the function that makes it gives one
            again that it has given before, or if it has another number of copies.
        """
        close = None
        if self._object is None:
            made = self._make(num_envs)
            self._check_is_new(made)
        elif self._lent.acquire(blocking=False):
            made, close = self._object, self._lent.release
        else:
            raise ValueError(
                f"environment {self.name!r} was given as one object, which is in use; give a function that makes one."
            )
        with contextlib.ExitStack() as if_it_does_not_fit:
            if_it_does_not_fit.callback(_close_quietly, close or getattr(made, "close", None))
            _check_parts(self.name, made)
            if made.num_envs != num_envs:
                raise ValueError(
                    f"environment {self.name!r} must be made with the number of copies that is asked for, "
                    f"{num_envs}, got {made.num_envs}; pass the function's argument on as num_envs, or give a "
                    "function if it is an object."
                )
            words = np.asarray(entropy).ravel().tolist()
            player = VectorPlayer(
                made, words, self.life_loss, close, self.episodes_per_seed, self.name
            )
            if_it_does_not_fit.pop_all()
        return player

    def _check_is_new(self, made: Any) -> None:
        with self._lent:
            if made in self._made:
                raise ValueError(
                    f"environment {self.name!r} must be made anew each time, got one that was given before; let the "
                    "function make it, or give the object itself to one worker."
                )
            self._made.add(made)

    @contextlib.contextmanager
    def playing(self, num_envs: int, entropy: Any = ()) -> Iterator[WatchedPlayer]:
        """Makes copies of the environment for a block, and closes them at its end. Takes what `make` takes.

        Raises:
          TimeoutError: from a step or a reset in the block that takes longer than `step_seconds`, or if to make the copies takes
            `num_envs` times as long.
        """
        live = Live()
        make = functools.partial(self.make, num_envs, entropy)
        try:
            live.call(functools.partial(live.open, make, num_envs), self.name, self.step_seconds)
            yield WatchedPlayer(live, self.name, self.step_seconds)
        finally:
            live.close()

    def encode(self, observation: Any) -> Any:
        """Observations as the network sees them, arrays `[N, ...]` of at most 32 bits."""
        encoded = spaces.encode(self.observation_space, observation, np)
        if isinstance(encoded, np.ndarray):
            return spaces.narrow(encoded, self._is_wide)
        return jax.tree.map(spaces.narrow, encoded, self._is_wide)

    def begin(self, player: VectorPlayer | WatchedPlayer, episode: np.ndarray) -> Any:
        """Begins the episodes of these numbers, `[N]` int. Returns the first observations, encoded.

        Raises:
          ValueError: if they are not what the space says.
        """
        encoded, num_envs = self.encode(player.begin(episode)), len(episode)
        example = self.observation_example()
        expected = jax.tree.leaves(example)
        for found, one in zip(jax.tree.leaves(encoded), expected, strict=True):
            spaces.check_like(self.name, found, (num_envs, *one.shape), one.dtype)
        return jax.tree.map(lambda x, one: x.astype(one.dtype, copy=False), encoded, example)

    def decode(self, action: np.ndarray) -> Any:
        """Actions of a policy, `[N]` or `[N, D]`, as the environment's own.

        Raises:
          ValueError: if one is none of the environment's. Some environments hang on it.
        """
        if self.continuous:
            if np.isnan(action).any():
                raise ValueError(
                    f"actions of environment {self.name!r} must be numbers, got a NaN; lower the learning rate, or correct "
                    "the policy's distribution."
                )
            fitted = spaces.fit(self._actions, action, self.action_bounds, np)
            is_integer = self._actions.dtype.kind in "iu"
            return (np.rint(fitted) if is_integer else fitted).astype(self._actions.dtype)
        # As an unsigned number, a negative one is too large as well.
        if (action.astype(np.uint32) >= np.asarray(self.num_actions, np.uint32)).any():
            raise ValueError(
                f"actions of environment {self.name!r} must be at least 0 and less than {self.num_actions}, got "
                f"{action.tolist()}; correct the policy's distribution."
            )
        return spaces.decode(self._actions, action.astype(np.int64))

    def observation_example(self) -> Any:
        """The shape and the dtype of one encoded observation, a tree of `jax.ShapeDtypeStruct`."""
        zeros = spaces.of_parts(_zeros, self.observation_space)
        sample = jax.tree.map(lambda x: x[None], zeros)
        encoded = self.encode(sample)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), encoded)

    def action_example(self, num_envs: int) -> jax.ShapeDtypeStruct:
        """The shape and the dtype of a policy's actions in `num_envs` environments, as they are remembered."""
        if self.continuous:
            return jax.ShapeDtypeStruct((num_envs, self.num_actions), jnp.float32)
        narrow = jnp.uint8 if np.max(self.num_actions) <= 256 else jnp.int32
        return jax.ShapeDtypeStruct((num_envs, *np.shape(self.num_actions)), narrow)


def _close_quietly(close: Any) -> None:
    """Closes what is not needed any more. An error in that changes nothing."""
    if close is not None:
        with contextlib.suppress(Exception):
            close()


def _check_parts(name: str, made: Any) -> None:
    needed = ("reset", "step", "num_envs", "single_observation_space", "single_action_space")
    missing = [part for part in needed if not hasattr(made, part)]
    if missing:
        raise TypeError(
            f"environment {name!r} must be a gymnasium.vector.VectorEnv, or a function of the number of copies that "
            f"makes one, got {type(made).__name__} without {', '.join(missing)}; use gymnasium.make_vec."
        )


def check_option(name: str, key: str, value: Any, is_right: bool, rule: str) -> None:
    """Raises a ValueError if an option of an environment is not right."""
    if not is_right:
        raise ValueError(
            f"{key} of environment {name!r} must be {rule}, got {value!r}; leave it out."
        )


def _check_options(name: str, life_loss: Any, seconds: Any, episodes: Any) -> None:
    check = functools.partial(check_option, name)
    is_positive = isinstance(seconds, int | float) and not isinstance(seconds, bool) and seconds > 0
    check("life_loss", life_loss, isinstance(life_loss, bool), "True or False")
    check("step_seconds", seconds, seconds is None or is_positive, "a positive number or None")
    is_count = type(episodes) is int and episodes > 0
    check("episodes_per_seed", episodes, is_count, "a positive integer")


def _zeros(space: Any) -> np.ndarray:
    return np.zeros(space.shape, space.dtype)
