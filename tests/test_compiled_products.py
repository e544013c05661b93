"""Matrix products for single kernels: every product of a traced program is found, replaced, and still right."""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core

from a3c_jax._compiled import products

pytestmark = pytest.mark.skipif(
    os.environ.get("A3C_JAX_PLAIN") == "1" or jax.default_backend() != "cpu",
    reason="the machine room is switched off",
)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def programs_of(function, *arguments):
    return jax.make_jaxpr(function)(*arguments)


X, W = normal(3, 16), normal(16, 16, seed=1) / 4

# Lengths on both sides of every threshold, and no multiples of a block.


def dense_layer(x, w):
    def loss(x, w):
        y = nn.Dense(w.shape[1], use_bias=False).apply({"params": {"kernel": w}}, x)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

    return jax.grad(loss, (0, 1), has_aux=True)(x, w)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(), (1,), (7,), (3, 5)])
@pytest.mark.parametrize(
    ("terms", "size"), [(1, 1), (4, 33), (9, 40), (40, 9), (128, 2), (33, 1), (64, 64)]
)
def test_the_products_of_a_plain_dense_layer_and_of_its_gradients_are_numpys(batch, terms, size):
    x, w = normal(*batch, terms), normal(terms, size, seed=1)
    program = products.rewrite(programs_of(dense_layer, x, w))
    assert not products.contains_products(program.jaxpr)
    dx, dw, y = core.jaxpr_as_fun(program)(x, w)
    x, w = np.float64(x), np.float64(w)
    dy = np.cos(np.arange(y.size)).reshape(y.shape)
    np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, dy @ w.T, rtol=1e-4, atol=1e-5)
    rows, columns = x.reshape(-1, terms), dy.reshape(-1, size)
    np.testing.assert_allclose(dw, rows.T @ columns, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("left", "right", "contract"),
    [
        ((12, 5), (12, 30), ((0,), (0,))),
        ((5, 12), (30, 12), ((1,), (1,))),
        ((12, 5), (30, 12), ((0,), (1,))),
        ((2, 12, 3), (4, 12, 11), ((1,), (1,))),
        ((4, 12, 3), (12, 10, 4), ((1, 0), (0, 2))),
        ((12,), (12, 20), ((0,), (0,))),
        ((20, 12), (12,), ((1,), (0,))),
        ((3, 12), (12,), ((1,), (0,))),
        ((40,), (40,), ((0,), (0,))),
    ],
)
def test_products_over_any_dimensions_are_replaced(left, right, contract):
    x, y = normal(*left), normal(*right, seed=1)
    program = programs_of(lambda x, y: lax.dot_general(x, y, (contract, ((), ()))), x, y)
    rewritten = products.rewrite(program)
    assert products.contains_products(program.jaxpr)
    assert "dot_general" not in str(rewritten)
    (actual,) = core.jaxpr_as_fun(rewritten)(x, y)
    expected = np.tensordot(np.float64(x), np.float64(y), contract)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.einsum("nij,njk->nik", x, x),
        lambda x: x[0].astype(jnp.bfloat16) @ x[1].astype(jnp.bfloat16),
        lambda x: x[0].astype(jnp.int32) @ x[1].astype(jnp.int32),
        lambda x: x[0, :, :4] @ x[1, :4],
        jnp.sin,
    ],
    ids=["batch", "bfloat16", "integers", "few terms", "none"],
)
def test_other_programs_stay_as_they_are(function):
    program = programs_of(function, normal(3, 20, 20))
    assert products.rewrite(program) is program


WRAPPERS = {
    "scan": lambda f: lambda x, w: lax.scan(lambda c, _: (f(c, w), c), x, None, length=3),
    "while": lambda f: (
        lambda x, w: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, f(c[1], w)), (0, x))
    ),
    "cond": lambda f: lambda x, w: lax.cond(x[0, 0] > 0, f, lambda x, w: f(x * 2, w), x, w),
    "jit": lambda f: lambda x, w: jax.jit(f)(jax.jit(f)(x, w), w),
    "checkpoint": lambda f: jax.grad(lambda x, w: jax.checkpoint(f)(x, w).sum()),
    "custom_jvp": lambda f: lambda x, w: jax.nn.relu(f(jax.nn.relu(x), w)),
    "custom_vjp": lambda f: jax.grad(lambda x, w: _with_own_gradient(f)(x, w).sum()),
    "vmap": lambda f: lambda x, w: jax.vmap(f, (0, None))(x, w),
    "closure": lambda f: lambda x, w: lax.map(lambda x: f(x, np.asarray(W)), x),
}


def _with_own_gradient(f):
    wrapped = jax.custom_vjp(f)
    wrapped.defvjp(lambda x, w: (f(x, w), w), lambda w, dy: (dy @ w.T, jnp.zeros_like(w)))
    return wrapped


@pytest.mark.parametrize("name", WRAPPERS)
def test_products_are_found_in_whatever_calls_them(name):
    function = WRAPPERS[name](lambda x, w: jnp.tanh(x @ w))
    program = programs_of(function, X, W)
    assert products.contains_products(program.jaxpr)
    rewritten = products.rewrite(program)
    assert "dot_general" not in str(rewritten)
    expected = jax.tree.leaves(function(X, W))
    actual = core.jaxpr_as_fun(rewritten)(X, W)
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_a_function_that_is_called_twice_stays_one():
    layer = jax.jit(lambda x, w: jnp.tanh(x @ w))
    program = products.rewrite(programs_of(lambda x, w: layer(layer(x, w), w), X, W))
    inner = [e.params["jaxpr"] for e in program.jaxpr.eqns if e.primitive.name in ("jit", "pjit")]
    assert len(inner) == 2
    assert inner[0] is inner[1]
