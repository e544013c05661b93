"""Convolutions written as matrix products, and large batches of images taken a piece at a time.

XLA has fast convolutions for a CPU, but not for their gradients inside a loop: there it computes one number after the
other. Its matrix products are fast everywhere.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from a3c_jax._compiled import process

Array = jax.Array

_KEPT = "convolution"
"""Names what the gradient of a chunk keeps from the forward pass."""

_SMALLEST_CHUNK = 16
_LARGEST_CHUNK = 32


def convolve(x: Array, kernel: Array, stride: int) -> Array:
    """A convolution without padding, the same as `flax.linen.Conv` computes but for its bias.

    Args:
      x: images, `[B, H, W, C]` float32.
      kernel: the weights, `[height, width, C, F]` float32.
      stride: by how many pixels the kernel moves on, downwards and to the right.

    Returns:
      `[B, (H - height) // stride + 1, (W - width) // stride + 1, F]`. The image's last rows and columns are left
      out if the kernel does not come to rest on them.
    """
    height, width = kernel.shape[:2]
    if not process.enabled() or height % stride or width % stride:
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    return checkpoint_name(_by_products(x, kernel, stride), _KEPT)


def _by_products(x: Array, kernel: Array, stride: int) -> Array:
    """The convolution as one matrix product, of a kernel whose sides are multiples of the stride.

    Images and kernel are cut into blocks of `stride` x `stride` pixels. Wherever the kernel comes to rest, each of
    its blocks lies on a block of the image. So it is a convolution of blocks in place of pixels, with stride 1.
    """
    batch, _, _, channels = x.shape
    features = kernel.shape[-1]
    out = [(x.shape[1 + d] - kernel.shape[d]) // stride + 1 for d in range(2)]
    size = [kernel.shape[d] // stride for d in range(2)]  # of the kernel, in blocks
    grid = [out[d] + size[d] - 1 for d in range(2)]  # of the image, in blocks
    places = [(i, j) for i in range(size[0]) for j in range(size[1])]
    pixels = stride * stride * channels  # numbers in a block

    x = x[:, : grid[0] * stride, : grid[1] * stride]
    x = x.reshape(batch, grid[0], stride, grid[1], stride, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, *grid, pixels)
    weights = kernel.reshape(size[0], stride, size[1], stride, channels, features)
    weights = weights.transpose(0, 2, 1, 3, 4, 5).reshape(len(places), pixels, features)

    # The product is of two matrices, because XLA would transpose an array of more dimensions for the gradient.
    # It is taken before or after the blocks are gathered: whatever makes the smaller array.
    if pixels < features:
        gathered = [x[:, i : i + out[0], j : j + out[1]] for i, j in places]
        rows = jnp.concatenate(gathered, axis=-1).reshape(-1, len(places) * pixels)
        return (rows @ weights.reshape(-1, features)).reshape(batch, *out, features)
    columns = weights.transpose(1, 0, 2).reshape(pixels, -1)
    products = (x.reshape(-1, pixels) @ columns).reshape(batch, *grid, -1)
    parts = [
        products[:, i : i + out[0], j : j + out[1], n * features : (n + 1) * features]
        for n, (i, j) in enumerate(places)
    ]
    return functools.reduce(jnp.add, parts)


def in_chunks(function: Callable[[Array], Array], x: Array) -> Array:
    """Applies a function to a batch, to one chunk after the other, so that their arrays stay in the processor's cache.

    The gradient keeps the results of convolutions and computes the rest again, chunk by chunk.

    Args:
      function: a pure function from `[B, ...]` to `[B, ...]` that treats every element of the batch alike.
      x: the batch, `[B, ...]`.

    Returns:
      What `function(x)` returns.
    """
    size = chunk_size(len(x))
    if size == len(x) or not process.enabled():
        return function(x)
    keep = jax.checkpoint_policies.save_only_these_names(_KEPT)
    function = jax.checkpoint(function, policy=keep, prevent_cse=False)  # as its page says of loops
    y = jax.lax.map(function, x.reshape(-1, size, *x.shape[1:]))
    return y.reshape(len(x), *y.shape[2:])


def chunk_size(batch: int) -> int:
    """The largest divisor of a batch from 16 to 32. The batch itself if it is not larger, or has no such divisor."""
    if batch <= _LARGEST_CHUNK:
        return batch
    sizes = range(_LARGEST_CHUNK, _SMALLEST_CHUNK - 1, -1)
    return next((size for size in sizes if batch % size == 0), batch)
