"""Running moments: exact when merged, shared by all workers, in checkpoints, evaluation and replay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from initial import initialize
from small_runs import WALK, assert_equal_runs, cut_short, replay, small, train

from a3c_jax import greedy_policy, normalization
from a3c_jax.optimizers import make_optimizer
from a3c_jax.rollout import Trajectory
from a3c_jax.worker import _moments_of_returns

BOTH = {"normalize_observations": True, "normalize_rewards": True}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 2**31))
def test_merging_parts_gives_the_moments_of_the_whole(sizes, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(3.0, 2.0, (size, 2)) for size in sizes]
    merged = normalization.initial_moments((2,))
    for part in parts:
        if len(part):
            merged = normalization.merge_moments(
                merged, normalization.batch_moments(jnp.asarray(part), 1)
            )
    whole = np.concatenate(parts)
    assert merged.num_values == len(whole)
    if len(whole):
        np.testing.assert_allclose(merged.mean, whole.mean(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            merged.squared_deviations, len(whole) * whole.var(0), rtol=1e-3, atol=1e-3
        )


def test_a_small_deviation_from_a_large_mean_is_not_lost():
    values = 1e4 + np.random.default_rng(0).normal(size=(500, 200))
    merged = normalization.initial_moments(())
    for row in values:
        merged = normalization.merge_moments(
            merged, normalization.batch_moments(jnp.asarray(row), 1)
        )
    np.testing.assert_allclose(normalization.standard_deviation(merged), values.std(), rtol=0.01)


def test_normalised_values_have_mean_zero_and_deviation_one_and_constants_stay_finite():
    values = jnp.asarray(
        np.random.default_rng(1).normal([5.0, -3.0, 2.0], [2.0, 0.5, 0.0], (2000, 3))
    )
    got = normalization.standardize(values, normalization.batch_moments(values, 1))
    np.testing.assert_allclose(got.mean(0), 0.0, atol=1e-4)
    np.testing.assert_allclose(got.std(0), [1.0, 1.0, 0.0], atol=1e-3)
    np.testing.assert_array_equal(
        normalization.standardize(values, normalization.initial_moments((3,))),
        jnp.clip(values, -10, 10),
    )
    scaled = normalization.scale_to_unit_variance(
        values[:, 0] - 4.0, normalization.batch_moments(values[:, 0], 1)
    )
    assert (jnp.sign(scaled) == jnp.sign(values[:, 0] - 4.0)).all()


@pytest.mark.parametrize("flat", [False, True], ids=["tree", "flattened"])
def test_the_optimizer_moves_the_weights_as_if_there_were_no_moments(flat):
    weights = {"kernel": jnp.arange(3.0), "bias": jnp.ones(1)}
    gradients = {"kernel": jnp.array([3.0, -4.0, 0.0]), "bias": jnp.array([12.0])}
    batch = lambda x: normalization.batch_moments(x, 1)  # noqa: E731
    statistics = {"observation": batch(jnp.arange(6.0).reshape(3, 2)), "reward": batch(jnp.ones(4))}
    segment = {
        "observation": batch(100.0 * jnp.arange(4.0).reshape(2, 2)),
        "reward": batch(jnp.arange(3.0)),
    }
    inner = make_optimizer("adam", learning_rate=0.1, max_gradient_norm=1.0)
    inner = optax.flatten(inner) if flat else inner
    outer = normalization.merge_statistics(inner)
    params = {"params": weights, "statistics": statistics}
    updates = {"params": gradients, "statistics": segment}
    moves, _ = outer.update(updates, outer.init(params), params)
    new = optax.apply_updates(params, moves)
    alone, _ = inner.update({"params": gradients}, inner.init({"params": weights}), None)
    expected = optax.apply_updates({"params": weights}, alone)["params"]
    jax.tree.map(np.testing.assert_array_equal, new["params"], expected)
    for name in statistics:
        merged = normalization.merge_moments(statistics[name], segment[name])
        assert isinstance(new["statistics"][name], normalization.Moments)
        for got, value in zip(new["statistics"][name], merged, strict=True):
            np.testing.assert_allclose(got, value, rtol=1e-6)


def test_observations_that_are_trees_have_moments_for_each_leaf():
    shape = {"image": (2, 3), "rest": ((), (4,))}
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(5, 2, (7, 2, 3)),
        "rest": (rng.normal(size=7), rng.normal(size=(7, 4))),
    }
    empty = normalization.initial_moments(shape)
    assert empty["image"].mean.shape == (2, 3) and empty["rest"][0].mean.shape == ()
    found = normalization.batch_moments(jax.tree.map(jnp.asarray, batch), 1)
    assert jax.tree.structure(found) == jax.tree.structure(empty)
    params = {"params": {}, "statistics": {"observation": found}}
    seen = normalization.normalize_observation(params, batch)
    for leaf in jax.tree.leaves(seen):
        np.testing.assert_allclose(leaf.mean(0), 0.0, atol=1e-5)
        np.testing.assert_allclose(leaf.std(0), 1.0, atol=1e-4)


def test_the_shared_moments_are_those_of_everything_that_all_workers_saw():
    config = small(num_workers=3, **BOTH)
    result = train(config)
    observations, returns = [], []

    # Each worker's part again, from the parameters that the schedule says.
    blueprint, params, states = initialize(config, environment=WALK)
    versions = [params]
    step = jax.jit(blueprint.worker_step)
    replay(config, result.schedule, on_update=lambda k, new, *_: versions.append(new.params))
    states = list(states)
    for worker, pulled in zip(*result.schedule, strict=True):
        gradients, states[worker], _ = step(versions[pulled], states[worker])
        observations.append(gradients[normalization.STATISTICS]["observation"])
        returns.append(gradients[normalization.STATISTICS]["reward"])
    for name, parts in (("observation", observations), ("reward", returns)):
        shared = result.params[normalization.STATISTICS][name]
        number = np.array([float(part.num_values) for part in parts])
        assert shared.num_values == number.sum() == result.environment_steps
        mean = np.stack([np.asarray(part.mean, np.float64) for part in parts])
        total = np.tensordot(number, mean, 1) / number.sum()
        np.testing.assert_allclose(shared.mean, total, rtol=1e-4, atol=1e-5)
        m2 = sum(np.asarray(part.squared_deviations, np.float64) for part in parts)
        m2 += np.tensordot(number, np.square(mean - total), 1)
        np.testing.assert_allclose(shared.squared_deviations, m2, rtol=1e-3)


@pytest.mark.parametrize("optimizer", [pytest.param("adam", marks=pytest.mark.slow), "rmsprop"])
def test_a_run_that_normalises_resumes_and_replays_bit_for_bit(tmp_path, optimizer):
    config = small(optimizer=optimizer, **BOTH)
    whole = train(config)
    assert_equal_runs(train(config, resume=cut_short(config, 20, tmp_path)), whole)
    several = small(optimizer=optimizer, num_workers=4, **BOTH)
    result = train(several)
    assert_equal_runs(replay(several, result.schedule), result)


def test_what_is_normalised_for_learning_is_reported_as_it_was():
    scaled = small(normalize_rewards=True, reward_clip=0.01, max_steps=2_000)
    result, plain = train(scaled), train(dataclasses.replace(scaled, learning_rate=1e-12))
    rewards = np.concatenate([result.episodes.episode_return, plain.episodes.episode_return])
    assert np.abs(rewards).max() > 1.0  # an episode has at most 8 steps, of 0.01 at most each


def test_evaluation_sees_what_training_saw():
    result = train(small(normalize_observations=True))
    observation = jnp.array([[30.0, -2.0, 0.5], [0.1, 0.2, 0.3]])
    policy = greedy_policy(result.network)
    action, _ = policy.act(result.params, jax.random.key(0), observation, ())
    statistics = result.params[normalization.STATISTICS]["observation"]
    network = {"params": result.params["params"]}
    seen = normalization.standardize(observation, statistics)
    assert not np.allclose(seen, observation)
    expected = result.network.apply(network, seen, method="actor").mode()
    np.testing.assert_array_equal(action, expected)


@pytest.mark.parametrize("deviation", [1e-7, 1e-3, 1e5])
def test_rewards_of_any_size_are_scaled(deviation):
    values = jnp.asarray(np.random.default_rng(1).normal(0.0, deviation, 2000), jnp.float32)
    moments = normalization.batch_moments(values, 1)
    got = normalization.scale_to_unit_variance(values, moments)
    np.testing.assert_allclose(got.std(), 1.0, rtol=1e-3)


def test_the_discounted_return_begins_again_after_what_is_not_finite():
    rewards = jnp.array([1.0, 2.0, np.nan, 4.0, 5.0, 6.0]).reshape(6, 1)
    flags = jnp.zeros((6, 1), bool)
    trajectory = Trajectory(flags, flags, rewards, flags, flags, flags)
    state = initialize(small(envs_per_worker=1, **BOTH), environment=WALK).states[0]
    state, got = _moments_of_returns(state, trajectory, 0.5)
    np.testing.assert_allclose(state.discounted_return, [9.5])
    assert np.isnan(got.mean)  # so that this update is skipped, and the next one is not


def test_the_discounted_return_begins_again_with_each_episode():
    rewards = jnp.arange(1.0, 7.0).reshape(6, 1)
    flags = jnp.zeros((6, 1), bool)
    trajectory = Trajectory(
        flags, flags, rewards, flags.at[1].set(True), flags.at[3].set(True), flags
    )
    state = initialize(small(envs_per_worker=1, **BOTH), environment=WALK).states[0]
    state = state._replace(discounted_return=jnp.array([8.0]))
    state, got = _moments_of_returns(state, trajectory, 0.5)
    #  0.5 * 8 + 1, then on; afresh after each end
    expected = np.array([5.0, 4.5, 3.0, 5.5, 5.0, 8.5])
    np.testing.assert_allclose(state.discounted_return, [8.5], rtol=1e-6)
    np.testing.assert_allclose(got.mean, expected.mean(), rtol=1e-6)
    np.testing.assert_allclose(got.squared_deviations, 6 * expected.var(), rtol=1e-6)
