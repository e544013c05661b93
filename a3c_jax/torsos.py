"""What the heads of a network read: a torso over the observation, and an optional recurrent core on top."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from a3c_jax import _compiled
from a3c_jax.cells import Carry, initial_carry, make_cell, where_tree
from a3c_jax.normalization import is_shape

Array = jax.Array

# The first argument is a variance: a standard deviation of sqrt(2) over the root of fan-in.
_TORSO_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")

SMALLEST_FRAME = 20
"""Height and width from which on the convolutions of `Atari` have an output."""


def choose_torso(observation_shape: Any) -> str:
    """The torso that `auto` stands for: `conv` for MinAtar's images, `atari` for frames of a game, otherwise `mlp`.

    Args:
      observation_shape: the shape of one observation, or a tree of shapes. Frames are `(frames, height, width)` or
        `(height, width, colours)`, up to 16 of at least 36x36 pixels.
    """
    if not is_shape(observation_shape) or len(observation_shape) != 3:
        return "mlp"
    if observation_shape[:2] == (10, 10):
        return "conv"
    frames, height, width = frames_first(observation_shape)
    return "atari" if frames <= 16 and min(height, width) >= 36 else "mlp"


def frames_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`(frames, height, width)` of an image, which may have its frames or colours behind height and width."""
    is_last = min(shape[1:]) < SMALLEST_FRAME <= min(shape[:2])
    return (shape[2], *shape[:2]) if is_last else tuple(shape)


class MLP(nn.Module):
    """A multilayer perceptron that flattens each observation first.

    An observation that is a dict or a tuple of arrays is flattened leaf by leaf, and the leaves are
    concatenated in the order of `jax.tree.leaves`: a dict's by their sorted names. Images of bytes, two of whose
    dimensions are at least 20, are divided by 255.

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
            x = leaf.reshape(*batch, math.prod(shape)).astype(jnp.float32)
            flat.append(x / 255 if _are_pixels(leaf.dtype, shape) else x)
        x = flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=-1)
        for size in self.hidden_sizes:
            x = self.activation(nn.Dense(size, kernel_init=_TORSO_INIT)(x))
        return x


def _are_pixels(dtype: Any, shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape is an image of bytes, not a small grid of numbers."""
    return dtype == jnp.uint8 and sum(size >= SMALLEST_FRAME for size in shape) >= 2


class ConvolutionParameters(nn.Module):
    """The parameters of a convolution: what `flax.linen.Conv` has, of the same names, shapes and initial values.

    Attributes:
      features: number of channels of the result.
      size: height and width of the kernel.
    """

    features: int
    size: int

    @nn.compact
    def __call__(self, channels: int) -> tuple[Array, Array]:
        """The kernel `[size, size, channels, features]` and the bias `[features]`."""
        shape = (self.size, self.size, channels, self.features)
        # The kernel comes first, as it does there, so that it gets the same random key.
        kernel = self.param("kernel", _TORSO_INIT, shape)
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,))


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
        kernel, bias = ConvolutionParameters(self.channels, 3, name="Conv_0")(image[-1])
        x = self.activation(_compiled.convolve(x, kernel, 1) + bias).reshape(*batch, -1)
        for size in self.hidden_sizes:
            x = self.activation(nn.Dense(size, kernel_init=_TORSO_INIT)(x))
        return x


class Atari(nn.Module):
    """The torso of the paper for Atari: two convolutions, then dense layers.

    The first convolution has 16 channels, kernels of 8x8 and stride 4, the second one 32 channels, kernels of 4x4
    and stride 2. The paper has one dense layer, of 256 units, and relu.

    Before the first layer, each image's `background` is subtracted, and bytes and other integers are divided by 255. The paper does
    not say how it scales pixels.

    Attributes:
      hidden_sizes: width of each dense layer.
      activation: applied after each layer.

    Source: Mnih et al. 2016, arXiv:1602.01783, section 5.1 and supplement, section 8.
    """

    hidden_sizes: tuple[int, ...]
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, observation: Array) -> Array:
        """Maps frames `[..., frames, height, width]`, usually uint8, to `[..., hidden_sizes[-1]]` float32.

        An image whose frames or colours come last, `[..., height, width, colours]`, is taken as well.

        Raises:
          ValueError: if the frames are too small for the convolutions.
        """
        batch, image = observation.shape[:-3], observation.shape[-3:]
        frames = frames_first(image) if len(image) == 3 else image
        if frames != image:
            observation = jnp.moveaxis(observation, -1, -3)
        if len(frames) < 3 or min(frames[1:]) < SMALLEST_FRAME:
            raise ValueError(
                f"observations must be [..., frames, height, width] of at least {SMALLEST_FRAME}x{SMALLEST_FRAME} "
                f"pixels for the torso 'atari', got shape {observation.shape}; use the torso 'mlp'."
            )
        scale = 1 / 255 if jnp.issubdtype(observation.dtype, jnp.integer) else 1.0
        kernel_0, bias_0 = ConvolutionParameters(16, 8, name="Conv_0")(frames[0])
        kernel_1, bias_1 = ConvolutionParameters(32, 4, name="Conv_1")(16)

        def convolutions(images: Array) -> Array:
            x = _compiled.convolve_frames(images, background(images), scale * kernel_0, 4)
            x = self.activation(x + bias_0)
            x = self.activation(_compiled.convolve(x, kernel_1, 2) + bias_1)
            return x.reshape(len(x), -1)

        x = _compiled.in_chunks(convolutions, observation.reshape(-1, *frames)).reshape(*batch, -1)
        for size in self.hidden_sizes:
            x = self.activation(nn.Dense(size, kernel_init=_TORSO_INIT)(x))
        return x


def background(images: Array) -> Array:
    """The brightness of each image's background: the median of every fourth pixel, in both directions, of its last frame or colour.

    Most pixels show the background, and it carries no information. But it shifts every unit of the first layer, and the first
    updates could switch units off for good. So it is subtracted from all frames.

    Args:
      images: `[B, frames, height, width]` of any dtype.

    Returns:
      `[B]` float32.
    """
    return _compiled.median(images[:, -1, ::4, ::4].reshape(len(images), -1))


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
