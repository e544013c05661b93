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

KEPT = "convolution"
"""Names what the gradient of a chunk keeps from the forward pass (`jax.ad_checkpoint`)."""

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
    if not process.enabled() or not _has_blocks(kernel, stride):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    batch, height, width, channels = x.shape
    rows, columns = height // stride, width // stride
    x = x[:, : rows * stride, : columns * stride]
    x = x.reshape(batch, rows, stride, columns, stride, channels).transpose(0, 1, 3, 2, 4, 5)
    weights = _blocks_of(kernel, stride)
    return _by_product(x.reshape(batch, rows, columns, -1), weights)


def convolve_frames(frames: Array, offset: Array, kernel: Array, stride: int) -> Array:
    """The convolution of `frames - offset`, for images whose frames or colours come first.

    Args:
      frames: `[B, C, H, W]`. Bytes, uint8, are fast if the stride is a multiple of 4, and the kernel's sides of the stride.
      offset: for each image, `[B]` float32.
      kernel: the weights, `[height, width, C, F]` float32.
      stride: by how many pixels the kernel moves on, downwards and to the right.

    Returns:
      The same as `convolve` returns for `[B, H, W, C]`.
    """
    is_fast = process.enabled() and frames.dtype == jnp.uint8 and stride % 4 == 0
    if not is_fast or not _has_blocks(kernel, stride):
        x = frames.astype(jnp.float32) - offset[:, None, None, None]
        return convolve(jnp.moveaxis(x, 1, -1), kernel, stride)
    batch, channels, height, width = frames.shape
    rows, columns = height // stride, width // stride
    x = frames[:, :, : rows * stride, : columns * stride]
    # XLA takes longer to reorder pixels than to multiply them, so four bytes move as one number.
    x = x.reshape(batch, channels, rows, stride, columns, stride // 4, 4)
    x = jax.lax.bitcast_convert_type(x, jnp.uint32).transpose(0, 2, 4, 1, 3, 5)
    x = jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(batch, rows, columns, -1)
    x = checkpoint_name(x, KEPT)
    x = x.astype(jnp.float32) - offset[:, None, None, None]
    weights = jnp.moveaxis(_blocks_of(kernel, stride), 4, 2)
    return _by_product(x, weights)


def _has_blocks(kernel: Array, stride: int) -> bool:
    return kernel.shape[0] % stride == kernel.shape[1] % stride == 0


def _blocks_of(kernel: Array, stride: int) -> Array:
    """A kernel `[height, width, C, F]` as blocks `[rows, columns, stride, stride, C, F]`."""
    height, width, *features = kernel.shape
    blocks = kernel.reshape(height // stride, stride, width // stride, stride, *features)
    return blocks.transpose(0, 2, 1, 3, 4, 5)


def _by_product(x: Array, weights: Array) -> Array:
    """The convolution as one matrix product, of a kernel whose sides are multiples of the stride.

    Images and kernel are cut into blocks of `stride` x `stride` pixels. Wherever the kernel comes to rest, each of
    its blocks lies on a block of the image. So it is a convolution of blocks in place of pixels, with stride 1.

    Args:
      x: the images' blocks, `[B, rows, columns, P]` with P numbers in each.
      weights: the kernel's blocks, `[rows, columns, ..., F]` with as many numbers in each, in the same order.
    """
    batch, *grid, pixels = x.shape
    size, features = weights.shape[:2], weights.shape[-1]
    out = [grid[d] - size[d] + 1 for d in range(2)]
    places = [(i, j) for i in range(size[0]) for j in range(size[1])]
    weights = weights.reshape(len(places), pixels, features)

    # The product is of two matrices, because XLA would transpose an array of more dimensions for the gradient.
    # It is taken before or after the blocks are gathered: whatever makes the smaller array.
    if pixels < features:
        gathered = [x[:, i : i + out[0], j : j + out[1]] for i, j in places]
        rows = jnp.concatenate(gathered, axis=-1).reshape(-1, len(places) * pixels)
        products = rows @ weights.reshape(-1, features)
        return checkpoint_name(products.reshape(batch, *out, features), KEPT)
    columns = weights.transpose(1, 0, 2).reshape(pixels, -1)
    products = (x.reshape(-1, pixels) @ columns).reshape(batch, *grid, -1)
    parts = [
        products[:, i : i + out[0], j : j + out[1], n * features : (n + 1) * features]
        for n, (i, j) in enumerate(places)
    ]
    return checkpoint_name(functools.reduce(jnp.add, parts), KEPT)


def in_chunks(function: Callable[[Array], Array], x: Array) -> Array:
    """Applies a function to a batch, to one chunk after the other, so that their arrays stay in the processor's cache.

    The gradient keeps the results of convolutions and of what prepares frames for them, and computes the rest again, chunk by
    chunk.

    Args:
      function: a pure function from `[B, ...]` to `[B, ...]` that treats every element of the batch alike.
      x: the batch, `[B, ...]`.

    Returns:
      What `function(x)` returns.
    """
    size = chunk_size(len(x))
    if size == len(x) or not process.enabled():
        return function(x)
    keep = jax.checkpoint_policies.save_only_these_names(KEPT)
    function = jax.checkpoint(function, policy=keep, prevent_cse=False)  # as its page says of loops
    y = jax.lax.map(function, x.reshape(-1, size, *x.shape[1:]))
    return y.reshape(len(x), *y.shape[2:])


def chunk_size(batch: int) -> int:
    """The largest divisor of a batch from 16 to 32. The batch itself if it is not larger, or has no such divisor."""
    if batch <= _LARGEST_CHUNK:
        return batch
    sizes = range(_LARGEST_CHUNK, _SMALLEST_CHUNK - 1, -1)
    return next((size for size in sizes if batch % size == 0), batch)
