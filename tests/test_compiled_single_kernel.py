"""Compiling into a single kernel: what `jax.jit` computes, as one kernel, or known beforehand to be impossible."""

import os
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import xla_metadata

from a3c_jax import _compiled
from a3c_jax._compiled import single_kernel
from a3c_jax.config import available_cores

pytestmark = pytest.mark.skipif(
    os.environ.get("A3C_JAX_PLAIN") == "1" or jax.default_backend() != "cpu",
    reason="the machine room is switched off",
)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def two_layers(x, w):
    return jnp.tanh(jnp.tanh(x @ w) @ w.T + 0.5)


def scan(x, w):
    def step(carry, _):
        carry = jnp.tanh(carry @ w)
        return carry, carry.sum(axis=-1)

    return lax.scan(step, x, None, length=5)


def branches(x):
    return [lax.cond(b, lambda x: x * 2, lambda x: x - 1, x) for b in (x[0, 0] < 9, x[0, 0] > 9)]


def loop(x):
    return lax.while_loop(lambda c: c[1].max() < 50, lambda c: (c[0] + 1, c[1] * 1.5), (0, x + 9))


def random_numbers(seed):
    a, b, c, d = jax.random.split(jax.random.key(seed), 4)
    logits = jax.random.normal(a, (6, 3))
    return {
        "normal": logits,
        "bits": jax.random.bits(b, (5,)),
        "categorical": jax.random.categorical(c, logits),
        "uniform": jax.random.uniform(d, (2, 2)),
    }


def gradients(x, w):
    def loss(w):
        _, sums = scan(x, w)
        return jnp.mean(jnp.square(sums)) + jnp.mean(jax.nn.logsumexp(two_layers(x, w), axis=-1))

    return jax.value_and_grad(loss)(w)


def integers(i):
    bits = i.astype(jnp.uint32) * jnp.uint32(2654435761)  # wraps around
    return i // 3, i % 3, bits, bits >> 7, i.astype(jnp.int8), jnp.argmax(i % 5), jnp.cumsum(i)


def booleans(x, i):
    return (x > 0) & (x[:, ::-1] < 1), jnp.any(x > 9), jnp.isnan(x / 0 * 0), i == i[::-1], ~(i > 4)


def not_finite(x):
    y = (x - x) / (x - x)  # NaN, and then what a compiler that believes in no NaN would fold away
    where = jnp.where(jnp.isnan(y), -1.0, y)
    return y, jnp.isnan(y), y == y, where, jnp.exp(x + 1e3), -jnp.abs(x) * 0


def moves(x, i):
    gathered = x[i % 3]
    halves = jnp.split(gathered, 2, axis=1)
    return jnp.concatenate([h.T.ravel() for h in halves]), lax.bitcast_convert_type(x, jnp.uint32)


UNARY = re.findall(
    r"\w+",
    """
    abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma erf erf_inv erfc exp
    exp2 expm1 floor is_finite lgamma log log1p logistic neg round rsqrt sign sin sinh sqrt square tan tanh
    """,
)
BINARY = re.findall(
    r"\w+",
    """
    add atan2 div eq ge gt igamma igamma_grad_a igammac le lt max min mul ne nextafter polygamma pow
    random_gamma_grad rem sub zeta
    """,
)
OF_INTEGERS = re.findall(
    r"\w+",
    """
    bitwise_and bitwise_or bitwise_xor div max min rem shift_left shift_right_arithmetic shift_right_logical
    """,
)


def many_operations(x, i):
    x, y, j = jnp.abs(x) / 2 + 0.1, jnp.abs(x[::-1]) / 2 + 0.2, jnp.abs(i[::-1]) % 5 + 1
    results = {name: getattr(lax, name)(x) for name in UNARY}
    results |= {name: getattr(lax, name)(x, y) for name in BINARY}
    results |= {name + "_i": getattr(lax, name)(i, j) for name in OF_INTEGERS}
    results |= {name: getattr(lax, name)(x) for name in ("cumsum", "cumprod", "cummax", "cummin")}
    results |= {name: getattr(jnp, name)(x, 0) for name in ("sum", "prod", "max", "argmax", "any")}
    results["counts"] = lax.population_count(i), lax.clz(i), ~i
    results["stacked"] = jnp.unstack(jnp.stack([x, y, x * y]))[1:]
    results["tiled"] = jnp.tile(jnp.pad(x, ((1, 2), (0, 0))), (2, 1))
    return results


