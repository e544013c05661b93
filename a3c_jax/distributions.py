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


def at_action(values: Array, action: Array) -> Array:
    """The number that belongs to each action taken, among the numbers of all actions.

    >>> at_action(jnp.array([[1., 2.], [3., 4.]]), jnp.array([1, 0]))
    Array([2., 3.], dtype=float32)

    It is selected by comparison rather than by indexing: the gradient of an indexed read is a scatter, which XLA:CPU
    runs element by element.

    Args:
      values: a number for each action, `[..., A]`, float.
      action: the actions taken, `[...]`, int.

    Returns:
      The numbers of the actions taken, `[...]`. An action outside `0..A-1` gives NaN.

    Raises:
      AssertionError: if the shape of `action` is not that of the batch, or its dtype is not of integers.
    """
    action = jnp.asarray(action)
    chex.assert_type(action, int)
    chex.assert_shape(action, values.shape[:-1])
    num_actions = np.int32(values.shape[-1])  # a narrow type of action could not count up to it
    chosen = action[..., None] == jnp.arange(num_actions)
    of_chosen = jnp.sum(jnp.where(chosen, values, 0.0), axis=-1)
    return jnp.where((action >= 0) & (action < num_actions), of_chosen, jnp.nan)


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
        # In half precision the noise that decides is too coarse: rare actions would come too rarely.
        logits = self.logits.astype(jnp.promote_types(self.logits.dtype, jnp.float32))
        return jax.random.categorical(key, logits).astype(jnp.int32)

    def log_prob(self, action: Array) -> Array:
        """The log-probability of `action`, `[...]` int, as `[...]` float in nats. One outside `0..A-1` gives NaN.

        Raises:
          AssertionError: if the shape is not that of the batch, or the dtype is not of integers.
        """
        return at_action(self.log_probs(), action)

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
          AssertionError: if the number of logits is not the sum of `num_actions`, or if there is no component.
        """
        if not self.num_actions:
            raise AssertionError(
                "num_actions must have a number for each component, got (); give one or more."
            )
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
        mean, scale = self._arrays()
        return mean + scale * jax.random.normal(key, mean.shape, mean.dtype)

    def log_prob(self, action: Array) -> Array:
        """The log-density of `action`, `[..., D]` float, as `[...]` float in nats.

        Raises:
          AssertionError: if the shapes differ.
        """
        mean, scale = self._arrays()
        action = jnp.asarray(action)
        chex.assert_equal_shape([action, mean, scale])
        z = (action - mean) / scale
        return jnp.sum(-0.5 * z**2 - jnp.log(scale) - 0.5 * math.log(2 * math.pi), axis=-1)

    def entropy(self) -> Array:
        """The differential entropy, `[...]`, in nats; it may be negative."""
        _, scale = self._arrays()
        return jnp.sum(jnp.log(scale) + 0.5 * math.log(2 * math.pi * math.e), axis=-1)

    def mode(self) -> Array:
        """The mean, `[..., D]`."""
        return self.mean

    def _arrays(self) -> tuple[Array, Array]:
        mean, scale = jnp.asarray(self.mean), jnp.asarray(self.scale)
        chex.assert_equal_shape([mean, scale])
        return mean, scale
