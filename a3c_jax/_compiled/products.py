"""Matrix products for a program that is a single kernel, put in place of XLA's by rewriting the traced program.

Inside a single kernel XLA writes a matrix product as plain loops with the sum innermost, one addition after the
other, and the processor's vector units stand idle. The formulas below have the elements of an array in the
innermost loop. The sums are the same, but added up in another order.

The program is rewritten after JAX has differentiated it, so that the products of the backward pass are among
those that are found, and any function benefits: no network has to be written for it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

Array = jax.Array

_BLOCK = 4
"""Products that are added in one pass over the sum. More bring nothing."""

_SHORT = 8
"""Elements in a row, or terms in a sum, that are too few for another way to pay."""


def rewrite(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The same program with other matrix products, those inside its loops and branches included."""
    return _Rewriter().program(closed)


class _Rewriter:
    """Rewrites programs, each only once: functions that are called several times stay one function."""

    def __init__(self) -> None:
        # Keeps the programs that it rewrote, so that no id is used twice.
        self._done: dict[int, tuple[Any, Any]] = {}

    def program(self, closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
        if id(closed) not in self._done:
            result = closed
            if contains_products(closed.jaxpr):
                inputs = [_shape(variable.aval) for variable in closed.jaxpr.invars]
                result = jax.make_jaxpr(self._evaluator(closed))(*inputs)
            self._done[id(closed)] = (closed, result)
        return self._done[id(closed)][1]

    def _evaluator(self, closed: core.ClosedJaxpr) -> Callable[..., list[Any]]:
        """A function that does what the program does, equation by equation."""

        def evaluate(*arguments: Any) -> list[Any]:
            values: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
            values.update(zip(closed.jaxpr.invars, arguments, strict=True))

            def read(atom: Any) -> Any:
                return atom.val if isinstance(atom, core.Literal) else values[atom]

            for equation in closed.jaxpr.eqns:
                results = self._equation(equation, [read(atom) for atom in equation.invars])
                values.update(zip(equation.outvars, results, strict=True))
            return [read(atom) for atom in closed.jaxpr.outvars]

        return evaluate

    def _equation(self, equation: Any, arguments: list[Any]) -> list[Any]:
        parameters = equation.params
        if equation.primitive is primitives.dot_general_p and is_replaceable(equation):
            lhs, rhs = arguments
            return [_product(lhs, rhs, parameters["dimension_numbers"][0])]
        if equation.primitive in (primitives.custom_jvp_call_p, primitives.custom_vjp_call_p):
            # The program is differentiated already, so that only the function itself is left of these.
            return self._evaluator(self.program(parameters["call_jaxpr"]))(*arguments)
        if any(contains_products(inner) for inner in inner_programs(equation)):
            parameters = {name: self._parameter(value) for name, value in parameters.items()}
        results = equation.primitive.bind(*arguments, **parameters)
        return results if equation.primitive.multiple_results else [results]

    def _parameter(self, value: Any) -> Any:
        if isinstance(value, core.ClosedJaxpr):
            return self.program(value)
        if isinstance(value, core.Jaxpr):  # without constants of its own
            rewritten = self.program(core.ClosedJaxpr(value, ()))
            return value if rewritten.consts else rewritten.jaxpr
        if type(value) is tuple:
            return tuple(map(self._parameter, value))
        return value


def _shape(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def inner_programs(equation: Any) -> list[Any]:
    """The programs that an equation calls, such as a loop's body, as `Jaxpr`s."""
    found: list[Any] = []

    def look(value: Any) -> None:
        if isinstance(value, core.ClosedJaxpr):
            found.append(value.jaxpr)
        elif isinstance(value, core.Jaxpr):
            found.append(value)
        elif isinstance(value, tuple | list):
            for item in value:
                look(item)

    for value in equation.params.values():
        look(value)
    return found


def contains_products(jaxpr: core.Jaxpr) -> bool:
    """Whether the program, or one that it calls, holds a matrix product that would be replaced."""
    return any(
        (equation.primitive is primitives.dot_general_p and is_replaceable(equation))
        or any(map(contains_products, inner_programs(equation)))
        for equation in jaxpr.eqns
    )


def is_replaceable(equation: Any) -> bool:
    """Whether a `dot_general` is a product of float32 matrices without batch dimensions that is long enough."""
    parameters = equation.params
    contract, batch = parameters["dimension_numbers"]
    lhs, rhs = (atom.aval for atom in equation.invars)
    if any(batch) or not contract[0] or equation.outvars[0].aval.dtype != jnp.float32:
        return False
    if lhs.dtype != jnp.float32 or rhs.dtype != jnp.float32 or not (lhs.size and rhs.size):
        return False
    if type(parameters["precision"]).__name__ in ("DotAlgorithm", "DotAlgorithmPreset"):
        return False
    if _sums_over_rows(lhs, rhs, contract):
        return True
    terms = math.prod(lhs.shape[d] for d in contract[0])
    return terms > _SHORT or rhs.size // terms <= _SHORT


def _sums_over_rows(lhs: Any, rhs: Any, contract: Any) -> bool:
    """Whether both operands have their rows multiplied with each other, as in the gradient of a layer's weights."""
    leading = tuple(range(len(contract[0])))
    return (
        tuple(contract[0]) == leading
        and tuple(contract[1]) == leading
        and lhs.ndim > len(leading)
        and rhs.ndim > len(leading)
    )


def _product(lhs: Array, rhs: Array, contract: Any) -> Array:
    """What `dot_general` computes without batch dimensions: all of lhs's other dimensions, then all of rhs's."""
    left, right = contract
    left_kept = [d for d in range(lhs.ndim) if d not in left]
    right_kept = [d for d in range(rhs.ndim) if d not in right]
    shape = [lhs.shape[d] for d in left_kept] + [rhs.shape[d] for d in right_kept]
    terms = math.prod(lhs.shape[d] for d in left)
    if _sums_over_rows(lhs, rhs, contract):
        x, y = lhs.reshape(terms, -1), rhs.reshape(terms, -1)
        if x.shape[1] <= y.shape[1]:
            result = _sum_of_outer_products(x, y)
        else:  # the innermost loop should be the longer one
            result = _sum_of_outer_products(y, x).T
        return result.reshape(shape)
    x = lhs.transpose(*left_kept, *left).reshape(-1, terms)
    w = rhs.transpose(*right, *right_kept).reshape(terms, -1)
    if w.shape[1] <= _SHORT:
        result = jnp.stack([_sum_of_halves(x * column) for column in w.T], axis=-1)
    else:
        result = _sum_of_outer_products(x.T, w)
    return result.reshape(shape)


def _sum_of_halves(x: Array) -> Array:
    """The sum over the last axis: halves are added to each other, element by element, while they are long."""
    while x.shape[-1] > 2 * _SHORT and x.shape[-1] % 2 == 0:
        first, second = jnp.split(x, 2, axis=-1)
        x = first + second
    return jnp.sum(x, axis=-1)


def _sum_of_outer_products(x: Array, y: Array) -> Array:
    """`[N, K]` and `[N, P]` to `[K, P]`; the innermost loop runs over P."""

    def add(total: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        for a, b in zip(*block, strict=True):
            total = total + a[:, None] * b[None, :]
        return total, None

    def blocks(z: Array) -> Array:
        if missing := -len(z) % _BLOCK:
            z = jnp.pad(z, ((0, missing), (0, 0)))  # zeros add nothing
        return z.reshape(-1, _BLOCK, z.shape[1])

    return jax.lax.scan(add, jnp.zeros((x.shape[1], y.shape[1])), (blocks(x), blocks(y)))[0]
