"""A network that gives the value of every action, and the epsilon-greedy policy that follows from the values."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from a3c_jax.distributions import at_action
from a3c_jax.networks import ActorCritic

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EpsilonGreedy:
    """The action of the highest value, but with probability epsilon any action, each as likely as the others.

    >>> EpsilonGreedy(jnp.array([1., 3.]), jnp.float32(.5)).probabilities()
    Array([0.25, 0.75], dtype=float32)

    Attributes:
      values: the value of each action, `[..., A]`, float.
      epsilon: how probable it is that the values are disregarded, `[...]`, or a scalar, in [0, 1].
    """

    values: Array
    epsilon: Array | float

    def probabilities(self) -> Array:
        """The probability of every action, `[..., A]`. They are constants to the gradient."""
        num_actions = self.values.shape[-1]
        epsilon = jnp.asarray(self.epsilon)[..., None]
        greedy = self.mode()[..., None] == jnp.arange(num_actions)
        return jnp.where(greedy, 1.0 - epsilon, 0.0) + epsilon / num_actions

    def sample(self, key: Array) -> Array:
        """One action for each batch element, `[...]`, int32."""
        explore_key, action_key = jax.random.split(key)
        batch, num_actions = self.values.shape[:-1], self.values.shape[-1]
        explores = jax.random.uniform(explore_key, batch) < self.epsilon
        anything = jax.random.randint(action_key, batch, 0, num_actions, jnp.int32)
        return jnp.where(explores, anything, self.mode())

    def log_prob(self, action: Array) -> Array:
        """The log-probability of `action`, `[...]` int, as `[...]` float in nats. One outside `0..A-1` gives NaN.

        Raises:
          AssertionError: if the shape is not that of the batch, or the dtype is not of integers.
        """
        return jnp.log(at_action(self.probabilities(), action))

    def entropy(self) -> Array:
        """The entropy, `[...]`, in nats."""
        return jnp.sum(jax.scipy.special.entr(self.probabilities()), axis=-1)

    def mode(self) -> Array:
        """The action of the highest value, `[...]`, int32; the first of equals."""
        return jnp.argmax(self.values, axis=-1).astype(jnp.int32)


class ActionValues(ActorCritic):
    """A network that gives the value of every action.

    It is used like an actor-critic: its policy is epsilon-greedy, and its state value is that of the best action.

    Attributes:
      evaluation_epsilon: how often the policy disregards the values when it is evaluated. Training has its own.
    """

    shared_torso: bool = True
    evaluation_epsilon: float = 0.05

    def setup(self) -> None:
        if isinstance(self.num_actions, tuple):
            raise ValueError(
                f"ActionValues.num_actions must be an integer, got {self.num_actions}: several discrete actions at "
                "once have no single value each; use a3c_jax.ActorCritic."
            )
        self.actor_trunk = self.critic_trunk = self.make_trunk()
        self.value_head = nn.Dense(self.num_actions)

    def _policy(self, features: Array) -> Any:
        return EpsilonGreedy(self.value_head(features), self.evaluation_epsilon)

    def _value(self, features: Array) -> Array:
        return jnp.max(self.value_head(features), axis=-1)
