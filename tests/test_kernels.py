"""Compiling into a single kernel: the same function as `jax.jit`, one kernel, or `jax.jit` itself."""

import functools
import re
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import xla_metadata

from a3c_jax import kernels

TIMEOUT = 30.0
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU has such kernels")


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
    words = i.astype(jnp.uint32) * jnp.uint32(2654435761)  # wraps around
    return i // 3, i % 3, words, words >> 7, i.astype(jnp.int8), jnp.argmax(i % 5), jnp.cumsum(i)


def booleans(x, i):
    return (x > 0) & (x[:, ::-1] < 1), jnp.any(x > 9), jnp.isnan(x / 0 * 0), i == i[::-1], ~(i > 4)


def not_finite(x):
    y = (x - x) / (x - x)  # NaN, and then what a compiler that believes in no NaN would fold away
    return (
        y,
        jnp.isnan(y),
        y == y,
        jnp.where(jnp.isnan(y), -1.0, y),
        jnp.exp(x + 1e3),
        -jnp.abs(x) * 0,
    )


def moves(x, i):
    gathered = x[i % 3]
    halves = jnp.split(gathered, 2, axis=1)
    return jnp.concatenate([h.T.ravel() for h in halves]), lax.bitcast_convert_type(x, jnp.uint32)


# Products of smaller matrices XLA does itself, so that they could join a kernel in any case.
X, W, COUNT = normal(3, 16), normal(16, 16, seed=1) / 4, jnp.arange(-4, 8)
PROGRAMS = {
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
}

# What XLA 0.10 cannot put into a kernel. (A convolution it can, when this was written.)
REFUSED = {
    "sort": (jnp.sort, X),
    "scatter": (lambda x: x.at[jnp.array([2, 0, 2])].add(1.0), X),
    "top_k": (lambda x: lax.top_k(x, 2), X),
    "cholesky": (lambda w: jnp.linalg.cholesky(w @ w.T + jnp.eye(16)), W),
    "fft": (lambda x: jnp.fft.fft(x).real, X),
    "convolution": (lambda x: lax.conv(x[None, None], W[None, None], (1, 1), "SAME"), X),
    "callback": (lambda x: jax.pure_callback(lambda x: np.asarray(x) * 2, x, x), X),
}


@functools.cache
def compiled_program(name):
    return kernels.compile_fused(*PROGRAMS[name])


def assert_equal_but_for_last_bits(actual, expected):
    """Integers and bools exactly; floats to a few units in the last place; NaN where NaN is."""

    def compare(x, y):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        if jnp.issubdtype(y.dtype, jnp.floating):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(x, y)

    chex.assert_trees_all_equal_structs(actual, expected)
    jax.tree.map(compare, actual, expected)


def entry_operations(compiled):
    """The operations of an optimized program's entry, but for what only names or moves data.

    XLA makes at least one kernel of each, except that it emits all that a `call` with these marks calls
    as a single one.
    """
    text = compiled.as_text()
    entry = text[text.index("\nENTRY ") :]
    instructions = re.findall(
        r"^ +(?:ROOT )?%\S+ = (.*)", entry[: entry.index("\n}")], re.MULTILINE
    )
    moves = {"parameter", "copy", "bitcast", "tuple", "get-tuple-element"}
    operations = []
    for instruction in instructions:
        while instruction.startswith("("):  # a tuple's type
            instruction = re.sub(r"^\([^()]*\) ", "", instruction)
        opcode = re.search(r"([a-z][a-z0-9-]*)\(", instruction)[1]
        if opcode == "call" and 'xla_cpu_small_call="true"' in instruction:
            opcode = "kernel" if 'inlineable="false"' in instruction else "inlined kernel"
        if opcode not in moves:
            operations.append(opcode)
    return operations


def refuse(*_, **__):
    raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: Unhandled opcode")


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_computes_what_jit_computes_and_is_one_kernel(name):
    function, *arguments = PROGRAMS[name]
    compiled = compiled_program(name)
    assert_equal_but_for_last_bits(compiled(*arguments), jax.jit(function)(*arguments))
    if jax.default_backend() == "cpu":
        assert entry_operations(compiled) == ["kernel"]