X, W, COUNT, ONE = normal(3, 16), normal(16, 16, seed=1) / 4, jnp.arange(-4, 8), jnp.ones(1)
POSSIBLE = {
    "two_layers": (two_layers, X, W),
    "scan": (scan, X, W),
    "branches": (branches, X),
    "loop": (loop, X),
    "random_numbers": (random_numbers, jnp.uint32(7)),
    "gradients": (gradients, X, W),
    "integers": (integers, COUNT),
    "booleans": (booleans, X, COUNT),
    "not_finite": (not_finite, X),
    "moves": (moves, X, COUNT),
    "many_operations": (many_operations, X, COUNT),
    "many_operations_in_a_loop": (
        lambda x, i: lax.map(lambda k: many_operations(x * k, i + 1), jnp.ones(2)),
        X,
        COUNT,
    ),
    # XLA splits long arrays over its threads by default.
    "long": (lambda x: jnp.tanh(jnp.ones((300, 3000)) * x[0, 0]).sum(), X),
    "outer": (lambda x: jnp.tanh(jnp.outer(x, x)) @ jnp.ones((300, 300)), jnp.ones(300)),
    # With these XLA would end the process: it finds out that an input does not matter.
    "one_element": (jnp.argmax, ONE),
    "one_of_one": (lambda x, i: x[i], ONE, COUNT),
    "updated_whole": (lambda x, i: lax.dynamic_update_slice(x, x * 2, (i[5],)), X[0], COUNT),
    "nothing": (lambda x: jnp.sum(x[:0]), X),
    "zero": (lambda x, i: x * 2 + 0 * i[0], X, COUNT),
}

IMPOSSIBLE = {
    "sort": (jnp.sort, X),
    "scatter": (lambda x: x.at[jnp.array([2, 0, 2])].add(1.0), X),
    "set_the_only_element": (lambda x: x.at[0].set(5.0), ONE),
    "top_k": (lambda x: lax.top_k(x, 2), X),
    "cholesky": (lambda w: jnp.linalg.cholesky(w @ w.T + jnp.eye(16)), W),
    "fft": (lambda x: jnp.fft.fft(x).real, X),
    "callback": (lambda x: jax.pure_callback(lambda x: np.asarray(x) * 2, x, x), X),
    "print": (lambda x: (jax.debug.print(""), x * 2)[1], X),
    "own_reduction": (
        lambda x: lax.reduce(x, 0.0, lambda a, b: jnp.where(b > a, b, a * 0.5), (0,)),
        X,
    ),
    "pairs": (
        lambda x: lax.reduce(
            (x, jnp.arange(16)),
            (jnp.inf, 0),
            lambda a, b: tuple(jnp.where(b[0] < a[0], y, x) for x, y in zip(a, b, strict=True)),
            (0,),
        ),
        X[0],
    ),
    "complex": (lambda x: jnp.abs(jnp.exp(1j * x)), X),
    "no_elements": (lambda x: (x[:0], x), X),
    "inside_a_loop": (lambda x: lax.scan(lambda c, _: (jnp.sort(c), 0), x, None, length=3)[0], X),
    "inside_a_branch": (lambda x: lax.cond(x[0, 0] > 0, jnp.sort, lambda x: x, x), X),
}


def programs_of(function, *arguments):
    return jax.make_jaxpr(function)(*arguments)


def compiled_both(function, *arguments):
    program, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    structure = jax.tree.structure(shape)
    return (
        single_kernel.compile_into_single_kernel(program, structure, list(arguments)),
        single_kernel.compile_plainly(program, structure, list(arguments)),
    )


def assert_equal_but_for_last_bits(actual, expected):
    """Integers and bools exactly; floats to a few units in the last place; NaN where NaN is."""

    def compare(x, y):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        if jnp.issubdtype(y.dtype, jnp.floating):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(x, y)

    chex.assert_trees_all_equal_structs(actual, expected)
    jax.tree.map(compare, actual, expected)


