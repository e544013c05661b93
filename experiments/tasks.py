"""Environments that gymnax does not have. Importing this module registers them with gymnax."""

from typing import Any

import a3c_jax.environments  # noqa: F401  (before gymnax: it sets how JAX runs on CPU)  # isort: skip
import gymnax
import jax
from gymnax.environments import spaces
from gymnax.environments.classic_control.cartpole import CartPole


class CartPolePositions(CartPole):
    """CartPole-v1 with its velocities hidden: only a policy with memory can balance the pole for long."""

    @property
    def name(self) -> str:
        return "CartPole-positions"

    def get_obs(self, state: Any, params: Any = None, key: Any = None) -> jax.Array:
        """The cart's position and the pole's angle, `[2]`."""
        return super().get_obs(state, params, key)[jax.numpy.array([0, 2])]

    def observation_space(self, params: Any) -> spaces.Box:
        high = super().observation_space(params).high[jax.numpy.array([0, 2])]
        return spaces.Box(-high, high, (2,), jax.numpy.float32)


if "CartPole-positions" not in gymnax.registered_envs:
    gymnax.register("CartPole-positions", CartPolePositions)
