"""Many small arrays as one: passing an array between Python and a compiled call costs by the piece.

A worker's state has a dozen arrays of a few bytes each, a network eight. A packed tree passes as one vector
instead. It is taken apart inside the compiled program, where slicing is free.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Layout:
    """Where each leaf of a tree lies in its vector.

    Trees of float32 alone become a float32 vector. Others become a vector of uint32 in which every element takes
    32 bits, so that integers, booleans, small floats and typed keys come back bit for bit.

    Args:
      example: a tree of arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      TypeError: if a leaf is no array, or its elements are wider than 32 bits.
    """

    def __init__(self, example: Any) -> None:
        self.treedef: Any
        leaves, self.treedef = jax.tree.flatten(example)
        self.leaves = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(_aval, leaves))
        self.dtype = jnp.dtype(jnp.float32)
        if any(x.dtype != jnp.float32 for x in self.leaves):
            self.dtype = jnp.dtype(jnp.uint32)
        self._encoded = [jax.eval_shape(self._encode, leaf) for leaf in self.leaves]
        ends = np.cumsum([0] + [math.prod(x.shape) for x in self._encoded]).tolist()
        self._bounds = list(zip(ends[:-1], ends[1:], strict=True))
        self.size: int = ends[-1]
        self.readers = self._field_readers()
        self.packed = packed_class(self)

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Layout)
            and self.treedef == other.treedef
            and self.leaves == other.leaves
        )

    def __hash__(self) -> int:
        return hash((self.treedef, self.leaves))

    def __reduce__(self) -> Any:
        return layout_of, (self.example(),)

    def example(self) -> Any:
        """The tree with a `jax.ShapeDtypeStruct` in place of each array."""
        return jax.tree.unflatten(self.treedef, self.leaves)

    def pack(self, tree: Any) -> Array:
        """The tree as one vector. May be traced.

        Raises:
          ValueError: if the tree is not like the example.
        """
        leaves, treedef = jax.tree.flatten(tree)
        if treedef != self.treedef:
            raise ValueError(f"the tree must have the structure {self.treedef}, got {treedef}.")
        for leaf, expected in zip(leaves, self.leaves, strict=True):
            if leaf.shape != expected.shape or leaf.dtype != expected.dtype:
                raise ValueError(
                    f"an array must be {expected.dtype}{list(expected.shape)}, like the example's, got "
                    f"{leaf.dtype}{list(leaf.shape)}."
                )
        return jnp.concatenate([self._encode(x).ravel() for x in leaves])

    def unpack(self, vector: Array) -> Any:
        """The tree from its vector. May be traced."""
        pieces = jnp.split(vector, [end for _, end in self._bounds[:-1]])
        leaves = [
            self._decode(piece.reshape(encoded.shape), leaf.dtype)
            for piece, encoded, leaf in zip(pieces, self._encoded, self.leaves, strict=True)
        ]
        return jax.tree.unflatten(self.treedef, leaves)

    def _encode(self, x: Any) -> Array:
        if self.dtype == jnp.float32:
            return jnp.asarray(x)
        if _is_key(x):
            return jax.random.key_data(x)
        if x.dtype == jnp.bool_:
            return x.astype(jnp.uint32)
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)

    def _decode(self, x: Array, dtype: Any) -> Array:
        if self.dtype == jnp.float32:
            return x
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(x, impl=_key_impl(dtype))
        if dtype == jnp.bool_:
            return x.astype(jnp.bool_)
        unsigned = jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
        return jax.lax.bitcast_convert_type(x.astype(unsigned), dtype)

    def _reader(self, number: int) -> Callable[[np.ndarray], Any]:
        """What reads a leaf from the vector on the host: a view, or a number, if that is possible."""
        leaf, (begin, end) = self.leaves[number], self._bounds[number]
        shape, dtype = leaf.shape, leaf.dtype
        if shape == () and dtype == np.bool_:
            return lambda host: host.item(begin) != 0
        if shape == () and dtype == np.int32:
            return lambda host: (host.item(begin) ^ 0x80000000) - 0x80000000
        if dtype == np.bool_:
            return lambda host: host[begin:end].reshape(shape) != 0
        if dtype in (np.int32, np.uint32, np.float32):
            if shape == ():
                return lambda host: host.view(dtype)[begin]
            return lambda host: host[begin:end].view(dtype).reshape(shape)
        encoded = self._encoded[number].shape

        def decode(host: np.ndarray) -> Any:
            value = self._decode(jnp.asarray(host[begin:end].reshape(encoded)), dtype)
            return value if _is_key(leaf) else np.asarray(value)

        return decode

    def _field_readers(self) -> dict[str, Callable[[np.ndarray], Any]]:
        """What reads each field of a NamedTuple from the vector on the host."""
        example = self.example()
        names = getattr(example, "_fields", ()) if isinstance(example, tuple) else ()
        fields, first = {}, 0
        for name in names:
            structure: Any = jax.tree.structure(getattr(example, name))
            readers = [self._reader(first + n) for n in range(structure.num_leaves)]
            first += len(readers)
            fields[name] = _field_reader(structure, readers)
        return fields


def _field_reader(structure: Any, readers: list[Callable[..., Any]]) -> Callable[..., Any]:
    if structure == jax.tree.structure(0):  # the field is an array
        return readers[0]
    return lambda host: jax.tree.unflatten(structure, [read(host) for read in readers])


class Packed:
    """A tree of arrays as one vector, on the device. `_compiled.unpack` gives the tree.

    Each layout has its own subclass. If the tree is a NamedTuple, its fields are attributes: NumPy arrays or
    numbers, read from the vector when they are asked for.

    Attributes:
      layout: where each leaf lies in the vector.
      vector: the vector.
      host: the vector on the host, fetched when it is first asked for.
    """

    __slots__ = ("host", "vector")
    layout: Layout

    def __init__(self, vector: Array) -> None:
        self.vector = vector

    def block_until_ready(self) -> "Packed":
        """Waits until it is computed."""
        self.vector.block_until_ready()
        return self

    def __getattr__(self, name: str) -> Any:  # called only for what there is not yet
        if name == "host":
            self.host = np.asarray(self.vector)
            return self.host
        raise AttributeError(f"a packed {self.layout.treedef} has no field {name!r}")

    def __reduce__(self) -> Any:
        return _from_host, (self.host, self.layout)

    def __repr__(self) -> str:
        return f"Packed({self.layout.example()})"


def _from_host(vector: np.ndarray, layout: Layout) -> Packed:
    return layout.packed(jnp.asarray(vector))


def packed_class(layout: Layout) -> type[Packed]:
    """The class of the packed trees of one layout."""

    def field(read: Callable[[np.ndarray], Any]) -> property:
        return property(lambda self: read(self.host))

    fields = {name: field(read) for name, read in layout.readers.items()}
    return type("Packed", (Packed,), {"__slots__": (), "layout": layout, **fields})


def layout_of(tree: Any) -> Layout | None:
    """The layout of a tree of several arrays; None if it passes as it is.

    A tree passes as it is if it holds fewer than two arrays, something that is no array, or elements of more than
    32 bits.
    """
    if isinstance(tree, Packed):
        return tree.layout
    if len(jax.tree.leaves(tree)) < 2:
        return None
    try:
        layout = Layout(tree)
    except TypeError:
        return None
    return _layouts.setdefault(layout, layout)


_layouts: dict[Layout, Layout] = {}
"""One object for each layout, so that two are compared at the price of two numbers."""


def _aval(x: Any) -> Any:
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise TypeError(f"only arrays can be packed, got {type(x).__name__}.")
    if not _is_key(x) and (x.dtype.itemsize > 4 or jnp.dtype(x.dtype).name in _NARROW):
        raise TypeError(f"elements must have 8, 16 or 32 bits, got {x.dtype}.")
    return x


_NARROW = ("int2", "uint2", "int4", "uint4", "float4_e2m1fn")
"""Types that share a byte, which cannot be viewed as an unsigned integer of their size."""


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _key_impl(dtype: Any) -> Any:
    found: list[Any] = []
    jax.eval_shape(
        lambda key: found.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct((), dtype)
    )
    return found[0]
