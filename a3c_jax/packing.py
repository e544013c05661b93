"""Many small arrays as one: what passes between the host and a compiled call costs by the piece.

Each array that enters or leaves a compiled call costs microseconds, and a worker's state has a dozen
of a few bytes each. Packed, a call passes one vector of state instead, unpacked inside the program,
where slicing is free.
"""

import math
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Tree = TypeVar("Tree")


class Packing(Generic[Tree]):
    """Packs trees of one structure into vectors of 32-bit words, and back, bit for bit.

    Args:
      example: a tree of arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      TypeError: where a leaf's elements are wider than 32 bits.
    """

    def __init__(self, example: Tree) -> None:
        self._treedef: Any
        leaves, self._treedef = jax.tree.flatten(example)
        self._key_impls: list[Any] = []

        def note_key_impls(leaves: list[Any]) -> None:  # of shapes, too, once they are traced
            self._key_impls += [jax.random.key_impl(x) if _is_key(x) else None for x in leaves]

        jax.eval_shape(note_key_impls, leaves)
        self._leaves = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
        for leaf in self._leaves:
            if not _is_key(leaf) and leaf.dtype.itemsize > 4:
                raise TypeError(
                    f"elements must have at most 32 bits, got {leaf.dtype}; turn off x64 mode."
                )
        words = [jax.eval_shape(_to_words, leaf) for leaf in self._leaves]
        self._word_shapes = [w.shape for w in words]
        sizes = [math.prod(shape) for shape in self._word_shapes]
        self._bounds = [int(end) for end in np.cumsum(sizes)]
        self.size = self._bounds[-1] if sizes else 0

    def pack(self, tree: Tree) -> Array:
        """The tree as one `[size]` uint32 vector. May be traced."""
        leaves, treedef = jax.tree.flatten(tree)
        if treedef != self._treedef:
            raise ValueError(
                f"the tree must have the structure {self._treedef}, got {treedef}; make another "
                "Packing for it."
            )
        words = [_to_words(x).ravel() for x in leaves]
        return jnp.concatenate(words) if words else jnp.zeros(0, jnp.uint32)

    def unpack(self, vector: Array) -> Tree:
        """The tree from its vector. May be traced."""
        pieces = jnp.split(vector, self._bounds[:-1]) if self._leaves else []
        leaves = [
            _from_words(piece.reshape(shape), leaf.dtype, key_impl)
            for piece, shape, leaf, key_impl in zip(
                pieces, self._word_shapes, self._leaves, self._key_impls, strict=True
            )
        ]
        return jax.tree.unflatten(self._treedef, leaves)

    def unpack_on_host(self, vector: Array | np.ndarray) -> Tree:
        """The tree as NumPy arrays, mostly views.

        Raises:
          TypeError: where a leaf is not of bool, int32, uint32 or float32.
        """
        words = np.asarray(vector)
        leaves = []
        begin = 0
        for end, leaf in zip(self._bounds, self._leaves, strict=True):
            if leaf.dtype not in (np.bool_, np.int32, np.uint32, np.float32):
                raise TypeError(
                    f"elements must be bool, int32, uint32 or float32 to be read on the host, got "
                    f"{leaf.dtype}; use unpack."
                )
            piece = words[begin:end].reshape(leaf.shape)
            leaves.append(piece != 0 if leaf.dtype == np.bool_ else piece.view(leaf.dtype))
            begin = end
        return jax.tree.unflatten(self._treedef, leaves)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _to_words(x: Array) -> Array:
    """Any array of elements of at most 32 bits as uint32 words, losslessly."""
    if _is_key(x):
        return jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = 8 * x.dtype.itemsize
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _from_words(words: Array, dtype: Any, key_impl: Any) -> Array:
    """The inverse of `_to_words`."""
    if key_impl is not None:
        return jax.random.wrap_key_data(words, impl=key_impl)
    if dtype == jnp.bool_:
        return words.astype(jnp.bool_)
    bits = 8 * jnp.dtype(dtype).itemsize
    return jax.lax.bitcast_convert_type(words.astype(jnp.dtype(f"uint{bits}")), dtype)
