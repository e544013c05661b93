"""The door: the same function as the one that went in, whatever mix of plain and packed trees it is called with."""

import os
import threading
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a3c_jax import A3CConfig, _compiled
from a3c_jax._compiled import process
from a3c_jax._compiled.function import threads_at_once
from a3c_jax.blueprint import make_blueprint
from a3c_jax.optimizers import make_updater

pytestmark = pytest.mark.skipif(
    os.environ.get("A3C_JAX_PLAIN") == "1", reason="the machine room is switched off"
)

TIMEOUT = 60.0


class Report(NamedTuple):
    values: dict[str, Any]
    count: Any


def step(params, state, scale):
    """Trees of floats, of mixed types with a key, and a number, to a tuple of all kinds of results."""
    key, noise_key = jax.random.split(state["key"])
    noise = jax.random.normal(noise_key, params["w"].shape)
    gradients = {"w": params["w"] * scale + noise, "b": params["b"] * state["count"]}
    state = {"key": key, "count": state["count"] + 1, "flag": ~state["flag"]}
    report = Report({"sum": gradients["w"].sum()}, state["count"])
    return gradients, state, gradients["b"][:2], report


def arguments():
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4)}
    state = {"key": jax.random.key(1), "count": jnp.int32(3), "flag": jnp.array([True, False])}
    return params, state, 0.5


def plain(results):
    return tuple(map(_compiled.unpack, results))


def assert_equal(actual, expected):
    def compare(x, y):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        if jnp.issubdtype(y.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)

    chex.assert_trees_all_equal_structs(actual, expected)
    jax.tree.map(compare, actual, expected)


@pytest.fixture(scope="module", params=[True, False], ids=["single kernel", "plainly"])
def compiled(request):
    return _compiled.compile(step, *arguments(), single_kernel=request.param)


def test_the_results_are_those_of_the_function(compiled):
    results = compiled(*arguments())
    kinds = [isinstance(result, _compiled.Packed) for result in results]
    assert kinds == [True, True, False, True]
    assert_equal(plain(results), step(*arguments()))


def test_plain_and_packed_arguments_may_be_mixed_call_by_call(compiled):
    params, state, scale = arguments()
    gradients, packed_state, _, _ = compiled(params, state, scale)
    expected = step(*plain((gradients, packed_state)), scale)
    for first in (gradients, _compiled.unpack(gradients)):
        for second in (packed_state, _compiled.unpack(packed_state)):
            for third in (scale, np.float32(scale), jnp.float32(scale)):
                assert_equal(plain(compiled(first, second, third)), expected)


def test_examples_may_be_packed(compiled):
    params, state, scale = arguments()
    gradients, packed_state, _, _ = compiled(params, state, scale)
    again = _compiled.compile(step, gradients, packed_state, scale, single_kernel=False)
    expected = step(*plain((gradients, packed_state)), scale)
    assert_equal(plain(again(gradients, packed_state, scale)), expected)


def test_it_is_compiled_before_it_is_called():
    traces = []

    def traced(params, state, scale):
        traces.append(1)
        return step(params, state, scale)

    compiled = _compiled.compile(traced, *arguments())
    assert len(traces) == 1
    results = compiled(*arguments())
    compiled(results[0], results[1], 0.25)
    assert len(traces) == 1


@pytest.mark.parametrize("single_kernel", [True, False])
def test_a_result_that_is_no_tuple_comes_back_as_it_is(single_kernel):
    x = jnp.arange(3.0)
    for function in (lambda x: x * 2, lambda x: {"one": x * 2}):
        result = _compiled.compile(function, x, single_kernel=single_kernel)(x)
        chex.assert_trees_all_equal(result, function(x))
    function = lambda x: Report({"a": x, "b": x}, jnp.int32(7))  # noqa: E731
    result = _compiled.compile(function, x, single_kernel=single_kernel)(x)
    assert int(result.count) == 7
    chex.assert_trees_all_equal(_compiled.unpack(result), function(x))
    assert _compiled.compile(lambda x: (), x)(x) == ()


def test_a_tree_that_cannot_be_packed_passes_plain_and_silently(capfd):
    state = {"small": jnp.ones(3, jnp.int4), "other": jnp.ones(2)}
    function = lambda s: (s, s["other"] * 2)  # noqa: E731
    compiled = _compiled.compile(function, state)
    results = compiled(state)
    assert not isinstance(results[0], _compiled.Packed)
    chex.assert_trees_all_equal(results, function(state))
    assert capfd.readouterr() == ("", "")


def test_another_shape_is_refused(compiled):
    params, state, scale = arguments()
    with pytest.raises(ValueError, match="like the example's"):
        compiled({**params, "b": jnp.ones(5)}, state, scale)
    alone = _compiled.compile(lambda x: x * 2, jnp.ones(3))
    with pytest.raises(TypeError, match="must be like those that it was compiled for"):
        alone(jnp.ones(4))


def test_an_error_of_the_function_itself_is_raised():
    def broken(x):
        raise ArithmeticError("broken")

    with pytest.raises(ArithmeticError, match="broken"):
        _compiled.compile(broken, jnp.ones(3))


