"""The packed worker step: what the pure one computes, over two vectors, and a report read on the host."""

import gc
import threading
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import Probe
from test_kernels import entry_operations, on_cpu

from a3c_jax import A3CConfig, kernels
from a3c_jax.agent import make_agent
from a3c_jax.rollout import Episodes
from a3c_jax.worker import PackedWorkerStep, Statistics

TIMEOUT = 30.0


def test_rewards_are_clipped_for_learning_and_reported_as_they_were():
    large = Probe(2, lambda sign, action, last: 3.0 * sign + 0.5 * last)
    clipped = Probe(2, lambda sign, action, last: jnp.clip(3.0 * sign + 0.5 * last, -0.7, 0.7))
    config = A3CConfig(
        num_workers=1, envs_per_worker=4, t_max=6, hidden_sizes=(4,), reward_clip=0.7
    )
    agent, same = make_agent(config, environment=large), make_agent(config, environment=clipped)
    gradients, _, (_, episodes) = jax.jit(agent.worker_step)(agent.params, agent.states[0])
    expected, _, _ = jax.jit(same.worker_step)(same.params, same.states[0])
    chex.assert_trees_all_close(gradients, expected, rtol=1e-5, atol=1e-6)
    returns = np.asarray(episodes.episode_return)[np.asarray(episodes.ended)]
    assert set(returns.tolist()) == {6.5, -5.5}


# First a worker step whose results can be told beforehand. Which episodes end is part of its state.

T, N, P = 3, 4, 5
PARAMS = {"w": jnp.arange(4.0).reshape(2, 2), "b": jnp.array([-7.5])}
RETURNS = np.arange(T * N, dtype=np.float32).reshape(T, N) * 1.5 - 4.0
LENGTHS = np.arange(T * N, dtype=np.int32).reshape(T, N) + 100


class State(NamedTuple):
    key: jax.Array
    ended: jax.Array
    loss: jax.Array
    calls: jax.Array


def told_step(params, state):
    key, _ = jax.random.split(state.key)
    gradients = jax.tree.map(lambda x: 2 * x + state.loss, params)
    # Not in alphabetical order, and one of another type.
    metrics = {"loss": state.loss, "entropy": jnp.sum(params["b"]), "calls": state.calls}
    episodes = Episodes(state.ended, jnp.asarray(RETURNS), jnp.asarray(LENGTHS))
    next_state = State(key, ~state.ended, state.loss * 3, state.calls + 1)
    return gradients, next_state, Statistics(metrics, episodes)


def told_state(ended=((0,) * N,) * T, loss=0.25, calls=7):
    return State(jax.random.key(5), jnp.array(ended, bool), jnp.float32(loss), jnp.int32(calls))


def told_variant(max_work):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "MAX_WORK", max_work)
        return PackedWorkerStep(told_step, PARAMS, told_state())


@pytest.fixture(scope="module")
def told():
    return told_variant(10**6)


def test_a_call_returns_the_gradients_the_state_and_the_report_worked_by_hand(told):
    state = told_state([[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]])
    gradients, packed_state, report = told(told.flatten(PARAMS), told.pack_state(state))
    # Twice the parameters, plus a loss of 0.25; b, then w.
    np.testing.assert_array_equal(gradients, [-14.75, 0.25, 2.25, 4.25, 6.25])
    expected = told_state(~state.ended, loss=0.75, calls=8)
    expected = expected._replace(key=jax.random.split(state.key)[0])
    np.testing.assert_array_equal(packed_state, told.pack_state(expected))
    assert told.metrics(report) == {"loss": 0.25, "entropy": -7.5, "calls": 7.0}
    returns, lengths = told.episodes(report)
    np.testing.assert_array_equal(returns, [-2.5, 8.0, 12.5])  # of steps 1, 8 and 11
    np.testing.assert_array_equal(lengths, [101, 108, 111])


def test_the_vector_of_parameters_goes_back_to_their_tree_bit_for_bit(told):
    flat = told.flatten(PARAMS)
    assert flat.shape == (P,)
    tree = told.unflatten(flat)
    chex.assert_trees_all_equal_structs(tree, PARAMS)
    chex.assert_trees_all_equal(tree, PARAMS)
    np.testing.assert_array_equal(told.flatten(tree), flat)