@on_cpu
@pytest.mark.parametrize("name", ["two_layers", "gradients"])
def test_jit_makes_several_kernels_of_the_same_program_so_that_the_test_above_can_fail(name):
    function, *arguments = PROGRAMS[name]
    operations = entry_operations(jax.jit(function).lower(*arguments).compile())
    assert len(operations) > 1
    assert "kernel" not in operations


def test_it_computes_with_the_arguments_of_the_call_and_not_of_the_compilation():
    compiled = kernels.compile_fused(two_layers, jnp.zeros_like(X), jnp.zeros_like(W))
    expected = np.tanh(np.tanh(np.float64(X) @ np.float64(W)) @ np.float64(W).T + 0.5)
    np.testing.assert_allclose(compiled(X, W), expected, rtol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_xla_cannot_put_into_a_kernel_is_computed_all_the_same(name):
    function, *arguments = REFUSED[name]
    compiled = kernels.compile_fused(function, *arguments)
    assert_equal_but_for_last_bits(compiled(*arguments), jax.jit(function)(*arguments))


def test_where_xla_refuses_a_program_it_is_compiled_as_jit_does(monkeypatch):
    expected = jax.jit(gradients)(X, W)
    with monkeypatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", refuse)
        compiled = kernels.compile_fused(gradients, X, W)
    chex.assert_trees_all_equal(compiled(X, W), expected)
    if jax.default_backend() == "cpu":
        assert "kernel" not in entry_operations(compiled.lower(X, W).compile())


@on_cpu
def test_an_xla_that_does_not_know_an_option_compiles_as_jit_does(monkeypatch):
    monkeypatch.setitem(kernels._OPTIONS, "xla_cpu_an_option_of_another_version", True)
    compiled = kernels.compile_fused(gradients, X, W)
    chex.assert_trees_all_equal(compiled(X, W), jax.jit(gradients)(X, W))


def test_an_error_of_the_function_itself_is_raised_and_not_taken_for_xlas():
    traces = []

    def broken(x):
        traces.append(x)
        raise ArithmeticError("broken")

    with pytest.raises(ArithmeticError, match="broken"):
        kernels.compile_fused(broken, X)
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["compile_fused", "jit_for_one_call"])
def test_on_another_backend_than_cpu_it_is_jit_without_marks_or_options(name, monkeypatch):
    jit, made = jax.jit, []

    def recording_jit(*arguments, **options):
        made.append((arguments, options))
        return jit(*arguments, **options)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "jit", recording_jit)
    arguments = (X, W) if name == "compile_fused" else ()
    compiled = getattr(kernels, name)(two_layers, *arguments)
    assert made == [((two_layers,), {})]
    monkeypatch.undo()
    assert "xla_cpu" not in compiled.lower(X, W).as_text()
    np.testing.assert_array_equal(compiled(X, W), jax.jit(two_layers)(X, W))


def test_the_marks_end_with_the_compilation():
    kernels.compile_fused(lambda x: jnp.tanh(x), X)
    with xla_metadata.set_xla_metadata(after="yes"):
        text = jax.jit(lambda x: jnp.sin(x)).lower(X).as_text()
    assert 'after = "yes"' in text
    assert "xla_cpu_small_call" not in text


@pytest.mark.parametrize("name", ["gradients", "random_numbers"])
def test_equal_inputs_give_equal_bits_call_after_call(name):
    _, *arguments = PROGRAMS[name]
    compiled = compiled_program(name)
    first = jax.tree.map(np.array, compiled(*arguments))
    for _ in range(20):
        chex.assert_trees_all_equal(compiled(*arguments), first)


# Matrix products inside a kernel. Lengths on both sides of every threshold, and no multiples of a block.


def dense_layer(x, w):
    def loss(x, w):
        y = kernels.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

    return jax.grad(loss, (0, 1), has_aux=True)(x, w)


