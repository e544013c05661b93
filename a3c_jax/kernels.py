"""How programs are compiled: a small one into a single kernel, so that a call of it never leaves its thread.

XLA runs a program on CPU as a graph of small kernels, and hands half of those that are ready to its
thread pool, however small they are. A segment of few steps spends most of its time in that hand-over.
Measured on 2 cores (2 networks of 128 units): a call that plays 1 environment for 5 steps and returns the
gradients takes 180 to 260 us so, with 3 context switches, and 37 us as a single kernel; 8 environments for
5 steps take 250 to 350 us, and 65 us; for 16 steps 720 us, and 150 us.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

Array = jax.Array

MAX_WORK = 10_000_000
"""Steps in a segment times parameters up to which a single kernel pays (2 networks of 128 units: at 8 environments
for 16 steps it takes a third of the graph's time, at 64 for 20 half of it, at 256 for 20 two thirds)."""

MAX_PARAMETERS = 2**16
"""Parameters up to which it pays: two layers of 64 units are 4 to 8 times as fast so, two of 128 by a sixth, and XLA
refuses two of 256."""

MAX_WORDS = 2**15
"""Words in an optimizer's state up to which its update is tried as a single kernel. XLA splits longer vectors
over its thread pool, which a kernel cannot do: it complains on stderr, and the update compiles as usual."""

_MARKS = {"xla_cpu_small_call": "true", "inlineable": "false"}
_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "",  # its matrix products cannot join a kernel
    # One large kernel takes LLVM 2.3 s to compile at its usual level 3 and 1.4 s at 2, and runs as fast.
    "xla_backend_optimization_level": 2,
}


def compile_fused(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """Compiles a function into a single kernel, or as `jax.jit` does where XLA cannot.

    It cannot where the backend is no CPU, where its version does not know how, or where the program holds
    something that only exists as a kernel of its own (a scatter, a sort, or a long vector that XLA splits over
    its thread pool). Either way the function computes the same, but for the last bits of floats.

    Args:
      function: a pure function.
      *arguments: arguments like those it will be called with.
    """
    plain = jax.jit(function)
    if jax.default_backend() != "cpu":
        return plain

    def inside(
        *arguments: Any,
    ) -> Any:  # not `function`, whose trace `plain` may have to use after all
        token = _INSIDE.set(True)
        try:
            return function(*arguments)
        finally:
            _INSIDE.reset(token)

    def marked(*arguments: Any) -> Any:
        with set_xla_metadata(**_MARKS):
            return jax.jit(inside)(*arguments)

    try:
        return jax.jit(marked, compiler_options=_OPTIONS).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError:
        return plain


def jit_for_one_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like `jax.jit`, for what runs only once: compiled quickly instead of well.

    The initial states and parameters of CartPole compile in 0.55 s so, and in 0.85 s otherwise.
    """
    if jax.default_backend() != "cpu":
        return jax.jit(function)
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


# Inside a kernel XLA writes a matrix product as plain loops with the sum innermost, one addition after the other. The
# processor's vector units stand idle. Written so that the innermost loop runs over the elements of an array, the
# gradients of 8 environments x 16 steps take 95 us instead of 285, those of 64 x 20 1.1 ms instead of 3.3 (as a graph,
# which the thread pool helps: 2.0).

_INSIDE: ContextVar[bool] = ContextVar("inside", default=False)
"""Whether what is being traced will be a kernel."""

_BLOCK = 4
"""Products that are added in one pass over the sum. 8 are as fast, but XLA would split the sums of two layers of 64
units over its thread pool, which a kernel cannot do."""

_SHORT = 8
"""Elements in a row, or terms in a sum, that are too few for another way to pay."""


def dot_general(lhs: Array, rhs: Array, dimension_numbers: Any, **options: Any) -> Array:
    """`jax.lax.dot_general`, for a dense layer: `[..., K]` times `[K, P]` is written as suits a kernel inside one.

    The sums are the same, added up in another order.
    """
    is_dense = rhs.ndim == 2 and dimension_numbers == (((lhs.ndim - 1,), (0,)), ((), ()))
    if is_dense and _INSIDE.get():
        return _product(lhs, rhs)
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, **options)


@jax.custom_vjp
def _product(x: Array, w: Array) -> Array:
    num_terms, size = w.shape
    if size <= _SHORT:
        return jnp.stack([_sum_of_halves(x * column) for column in w.T], axis=-1)
    if num_terms <= _SHORT:
        return x @ w
    product = _sum_of_outer_products(x.reshape(-1, num_terms).T, w)
    return product.reshape(*x.shape[:-1], size)


def _product_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, w), (x, w)


def _product_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = residuals
    rows, columns = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    if w.shape[0] <= w.shape[1]:
        dw = _sum_of_outer_products(rows, columns)
    else:  # the innermost loop should be the longer one
        dw = _sum_of_outer_products(columns, rows).T
    return _product(dy, w.T), dw


_product.defvjp(_product_forward, _product_backward)


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

    def blocks(z: Array) -> Array:  # zeros add nothing
        return jnp.pad(z, ((0, -len(z) % _BLOCK), (0, 0))).reshape(-1, _BLOCK, z.shape[1])

    return jax.lax.scan(add, jnp.zeros((x.shape[1], y.shape[1])), (blocks(x), blocks(y)))[0]
