"""What the networks for images are made of: NumPy's convolutions and medians and XLA's gradients, whole and in chunks."""

import os
from functools import partial
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a3c_jax import _compiled
from a3c_jax._compiled import products
from a3c_jax._compiled.convolution import chunk_size

pytestmark = pytest.mark.skipif(
    os.environ.get("A3C_JAX_PLAIN") == "1" or jax.default_backend() != "cpu",
    reason="the machine room is switched off",
)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def xlas(x, kernel, stride):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def numpys(x, kernel, stride):
    """The definition, in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
    return np.einsum("bhwcij,ijck->bhwk", windows[:, ::stride, ::stride], kernel)


def primitives(function, *arguments):
    """The names of all operations of a function, those inside its loops included."""
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            found.append(equation.primitive.name)
            for inner in products.inner_programs(equation):
                visit(inner)

    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


# Image, kernel, stride. Images that the kernel fills and those with a rest; kernels of one block and of several;
# more outputs than numbers in a block and fewer; nothing square.
CASES = {
    "the paper's first": ((2, 84, 84, 4), (8, 8, 4, 16), 4),
    "the paper's second": ((2, 20, 20, 16), (4, 4, 16, 32), 2),
    "MinAtar's": ((2, 10, 10, 4), (3, 3, 4, 16), 1),
    "a rest of rows and columns": ((2, 43, 30, 3), (8, 8, 3, 5), 4),
    "one block": ((3, 7, 9, 2), (3, 3, 2, 4), 3),
    "one place": ((1, 6, 4, 2), (6, 4, 2, 3), 2),
    "not square": ((2, 9, 13, 2), (2, 6, 2, 20), 2),
    "one pixel": ((2, 5, 4, 3), (1, 1, 3, 2), 1),
}


@pytest.mark.slow
@pytest.mark.parametrize(("image", "kernel", "stride"), CASES.values(), ids=CASES)
def test_it_is_numpys_sum_and_its_gradients_are_xlas(image, kernel, stride):
    x, kernel = normal(*image), normal(*kernel, seed=1)
    assert "conv_general_dilated" not in primitives(
        lambda x, kernel: _compiled.convolve(x, kernel, stride), x, kernel
    )
    y = _compiled.convolve(x, kernel, stride)
    np.testing.assert_allclose(y, numpys(x, kernel, stride), rtol=1e-4, atol=1e-4)
    weights = normal(*y.shape, seed=2)
    gradients, expected = (
        jax.grad(lambda x, kernel, f=f: jnp.sum(weights * f(x, kernel, stride)), (0, 1))(x, kernel)
        for f in (_compiled.convolve, xlas)
    )
    chex.assert_trees_all_close(gradients, expected, rtol=1e-4, atol=1e-3)


# Frames of bytes, whose pixels are moved four at a time: rests of rows and columns, one frame and several, any stride.
@pytest.mark.parametrize(
    ("shape", "kernel", "stride"),
    [
        ((2, 4, 84, 84), (8, 8, 4, 16), 4),
        ((2, 3, 43, 30), (8, 4, 3, 5), 4),
        ((2, 1, 17, 24), (16, 8, 1, 3), 8),
        ((2, 2, 9, 13), (4, 2, 2, 3), 2),
        ((2, 2, 9, 13), (5, 4, 2, 3), 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_frames_without_their_offsets_are_convolved_as_images_are(shape, kernel, stride, dtype):
    frames = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape), dtype)
    offset, kernel = jnp.arange(len(frames)) + 0.5, normal(*kernel, seed=1)
    x = np.moveaxis(np.float64(frames) - np.asarray(offset)[:, None, None, None], 1, -1)

    def found(kernel):
        return _compiled.convolve_frames(frames, offset, kernel, stride)

    expected = numpys(x, kernel, stride)
    np.testing.assert_allclose(found(kernel), expected, rtol=1e-4, atol=0.05)
    weights = normal(*expected.shape, seed=2)
    gradients = [
        jax.grad(lambda kernel, f=f: jnp.sum(weights * f(kernel)))(kernel)
        for f in (found, lambda kernel: xlas(jnp.asarray(x, jnp.float32), kernel, stride))
    ]
    chex.assert_trees_all_close(*gradients, rtol=1e-4, atol=0.1)
    moves_bytes = dtype == np.uint8 and stride % 4 == 0 and kernel.shape[0] % stride == 0
    assert ("bitcast_convert_type" in primitives(found, kernel)) == moves_bytes


# One number, two, and many; rows with few different numbers, with the lowest and the highest ones only, and with all.
@pytest.mark.parametrize("size", [1, 2, 3, 10, 441])
def test_the_median_of_bytes_is_numpys_without_a_sort(size):
    x = np.random.default_rng(size).integers(0, 256, (60, size)).astype(np.uint8)
    x[:20] %= 3
    x[20], x[21], x[22:40] = 0, 255, np.where(x[22:40] > 127, 255, 0)
    found = jax.jit(_compiled.median)(x)
    np.testing.assert_array_equal(found, np.median(x, axis=1))
    assert found.dtype == np.float32 and "sort" not in primitives(_compiled.median, x)
    mapped = jax.vmap(_compiled.median)(x.reshape(3, 20, size))
    np.testing.assert_array_equal(mapped.ravel(), found)
    for others in (x / 2, x > 127, x.astype(np.float16)):
        found = _compiled.median(others)
        np.testing.assert_array_equal(found, np.median(np.float32(others), axis=1))
        assert found.dtype == np.float32


@pytest.mark.parametrize("side", [(5, 4), (4, 5)], ids=["height", "width"])
def test_a_kernel_that_is_no_multiple_of_the_stride_is_left_to_xla(side):
    x, kernel = normal(2, 11, 12, 3), normal(*side, 3, 4)
    assert primitives(lambda: _compiled.convolve(x, kernel, 2)).count("conv_general_dilated") == 1
    y = _compiled.convolve(x, kernel, 2)
    np.testing.assert_allclose(y, numpys(x, kernel, 2), rtol=1e-4, atol=1e-4)


def test_without_the_machine_room_all_is_left_to_xla_and_whole():
    x, kernel = normal(48, 6, 6, 1), normal(2, 2, 1, 3)

    def found():
        chunked = partial(_compiled.in_chunks, lambda x: _compiled.convolve(x, kernel, 2))
        return {"scan", "dot_general", "conv_general_dilated"} & {*primitives(chunked, x)}

    assert found() == {"scan", "dot_general"}
    with mock.patch.dict(os.environ, A3C_JAX_PLAIN="1"):
        assert found() == {"conv_general_dilated"}
        x = jnp.zeros((2, 9), jnp.uint8)
        assert "sort" in primitives(_compiled.median, x)
        frames, offset = jnp.zeros((2, 1, 8, 8), jnp.uint8), jnp.zeros(2)
        convolve = partial(_compiled.convolve_frames, stride=4)
        used = primitives(convolve, frames, offset, jnp.zeros((4, 4, 1, 3)))
        assert "conv_general_dilated" in used and "bitcast_convert_type" not in used


def test_it_can_be_mapped_compiled_and_put_into_a_loop():
    x, kernels = normal(3, 2, 12, 12, 2), normal(3, 4, 4, 2, 5, seed=1)
    expected = jnp.stack([xlas(*pair, 2) for pair in zip(x, kernels, strict=True)])

    def one(x, kernel):
        return _compiled.convolve(x, kernel, 2)

    def loop(x, kernels):
        return jax.lax.scan(lambda _, pair: (None, one(*pair)), None, (x, kernels))[1]

    for way in (jax.vmap(one), jax.jit(jax.vmap(one)), loop):
        chex.assert_trees_all_close(way(x, kernels), expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_has_three_products_and_none_is_transposed():
    """Two dimensions only, and the rows of both summed: XLA would transpose the arrays for anything else."""
    x, kernel = normal(2, 12, 12, 2), normal(4, 4, 2, 5)
    program = jax.make_jaxpr(
        jax.grad(lambda x, k: jnp.sum(_compiled.convolve(x, k, 2) ** 2), (0, 1))
    )
    products = [e for e in program(x, kernel).jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) == 3
    assert all(atom.aval.ndim == 2 for e in products for atom in e.invars)


@pytest.mark.parametrize(
    ("name", "product"),
    [
        (
            "the paper's first",
            ((2 * 21 * 21, 64), (64, 4 * 16)),
        ),  # a column for each block and output
        ("the paper's second", ((2 * 10 * 10, 64), (64, 4 * 32))),
        ("MinAtar's", ((2 * 8 * 8, 9 * 4), (9 * 4, 16))),  # a row for each place of the kernel
    ],
)
def test_blocks_are_gathered_before_or_after_the_product_whichever_is_less(name, product):
    image, kernel, stride = CASES[name]
    program = jax.make_jaxpr(lambda x, k: _compiled.convolve(x, k, stride))
    (found,) = [
        tuple(atom.aval.shape for atom in e.invars)
        for e in program(jnp.zeros(image), jnp.zeros(kernel)).jaxpr.eqns
        if e.primitive.name == "dot_general"
    ]
    assert found == product


# Chunks.


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (0, 0),
        (1, 1),
        (32, 32),
        (33, 33),
        (34, 17),
        (37, 37),
        (48, 24),
        (80, 20),
        (320, 32),
        (68, 17),
    ],
)
def test_the_chunk_is_the_largest_divisor_from_16_to_32(batch, size):
    assert chunk_size(batch) == size


def network(kernels, x):
    """Two layers, whose second gradient needs what the first computed."""
    for kernel in kernels:
        x = jnp.tanh(_compiled.convolve(x, kernel, 2))
    return x.reshape(len(x), -1)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [32, 40, 37])
def test_chunks_change_neither_the_results_nor_the_gradients(batch):
    x, kernels = normal(batch, 12, 12, 2), (normal(4, 4, 2, 5), normal(2, 2, 5, 3))
    sizes = []

    def chunk(x):
        sizes.append(len(x))
        return network(kernels, x)

    y = _compiled.in_chunks(chunk, x)
    assert set(sizes) == {20 if batch == 40 else batch}
    chex.assert_trees_all_close(y, network(kernels, x), rtol=1e-5, atol=1e-5)
    weights = normal(*y.shape, seed=3)
    gradients, expected = (
        jax.jit(jax.grad(lambda kernels, x, f=f: jnp.sum(weights * f(kernels, x)), (0, 1)))(
            kernels, x
        )
        for f in (lambda k, x: _compiled.in_chunks(lambda x: network(k, x), x), network)
    )
    chex.assert_trees_all_close(gradients, expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_a_chunk_computes_no_convolution_again():
    x, kernels = normal(40, 12, 12, 2), (normal(4, 4, 2, 5), normal(2, 2, 5, 3))

    def products(function):
        gradient = jax.grad(lambda kernels: jnp.sum(function(kernels)))
        return primitives(gradient, kernels).count("dot_general")

    # Two forward, two for the kernels, and one for the second layer's input.
    assert products(lambda kernels: network(kernels, x)) == 5
    assert products(lambda k: _compiled.in_chunks(lambda x: network(k, x), x)) == 5
