"""Actor-critic networks in Flax linen."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from a3c_jax.distributions import Categorical

Array = jax.Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "tanh": nn.tanh,
    "elu": nn.elu,
    "silu": nn.silu,
    "gelu": nn.gelu,
}

# The policy's head starts small, so that the first policy is close to uniform whatever the observation.
# The first argument is a variance: standard deviations of 0.01, 1 and sqrt(2) over the root of fan-in.
_POLICY_INIT = nn.initializers.variance_scaling(1e-4, "fan_in", "truncated_normal")
_VALUE_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
_TORSO_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")


class MLP(nn.Module):
    """A multilayer perceptron that flattens each observation first.

    Attributes:
      hidden_sizes: width of each layer.
      activation: applied after each layer.
      observation_ndim: how many trailing dimensions make up one observation.
    """

    hidden_sizes: tuple[int, ...]
    activation: Callable[[Array], Array]
    observation_ndim: int = 1

    @nn.compact
    def __call__(self, observation: Array) -> Array:
        """Maps `[..., *observation]` of any dtype to `[..., hidden_sizes[-1]]` float32."""
        batch = observation.shape[: observation.ndim - self.observation_ndim]
        x = observation.reshape(*batch, -1).astype(jnp.float32)
        for size in self.hidden_sizes:
            x = self.activation(nn.Dense(size, kernel_init=_TORSO_INIT)(x))
        return x


class ActorCritic(nn.Module):
    """A policy over discrete actions and a state-value function.

    Attributes:
      num_actions: number of discrete actions.
      hidden_sizes: width of each hidden layer.
      activation: name of the non-linearity, a key of `ACTIVATIONS`.
      shared_torso: whether actor and critic share the hidden layers.
      observation_ndim: how many trailing dimensions make up one observation.
    """

    num_actions: int
    hidden_sizes: tuple[int, ...] = (128,)
    activation: str = "relu"
    shared_torso: bool = False
    observation_ndim: int = 1

    def setup(self) -> None:
        def torso() -> MLP:
            return MLP(self.hidden_sizes, ACTIVATIONS[self.activation], self.observation_ndim)

        self.actor_torso = torso()
        self.critic_torso = self.actor_torso if self.shared_torso else torso()
        self.policy_head = nn.Dense(self.num_actions, kernel_init=_POLICY_INIT)
        self.value_head = nn.Dense(1, kernel_init=_VALUE_INIT)

    def __call__(self, observation: Array) -> tuple[Categorical, Array]:
        """Maps observations `[..., *observation]` to a distribution and values, both of batch `[...]`."""
        return self.actor(observation), self.critic(observation)

    def actor(self, observation: Array) -> Categorical:
        """The policy alone: logits, never probabilities."""
        return Categorical(self.policy_head(self.actor_torso(observation)))

    def critic(self, observation: Array) -> Array:
        """The value alone, `[...]`: no trailing dimension of one that could broadcast by accident."""
        return jnp.squeeze(self.value_head(self.critic_torso(observation)), axis=-1)


def trajectory_apply(network: nn.Module) -> Callable[[Any, Any], tuple[Any, Array, Array]]:
    """An `apply_fn` for `a3c_jax.losses.a3c_loss` from a network that maps observations.

    Args:
      network: a module like `ActorCritic`, with the methods `__call__` and `critic`.

    Returns:
      A function from parameters and a trajectory to the distribution at `observation_tm1`, its values
      `v_tm1`, and `v_t`, the values of the observations that followed.

    `v_t` costs one small forward pass. Inside an episode the observation that followed is the next one
    acted upon, so that `v_t` is `v_tm1` one step on. Only after the segment's last step and at a time
    limit is it not, and the pass over all final observations runs only where a time limit was met.
    (After a termination `v_t` is never read: its discount is zero.)
    """

    apply: Callable[..., Any] = network.apply

    def apply_fn(params: Any, trajectory: Any) -> tuple[Any, Array, Array]:
        def critic(observation: Array) -> Array:
            return apply(params, observation, method="critic")

        distribution_tm1, v_tm1 = apply(params, trajectory.observation_tm1)
        v_last = critic(trajectory.observation_t[-1:])
        v_next = jnp.concatenate([v_tm1[1:], v_last])
        v_t = jax.lax.cond(
            jnp.any(trajectory.truncated_t),
            lambda: jnp.where(trajectory.truncated_t, critic(trajectory.observation_t), v_next),
            lambda: v_next,
        )
        return distribution_tm1, v_tm1, v_t

    return apply_fn
