"""How programs are compiled: a small one into a single kernel, so that a call of it never leaves its thread.

XLA runs a program on CPU as a graph of small kernels, and hands half of those that are ready to its
thread pool, however small they are. A segment of few steps spends most of its time in that hand-over.
Measured on 2 cores (2 networks of 128 units): a call that plays 1 environment for 5 steps and returns the
gradients takes 180 to 260 us so, with 3 context switches, and 35 us as a single kernel; 8 environments for
5 steps take 250 to 350 us, and 95 us.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata

MAX_WORK = 500_000
"""Steps in a segment times parameters up to which a single kernel pays: it multiplies matrices with
plain loops, so that larger segments are faster as a graph (at 8 environments for 16 steps the single
kernel takes half the time, at 64 for 5 as much, at 64 for 20 a quarter more)."""

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
    something that only exists as a kernel of its own (a scatter, a sort, or a long vector that XLA splits over its thread pool). Either way the
    function computes the same, but for the last bits of floats.

    Args:
      function: a pure function.
      *arguments: arguments like those it will be called with.
    """
    plain = jax.jit(function)
    if jax.default_backend() != "cpu":
        return plain

    def marked(*arguments: Any) -> Any:
        with set_xla_metadata(**_MARKS):
            return plain(*arguments)

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
