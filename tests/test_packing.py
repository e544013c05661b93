"""Packing: every tree comes back bit for bit, from one vector of 32-bit words."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a3c_jax.packing import Packing

# Quiet and signalling NaNs with a payload, both infinities, both zeros, the smallest denormal, the
# largest denormal, the smallest normal and the largest finite number.
HARD_FLOAT32 = np.array(
    [0x7FC00001, 0xFFC12345, 0x7F800001, 0x7F800000, 0xFF800000, 0x00000000, 0x80000000]
    + [0x00000001, 0x807FFFFF, 0x00800000, 0x7F7FFFFF],
    np.uint32,
).view(np.float32)

LEAVES = {
    "float32": lambda: HARD_FLOAT32,
    "int32": lambda: np.array([-(2**31), -1, 0, 2**31 - 1], np.int32),
    "uint32": lambda: np.array([0, 1, 2**31, 2**32 - 1], np.uint32),
    "bool": lambda: np.array([[True, False], [False, True]]),
    "int8": lambda: np.array([-128, -1, 0, 127], np.int8),
    "uint8": lambda: np.array([0, 1, 128, 255], np.uint8),
    "int16": lambda: np.array([-(2**15), -1, 2**15 - 1], np.int16),
    # A NaN with a payload, minus infinity, minus zero, a denormal, one.
    "float16": lambda: np.array([0x7E01, 0xFC00, 0x8000, 1, 0x3C00], np.uint16).view(np.float16),
    "bfloat16": lambda: np.array([0x7FC1, 0xFF80, 0x8000, 1], np.uint16).view(jnp.bfloat16),
    "scalar": lambda: np.float32(-0.0),
    "image": lambda: np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5),
    "no_elements": lambda: np.zeros((3, 0), np.float32),
    "threefry_key": lambda: jax.random.key(3, impl="threefry2x32"),
    "threefry_keys": lambda: jax.random.split(jax.random.key(3, impl="threefry2x32"), (2, 3)),
    "rbg_key": lambda: jax.random.key(4, impl="rbg"),
    "raw_key": lambda: jax.random.PRNGKey(5),
}


class State(NamedTuple):
    leaves: dict[str, Any]
    rest: tuple[Any, ...]


def everything() -> State:
    leaves = {name: jnp.asarray(make()) for name, make in LEAVES.items()}
    return State(leaves, (jnp.int32(7), None, [jnp.ones((2, 1), jnp.bool_)]))


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Same type, shape and bits. Comparing values would let -0.0 pass for 0.0, and fail on NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if jnp.issubdtype(expected.dtype, jax.dtypes.prng_key):
        actual, expected = jax.random.key_data(actual), jax.random.key_data(expected)
    assert np.asarray(actual).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize("name", LEAVES)
def test_one_leaf_of_each_kind_comes_back_bit_for_bit(name):
    leaf = jnp.asarray(LEAVES[name]())
    packing = Packing(leaf)
    vector = packing.pack(leaf)
    assert vector.dtype == jnp.uint32
    assert vector.shape == (packing.size,)
    assert_same_bits(packing.unpack(vector), leaf)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_tree_of_all_kinds_at_once_comes_back_with_its_structure(wrap):
    tree = everything()
    packing = Packing(tree)
    result = wrap(packing.unpack)(wrap(packing.pack)(tree))
    assert jax.tree.structure(result) == jax.tree.structure(tree)
    jax.tree.map(assert_same_bits, result, tree)


def test_a_key_that_went_through_draws_the_same_numbers_as_before():
    key = jax.random.key(11, impl="rbg")
    packing = Packing({"key": key})
    result = packing.unpack(packing.pack({"key": key}))["key"]
    assert jax.random.key_impl(result) == jax.random.key_impl(key)
    np.testing.assert_array_equal(jax.random.normal(result, (8,)), jax.random.normal(key, (8,)))


def test_another_tree_of_the_same_structure_uses_the_same_packing():
    packing = Packing({"a": jnp.zeros(2), "b": jnp.zeros((), jnp.int32)})
    tree = {"a": jnp.array([1.5, -2.5]), "b": jnp.int32(-9)}
    jax.tree.map(assert_same_bits, packing.unpack(packing.pack(tree)), tree)


def test_a_packing_made_from_shapes_alone_packs_arrays():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.array([True])}
    packing = Packing(jax.eval_shape(lambda: tree))
    assert packing.size == 7
    jax.tree.map(assert_same_bits, packing.unpack(packing.pack(tree)), tree)


@pytest.mark.parametrize("tree", [(), {}, {"a": None, "b": []}], ids=["tuple", "dict", "nested"])
def test_a_tree_without_leaves_comes_back(tree):
    packing = Packing(tree)
    vector = packing.pack(tree)
    assert packing.size == 0
    assert vector.shape == (0,)
    assert packing.unpack_on_host(vector) == tree
    assert packing.unpack(vector) == tree


def test_unpack_on_host_gives_what_unpack_gives_as_numpy_arrays():
    tree = {
        "bool": jnp.array([[True, False, True]]),
        "int32": jnp.array([-(2**31), 5], jnp.int32),
        "uint32": jnp.array(2**32 - 1, jnp.uint32),
        "float32": jnp.asarray(np.tile(HARD_FLOAT32, 2)).reshape(2, 11),
        "none": jnp.zeros((2, 0)),
    }
    packing = Packing(tree)
    vector = jax.jit(packing.pack)(tree)
    on_host, on_device = packing.unpack_on_host(vector), packing.unpack(vector)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(on_host))
    jax.tree.map(assert_same_bits, on_host, on_device)
    jax.tree.map(assert_same_bits, on_host, tree)


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint64, np.complex64])
def test_elements_wider_than_32_bits_are_refused_when_the_packing_is_made(dtype):
    example = {"fits": jnp.zeros(2), "wide": jax.ShapeDtypeStruct((2,), dtype)}
    with pytest.raises(TypeError, match=rf"at most 32 bits, got {np.dtype(dtype).name}; turn off"):
        Packing(example)


def test_a_tree_of_another_structure_is_refused():
    packing = Packing({"a": jnp.zeros(2), "b": jnp.zeros(2)})
    with pytest.raises(ValueError, match="b"):
        packing.pack({"a": jnp.zeros(2)})


def test_what_the_host_cannot_view_is_refused_there():
    packing = Packing({"half": jnp.ones(2, jnp.float16)})
    with pytest.raises(TypeError, match="to be read on the host, got float16"):
        packing.unpack_on_host(packing.pack({"half": jnp.ones(2, jnp.float16)}))
