"""Compiled functions of trees that hold large arrays: each leaf passes by itself, and none is copied into a vector."""

from collections.abc import Callable, Sequence
from typing import Any

import jax


class OverLeaves:
    """A compiled function of the parameters and of trees that are passed as one array for each leaf.

    `compile` may pack a tree of several small arrays into one vector. Observations of many bytes are large, and are left
    as they are.

    Args:
      compile: `compile(function, *examples)` compiles a pure function.
      function: `function(params, *trees) -> results`, a tuple.
      params: parameters like those to come.
      trees: trees like those to come.
      packed: the numbers of the results that are left to `compile`, and so come back as it returns them.
      **options: for `compile`.
    """

    def __init__(
        self,
        compile: Callable[..., Any],
        function: Any,
        params: Any,
        trees: Any,
        packed: Sequence[int] = (),
        **options: Any,
    ) -> None:
        leaves, inputs = jax.tree.flatten(trees)
        structures: list[Any] = []

        def over_leaves(params: Any, *leaves: Any) -> Any:
            results = function(params, *jax.tree.unflatten(inputs, leaves))
            parts = [
                ([x], None) if k in packed else jax.tree.flatten(x) for k, x in enumerate(results)
            ]
            structures[:] = [structure for _, structure in parts]
            return tuple(x for leaves, _ in parts for x in leaves)

        self._compiled = compile(over_leaves, params, *leaves, **options)
        # Filled when the function is traced; if it is debugged, when it is first called.
        self._structures = structures
        self.in_single_kernel = self._compiled.in_single_kernel

    def __call__(self, params: Any, *trees: Any) -> tuple[Any, ...]:
        results = iter(self._compiled(params, *jax.tree.leaves(trees)))
        return tuple(_next(results, structure) for structure in self._structures)


def _next(results: Any, structure: Any) -> Any:
    """The next result: as it is if it has no structure, otherwise a tree of as many of them as it needs."""
    if structure is None:
        return next(results)
    return jax.tree.unflatten(structure, [next(results) for _ in range(structure.num_leaves)])
