"""A segment of a worker's environments on the host, while it is played: the counterpart of `a3c_jax.rollout.unroll`."""

from typing import Any

import jax
import numpy as np

from a3c_jax import rollout, spaces
from a3c_jax.autoreset import Stepped


class HostSegment:
    """What a worker plays, step by step, in arrays on the host. They are made anew for each segment.

    Args:
      name: the environment's name, for error messages.
      num_steps: how many steps it has.
      state: what it begins with.
      marks_beginnings: see `a3c_jax.host_environment.HostEnvironment`.
    """

    def __init__(
        self, name: str, num_steps: int, state: rollout.RolloutState, marks_beginnings: bool
    ) -> None:
        self._name, num_envs = name, len(state.episode_return)
        self.entropy = state.environment.entropy
        self.episode_return = np.array(state.episode_return)
        self.episode_length = np.array(state.episode_length)
        self._t = 0
        leaves, self._structure = jax.tree.flatten(state.observation)
        self._observation = [np.empty((num_steps + 1, *x.shape), x.dtype) for x in leaves]
        self._set_observation(state.observation)
        self._final: dict[int, Any] = {}
        self._actions: list[np.ndarray] = []
        self._log_probs: list[np.ndarray] = []
        self._reward = np.empty((num_steps, num_envs), np.float32)
        self._terminated, self._truncated = (np.empty((num_steps, num_envs), bool) for _ in "ab")
        self._ended = np.empty((num_steps, num_envs), bool)
        self._returns = np.empty((num_steps, num_envs), np.float32)
        self._lengths = np.empty((num_steps, num_envs), np.int32)
        self._valid = np.ones((num_steps, num_envs), bool) if marks_beginnings else None

    def observation(self) -> Any:
        """What to act upon next."""
        return self._tree([x[self._t] for x in self._observation])

    def append(self, action: np.ndarray, log_prob: np.ndarray, stepped: Stepped) -> np.ndarray:
        """Adds a step. Returns where a recurrent network forgets, `[N]` bool."""
        t = self._t
        terminated, truncated = stepped.terminated, stepped.truncated
        ended = terminated | truncated
        self._actions.append(action)
        self._log_probs.append(log_prob)
        self._reward[t] = stepped.reward
        self._ended[t] = ended
        self.episode_return += stepped.reward
        self.episode_length += 1
        if stepped.valid is not None:
            self._valid[t] = stepped.valid  # type: ignore[index]
            self.episode_length -= ~stepped.valid
            truncated = truncated | ~stepped.valid  # so that nothing is carried over from it
        if stepped.life_lost is not None:
            terminated = terminated | stepped.life_lost
        self._terminated[t], self._truncated[t] = terminated, truncated
        self._returns[t], self._lengths[t] = self.episode_return, self.episode_length
        if ended.any():
            # With NextStep, the last observation is also the next one that is acted upon, and so it is kept anyway.
            if self._valid is None:
                self._final[t] = stepped.final_observation
            self.episode_return = np.where(ended, np.float32(0), self.episode_return)
            self.episode_length = np.where(ended, np.int32(0), self.episode_length)
        self._t = t + 1
        self._set_observation(stepped.observation)
        return terminated | truncated

    def read(self, carry: Any) -> tuple[rollout.Trajectory, rollout.Episodes]:
        """The segment.

        Args:
          carry: what a recurrent network remembered at its start.
        """
        observation_t = [x[1:] for x in self._observation]
        if self._final:
            observation_t = [np.array(x) for x in observation_t]
            for t, final in self._final.items():
                for to, x in zip(observation_t, jax.tree.leaves(final), strict=True):
                    to[t] = x
        trajectory = rollout.Trajectory(
            observation_tm1=self._tree([x[:-1] for x in self._observation]),
            action_tm1=np.stack(self._actions),  # type: ignore[arg-type]
            reward_t=self._reward,  # type: ignore[arg-type]
            terminated_t=self._terminated,  # type: ignore[arg-type]
            truncated_t=self._truncated,  # type: ignore[arg-type]
            observation_t=self._tree(observation_t),
            carry=carry,
            log_prob_tm1=np.stack(self._log_probs),
            valid_tm1=self._valid,
        )
        episodes: Any = rollout.Episodes(self._ended, self._returns, self._lengths)  # type: ignore[arg-type]
        return trajectory, episodes

    def _set_observation(self, observation: Any) -> None:
        is_array = isinstance(observation, np.ndarray)
        for to, x in zip(
            self._observation,
            [observation] if is_array else jax.tree.leaves(observation),
            strict=True,
        ):
            spaces.check_like(self._name, x, to.shape[1:], to.dtype)
            to[self._t] = x

    def _tree(self, leaves: list[np.ndarray]) -> Any:
        """The leaves as an observation."""
        return jax.tree.unflatten(self._structure, leaves)

    def actions(self) -> np.ndarray:
        """The actions, `[T, N, ...]`."""
        return np.stack(self._actions)
