"""The choice between a single kernel and plain compilation: by a rule where it is certain, and by timing elsewhere."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from a3c_jax import _compiled
from a3c_jax._compiled import choice, single_kernel

pytestmark = pytest.mark.skipif(
    os.environ.get("A3C_JAX_PLAIN") == "1" or jax.default_backend() != "cpu",
    reason="the machine room is switched off",
)


def programs_of(function, *arguments):
    return jax.make_jaxpr(function)(*arguments)


X, W = jnp.ones((3, 16)), jnp.ones((16, 16)) / 16


def scan(x, w):
    return lax.scan(lambda c, _: (jnp.tanh(c @ w), c.sum()), x, None, length=5)


def two_layers(x, w):
    return jnp.tanh(jnp.tanh(x @ w) @ w)


def record_what_is_compiled(monkeypatch, single_is_faster):
    made = []
    for name in ("compile_into_single_kernel", "compile_plainly"):
        function = getattr(single_kernel, name)
        monkeypatch.setattr(
            choice, name, lambda *a, f=function, n=name: made.append(n.split("_")[-1]) or f(*a)
        )
    monkeypatch.setattr(choice, "is_faster", lambda *_: made.append("timed") or single_is_faster)
    return made


def loop_of(width):
    x, w = jnp.ones((9, width)), jnp.ones((width, width)) / width
    return scan, x, w


@pytest.mark.parametrize("single_is_faster", [True, False])
def test_a_segment_with_thin_products_is_compiled_once_and_others_twice_and_timed(
    single_is_faster, monkeypatch
):
    made = record_what_is_compiled(monkeypatch, single_is_faster)
    assert _compiled.compile(*loop_of(8)).in_single_kernel
    assert made == ["kernel"]
    made.clear()
    assert _compiled.compile(*loop_of(16)).in_single_kernel == single_is_faster
    assert made == ["kernel", "plainly", "timed"]


def test_a_program_without_a_loop_or_with_large_products_is_compiled_plainly(monkeypatch):
    made = record_what_is_compiled(monkeypatch, True)
    assert not _compiled.compile(two_layers, X, W).in_single_kernel
    monkeypatch.setattr(choice, "MOST_WORK", 1000)
    assert not _compiled.compile(*loop_of(16)).in_single_kernel
    assert made == ["plainly", "plainly"]


@pytest.mark.parametrize("single_kernel", [True, False])
def test_the_caller_may_decide(single_kernel, monkeypatch):
    made = record_what_is_compiled(monkeypatch, not single_kernel)
    compiled = _compiled.compile(*loop_of(16), single_kernel=single_kernel)
    assert compiled.in_single_kernel == single_kernel
    assert made == ["kernel" if single_kernel else "plainly"]


def test_of_two_functions_the_faster_is_found():
    x = jnp.ones((200, 200))
    fast = jax.jit(lambda x: x + 1)
    slow = jax.jit(lambda x: lax.fori_loop(0, 50, lambda _, x: jnp.tanh(x @ x), x))
    assert choice.is_faster(fast, slow, [x])
    assert not choice.is_faster(slow, fast, [x])


def test_the_multiplications_of_a_program_are_counted_with_those_in_its_loops():
    def network(x, w):
        return lax.scan(lambda c, _: (c @ w, jnp.vdot(c, c)), x, None, length=5)

    work = list(choice.products(programs_of(network, jnp.ones((9, 16)), jnp.ones((16, 16))).jaxpr))
    assert sorted(work) == [(5 * 9 * 16, True), (5 * 9 * 16 * 16, False)]
    image, weights = jnp.ones((2, 10, 10, 3)), jnp.ones((3, 3, 3, 4))
    program = programs_of(
        lambda x, w: lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        image,
        weights,
    )
    assert list(choice.products(program.jaxpr)) == [(2 * 8 * 8 * 4 * 27, False)]
