"""Action distributions: sample, log-probability, entropy, mode.

Each is a pytree of arrays with any leading batch dimensions, so that it passes through jit, vmap and
scan. The categorical is safe at the edge: an impossible action or a vanishing probability gives no NaN,
neither in the value nor in the gradient.
"""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Categorical:
    """A choice among A actions, given by unnormalised log-probabilities.

    >>> Categorical(jnp.zeros(4)).entropy()  # log 4
    Array(1.3862944, dtype=float32)

    Attributes:
      logits: `[..., A]`, float. `-inf` marks an impossible action.
    """

    logits: Array

    def log_probs(self) -> Array:
        """The log-probability of every action, `[..., A]`, in nats."""
        return jax.nn.log_softmax(self.logits)

    def sample(self, key: Array) -> Array:
        """One action for each batch element, `[...]`, int32."""
        return jax.random.categorical(key, self.logits).astype(jnp.int32)

    def log_prob(self, action: Array) -> Array:
        """The log-probability of `action`, `[...]` int, as `[...]` float in nats.

        The action is selected by comparison rather than by indexing: the gradient of an indexed read is
        a scatter, which XLA:CPU runs element by element. An action outside `0..A-1` gives NaN.

        Raises:
          AssertionError: if the shape is not that of the batch, or the dtype is not of integers.
        """
        action = jnp.asarray(action)
        chex.assert_type(action, int)
        chex.assert_shape(action, self.logits.shape[:-1])
        num_actions = self.logits.shape[-1]
        action = action.astype(jnp.int32)  # a narrow type could not count up to num_actions
        chosen = action[..., None] == jnp.arange(num_actions)
        log_prob = jnp.sum(jnp.where(chosen, self.log_probs(), 0.0), axis=-1)
        return jnp.where((action >= 0) & (action < num_actions), log_prob, jnp.nan)

    def entropy(self) -> Array:
        """The entropy of the whole distribution, `[...]`, in nats, between 0 and log A."""
        log_probs = self.log_probs()
        possible = log_probs != -jnp.inf  # p log p is 0 at p = 0, where its factors are 0 and -inf
        log_probs = jnp.where(possible, log_probs, 0.0)
        return -jnp.sum(jnp.where(possible, jnp.exp(log_probs) * log_probs, 0.0), axis=-1)

    def mode(self) -> Array:
        """The most probable action, `[...]`, int32; the first of equals."""
        return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalGaussian:
    """Independent normal distributions over the D components of a continuous action.

    Attributes:
      mean: `[..., D]`, float.
      scale: the standard deviations, `[..., D]`, float, positive.
    """

    mean: Array
    scale: Array

    def sample(self, key: Array) -> Array:
        """One action for each batch element, `[..., D]`, not clipped to any bound."""
        chex.assert_equal_shape([self.mean, self.scale])
        return self.mean + self.scale * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def log_prob(self, action: Array) -> Array:
        """The log-density of `action`, `[..., D]` float, as `[...]` float in nats.

        Raises:
          AssertionError: if the shapes differ.
        """
        chex.assert_equal_shape([action, self.mean, self.scale])
        z = (action - self.mean) / self.scale
        return jnp.sum(-0.5 * z**2 - jnp.log(self.scale) - 0.5 * math.log(2 * math.pi), axis=-1)

    def entropy(self) -> Array:
        """The differential entropy, `[...]`, in nats; it may be negative."""
        chex.assert_equal_shape([self.mean, self.scale])
        return jnp.sum(jnp.log(self.scale) + 0.5 * math.log(2 * math.pi * math.e), axis=-1)

    def mode(self) -> Array:
        """The mean, `[..., D]`."""
        return self.mean
