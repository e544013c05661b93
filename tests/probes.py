"""Tiny environments with known optimal values and policies, in the package's batched protocol."""

import jax
import jax.numpy as jnp

from a3c_jax.environments import Transition


class Probe:
    """Episodes of `length` steps whose observation is a random sign and how many steps remain.

    Args:
      length: steps in an episode.
      reward: `reward(sign, action, last) -> [N]`, where `last` marks an episode's last step.
      truncates: whether episodes end by a time limit instead of terminating.
      shows_time: whether the observation tells how many steps remain.
    """

    name = "Probe"
    num_actions = 2
    continuous = False
    observation_shape = (2,)

    def __init__(self, length, reward, truncates=False, shows_time=True):
        self.length, self.reward, self.truncates = length, reward, truncates
        self.shows_time = shows_time

    def reset(self, key, num_envs):
        sign = jax.random.rademacher(key, (num_envs,), jnp.float32)
        remaining = jnp.full(num_envs, self.length)
        return self.observe(sign, remaining), (sign, remaining)

    def step(self, key, state, action):
        sign, remaining = state
        remaining = remaining - 1
        last = remaining == 0
        final = self.observe(sign, remaining)
        reward = self.reward(sign, action, last).astype(jnp.float32)
        fresh_observation, fresh = self.reset(key, len(sign))
        state = jax.tree.map(lambda a, b: jnp.where(last, a, b), fresh, (sign, remaining))
        observation = jax.tree.map(
            lambda a, b: jnp.where(last.reshape(-1, *[1] * (b.ndim - 1)), a, b),
            fresh_observation,
            final,
        )
        never = jnp.zeros_like(last)
        terminated, truncated = (never, last) if self.truncates else (last, never)
        return Transition(observation, state, reward, terminated, truncated, final)

    def observe(self, sign, remaining):
        time = remaining.astype(jnp.float32) if self.shows_time else jnp.zeros_like(sign)
        return jnp.stack([sign, time], axis=-1)


class DictProbe(Probe):
    """A probe whose observation is a dict or a tuple: the sign as a vector of one, and the time as a scalar."""

    name = "DictProbe"

    def __init__(self, *arguments, kind=dict, **options):
        super().__init__(*arguments, **options)
        self.kind = kind
        self.observation_shape = self._tree((1,), ())

    def observe(self, sign, remaining):
        return self._tree(sign[:, None], super().observe(sign, remaining)[:, 1])

    def _tree(self, sign, time):
        return {"sign": sign, "time": time} if self.kind is dict else (sign, time)
