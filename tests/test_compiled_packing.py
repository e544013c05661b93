"""Packing: every tree comes back bit for bit, from one vector, and is read on the host field by field."""

import os
import pickle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a3c_jax import _compiled
from a3c_jax._compiled.packing import Layout, layout_of, packed_class

pytestmark = pytest.mark.skipif(
    os.environ.get("A3C_JAX_PLAIN") == "1", reason="the machine room is switched off"
)

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
    flag: Any
    count: Any


def everything() -> State:
    leaves = {name: jnp.asarray(make()) for name, make in LEAVES.items()}
    return State(leaves, ((), None, jnp.float32(2)), jnp.bool_(True), jnp.int32(-7))


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Same type, shape and bits. Comparing values would let -0.0 pass for 0.0, and fail on NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if jnp.issubdtype(expected.dtype, jax.dtypes.prng_key):
        actual, expected = jax.random.key_data(actual), jax.random.key_data(expected)
    assert np.asarray(actual).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize("beside", ["float32", "int32"])
@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_of_each_kind_comes_back_bit_for_bit_beside_floats_and_beside_integers(name, beside):
    tree = (jnp.asarray(LEAVES[name]()), jnp.asarray(LEAVES[beside]()))
    layout = Layout(tree)
    vector = layout.pack(tree)
    assert vector.shape == (layout.size,)
    all_floats = all(x.dtype == jnp.float32 for x in tree)
    assert vector.dtype == (jnp.float32 if all_floats else jnp.uint32)
    jax.tree.map(assert_same_bits, layout.unpack(vector), tree)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_tree_of_all_kinds_at_once_comes_back_with_its_structure(wrap):
    tree = everything()
    layout = Layout(tree)
    result = wrap(layout.unpack)(wrap(layout.pack)(tree))
    assert jax.tree.structure(result) == jax.tree.structure(tree)
    jax.tree.map(assert_same_bits, result, tree)


def test_a_key_that_went_through_draws_the_same_numbers_as_before():
    tree = (jax.random.key(11, impl="rbg"), jnp.ones(2))
    result = Layout(tree).unpack(Layout(tree).pack(tree))[0]
    assert jax.random.key_impl(result) == jax.random.key_impl(tree[0])
    np.testing.assert_array_equal(jax.random.normal(result, (8,)), jax.random.normal(tree[0], (8,)))


@pytest.mark.parametrize("tree", [(), {}, {"a": None, "b": []}, jnp.ones(3), {"a": jnp.ones(3)}])
def test_a_tree_of_fewer_than_two_arrays_passes_as_it_is(tree):
    assert layout_of(tree) is None


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint64, np.complex64, jnp.int4])
def test_a_tree_with_elements_that_do_not_fit_passes_as_it_is(dtype):
    assert layout_of((jnp.zeros(2), jax.ShapeDtypeStruct((2,), dtype))) is None
    assert layout_of((jnp.zeros(2), "no array")) is None


def test_trees_of_one_kind_have_one_layout():
    def tree(value):
        return {"a": jnp.full(2, value), "b": jnp.int32(value)}

    assert layout_of(tree(1)) is layout_of(tree(2))
    assert layout_of(tree(1)) is not layout_of({"a": jnp.zeros(3), "b": jnp.int32(1)})


def test_another_tree_is_refused():
    layout = Layout({"a": jnp.zeros(2), "b": jnp.zeros(2)})
    with pytest.raises(ValueError, match="the tree must have the structure"):
        layout.pack({"a": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"like the example's, got float32\[3\]"):
        layout.pack({"a": jnp.zeros(2), "b": jnp.zeros(3)})


def packed(tree: Any) -> Any:
    return _compiled.compile(lambda x, tree: (x + 1, tree), jnp.ones(2), tree)(jnp.ones(2), tree)[1]


def test_the_fields_of_a_namedtuple_are_read_on_the_host():
    tree = everything()
    value = packed(tree)
    assert isinstance(value, _compiled.Packed)
    assert (bool(value.flag), int(value.count)) == (True, -7)
    for name, expected in tree.leaves.items():
        actual = value.leaves[name]
        is_key = jnp.issubdtype(expected.dtype, jax.dtypes.prng_key)
        assert is_key or isinstance(actual, np.ndarray | np.generic)
        assert_same_bits(actual, expected)
    assert value.rest[:2] == ((), None)
    assert float(value.rest[2]) == 2
    with pytest.raises(AttributeError, match="has no field 'nonsense'"):
        _ = value.nonsense


def test_reading_a_field_decodes_no_other():
    layout, reads = Layout(everything()), []

    def recorded(name, read):
        return lambda host: reads.append(name) or read(host)

    layout.readers = {name: recorded(name, read) for name, read in layout.readers.items()}
    value = packed_class(layout)(layout.pack(everything()))
    _ = value.flag, value.rest
    assert reads == ["flag", "rest"]


def test_a_packed_tree_survives_pickling():
    value = packed(everything())
    again = pickle.loads(pickle.dumps(value))
    assert type(again) is type(value)
    jax.tree.map(assert_same_bits, _compiled.unpack(again), everything())


def test_unpacking_gives_the_tree_and_anything_else_back():
    tree = everything()
    jax.tree.map(assert_same_bits, _compiled.unpack(packed(tree)), tree)
    assert _compiled.unpack(tree) is tree
    assert _compiled.unpack(3) == 3
