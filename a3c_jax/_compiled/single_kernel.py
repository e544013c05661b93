"""Compiling a whole program into a single kernel, so that a call never leaves the thread that makes it.

XLA runs a program on a CPU as a graph of many small kernels, which are functions in machine code (they have nothing
to do with Pallas, nor with the weights that Flax calls kernels). It hands some of them to its thread pool, however
small they are. A segment of a few environments spends most of its time in that hand-over. As a single kernel, the
same program is one such function.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core

from a3c_jax._compiled import products

Array = jax.Array

_MARKS = {"xla_cpu_small_call": "true", "inlineable": "false"}
_UNSPLIT: dict[str, Any] = {"xla_disable_hlo_passes": "cpu-parallel-task-assigner"}
"""Switches off the pass of XLA that splits operations over its thread pool."""

_OPTIONS: dict[str, Any] = {
    # The matrix products of this library cannot be part of a kernel.
    "xla_cpu_experimental_ynn_fusion_type": "",
    # Nor can operations that are split.
    **_UNSPLIT,
    # One large kernel takes LLVM much longer to compile at its usual level, 3, and runs as fast.
    "xla_backend_optimization_level": 2,
}


def compile_into_single_kernel(
    program: core.ClosedJaxpr, results: Any, inputs: list[Any], **more_options: Any
) -> Callable[..., Any] | None:
    """Compiles a program into a single kernel; None if XLA refuses.

    Call it only with programs that `can_be_single_kernel` allows. XLA complains on stderr about others, and may
    end the process. The arguments are those of `compile_program`; `more_options` go to XLA as well.
    """
    function = core.jaxpr_as_fun(products.rewrite(program))

    def inside(*leaves: Any) -> Any:
        return _with_inputs_alive(leaves, function(*leaves))

    def marked(*leaves: Any) -> Any:
        with set_xla_metadata(**_MARKS):
            return jax.jit(inside)(*leaves)

    compiled = jax.jit(
        _over_trees(marked, program, results), compiler_options=_OPTIONS | more_options
    )
    try:
        jax.block_until_ready(compiled(*inputs))
    except Exception:
        # If it is the program's own, it is raised again when that is compiled plainly.
        return None
    return compiled


def _with_inputs_alive(inputs: Sequence[Array], outputs: list[Array]) -> list[Array]:
    """The outputs, in a way that XLA believes that they depend on every input.

    XLA ends the process if an input of a single kernel turns out not to matter, because the result is a constant
    for instance. So one element of the smallest output seems to depend on a condition that is never met, which
    only LLVM finds out.
    """
    candidates = [n for n, output in enumerate(outputs) if not _is_key(output)]
    smallest = min(candidates, key=lambda n: outputs[n].size)
    output = outputs[smallest].ravel()
    bits = functools.reduce(jax.lax.bitwise_or, map(_first_bits, inputs), jnp.uint32(0))
    never = (bits >> 1) > jnp.uint32(2**31 - 1)
    first = jnp.where(never, bits.astype(output.dtype), output[:1])
    output = jnp.concatenate([first, output[1:]]).reshape(outputs[smallest].shape)
    return [*outputs[:smallest], output, *outputs[smallest + 1 :]]


def _first_bits(x: Array) -> Array:
    """The bits of an array's first element as a uint32."""
    x = jax.random.key_data(x) if _is_key(x) else x
    first = jax.lax.slice(x.ravel(), (0,), (1,))[0]
    if first.dtype == jnp.bool_:
        return first.astype(jnp.uint32)
    unsigned = jnp.dtype(f"uint{8 * first.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(first, unsigned).astype(jnp.uint32)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def compile_plainly(
    program: core.ClosedJaxpr, results: Any, inputs: list[Any]
) -> Callable[..., Any]:
    """Compiles a program as `jax.jit` does, but for one thing. The arguments are those of `compile_program`.

    XLA would split loops over long arrays into a part for each core, and pass the parts to its thread pool. But here
    each core has a worker thread of its own, so that the parts only wait for each other. The results are the same,
    bit for bit.
    """
    function = _over_trees(core.jaxpr_as_fun(program), program, results)
    compiled = jax.jit(function, compiler_options=_UNSPLIT)
    try:
        jax.block_until_ready(compiled(*inputs))
    except Exception:
        # Either XLA does not know the option, or the error is the program's own and is raised again.
        compiled = jax.jit(function)
        jax.block_until_ready(compiled(*inputs))
    return compiled


def _over_trees(
    function: Callable[..., Any], program: core.ClosedJaxpr, results: Any
) -> Callable[..., Any]:
    """A program's function, which takes arrays and returns a list of them, as one from trees to trees."""

    def over_trees(*inputs: Any) -> Any:
        leaves = jax.tree.leaves(inputs)
        expected = [(aval.shape, aval.dtype) for aval in program.in_avals]
        actual = [(aval.shape, aval.dtype) for aval in map(jax.typeof, leaves)]
        if actual != expected:
            raise TypeError(
                f"the arguments must be like those that it was compiled for, {expected}, got {actual}."
            )
        return jax.tree.unflatten(results, function(*leaves))

    return over_trees


def can_be_single_kernel(program: core.ClosedJaxpr) -> bool:
    """Whether XLA can compile a program into a single kernel, as far as it is known: what is unknown counts as no."""
    ends = [*program.in_avals, *program.out_avals]
    return (
        all(math.prod(aval.shape) > 0 for aval in ends)
        and not all(map(_is_key, program.out_avals))
        and _is_allowed(program.jaxpr)
    )


def _is_allowed(jaxpr: core.Jaxpr) -> bool:
    variables = [*jaxpr.invars, *jaxpr.constvars, *jaxpr.outvars]
    variables += [variable for equation in jaxpr.eqns for variable in equation.outvars]
    return (
        not jaxpr.effects
        and all(_has_allowed_type(variable.aval) for variable in variables)
        and all(equation.primitive.name in _ALLOWED for equation in jaxpr.eqns)
        and all(_is_allowed(inner) for e in jaxpr.eqns for inner in products.inner_programs(e))
    )


def _has_allowed_type(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and (_is_key(aval) or dtype.name in _TYPES)


_TYPES = {"bool", "int8", "int16", "int32", "uint8", "uint16", "uint32"}
_TYPES |= {"float16", "bfloat16", "float32"}

_ALLOWED = frozenset(
    re.findall(
        r"\w+",
        """
    abs acos acosh add add_any and argmax argmin asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    bitcast_convert_type broadcast_in_dim cbrt ceil clamp clz concatenate cond conv_general_dilated
    convert_element_type copy cos cosh cumlogsumexp cummax cummin cumprod cumsum custom_jvp_call
    custom_vjp_call digamma div dot_general dynamic_slice dynamic_update_slice empty empty2 eq eq_to erf
    erf_inv erfc exp exp2 expm1 floor gather ge gt igamma igamma_grad_a igammac integer_pow iota
    is_finite jit le le_to lgamma log log1p log2 logistic lt lt_to max min mul name ne neg nextafter not
    one_minus_square optimization_barrier or pad polygamma population_count pow random_bits random_fold_in random_gamma
    random_seed random_split random_unwrap random_wrap reduce_and reduce_max reduce_min
    reduce_or reduce_precision reduce_prod reduce_sum reduce_xor regularized_incomplete_beta rem remat2
    reshape rev round rsqrt scan select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh
    slice split sqrt square squeeze stack stop_gradient sub tan tanh threefry2x32 tile transpose unstack
    while xor zeta
    """,
    )
)
"""Names of the primitives that XLA can put into a kernel. A test tries each by itself. jax 0.10 does not have all of them."""
