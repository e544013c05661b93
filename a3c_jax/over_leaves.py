"""Compiled functions of trees that hold large arrays: each leaf passes by itself, and none is copied into a vector."""

from collections.abc import Callable
from typing import Any

import jax


class OverLeaves:
    """A compiled function of the parameters and of trees that are passed as one array for each leaf.

    So arrays of bytes stay what they are, and are not copied, whatever `compile` does with a tree of several arrays.

    Args:
      compile: `compile(function, *examples)` compiles a pure function.
      function: `function(params, *trees) -> (kept, tree)`, of which `kept` is a tuple of results that are returned
        as `compile` returns them.
      params: parameters like those to come.
      trees: trees like those to come.
      **options: for `compile`.
    """

    def __init__(
        self, compile: Callable[..., Any], function: Any, params: Any, trees: Any, **options: Any
    ) -> None:
        leaves, inputs = jax.tree.flatten(trees)
        shapes: list[Any] = []

        def over_leaves(params: Any, *leaves: Any) -> Any:
            kept, tree = function(params, *jax.tree.unflatten(inputs, leaves))
            results, structure = jax.tree.flatten(tree)
            shapes[:] = [len(kept), structure]
            return (*kept, *results)

        self._compiled = compile(over_leaves, params, *leaves, **options)
        # Filled when the function is traced; if it is debugged, when it is first called.
        self._shapes = shapes
        self.in_single_kernel = self._compiled.in_single_kernel

    def __call__(self, params: Any, *trees: Any) -> tuple[tuple[Any, ...], Any]:
        results = self._compiled(params, *jax.tree.leaves(trees))
        num_kept, structure = self._shapes
        return results[:num_kept], jax.tree.unflatten(structure, results[num_kept:])


def keep_nothing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with an empty tuple as its `kept` results; see `OverLeaves`."""
    return lambda *arguments: ((), function(*arguments))


def keep_gradients_and_report(function: Callable[..., Any]) -> Callable[..., Any]:
    """A worker's step with gradients and report as its `kept` results; see `OverLeaves`."""

    def split(*arguments: Any) -> Any:
        gradients, state, report = function(*arguments)
        return (gradients, report), state

    return split
