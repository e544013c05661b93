"""Gymnasium's vector environments under one rule: when an episode has ended, the next one has begun.

Gymnasium leaves it to each vector environment how the next episode begins (`gymnasium.vector.AutoresetMode`). Here are
all three ways:

| mode     | what `step` returns at an episode's end     | what is done about it                                        |
|----------|---------------------------------------------|--------------------------------------------------------------|
| Disabled | the last observation                        | the ended environments are reset at once                     |
| SameStep | the next episode's first observation; the last one is in `info["final_obs"]`  | both are taken       |
| NextStep | the last observation; the next `step` only resets, whatever the action  | that step is marked, and losses leave it out |

Gymnasium's own `SyncVectorEnv` and `AsyncVectorEnv` and ale-py's `AtariVectorEnv` can reset some of their environments
with a seed for each. With Disabled, or with NextStep and no wrapper around, that is used, and what the table says of Disabled
holds for both: each episode gets a seed of its own, so that it can be played again from that seed and its actions
(`VectorPlayer.put_back`). Where a seed costs much, several episodes may follow one another from one (`episodes_per_seed`).
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from a3c_jax.protocol import checked_values

_CLOSE_SECONDS = 5.0
"""How long environments in processes may take for the step that they are in when they are closed."""

_SEEDED_SINGLY = ("SyncVectorEnv", "AsyncVectorEnv", "AtariVectorEnv")


class Stepped(NamedTuple):
    """What follows an action in each of N environments.

    Attributes:
      observation: what to act upon next, a tree of `[N, ...]`.
      reward: `[N]` float32.
      terminated: whether the episode ended by itself, `[N]` bool.
      truncated: whether a time limit cut it, `[N]` bool.
      final_observation: the observation that followed the action, before any reset, like `observation`.
      valid: False where the step only began the next episode, `[N]` bool; None if it did nowhere.
      life_lost: where a life was lost and the game goes on, `[N]` bool; None if that is not looked at.
    """

    observation: Any
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    final_observation: Any
    valid: np.ndarray | None = None
    life_lost: np.ndarray | None = None


class VectorPlayer:
    """N environments of one worker.

    Args:
      environment: a `gymnasium.vector.VectorEnv`.
      entropy: integers that all seeds are derived from.
      life_loss: whether to look at `info["lives"]`.
      close: what to call in the end instead of the environment's own `close`.
      episodes_per_seed: how many episodes follow one another from one seed, if single environments can be seeded. With
        more than one, how the later ones begin must not depend on what was done in those before.
      name: what it is called in error messages.

    Attributes:
      episode: the number of each environment's running episode, counted from zero, `[N]` int32.
      marks_beginnings: whether some steps only begin the next episode.
      can_put_back: whether a running episode can be played again from its seed and its actions.
    """

    def __init__(
        self,
        environment: Any,
        entropy: Sequence[int] = (),
        life_loss: bool = False,
        close: Callable[[], Any] | None = None,
        episodes_per_seed: int = 1,
        name: str = "",
    ) -> None:
        self._environment, self._name = environment, name or type(environment).__name__
        self._close = self._close_all if close is None else close
        self._entropy = tuple(int(word) for word in entropy)
        self._num_envs = num_envs = int(environment.num_envs)
        each = (f"{what}[{num_envs}]" for what in ("reward", "terminated", "truncated"))
        self._of_step = ("observation", *each, "info")
        self._innermost = innermost = getattr(environment, "unwrapped", environment)
        known = {kind.__name__ for kind in type(innermost).__mro__} & {*_SEEDED_SINGLY}
        self._mode = autoreset_mode(environment)
        self._takes_list_of_seeds, self._is_atari = bool(known), "AtariVectorEnv" in known
        self._episodes_per_seed = episodes_per_seed
        self.can_put_back = bool(known) and (
            self._mode == "Disabled" or (self._mode == "NextStep" and environment is innermost)
        )
        self._resets_itself = self._mode != "Disabled" and not self.can_put_back
        self.marks_beginnings = self._resets_itself and self._mode == "NextStep"
        self._life_loss, self._lives = life_loss, np.zeros(self._num_envs, np.int64)
        self._ended = np.zeros(self._num_envs, bool)
        self._others_were_checked = False
        self.episode = np.full(self._num_envs, -1, np.int32)

    def begin(self, episode: np.ndarray) -> Any:
        """Resets all environments, to the beginning of the episodes of these numbers `[N]`."""
        self._ended = np.zeros(self._num_envs, bool)
        everywhere = np.ones(self._num_envs, bool)
        if self._takes_list_of_seeds:
            return self._begin(everywhere, episode)
        self.episode = np.array(episode, np.int32)
        return self._call_reset(everywhere, seed=self._seed(0))

    def step(self, action: Any) -> Stepped:
        """Applies one action to each environment, and begins the next episode where one has ended."""
        values = self._environment.step(action)
        values = checked_values(self._name, "step", self._of_step, values, self._are_of_step)
        observation, reward, terminated, truncated, info = values
        # Copies, because the environment may use its arrays again in the reset below.
        reward = np.array(reward, np.float32)
        terminated, truncated = np.array(terminated, bool), np.array(truncated, bool)
        ended, valid, final_observation = terminated | truncated, None, observation
        life_lost = self._count_lives(info, ended) if self._life_loss else None
        if self.marks_beginnings:
            began, self._ended = self._ended, ended
            if began.any():
                valid = ~began
                reward = np.where(valid, reward, np.float32(0))
            self.episode = self.episode + began
        elif ended.any():
            if self._resets_itself:
                final_observation = _insert(observation, info, ended)
                self.episode = self.episode + ended
            else:
                final_observation = jax.tree.map(np.array, observation)
                observation = self._reset(ended, self.episode + 1)
                self._check_others(final_observation, observation, ended)
        return Stepped(
            observation, reward, terminated, truncated, final_observation, valid, life_lost
        )

    def _are_of_step(self, _: Any, reward: Any, terminated: Any, truncated: Any, __: Any) -> bool:
        return np.shape(reward) == np.shape(terminated) == np.shape(truncated) == self._ended.shape

    def put_back(
        self,
        episode: np.ndarray,
        actions: Sequence[Any],
        length: np.ndarray,
        watched: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> tuple[Any, np.ndarray]:
        """Plays running episodes again, up to where they were.

        All environments are stepped together, and their episodes end together, so that the longest begins first. The
        others are stepped on the way, too, and are reset when their turn comes.

        Args:
          episode: the episodes' numbers, `[N]` int.
          actions: the environment's own actions, one for each step of the longest episode: the last `length[n]`
            of them belong to environment n's.
          length: how many steps they have had, `[N]` int.
          watched: a context manager that each step is made in.

        Returns:
          The observations to act upon next, and what the episodes have paid, `[N]` float32.
        """
        steps = int(length.max(initial=0))
        observation, paid = self.begin(episode), np.zeros(self._num_envs, np.float32)
        for k in range(steps):
            begins = length == steps - k
            if k and begins.any():
                self._begin(begins, episode)
            with watched():
                stepped = self.step(actions[k])
            observation = stepped.observation
            paid = np.where(length >= steps - k, paid + stepped.reward, paid)
        late = length == 0
        if steps and late.any():
            observation = self._begin(late, episode)
        return observation, paid

    def _count_lives(self, info: dict[str, Any], ended: np.ndarray) -> np.ndarray:
        """Where there are fewer lives than before."""
        if "lives" not in info:
            raise ValueError(
                "life_loss needs an environment that says info['lives'], as Atari's do, got only "
                f"{sorted(info)}; leave life_loss out."
            )
        lives = np.asarray(info["lives"])
        lost = (lives < self._lives) & ~ended
        self._lives = np.where(ended, 0, lives)
        return lost

    def _check_others(self, before: Any, after: Any, ended: np.ndarray) -> None:
        """Checks once that a reset of some environments has left the others as they were."""
        if self._others_were_checked or ended.all():
            return
        self._others_were_checked = True
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            x, y = np.asarray(x)[~ended], np.asarray(y)[~ended]
            if not np.array_equal(x, y, equal_nan=x.dtype.kind == "f"):
                raise ValueError(
                    "reset(options={'reset_mask': mask}) must leave the environments outside the mask as they are, but "
                    "their observations changed; let it, and each wrapper, look at the mask, or use another autoreset."
                )

    def render(self) -> np.ndarray:
        """A picture of the first environment, `[height, width, 3]` uint8, if it was made with that `render_mode`."""
        return np.asarray(self._environment.render()[0])

    def close(self) -> None:
        """Closes the environments."""
        self._close()

    def end_processes(self) -> None:
        """Ends the processes of environments that do not return from a step. It may be called from another thread."""
        for process in getattr(self._innermost, "processes", ()):
            process.terminate()

    def _close_all(self) -> None:
        """Closes the environments. If one of their processes has died, the others are ended all the same."""
        processes = getattr(self._innermost, "processes", ())
        try:
            self._environment.close(**{"timeout": _CLOSE_SECONDS} if processes else {})
        finally:
            self.end_processes()

    def _begin(self, mask: np.ndarray, episode: np.ndarray) -> Any:
        """Begins any episodes in some environments, from their seeds on. Returns the observations of all."""
        observation = self._reset(mask, episode - episode % self._episodes_per_seed)
        while (earlier := mask & (self.episode < episode)).any():
            observation = self._reset(earlier, self.episode + 1)
        return observation

    def _reset(self, mask: np.ndarray, episode: np.ndarray) -> Any:
        """Begins episodes in some environments: the next ones, or the first ones from a seed."""
        self.episode = np.where(mask, episode, self.episode).astype(np.int32)
        # Without a list of seeds the environment goes on with its own generator.
        seeds = self._seeds(mask) if self._takes_list_of_seeds else None
        options = None if mask.all() else {"reset_mask": mask}
        return self._call_reset(mask, seed=seeds, options=options)

    def _call_reset(self, mask: np.ndarray, **arguments: Any) -> Any:
        values = self._environment.reset(**arguments)
        observation, info = checked_values(self._name, "reset", ("observation", "info"), values)
        if self._life_loss:  # if it does not say, new games have no lives until their first step
            self._lives = np.where(mask, info.get("lives", 0), self._lives)
        return observation

    def _seeds(self, mask: np.ndarray) -> Any:
        """The seeds for a reset of some environments, in the form that the environment takes."""
        is_first = self.episode % self._episodes_per_seed == 0
        seeds = [self._seed(n) if mask[n] and is_first[n] else None for n in range(self._num_envs)]
        if self._is_atari:  # takes only those of the environments to reset, and -1 for none
            return np.array([-1 if seeds[n] is None else seeds[n] for n in np.flatnonzero(mask)])
        return seeds

    def _seed(self, number: int) -> int:
        """The seed of an environment's running episode."""
        words = (*self._entropy, number, int(self.episode[number]))
        return int(np.random.SeedSequence(words).generate_state(1)[0] >> 1)


