"""The choice between a single kernel and plain compilation: by a rule where it is certain, and by timing elsewhere."""

import functools
import os

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from a3c_jax import A3CConfig
from a3c_jax._compiled import choice
from a3c_jax._compiled import single_kernel as single_kernel_module
from a3c_jax.blueprint import make_blueprint

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


def compiled(function, *arguments, single_is_faster=True, single_kernel=None, **ways):
    """Whether a program becomes a single kernel, and what was done to find out."""
    made = []

    def recorded(name, compile_it):
        return lambda *given: made.append(name) or compile_it(*given)

    ways = choice.Ways(
        into_single_kernel=recorded("single", single_kernel_module.compile_into_single_kernel),
        plainly=recorded("plain", single_kernel_module.compile_plainly),
        is_faster=recorded("timed", lambda *_: single_is_faster),
    )._replace(**ways)
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    structure = jax.tree.structure(shapes)
    run, is_single = choice.compile_program(
        program, structure, list(arguments), single_kernel, ways
    )
    chex.assert_trees_all_close(run(*arguments), function(*arguments), rtol=1e-4)
    return is_single, made


def loop_of(width):
    x, w = jnp.ones((9, width)), jnp.ones((width, width)) / width
    return scan, x, w


@pytest.mark.parametrize("faster", [True, False])
def test_a_segment_with_thin_products_is_compiled_once_and_others_twice_and_timed(faster):
    assert compiled(*loop_of(8), single_is_faster=faster) == (True, ["single"])
    expected = (faster, ["single", "plain", "timed"])
    assert compiled(*loop_of(16), single_is_faster=faster) == expected


def test_a_program_without_a_loop_or_with_large_products_is_compiled_plainly():
    assert compiled(two_layers, X, W) == (False, ["plain"])
    assert compiled(*loop_of(16), most_work=1000) == (False, ["plain"])


@pytest.mark.parametrize("wish", [True, False])
def test_the_caller_may_decide(wish):
    result = compiled(*loop_of(16), single_is_faster=not wish, single_kernel=wish)
    assert result == (wish, ["single" if wish else "plain"])


def test_what_xla_refuses_after_all_is_compiled_plainly():
    into_single_kernel = functools.partial(
        single_kernel_module.compile_into_single_kernel, xla_cpu_an_option_of_another_version=True
    )
    result = compiled(*loop_of(8), into_single_kernel=into_single_kernel, single_kernel=True)
    assert result == (False, ["plain"])


@pytest.mark.slow
def test_of_two_functions_the_faster_is_found():
    x = jnp.ones((200, 200))
    fast = jax.jit(lambda x: x + 1)
    slow = jax.jit(lambda x: lax.fori_loop(0, 50, lambda _, x: jnp.tanh(x @ x), x))
    assert choice.is_faster(fast, slow, [x])
    assert not choice.is_faster(slow, fast, [x])


def test_the_multiplications_of_a_program_are_counted_with_those_in_its_loops():
    def network(x, w):
        return lax.scan(lambda c, _: (c @ w, jnp.vdot(c, c)), x, None, length=5)

    work = list(
        choice.matrix_products(programs_of(network, jnp.ones((9, 16)), jnp.ones((16, 16))).jaxpr)
    )
    assert sorted(work) == [(5 * 9 * 16, True), (5 * 9 * 16 * 16, False)]
    image, weights = jnp.ones((2, 10, 10, 3)), jnp.ones((3, 3, 3, 4))
    program = programs_of(
        lambda x, w: lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        image,
        weights,
    )
    assert list(choice.matrix_products(program.jaxpr)) == [(2 * 8 * 8 * 4 * 27, False)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"activation": "relu", "shared_torso": True},
        {"core": "lstm"},
        {"environment": "Pendulum-v1", "normalize_observations": True, "normalize_rewards": True},
        {"algorithm": "n_step_q"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())) or "default",
)
def test_the_worker_steps_of_usual_runs_may_become_a_single_kernel(fields):
    # A new version of JAX may differentiate by operations that the list does not have yet.
    blueprint = make_blueprint(A3CConfig(num_workers=1, hidden_sizes=(8,), **fields))
    state = jax.eval_shape(blueprint.start, jnp.uint32(0), jnp.int32(0))
    params = jax.eval_shape(blueprint.init, jnp.uint32(0), state.observation)
    assert single_kernel_module.can_be_single_kernel(
        programs_of(blueprint.worker_step, params, state)
    )
