"""Action distributions: sample, log-probability, entropy, mode.

Each is a pytree of arrays with any leading batch dimensions, so that it passes through jit, vmap and
scan. The categoricals are safe at the edge: an impossible action or a vanishing probability gives no NaN,
neither in the value nor in the gradient.
"""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

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
class MultiCategorical:
    """Independent choices for the D components of an action, each among a number of its own.

    The probability of an action is the product of its components' probabilities, so that log-probabilities and
    entropies are sums.

    >>> MultiCategorical(jnp.zeros(5), (3, 2)).entropy()  # log 3 + log 2
    Array(1.7917595, dtype=float32)

    Attributes:
      logits: the logits of all components side by side, `[..., A_1 + ... + A_D]`, float. `-inf` marks an
        impossible choice.
      num_actions: the number of choices of each component, `(A_1, ..., A_D)`. It is static: part of the tree's
        structure, not one of its arrays.
    """

    logits: Array
    num_actions: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def components(self) -> Categorical:
        """The components' distributions as one batch `[..., D]`.

        A component with fewer choices than another is filled up with impossible ones.

        Raises:
          AssertionError: if the number of logits is not the sum of `num_actions`.
        """
        chex.assert_axis_dimension(self.logits, -1, sum(self.num_actions))
        parts = jnp.split(self.logits, np.cumsum(self.num_actions)[:-1], axis=-1)
        same = [(0, 0)] * (self.logits.ndim - 1)
        filled = [
            jnp.pad(part, [*same, (0, max(self.num_actions) - n)], constant_values=-jnp.inf)
            for part, n in zip(parts, self.num_actions, strict=True)
        ]
        return Categorical(jnp.stack(filled, axis=-2))

    def sample(self, key: Array) -> Array:
        """One action for each batch element, `[..., D]`, int32."""
        return self.components().sample(key)

    def log_prob(self, action: Array) -> Array:
        """The log-probability of `action`, `[..., D]` int, as `[...]` float in nats.

        If any component of an action is outside its range, its log-probability is NaN.

        Raises:
          AssertionError: if the shape is not that of the batch and of the components, or the dtype is not of
            integers.
        """
        log_probs = self.components().log_prob(action)
        exists = action < np.array(self.num_actions)  # and is not one of those filled up with
        return jnp.where(exists, log_probs, jnp.nan).sum(axis=-1)

    def entropy(self) -> Array:
        """The entropy of the whole distribution, `[...]`, in nats, between 0 and the sum of log A_d."""
        return self.components().entropy().sum(axis=-1)

    def mode(self) -> Array:
        """The most probable action, `[..., D]`, int32; the first of equals in each component."""
        return self.components().mode()


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
