"""What the heads of a network read: a torso over the observation, and an optional recurrent core on top."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from a3c_jax.cells import Carry, initial_carry, make_cell, where_tree

Array = jax.Array

# The first argument is a variance: a standard deviation of sqrt(2) over the root of fan-in.
_TORSO_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")


class MLP(nn.Module):
    """A multilayer perceptron that flattens each observation first.

    An observation that is a dict or a tuple of arrays is flattened leaf by leaf, and the leaves are
    concatenated in the order of `jax.tree.leaves`: a dict's by their sorted names.

    Attributes:
      hidden_sizes: width of each layer.
      activation: applied after each layer.
      observation_ndim: how many trailing dimensions make up one observation; a tuple of such numbers,
        one for each leaf, if observations are trees.
    """

    hidden_sizes: tuple[int, ...]
    activation: Callable[[Array], Array]
    observation_ndim: int | tuple[int, ...] = 1

    @nn.compact
    def __call__(self, observation: Any) -> Array:
        """Maps `[..., *observation]` of any dtype to `[..., hidden_sizes[-1]]` float32."""
        leaves = jax.tree.leaves(observation)
        ndims = self.observation_ndim
        ndims = (ndims,) * len(leaves) if isinstance(ndims, int) else ndims
        flat = []
        for leaf, ndim in zip(leaves, ndims, strict=True):
            batch, shape = leaf.shape[: leaf.ndim - ndim], leaf.shape[leaf.ndim - ndim :]
            flat.append(leaf.reshape(*batch, math.prod(shape)).astype(jnp.float32))
        x = flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=-1)
        for size in self.hidden_sizes:
            x = self.activation(nn.Dense(size, kernel_init=_TORSO_INIT)(x))
        return x


class Conv(nn.Module):
    """The torso of Young & Tian 2019 (arXiv:1903.03176) for MinAtar: one 3x3 convolution, then dense layers.

    Attributes:
      hidden_sizes: width of each dense layer.
      activation: applied after each layer.
      channels: number of the convolution's channels.
    """

    hidden_sizes: tuple[int, ...]
    activation: Callable[[Array], Array]
    channels: int = 16

    @nn.compact
    def __call__(self, observation: Array) -> Array:
        """Maps images `[..., height, width, channels]` of any dtype to `[..., hidden_sizes[-1]]` float32."""
        batch, image = observation.shape[:-3], observation.shape[-3:]
        x = observation.reshape(-1, *image).astype(jnp.float32)
        conv = nn.Conv(self.channels, (3, 3), padding="VALID", kernel_init=_TORSO_INIT)
        x = self.activation(conv(x)).reshape(*batch, -1)
        for size in self.hidden_sizes:
            x = self.activation(nn.Dense(size, kernel_init=_TORSO_INIT)(x))
        return x


class Trunk(nn.Module):
    """A torso and, if `core` names one, a recurrent core on top.

    Attributes:
      torso: maps observations `[..., *observation]` to features `[..., F]`.
      core: None, `lstm` or `gru`.
      core_size: width of the core.
      forget_bias: see `a3c_jax.cells`.
    """

    torso: nn.Module
    core: str | None = None
    core_size: int = 256
    forget_bias: float = 1.0

    def setup(self) -> None:
        if self.core is not None:
            self.cell = make_cell(self.core, self.core_size, self.forget_bias)

    def __call__(self, observation: Any, carry: Carry) -> tuple[Array, Carry]:
        """One step: features `[..., F]` and the carry after it."""
        features = self.torso(observation)
        if self.core is None:
            return features, carry
        carry, features = self.cell(carry, features)
        return features, carry

    def unroll(self, observation: Any, carry: Carry, starts: Array) -> tuple[Array, Carry]:
        """T steps.

        Args:
          observation: `[T, N, *observation]`.
          carry: the carry before the first step, a tree of `[N, ...]`.
          starts: whether an episode starts with this observation, `[T, N]` bool. The carry is then reset
            before the step.

        Returns:
          Features `[T, N, F]`, and the carry after each step, a tree of `[T, N, ...]`.
        """
        features = self.torso(observation)
        if self.core is None:
            return features, carry
        fresh = initial_carry(self.core, self.core_size, starts.shape[1])

        def step(cell: nn.Module, carry: Carry, inputs: Any) -> tuple[Carry, Any]:
            x, start = inputs
            carry, features = cell(where_tree(start, fresh, carry), x)
            return carry, (features, carry)

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        _, (features, carries) = scan(self.cell, carry, (features, starts))
        return features, carries
