"""Trees as arrays with names: nothing lost on the way, and nothing taken for something else."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_runs import words

from a3c_jax.asynchrony.trees import name_leaves, restore_from_vector, restore_leaves


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


def tree():
    return {
        "params": {"kernel": jnp.array([[1.0, -0.0], [jnp.nan, jnp.inf]]), "bias": jnp.zeros(0)},
        "pair": Pair(jnp.arange(3), [jnp.bool_(True), jnp.uint8(255)]),
        "half": jnp.array([1.5, -2.0], jnp.bfloat16),
        "key": jax.random.split(jax.random.key(3), 2),
        "number": 7,
    }


def zeros_like(value):
    """A tree of the same form with other contents."""
    if jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), value.shape)
    return jnp.zeros_like(value)


def bits(value):
    return words(name_leaves(value))


def test_the_names_are_the_paths_to_the_leaves():
    named = name_leaves(tree())
    assert set(named) == {
        "params/kernel", "params/bias", "pair/first", "pair/second/0", "pair/second/1", "half",
        "key", "number",
    }  # fmt: skip
    assert all(isinstance(array, np.ndarray) for array in named.values())
    np.testing.assert_array_equal(named["pair/first"], [0, 1, 2])
    np.testing.assert_array_equal(named["key"], jax.random.key_data(tree()["key"]))
    assert list(name_leaves(optax.adam(0.1).init(jnp.zeros(2)))) == ["0/count", "0/mu", "0/nu"]


def test_a_tree_comes_back_bit_for_bit_whatever_the_order_of_the_names():
    original = tree()
    named = dict(reversed(name_leaves(original).items()))
    restored = restore_leaves("states", named, jax.tree.map(zeros_like, original))
    chex.assert_trees_all_equal_structs(restored, original)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, jax.tree.map(jnp.asarray, original))
    assert bits(restored) == bits(original)
    assert jax.random.key_impl(restored["key"]) == jax.random.key_impl(original["key"])


def test_the_kind_of_a_random_key_is_kept():
    key = jax.random.key(5, impl="rbg")
    restored = restore_leaves("key", name_leaves({"k": key}), {"k": jax.random.key(0, impl="rbg")})
    np.testing.assert_array_equal(
        jax.random.uniform(restored["k"], (3,)), jax.random.uniform(key, (3,))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": np.zeros(3, np.float32)}, r"'a' is float32\[3\], .* needs float32\[2\]"),
        ({"a": np.zeros((2, 1), np.float32)}, r"'a' is float32\[2, 1\], .* needs float32\[2\]"),
        ({"a": np.zeros(2, np.int32)}, r"'a' is int32\[2\], .* needs float32\[2\]"),
        ({"a": None}, r"'a' is missing, .* needs float32\[2\]"),
        ({"c": np.zeros(2, np.float32)}, r"'c' is float32\[2\], .* needs no such array"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    like = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    named = {k: v for k, v in (name_leaves(like) | change).items() if v is not None}
    with pytest.raises(ValueError, match="^params " + message):
        restore_leaves("params", named, like)


def test_arrays_of_equal_shape_cannot_change_places():
    # By their order alone, the one would be taken for the other.
    before = {"first": jnp.zeros(2), "second": jnp.ones(2)}
    after = {"first": jnp.zeros(2), "third": jnp.zeros(2)}
    with pytest.raises(ValueError, match="'third' is missing"):
        restore_leaves("params", name_leaves(before), after)
    restored = restore_leaves(
        "params", name_leaves(before), {"second": jnp.zeros(2), "first": jnp.zeros(2)}
    )
    np.testing.assert_array_equal(restored["second"], [1, 1])


# The vectors of format 1: 32 bits for each element, as the leaves follow each other.


def as_vector(value):
    """What format 1 made of a tree."""
    parts = []
    for array in name_leaves(value).values():
        if array.dtype.itemsize == 4:
            part = array.view(np.uint32)
        elif array.dtype == np.bool_:
            part = array.astype(np.uint32)
        else:
            part = array.view(f"uint{8 * array.dtype.itemsize}").astype(np.uint32)
        parts.append(part.ravel())
    return np.concatenate(parts)


@pytest.mark.parametrize("dtype", [np.uint32, np.float32, np.int32])
def test_a_vector_of_words_becomes_the_tree_bit_for_bit(dtype):
    original = tree()
    vector = as_vector(original).view(dtype)
    restored = restore_from_vector("states", vector, jax.tree.map(zeros_like, original))
    chex.assert_trees_all_equal_structs(restored, original)
    assert bits(restored) == bits(original)


def test_a_vector_by_hand():
    # 1.0 has the bits 0x3f800000; the flag and the byte are written as numbers.
    vector = np.array([0x3F800000, 0, 1, 200], np.uint32)
    like = {"a": jnp.zeros((1, 2)), "b": jnp.bool_(False), "c": jnp.uint8(0)}
    restored = restore_from_vector("states", vector, like)
    np.testing.assert_array_equal(restored["a"], [[1.0, 0.0]])
    assert bool(restored["b"]) and int(restored["c"]) == 200


def test_a_vector_of_another_length_or_of_other_elements_is_refused():
    for vector, like, message in (
        (np.zeros(3, np.float32), {"a": jnp.zeros(2)}, r"states is float32\[3\], .* needs 2 ele"),
        (np.zeros(2, np.float64), {"a": jnp.zeros(2)}, r"states is float64\[2\], .* of 32 bits"),
        (np.zeros((2, 1), np.float32), {"a": jnp.zeros(2)}, r"is float32\[2, 1\], .* needs 2 ele"),
        (np.zeros(1, np.float32), {}, r"states is float32\[1\], .* needs 0 elements"),
    ):
        with pytest.raises(ValueError, match=message):
            restore_from_vector("states", vector, like)
    assert restore_from_vector("optimizer_state", np.zeros(0, np.float32), {}) == {}


def test_no_array_is_lost_to_another_of_the_same_name():
    with pytest.raises(ValueError, match="different names, got 'a/b' twice"):
        name_leaves({"a/b": jnp.zeros(1), "a": {"b": jnp.ones(1)}})
