"""Whether a program becomes a single kernel: only if XLA can do it, and only if it pays."""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from jax.extend import core

from a3c_jax._compiled.products import inner_programs
from a3c_jax._compiled.single_kernel import (
    can_be_single_kernel,
    compile_into_single_kernel,
    compile_plainly,
)
from a3c_jax.config import available_cores

MOST_WORK = 200_000_000
"""Multiplications and additions beyond which a single kernel is not tried. XLA's own matrix products are better
then, and a large program takes long to compile twice."""

_THIN = 8
"""A matrix product with so few rows, columns or terms is thin. XLA's own products do not help with it."""

_ROUND_SECONDS = 0.01
_NUM_ROUNDS = 7


def compile_program(
    program: core.ClosedJaxpr,
    results: Any,
    inputs: list[Any],
    single_kernel: bool | None = None,
    ways: "Ways | None" = None,
) -> tuple[Callable[..., Any], bool]:
    """Compiles a program.

    A program with a loop is a segment of a worker. If its matrix products are all thin, as they are with one
    hidden layer and few observations and actions, a single kernel is the faster one without doubt. Otherwise the
    program is compiled in both ways and timed. A program without a loop, such as an optimizer's update, gains
    nothing.

    Args:
      program: the program, from the arrays in the inputs to those in the results.
      results: the structure of its results, as `jax.tree.structure` gives it.
      inputs: an example of each of its inputs, which are trees.
      single_kernel: whether to make it a single kernel if that is possible; None lets it be decided.
      ways: how to compile and to compare, for tests.

    Returns:
      A function from the inputs to the results, compiled for inputs like the examples, and whether it is a single
      kernel.
    """
    ways = ways or Ways()
    if single_kernel is None:
        work = list(matrix_products(program.jaxpr))
        tries = has_loop(program.jaxpr) and sum(size for size, _ in work) <= ways.most_work
        is_certain = all(is_thin for _, is_thin in work)
    else:
        tries, is_certain = single_kernel, True
    if tries and can_be_single_kernel(program):
        compiled = ways.into_single_kernel(program, results, inputs)
        if compiled is not None and is_certain:
            return compiled, True
        plain = ways.plainly(program, results, inputs)
        if compiled is not None and ways.is_faster(compiled, plain, inputs):
            return compiled, True
        return plain, False
    return ways.plainly(program, results, inputs), False


def is_faster(one: Callable[..., Any], other: Callable[..., Any], inputs: list[Any]) -> bool:
    """Whether one function is faster than the other, when each core has a thread that calls it.

    They are timed in turn, so that other work on the machine disturbs both.
    """
    threads = available_cores()

    def calls(function: Callable[..., Any], number: int) -> None:
        for _ in range(number):
            jax.block_until_ready(function(*inputs))

    with ThreadPoolExecutor(threads) as pool:

        def round_of(function: Callable[..., Any], number: int) -> float:
            began = time.perf_counter()
            list(pool.map(calls, [function] * threads, [number] * threads))
            return time.perf_counter() - began

        number = max(1, round(_ROUND_SECONDS / min(round_of(one, 1) for _ in range(3))))
        rounds = [(round_of(one, number), round_of(other, number)) for _ in range(_NUM_ROUNDS)]
    return sum(a < b for a, b in rounds) > _NUM_ROUNDS // 2


class Ways(NamedTuple):
    """How a program is compiled, and how the two ways are compared."""

    into_single_kernel: Callable[..., Any] = compile_into_single_kernel
    plainly: Callable[..., Any] = compile_plainly
    is_faster: Callable[..., bool] = is_faster
    most_work: int = MOST_WORK


def has_loop(jaxpr: core.Jaxpr) -> bool:
    """Whether the program, or one that it calls, has a loop."""
    return any(
        equation.primitive.name in ("scan", "while") or any(map(has_loop, inner_programs(equation)))
        for equation in jaxpr.eqns
    )


def matrix_products(jaxpr: core.Jaxpr, times: int = 1) -> Iterator[tuple[int, bool]]:
    """Each matrix product and convolution: its multiplications in all, and whether it is thin."""
    equation: Any
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        size = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if name == "dot_general":
            (contract, _), batch = equation.params["dimension_numbers"]
            lhs, rhs = (atom.aval for atom in equation.invars)
            terms = math.prod(lhs.shape[d] for d in contract)
            others = terms * math.prod(lhs.shape[d] for d in batch[0])
            shortest = min(terms, lhs.size // others, rhs.size // others)
            yield times * size * terms, shortest <= _THIN
        elif name == "conv_general_dilated":
            weights = equation.invars[1].aval
            channels = weights.shape[equation.params["dimension_numbers"].rhs_spec[0]]
            yield times * size * (weights.size // channels), False
        length = equation.params.get("length", 1) if name == "scan" else 1
        for inner in inner_programs(equation):
            yield from matrix_products(inner, times * length)


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