@pytest.mark.parametrize("batch", [(), (1,), (7,), (3, 5)])
@pytest.mark.parametrize(
    ("terms", "size"), [(1, 1), (4, 33), (9, 40), (40, 9), (128, 2), (33, 1), (64, 64)]
)
def test_a_dense_layer_inside_a_kernel_is_that_of_numpy_and_so_are_its_gradients(
    batch, terms, size
):
    x, w = normal(*batch, terms), normal(terms, size, seed=1)
    compiled = kernels.compile_fused(dense_layer, x, w)
    if jax.default_backend() == "cpu":  # a result that is transposed last may be a second one
        assert entry_operations(compiled) in (["kernel"], ["kernel", "fusion"])
    (dx, dw), y = compiled(x, w)
    x, w = np.float64(x), np.float64(w)
    dy = np.cos(np.arange(y.size)).reshape(y.shape)
    np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, dy @ w.T, rtol=1e-4, atol=1e-5)
    rows, columns = x.reshape(-1, terms), dy.reshape(-1, size)
    np.testing.assert_allclose(dw, rows.T @ columns, rtol=1e-4, atol=1e-5)


def test_outside_a_kernel_a_product_is_that_of_jax():
    x, w = normal(7, 40), normal(40, 40)
    kernels.compile_fused(dense_layer, x, w)  # what it sets ends with it

    def plain(x, w):
        return lax.dot_general(x, w, (((1,), (0,)), ((), ())))

    def ours(x, w):
        return kernels.dot_general(x, w, (((1,), (0,)), ((), ())))

    assert str(jax.make_jaxpr(ours)(x, w)) == str(jax.make_jaxpr(plain)(x, w))


def test_a_product_that_is_no_dense_layers_is_that_of_jax_inside_too():
    x, w = normal(5, 40), normal(9, 40, seed=1)
    transposed = (((1,), (1,)), ((), ()))
    compiled = kernels.compile_fused(lambda x, w: kernels.dot_general(x, w, transposed), x, w)
    np.testing.assert_allclose(compiled(x, w), np.float64(x) @ np.float64(w).T, rtol=1e-4)


def test_where_xla_refuses_the_products_are_those_of_jax_again(monkeypatch):
    x, w = normal(7, 40), normal(40, 40)
    with monkeypatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", refuse)
        compiled = kernels.compile_fused(dense_layer, x, w)
    assert "while" not in compiled.lower(x, w).as_text()
    chex.assert_trees_all_equal(compiled(x, w), jax.jit(dense_layer)(x, w))


def test_arguments_and_earlier_results_stay_as_they_were():
    compiled = kernels.compile_fused(lambda x, w: (x + 1, x @ w), X, W)
    x, w = X + 0, W + 0
    results = [compiled(x + n, w) for n in range(10)]
    assert not x.is_deleted()
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(w, W)
    for n, (plus_one, _) in enumerate(results):
        np.testing.assert_array_equal(plus_one, (X + n) + 1)


def test_several_threads_call_the_same_program_and_each_gets_its_own_results():
    num_threads, calls = 4, 200
    compiled = compiled_program("gradients")
    inputs = [normal(3, 16, seed=seed) for seed in range(num_threads)]
    expected = [jax.tree.map(np.array, compiled(x, W)) for x in inputs]
    barrier, errors, done = threading.Barrier(num_threads), [], []

    def work(n):
        try:
            barrier.wait(TIMEOUT)
            for _ in range(calls):
                chex.assert_trees_all_equal(compiled(inputs[n], W), expected[n])
            done.append(n)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not errors, errors[0]
    assert sorted(done) == list(range(num_threads))


@pytest.mark.parametrize("name", ["gradients", "sort"])
def test_what_is_compiled_for_one_call_computes_what_jit_computes(name):
    function, *arguments = (PROGRAMS | REFUSED)[name]
    actual = kernels.jit_for_one_call(function)(*arguments)
    assert_equal_but_for_last_bits(actual, jax.jit(function)(*arguments))