def entry_operations(compiled, *arguments):
    """The operations of an optimized program's entry, but for what only names or moves data.

    XLA makes at least one kernel of each, except that it emits all that a `call` with the marks calls as one.
    """
    text = compiled.lower(*arguments).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    lines = re.findall(r"^ +(?:ROOT )?%\S+ = (.*)", entry[: entry.index("\n}")], re.MULTILINE)
    operations = []
    for line in lines:
        while line.startswith("("):  # a tuple's type
            line = re.sub(r"^\([^()]*\) ", "", line)
        opcode = re.search(r"([a-z][a-z0-9-]*)\(", line)[1]
        if opcode == "call" and 'xla_cpu_small_call="true"' in line:
            opcode = "single kernel" if 'inlineable="false"' in line else "inlined"
        if opcode not in {"parameter", "copy", "bitcast", "tuple", "get-tuple-element"}:
            operations.append(opcode)
    return operations


def possible():
    slow = {"many_operations_in_a_loop"}  # as "many_operations" and "scan" together
    return [pytest.param(n, marks=pytest.mark.slow if n in slow else ()) for n in POSSIBLE]


@pytest.mark.parametrize("name", possible())
def test_it_computes_what_jit_computes_and_is_one_kernel(name, capfd):
    function, *arguments = POSSIBLE[name]
    assert single_kernel.can_be_single_kernel(programs_of(function, *arguments))
    single, plain = compiled_both(function, *arguments)
    assert_equal_but_for_last_bits(single(*arguments), plain(*arguments))
    assert entry_operations(single, *arguments) == ["single kernel"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["two_layers", "gradients"])
def test_plainly_several_are_made_of_the_same_program_so_that_the_test_above_can_fail(name):
    function, *arguments = POSSIBLE[name]
    operations = entry_operations(jax.jit(function), *arguments)
    assert len(operations) > 1
    assert "single kernel" not in operations


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_one_kernel_is_known_beforehand_and_compiled_plainly(name, capfd):
    function, *arguments = IMPOSSIBLE[name]
    assert not single_kernel.can_be_single_kernel(programs_of(function, *arguments))
    expected = jax.jit(function)(*arguments)
    capfd.readouterr()
    compiled = _compiled.compile(function, *arguments, single_kernel=True)
    assert not compiled.in_single_kernel
    results = compiled(*arguments)
    results = tuple(map(_compiled.unpack, results)) if type(results) is tuple else results
    assert_equal_but_for_last_bits(_compiled.unpack(results), expected)
    assert capfd.readouterr().err == ""


def test_the_marks_end_with_the_compilation():
    compiled_both(lambda x: jnp.tanh(x), X)
    with xla_metadata.set_xla_metadata(after="yes"):
        text = jax.jit(lambda x: jnp.sin(x)).lower(X).as_text()
    assert 'after = "yes"' in text
    assert "xla_cpu_small_call" not in text


# Plainly.


def long_arrays(x, w):
    """A loop that XLA finds worth splitting, and a matrix product."""
    return jnp.tanh(2 * jnp.tanh(x)), x @ w


def test_plainly_no_loop_is_split_over_the_threads_of_xla():
    x, w = normal(1024, 1024), normal(1024, 64, seed=1)
    split = jax.jit(long_arrays)
    compiled = single_kernel.compile_plainly(
        programs_of(long_arrays, x, w), jax.tree.structure((0, 0)), [x, w]
    )
    chex.assert_trees_all_equal(compiled(x, w), split(x, w))
    parts = [
        re.findall(r'"outer_dimension_partitions":\["', f.lower(x, w).compile().as_text())
        for f in (compiled, split)
    ]
    assert parts[0] == []
    if available_cores() > 1:  # otherwise there is nothing to switch off
        assert parts[1] != []


def test_plainly_an_error_of_the_program_itself_is_raised():
    def fails(x):
        raise ValueError("my own error")

    program = programs_of(lambda x: jax.pure_callback(fails, jax.typeof(x), x) + 1, X)
    with pytest.raises(Exception, match="my own error"):
        single_kernel.compile_plainly(program, jax.tree.structure(0), [X])


def test_plainly_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(single_kernel, "_UNSPLIT", {"xla_unheard_of": "yes"})
    compiled = single_kernel.compile_plainly(programs_of(jnp.sin, X), jax.tree.structure(0), [X])
    chex.assert_trees_all_equal(compiled(X), jnp.sin(X))