def autoreset_mode(environment: Any) -> str:
    """`Disabled`, `SameStep` or `NextStep`.

    Gymnasium's own vectors write it into the metadata of the single environments' class, where the next vector of
    that class overwrites it. They have it as an attribute, too, which is read instead.

    Raises:
      ValueError: if the environment does not say.
    """
    metadata = getattr(environment, "metadata", None) or {}
    innermost = getattr(environment, "unwrapped", environment)
    found = [metadata.get("autoreset_mode")]
    if metadata is getattr(innermost, "metadata", None):
        found.insert(0, getattr(innermost, "autoreset_mode", None))
    for mode in (getattr(mode, "value", mode) for mode in found):
        if mode in ("Disabled", "SameStep", "NextStep"):
            return str(mode)
    raise ValueError(
        "a vector environment must say in metadata['autoreset_mode'] how its episodes begin anew, got "
        f"{found[-1]!r} from {type(environment).__name__}; set it to a gymnasium.vector.AutoresetMode."
    )


def _insert(observation: Any, info: dict[str, Any], ended: np.ndarray) -> Any:
    """The observations with the last ones of the ended episodes in place of the next ones' first.

    `info["final_obs"]` is dense, like `observation`, or an array of N objects, of which those of the ended episodes
    are like one observation. They may have dicts and lists of other kinds than `observation`, and keys that it has not.
    """
    if "final_obs" not in info:
        raise ValueError(
            "a vector environment whose autoreset is SameStep must give the last observations of ended episodes in "
            f"info['final_obs'], got only {sorted(info)}; give them, or use another autoreset."
        )
    final = info["final_obs"]
    copied = jax.tree.map(np.array, observation)

    def put(x: Any, n: Any, last: Any) -> None:
        if isinstance(x, Mapping):
            for key, part in x.items():
                put(part, n, last[key])
            return
        if isinstance(x, tuple):
            for part, last_part in zip(x, last, strict=True):
                put(part, n, last_part)
            return
        if np.shape(x[n]) != np.shape(last):
            raise ValueError(
                f"info['final_obs'] must hold observations of the shape {list(x.shape[1:])}, got another one; a wrapper "
                "that changes observations has left it out: wrap the single environments, or use another autoreset."
            )
        x[n] = last

    if isinstance(final, np.ndarray) and final.dtype == object:
        for n in np.flatnonzero(ended):
            put(copied, n, final[n])
    else:
        put(copied, ended, jax.tree.map(lambda x: x[ended], final))
    return copied
