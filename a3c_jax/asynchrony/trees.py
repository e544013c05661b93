"""A tree as arrays with names: how parameters and states are saved, checked and restored."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Named = dict[str, np.ndarray]


def name_leaves(tree: Any) -> Named:
    """The arrays of a tree on the host, by the path to each; a random key as its key data.

    >>> name_leaves({"params": {"bias": jnp.zeros(2)}})
    {'params/bias': array([0., 0.], dtype=float32)}

    Raises:
      ValueError: if two arrays have the same name, so that one would be lost.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {_name(path): np.asarray(_data(leaf)) for path, leaf in leaves}
    if len(named) < len(leaves):
        names = [_name(path) for path, _ in leaves]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"the arrays of a tree must have different names, got {twice!r} twice; rename a key with a slash."
        )
    return named


def restore_leaves(what: str, named: Named, like: Any) -> Any:
    """A tree like `like`, with the arrays of `named` in it.

    Args:
      what: what the tree is, for the error message.
      named: what `name_leaves` made of a tree of the same structure.
      like: a tree of arrays of the right shapes and dtypes. One whose first dimension is zero may have any length
        there.

    Raises:
      ValueError: if a name, a shape or a dtype differs.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    expected = {_name(path): leaf for path, leaf in leaves}
    for name in [*expected, *named]:
        have = named.get(name)
        want = None if name not in expected else _data(expected[name])
        if have is None or want is None or not _fits(have, want):
            needed = "no such array" if want is None else _describe(want)
            raise ValueError(f"{what} {name!r} is {_describe(have)}, but this run needs {needed}")
    restored = [_restore(named[name], leaf) for name, leaf in expected.items()]
    return jax.tree.unflatten(structure, restored)


def stack_leaves(trees: list[Named]) -> Named:
    """Each worker's arrays as one with a leading dimension. Shorter ones begin with zeros, if lengths differ."""

    def stack(arrays: list[np.ndarray]) -> np.ndarray:
        longest = max((len(x) for x in arrays if x.ndim), default=0)
        if all(x.ndim == 0 or len(x) == longest for x in arrays):
            return np.stack(arrays)
        missing = [[(longest - len(x), 0)] + [(0, 0)] * (x.ndim - 1) for x in arrays]
        return np.stack([np.pad(x, width) for x, width in zip(arrays, missing, strict=True)])

    return {name: stack([tree[name] for tree in trees]) for name in trees[0]}


def restore_from_vector(what: str, vector: np.ndarray, like: Any) -> Any:
    """A tree like `like` from one vector of its leaves' elements, 32 bits each, as format 1 saved it.

    Raises:
      ValueError: if the vector has another length, or elements of another size.
    """
    leaves, structure = jax.tree.flatten(like)
    data = [_data(leaf) for leaf in leaves]
    ends = np.cumsum([math.prod(x.shape) for x in data])
    size = int(ends[-1]) if len(ends) else 0
    if vector.shape != (size,) or vector.dtype.itemsize != 4:
        raise ValueError(
            f"{what} is {_describe(vector)}, but this run needs {size} elements of 32 bits"
        )
    pieces = np.split(vector.view(np.uint32), ends)[:-1]
    restored = [
        _restore(_from_32_bits(piece, x.dtype).reshape(x.shape), leaf)
        for piece, x, leaf in zip(pieces, data, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, restored)


def _fits(have: np.ndarray, want: Any) -> bool:
    any_length = want.shape[:1] == (0,) and have.ndim > 0
    shape = (0, *have.shape[1:]) if any_length else have.shape
    return (shape, have.dtype) == (want.shape, want.dtype)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _data(leaf: Any) -> Any:
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return jnp.asarray(leaf)


def _restore(data: np.ndarray, like: Any) -> jax.Array:
    if jnp.issubdtype(jnp.result_type(like), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(like))
    return jnp.asarray(data)


def _from_32_bits(elements: np.ndarray, dtype: Any) -> np.ndarray:
    return elements.astype(f"uint{8 * np.dtype(dtype).itemsize}").view(dtype)


def _describe(array: Any) -> str:
    return "missing" if array is None else f"{array.dtype}{list(array.shape)}"