PATTERNS = {
    "none": np.zeros((T, N), bool),
    "first": np.arange(T * N).reshape(T, N) == 0,
    "last": np.arange(T * N).reshape(T, N) == T * N - 1,
    "one environment": np.arange(T * N).reshape(T, N) % N == 2,
    "one step": np.arange(T * N).reshape(T, N) // N == 1,
    "every other": np.arange(T * N).reshape(T, N) % 2 == 1,
    "all": np.ones((T, N), bool),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_exactly_the_episodes_that_ended_are_reported_step_by_step(name, told):
    ended = PATTERNS[name]
    _, _, report = told(told.flatten(PARAMS), told.pack_state(told_state(ended)))
    returns, lengths = told.episodes(report)
    steps = [(t, n) for t in range(T) for n in range(N) if ended[t, n]]
    np.testing.assert_array_equal(returns, [RETURNS[t, n] for t, n in steps])
    np.testing.assert_array_equal(lengths, [LENGTHS[t, n] for t, n in steps])
    assert returns.shape == lengths.shape == (len(steps),)
    assert (returns.dtype, lengths.dtype) == (np.float32, np.int32)
    assert isinstance(returns, np.ndarray) and isinstance(lengths, np.ndarray)


@pytest.mark.parametrize("loss", [-0.0, 1e-42, 3.4e38, np.inf, -np.inf, np.nan])
def test_metrics_are_python_floats_whatever_their_value(loss, told):
    _, _, report = told(told.flatten(PARAMS), told.pack_state(told_state(loss=loss)))
    metrics = told.metrics(report)
    assert all(type(value) is float for value in metrics.values())
    assert np.float32(metrics["loss"]).tobytes() == np.float32(loss).tobytes()
    assert metrics["entropy"] == -7.5


def test_a_report_is_on_the_host_and_later_calls_leave_it_alone(told):
    flat = told.flatten(PARAMS)
    _, _, report = told(flat, told.pack_state(told_state(PATTERNS["every other"], loss=1.0)))
    assert isinstance(report, np.ndarray) and not isinstance(report, jax.Array)
    before, metrics, episodes = report.copy(), told.metrics(report), told.episodes(report)
    other = told.pack_state(told_state(PATTERNS["all"], loss=99.0))
    for _ in range(50):
        told(flat, other)  # what it returns is freed at once, to be used again
    gc.collect()
    np.testing.assert_array_equal(report, before)
    assert told.metrics(report) == metrics
    assert metrics["loss"] == 1.0
    chex.assert_trees_all_equal(told.episodes(report), episodes)
    np.testing.assert_array_equal(episodes[1], LENGTHS[:, 1::2].ravel())


# A segment's work is its steps times the parameters: 3 x 4 x 5 = 60.


@pytest.mark.parametrize(("max_work", "fused"), [(61, True), (60, True), (59, False), (0, False)])
def test_a_segment_up_to_the_limit_is_compiled_into_a_kernel_and_a_larger_one_is_not(
    max_work, fused, monkeypatch
):
    compiled_with = []

    def compile_fused(function, *arguments):
        compiled_with.append(arguments)
        return function

    monkeypatch.setattr(kernels, "compile_fused", compile_fused)
    monkeypatch.setattr(kernels, "MAX_WORK", max_work)
    step = PackedWorkerStep(told_step, PARAMS, told_state())
    assert len(compiled_with) == fused
    if fused:
        assert step.flatten(PARAMS).shape == (P,)
        expected = step.flatten(PARAMS), step.pack_state(told_state())
        chex.assert_trees_all_equal(compiled_with[0], expected)


def test_a_worker_step_whose_program_xla_refuses_is_computed_all_the_same():
    def sorting_step(params, state):
        gradients, state, statistics = told_step(params, state)
        return gradients | {"b": jnp.sort(gradients["w"].ravel())[-1:]}, state, statistics

    step = PackedWorkerStep(sorting_step, PARAMS, told_state())
    gradients, _, report = step(step.flatten(PARAMS), step.pack_state(told_state()))
    np.testing.assert_array_equal(gradients, [6.25, 0.25, 2.25, 4.25, 6.25])
    assert step.metrics(report)["loss"] == 0.25


def flatten(tree):
    """The leaves one after the other, by NumPy."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


# Then a real one. Episodes last three steps, so that two ends fall into a segment of seven.


class Real(NamedTuple):
    params: object
    states: list
    on_trees: object
    fused: PackedWorkerStep
    plain: PackedWorkerStep


@pytest.fixture(scope="module")
def real():
    probe = Probe(3, lambda sign, action, last: sign * (2 * action - 1) + 0.25 * last)
    config = A3CConfig(num_workers=2, envs_per_worker=2, t_max=7, hidden_sizes=(4,))
    agent = make_agent(config, environment=probe)
    with pytest.MonkeyPatch.context() as patch:
        fused = PackedWorkerStep(agent.worker_step, agent.params, agent.states[0])
        patch.setattr(kernels, "MAX_WORK", 0)
        plain = PackedWorkerStep(agent.worker_step, agent.params, agent.states[0])
    return Real(
        agent.params, agent.states, kernels.jit_for_one_call(agent.worker_step), fused, plain
    )


@on_cpu
def test_the_small_variant_is_one_kernel_and_the_large_one_is_not(real):
    assert entry_operations(real.fused._step) == ["kernel"]
    lowered = real.plain._step.lower(
        real.plain.flatten(real.params), real.plain.pack_state(real.states[0])
    )
    assert "xla_cpu_small_call" not in lowered.as_text()


def params_after(real, n):
    """Other parameters for every call, so that none can pass by ignoring them."""
    return jax.tree.map(
        lambda x: np.float32(np.asarray(x) * (1.0 + 0.1 * n) - 0.05 * n), real.params
    )


@pytest.mark.parametrize("variant", ["fused", "plain"])
def test_both_variants_do_what_the_worker_step_does_on_trees_segment_after_segment(variant, real):
    step = getattr(real, variant)
    state = real.states[1]
    packed = step.pack_state(state)
    for n in range(4):
        params = params_after(real, n)
        gradients, state, (metrics, episodes) = real.on_trees(params, state)
        flat_gradients, packed, report = step(step.flatten(params), packed)
        np.testing.assert_allclose(flat_gradients, flatten(gradients), rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(packed, step.pack_state(state))  # no float is rounded here
        expected = {name: float(value) for name, value in metrics.items()}
        assert step.metrics(report) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        ended = np.asarray(episodes.ended)
        returns, lengths = step.episodes(report)
        np.testing.assert_array_equal(returns, np.asarray(episodes.episode_return)[ended])
        np.testing.assert_array_equal(lengths, np.asarray(episodes.length)[ended])
        assert len(lengths) == 2 * ((7 * n + 7) // 3 - 7 * n // 3)  # of 2 environments
        assert (lengths == 3).all()


@pytest.mark.parametrize("variant", ["fused", "plain"])
def test_a_call_leaves_its_arguments_alone(variant, real):
    step = getattr(real, variant)
    flat, packed = step.flatten(real.params), step.pack_state(real.states[0])
    copies = np.array(flat), np.array(packed)
    step(flat, packed)
    assert not flat.is_deleted() and not packed.is_deleted()
    chex.assert_trees_all_equal((flat, packed), copies)


def test_the_two_variants_agree(real):
    flat, packed = real.fused.flatten(real.params), real.fused.pack_state(real.states[0])
    fused, plain = real.fused(flat, packed), real.plain(flat, packed)
    np.testing.assert_allclose(fused[0], plain[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(fused[1], plain[1])
    assert real.fused.metrics(fused[2]) == pytest.approx(real.plain.metrics(plain[2]), rel=1e-4)
    chex.assert_trees_all_equal(real.fused.episodes(fused[2]), real.plain.episodes(plain[2]))


def test_the_gradient_norm_is_that_of_the_gradients(real):
    packed = real.fused.pack_state(real.states[0])
    gradients, _, report = real.fused(real.fused.flatten(real.params), packed)
    norm = np.linalg.norm(np.asarray(gradients, np.float64))
    assert norm > 0.1
    assert real.fused.metrics(report)["gradient_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("variant", ["fused", "plain"])
def test_several_threads_each_get_the_bits_that_a_thread_alone_gets(variant, real):
    step, segments = getattr(real, variant), 25

    def play(worker):
        packed, results = step.pack_state(real.states[worker]), []
        for n in range(segments):
            gradients, packed, report = step(flats[n % 3], packed)
            results.append((np.array(gradients), np.array(packed), report))
        return results

    flats = [step.flatten(params_after(real, n)) for n in range(3)]
    alone = [play(worker) for worker in range(2)]
    together, barrier = {}, threading.Barrier(4)

    def work(place):
        barrier.wait(TIMEOUT)
        together[place] = play(place % 2)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert sorted(together) == [0, 1, 2, 3]
    for place, results in together.items():
        chex.assert_trees_all_equal(results, alone[place % 2])
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(alone[0], alone[1])