def test_arguments_and_earlier_results_stay_as_they_were(compiled):
    given = arguments()
    first = compiled(*given)
    bits = [np.array(x.vector) for x in first[:2]]
    for _ in range(5):
        compiled(*first[:2], 0.5)
    for result, before in zip(first[:2], bits, strict=True):
        np.testing.assert_array_equal(result.vector, before)
    chex.assert_trees_all_equal(given[0], arguments()[0])


def test_several_threads_each_get_their_own_results(compiled):
    params, state, _ = arguments()
    inputs = [compiled(params, state, float(n))[:2] for n in range(4)]
    expected = [np.array(compiled(*given, 0.5)[0].vector) for given in inputs]
    errors, done = [], []

    def work(n):
        try:
            for _ in range(100):
                np.testing.assert_array_equal(compiled(*inputs[n], 0.5)[0].vector, expected[n])
            done.append(n)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not errors, errors[0]
    assert sorted(done) == [0, 1, 2, 3]


@pytest.mark.parametrize("off", ["environment variable", "another backend"])
def test_switched_off_it_is_jit_on_trees(off, monkeypatch):
    made, jit = [], jax.jit
    if off == "another backend":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    else:
        monkeypatch.setenv(process.PLAIN, "1")
    monkeypatch.setattr(
        jax, "jit", lambda *a, **options: made.append((a, options)) or jit(*a, **options)
    )
    compiled = _compiled.compile(step, *arguments())
    _compiled.compile_for_few_calls(step)
    assert made == [((step,), {})] * 2
    assert not compiled.in_single_kernel
    assert compiled.max_concurrent_calls(16, *arguments()) is None
    results = compiled(*arguments())
    assert not any(isinstance(result, _compiled.Packed) for result in results)
    assert_equal(results, jit(step)(*arguments()))


def test_compiled_for_few_calls_it_computes_the_same():
    assert_equal(_compiled.compile_for_few_calls(step)(*arguments()), step(*arguments()))


@pytest.mark.parametrize(
    ("seconds", "cores", "expected"),
    [(70e-6, 4, 2), (230e-6, 4, 3), (900e-6, 4, 4), (10e-6, 3, 2), (1e-3, 16, 12), (0.1, 16, 16)],
)
def test_short_calls_leave_room_for_fewer_threads_than_cores(seconds, cores, expected):
    assert threads_at_once(64, cores, lambda: seconds) == expected


@pytest.mark.parametrize(("cores", "num_threads"), [(2, 16), (4, 2)])
def test_nothing_is_timed_if_there_are_no_more_than_two_threads_or_cores(cores, num_threads):
    assert threads_at_once(num_threads, cores, lambda: pytest.fail("timed")) == cores


def test_only_a_single_kernel_limits_how_many_threads_call_it():
    for single_kernel in (True, False):
        compiled = _compiled.compile(step, *arguments(), single_kernel=single_kernel)
        limit = compiled.max_concurrent_calls(64, *arguments())
        assert (limit is not None) == single_kernel


# What the machine room is for: the default configuration's worker step and its update.


@pytest.fixture(scope="module")
def default():
    blueprint = make_blueprint(A3CConfig(num_workers=2, envs_per_worker=4, t_max=8))
    state = jax.jit(blueprint.start)(np.uint32(0), np.int32(0))
    params = jax.jit(blueprint.init)(np.uint32(0), state.observation)
    return blueprint, params, state


@pytest.mark.slow
def test_the_defaults_worker_step_is_a_single_kernel_and_its_update_is_not(default, capfd):
    blueprint, params, state = default
    step = _compiled.compile(blueprint.worker_step, params, state)
    assert step.in_single_kernel
    assert capfd.readouterr() == ("", "")
    expected = jax.jit(blueprint.worker_step)(params, state)
    results = step(params, state)
    assert_equal_but_for_last_bits(plain(results), expected)
    assert int(results[2].num_episodes) == int(expected[2].num_episodes)
    np.testing.assert_array_equal(results[2].episodes.ended, expected[2].episodes.ended)

    updater = make_updater(blueprint.optimizer(1e-3))
    optimizer_state = _compiled.compile(updater.init, params)(params)
    update = _compiled.compile(updater.update, results[0], optimizer_state, params, 0)
    assert not update.in_single_kernel
    moved, optimizer_state, _ = update(results[0], optimizer_state, params, 1)
    assert bool(optimizer_state.finite)
    bad = jax.tree.map(lambda x: x * jnp.nan, _compiled.unpack(results[0]))
    same, optimizer_state, _ = update(bad, optimizer_state, moved, 0)
    assert not optimizer_state.finite
    np.testing.assert_array_equal(same.vector, moved.vector)


def assert_equal_but_for_last_bits(actual, expected):
    def compare(x, y):
        if jnp.issubdtype(y.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)

    jax.tree.map(compare, actual, expected)


def test_a_segment_gives_the_same_bits_call_after_call(default):
    blueprint, params, state = default
    step = _compiled.compile(blueprint.worker_step, params, state)
    first = [np.array(result.vector) for result in step(params, state)]
    for _ in range(10):
        for result, before in zip(step(params, state), first, strict=True):
            np.testing.assert_array_equal(result.vector, before)
