"""Simulated asynchrony: the schedules by hand, and the compiled run against `train` and `replay`."""

import dataclasses
import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_runs import program, train_together

import a3c_jax
from a3c_jax import (
    A3CConfig,
    Schedule,
    SimulationResult,
    fixed_delay,
    make_simulation,
    random_delays,
    round_robin,
    straggler,
)
from a3c_jax.asynchrony import schedules, simulation
from a3c_jax.losses import a3c_loss

SMALL = {"envs_per_worker": 2, "t_max": 4, "hidden_sizes": (8,), "num_workers": 1}
UPDATES = 25


def config(num_updates=UPDATES, **changes):
    return A3CConfig(**SMALL | {"max_steps": 8 * num_updates} | changes)


def flat(params):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])


def episodes(result):
    """The number and the sum of returns of the episodes that ended, whatever kind of result."""
    if isinstance(result, SimulationResult):
        total = np.sum(result.num_episodes * result.episode_return, axis=-1)
        return np.sum(result.num_episodes, axis=-1), total
    return len(result.episodes.episode_return), result.episodes.episode_return.sum()


def assert_same_run(simulated, run, atol=1e-5):
    np.testing.assert_allclose(flat(simulated.params), flat(run.params), atol=atol)
    np.testing.assert_allclose(episodes(simulated), episodes(run), rtol=1e-6)


def assert_ended_where_it_was_not_finite(result):
    applied = np.asarray(result.applied)
    bad = int(np.argmin(applied))
    assert 0 < bad < UPDATES - 1 and not applied[bad:].any()
    assert not np.any(result.num_episodes[bad:])
    assert np.isfinite(flat(result.params)).all()


def row(mapped, index):
    """One of the runs that were mapped."""
    return jax.tree.map(lambda x: x[index], mapped)


# The schedules


def columns(schedule):
    assert (schedule.worker.dtype, schedule.pulled_version.dtype) == (np.int32, np.int64)
    return schedule.worker.tolist(), schedule.pulled_version.tolist()


def test_round_robin_by_hand():
    # Worker 0 makes update 0 and pulls the version 1 that it led to; worker 1 pulls 2, worker 2 pulls 3.
    assert columns(round_robin(3, 7)) == ([0, 1, 2, 0, 1, 2, 0], [0, 0, 0, 1, 2, 3, 4])
    assert round_robin(3, 7).staleness.tolist() == [0, 1, 2, 2, 2, 2, 2]
    assert columns(round_robin(1, 3)) == ([0, 0, 0], [0, 1, 2])


def test_fixed_delay_by_hand():
    assert columns(fixed_delay(0, 4)) == ([0, 0, 0, 0], [0, 1, 2, 3])
    assert columns(fixed_delay(2, 5)) == ([0] * 5, [0, 0, 0, 1, 2])
    assert columns(fixed_delay(2, 5, num_workers=2)) == ([0, 1, 0, 1, 0], [0, 0, 0, 1, 2])


def test_a_straggler_by_hand():
    # Ends of segments: worker 1 at 1, 2, 3 and so on, worker 0 at 3 and 6, before worker 1's.
    # k           0  1  2  3  4  5  6  7
    # at          1  2  3  3  4  5  6  6
    worker = [1, 1, 0, 1, 1, 1, 0, 1]
    pulled = [0, 1, 0, 2, 4, 5, 3, 6]
    assert columns(straggler(2, 3.0, 8)) == (worker, pulled)


def test_a_straggler_that_is_not_slow_is_round_robin():
    assert columns(straggler(4, 1.0, 50)) == columns(round_robin(4, 50))


def test_a_stragglers_staleness_in_the_long_run():
    # Of 4 workers, one 10 times slower: in its segment the 3 others make 10 updates each; between two updates
    # of another worker, its 2 equals make one each, and the straggler a tenth.
    schedule = straggler(4, 10.0, 10_000)
    slow = schedule.worker == 0
    np.testing.assert_allclose(schedule.staleness[slow].mean(), 30, rtol=0.01)
    np.testing.assert_allclose(schedule.staleness[~slow].mean(), 2.1, rtol=0.01)
    np.testing.assert_allclose(slow.mean(), 1 / 31, rtol=0.02)


def test_random_delays_are_drawn_from_the_distribution():
    rng = np.random.default_rng(0)
    schedule = random_delays([1.0, 0.0, 3.0], 20_000, rng, num_workers=3)
    assert columns(schedule)[0][:4] == [0, 1, 2, 0]
    assert schedule.staleness[:2].tolist() == [0, 1]  # 2 and 2 were drawn: no version was so old
    counts = np.bincount(schedule.staleness, minlength=3) / 20_000
    np.testing.assert_allclose(counts, [0.25, 0, 0.75], atol=0.01)  # standard error 0.003

    again = random_delays([1.0, 0.0, 3.0], 20_000, np.random.default_rng(0), num_workers=3)
    assert columns(again) == columns(schedule)
    only = random_delays([0, 0, 1], 6, rng)
    assert columns(only) == columns(fixed_delay(2, 6))


SCHEDULES = {
    "round_robin": round_robin(3, UPDATES),
    "fixed_delay": fixed_delay(3, UPDATES, num_workers=2),
    "random_delays": random_delays(np.ones(5), UPDATES, np.random.default_rng(1), num_workers=3),
    "straggler": straggler(3, 2.5, UPDATES),
}
# A rate so large that reading another version of the parameters would show.
WORKERS = config(num_workers=3, seed=2, learning_rate=0.02, optimizer="rmsprop")


@pytest.fixture(scope="module")
def threaded():
    return train_together(WORKERS)


@pytest.fixture(scope="module")
def mapped_over_schedules(threaded):
    """All of them and a recorded one, in one compiled program."""
    schedules = SCHEDULES | {"recorded": threaded.schedule}
    simulate = make_simulation(WORKERS, max_staleness=UPDATES)
    stacked = jax.tree.map(lambda *x: np.stack(x), *schedules.values())
    mapped = jax.jit(jax.vmap(simulate, (None, None, 0)))(2, 0.02, stacked)
    return {name: row(mapped, index) for index, name in enumerate(schedules)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_simulated_is_its_replay(name, mapped_over_schedules):
    # Replay raises where a schedule names a version or a worker that there cannot be.
    simulated = mapped_over_schedules[name]
    assert simulated.applied.all()
    assert_same_run(simulated, a3c_jax.replay(program(WORKERS), SCHEDULES[name]))


def test_a_recorded_run_of_threads_is_simulated(threaded, mapped_over_schedules):
    assert_same_run(mapped_over_schedules["recorded"], threaded)


def test_those_runs_differ_by_more_than_rounding(mapped_over_schedules):
    vectors = [flat(mapped_over_schedules[name].params) for name in SCHEDULES]
    for i, a in enumerate(vectors):
        assert all(np.abs(a - b).max() > 1e-2 for b in vectors[:i])


# The compiled run


PLAIN = config(seed=3, learning_rate=0.01, learning_rate_schedule="linear", nonfinite="skip")


@pytest.fixture(scope="module")
def plain():
    """Keeps one version only."""
    return jax.jit(make_simulation(PLAIN, max_staleness=0))


def test_no_delay_and_one_worker_is_plain_training(plain):
    assert_same_run(plain(3, 0.01, fixed_delay(0, UPDATES)), a3c_jax.train(program(PLAIN)))


@pytest.fixture(scope="module")
def simulate():
    """Shared by the tests below, since it is compiled once."""
    return make_simulation(config(num_workers=2), max_staleness=3)


@pytest.mark.slow
def test_the_oldest_version_that_is_kept_is_the_right_one_and_the_metrics_are_each_updates(
    simulate,
):
    # A hundred times the default rate: a neighbouring version is a quite different one.
    settings = config(num_workers=2, seed=5, learning_rate=0.2)
    schedule, seen = fixed_delay(3, UPDATES, num_workers=2), []
    run = a3c_jax.replay(
        program(settings), schedule, on_update=lambda *update: seen.append(update[3])
    )
    simulated = simulate(5, 0.2, schedule)
    assert_same_run(simulated, run, atol=1e-3)
    assert set(simulated.metrics) == set(seen[0])
    for name, values in simulated.metrics.items():
        expected = [metrics[name] for metrics in seen]
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-3)

    neighbour = simulate(5, 0.2, fixed_delay(2, UPDATES, num_workers=2))
    assert np.abs(flat(neighbour.params) - flat(simulated.params)).max() > 0.1


@pytest.fixture(scope="module")
def mapped(simulate):
    """Runs of these seeds and learning rates side by side. Row `IMPOSSIBLE` of the last one cannot be."""
    schedules = [fixed_delay(2, UPDATES, num_workers=2) for _ in SEEDS]
    schedules[-1].pulled_version[IMPOSSIBLE] = -1
    stacked = jax.tree.map(lambda *x: np.stack(x), *schedules)
    result = jax.vmap(simulate)(jnp.array(SEEDS, jnp.uint32), jnp.array(RATES), stacked)
    return [row(result, index) for index in range(len(SEEDS))]


SEEDS = [0, 2**32 - 1, 2**32 - 1, 0]
RATES = [1e-2, 1e-2, 3e-2, 1e-2]
IMPOSSIBLE = 16  # in whose segment an episode ends


@pytest.mark.slow  # those above are mapped over schedules
def test_mapped_over_seeds_and_learning_rates_every_run_is_itself(simulate, mapped):
    for run, seed, rate in list(zip(mapped, SEEDS, RATES, strict=True))[:3]:
        single = simulate(seed, rate, fixed_delay(2, UPDATES, num_workers=2))
        assert_same_run(run, single)
        np.testing.assert_array_equal(run.num_episodes, single.num_episodes)
        np.testing.assert_allclose(run.episode_return, single.episode_return, rtol=1e-6)
        for name, values in single.metrics.items():
            np.testing.assert_allclose(run.metrics[name], values, rtol=1e-3, atol=1e-4)
    # Another seed, and another rate, is another run.
    first, second, third = (flat(run.params) for run in mapped[:3])
    assert np.abs(first - second).max() > 1e-2 and np.abs(second - third).max() > 1e-2


@pytest.mark.slow  # a row and "skip", and "stop" for what is not finite, are tested below
def test_a_row_that_cannot_be_ends_the_run_where_the_configuration_says_stop(mapped):
    whole, stopped = mapped[0], mapped[-1]
    assert whole.applied.all()
    assert np.flatnonzero(stopped.applied).tolist() == list(range(IMPOSSIBLE))
    before = slice(IMPOSSIBLE)
    np.testing.assert_array_equal(stopped.num_episodes[before], whole.num_episodes[before])
    assert whole.num_episodes[IMPOSSIBLE:].any() and not stopped.num_episodes[IMPOSSIBLE:].any()


def test_the_final_return_is_the_mean_over_episodes_of_the_last_updates():
    result = SimulationResult(
        params=None,
        num_episodes=jnp.array([[5, 1, 0, 3], [1, 0, 0, 0]]),
        episode_return=jnp.array([[9.0, 10.0, 0.0, 30.0], [8.0, 0.0, 0.0, 0.0]]),
        metrics={},
        applied=jnp.ones((2, 4), bool),
    )
    # (1 * 10 + 3 * 30) / 4; no episode ended in the second run's last three updates.
    np.testing.assert_allclose(result.final_return(0.75), [25.0, np.nan])
    np.testing.assert_allclose(result.final_return(), [30.0, np.nan])  # at least one update
    np.testing.assert_allclose(result.final_return(1.0), [(45 + 10 + 90) / 9, 8.0])


def test_solved_is_when_the_mean_of_the_last_episodes_first_reaches_the_value():
    result = SimulationResult(
        params=None,
        num_episodes=jnp.array([[2, 0, 1, 3, 1], [1, 0, 0, 0, 0]]),
        episode_return=jnp.array([[4.0, 0.0, 10.0, 20.0, 2.0], [80.0, 0.0, 0.0, 0.0, 0.0]]),
        metrics={},
        applied=jnp.ones((2, 5), bool),
    )
    # Before two have ended, the mean is over what there is.
    np.testing.assert_allclose(
        result.recent_return(2), [[4.0, 4.0, 6.0, 20.0, 15.5], [80.0] * 5], rtol=1e-6
    )
    # The last two episodes at least: 4 after update 1 and 2, (8 + 10) / 3 after 3, 20 after 4, (60 + 2) / 4 after 5.
    for value, updates in ((4.0, 1), (4.1, 3), (6.0, 3), (6.1, 4), (20.0, 4), (20.1, np.inf)):
        np.testing.assert_array_equal(result.updates_to_solve(value, 2), [updates, np.inf])
    np.testing.assert_array_equal(result.updates_to_solve(9.0, 1), [3, 1])


# Segments side by side


@pytest.fixture(scope="module")
def in_pairs():
    """Two workers at once, of three. The last update has no other beside it."""
    skips = dataclasses.replace(WORKERS, nonfinite="skip")
    return jax.jit(make_simulation(skips, max_staleness=3, workers_at_once=2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["round_robin", "fixed_delay"])
def test_segments_side_by_side_are_the_same_run(name, in_pairs):
    simulated = in_pairs(2, 0.02, SCHEDULES[name])
    assert simulated.applied.shape == (UPDATES,) and simulated.applied.all()
    assert_same_run(simulated, a3c_jax.replay(program(WORKERS), SCHEDULES[name]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "n_step_q?target_interval=16&exploration_steps=40"},
        {"algorithm": "a3c?learns_at_newest=True"},
        {"normalize_observations": True, "normalize_rewards": True},
        {"core": "gru", "core_size": 4},
    ],
    ids=str,
)
def test_segments_side_by_side_are_the_same_run_whatever_is_learnt(changes):
    settings = config(num_workers=3, seed=2, learning_rate=0.01, **changes)
    schedule = round_robin(3, UPDATES)
    one, three = (
        make_simulation(settings, 2, workers_at_once=number)(2, 0.01, schedule) for number in (1, 3)
    )
    assert_same_run(three, a3c_jax.replay(program(settings), schedule), atol=1e-4)
    np.testing.assert_allclose(flat(one.params), flat(three.params), atol=1e-4)


@pytest.mark.slow
def test_a_run_of_groups_ends_where_the_configuration_says_stop():
    settings = config(num_workers=2, learning_rate=HUGE)
    simulate = make_simulation(settings, 1, workers_at_once=2)
    result = simulate(0, HUGE, round_robin(2, UPDATES))
    assert_ended_where_it_was_not_finite(result)


def test_a_row_that_cannot_be_changes_nothing(in_pairs):
    worker, pulled = (column.copy() for column in fixed_delay(3, UPDATES, num_workers=3))
    worker[7], pulled[9] = worker[6], 9  # its pair's other worker, and its pair's own first update
    result = in_pairs(2, 0.02, Schedule(worker, pulled))
    assert np.flatnonzero(~np.asarray(result.applied)).tolist() == [7, 9]
    worker[7], pulled[9] = 3, -1  # rows of no worker, and from no version
    assert_same_run(in_pairs(2, 0.02, Schedule(worker, pulled)), result, atol=0)


def test_groups_that_cannot_be_played_side_by_side_are_refused():
    simulate = make_simulation(config(num_workers=2), max_staleness=1, workers_at_once=2)
    for worker, pulled in (([0, 0], [0, 0]), ([0, 1, 0, 1], [0, 0, 1, 3])):
        schedule = Schedule(np.array(worker, np.int32), np.array(pulled, np.int64))
        with pytest.raises(ValueError, match="workers_at_once must be such"):
            simulate(0, 1e-3, schedule)


# What cannot be


HUGE = 1e38  # a step of this size makes an infinity within some updates


@pytest.mark.slow
def test_what_is_not_finite_ends_the_run_where_the_configuration_says_stop(simulate):
    result = simulate(0, HUGE, fixed_delay(0, UPDATES))
    assert_ended_where_it_was_not_finite(result)


def test_what_is_not_finite_is_skipped_where_the_configuration_says_skip(plain):
    result = plain(0, HUGE, fixed_delay(0, UPDATES))
    assert not np.asarray(result.applied).all()
    assert np.isfinite(flat(result.params)).all()
    assert np.sum(result.num_episodes[np.argmin(result.applied) :]) > 0  # it plays on


def test_a_row_that_cannot_be_is_not_applied_where_it_is_traced(plain):
    worker, pulled = (column.copy() for column in fixed_delay(0, UPDATES))
    worker[1], pulled[2], pulled[3], pulled[5] = 1, 3, -1, 4  # the last one is too stale by one
    applied = plain(3, 1e-2, Schedule(worker, pulled)).applied
    assert np.flatnonzero(~np.asarray(applied)).tolist() == [1, 2, 3, 5]


@pytest.mark.parametrize(
    ("worker", "pulled", "message"),
    [
        ([0, 2], [0, 1], r"schedule\.worker must lie in \[0, 1\], got 0 to 2"),
        ([-1, 0], [0, 1], r"schedule\.worker must lie in \[0, 1\], got -1 to 0"),
        ([0, 0], [0, 2], r"schedule\.pulled_version must name a version that exists"),
        ([0, 0], [-1, 0], r"schedule\.pulled_version must name a version that exists"),
        ([0, 0, 0], [0, 0, 0], "staleness must be at most max_staleness 1, got 2"),
        ([0, 0], [0], r"two vectors of equal length, got \(2,\) and \(1,\)"),
        ([], [], "must hold one update at least"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(worker, pulled, message):
    simulate = make_simulation(config(num_workers=2), max_staleness=1)
    with pytest.raises(ValueError, match=message):
        simulate(0, 1e-3, Schedule(np.array(worker, np.int32), np.array(pulled, np.int64)))


ONE = fixed_delay(0, num_updates=1)


def simulate_with(setting, **fields):
    """One update with a setting."""
    return make_simulation(config(**fields), 0)(0, {setting: 0.1}, ONE)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make_simulation(config(), -1), ValueError, "max_staleness must be >= 0, got -1"),
        (
            lambda: make_simulation(config(), 0, workers_at_once=0),
            ValueError,
            "workers_at_once must be >= 1, got 0",
        ),
        (
            lambda: make_simulation(config(), 0, loss=a3c_loss)(0, {"entropy_cost": 0.1}, ONE),
            ValueError,
            "entropy_cost belongs to the built-in loss and must not be a setting",
        ),
        (
            lambda: make_simulation(config(), 0, optimizer=optax.sgd(0.1))(
                0, {"momentum": 0.1}, ONE
            ),
            ValueError,
            "momentum belongs to the built-in optimizer and must not be a setting",
        ),
        *(
            (
                functools.partial(simulate_with, setting, **fields),
                ValueError,
                f"{setting} belongs to {owner} and must",
            )
            for setting, fields, owner in [
                ("momentum", {"optimizer": "adam"}, "the optimizer 'momentum'"),
                ("adam_epsilon", {"optimizer": "rmsprop"}, "the optimizer 'adam'"),
                ("rmsprop_decay", {}, "the optimizer 'rmsprop' and 'shared_rmsprop'"),
                ("entropy_cost", {"algorithm": "n_step_q"}, "A3C's loss"),
            ]
        ),
        (lambda: round_robin(0, 5), ValueError, "num_workers must be >= 1, got 0"),
        (lambda: fixed_delay(-1, 5), ValueError, "delay must be >= 0, got -1"),
        (lambda: fixed_delay(1.5, 5), TypeError, "delay must be an integer >= 0, got 1.5"),
        (lambda: fixed_delay(1, 0), ValueError, "num_updates must be >= 1, got 0"),
        (lambda: straggler(2, 0.5, 5), ValueError, "slowness must be >= 1 and finite, got 0.5"),
        (lambda: straggler(2, np.nan, 5), ValueError, "slowness must be >= 1 and finite, got nan"),
        (lambda: straggler(0, 2.0, 5), ValueError, "num_workers must be >= 1, got 0"),
        (lambda: random_delays([0.0], 5, None), ValueError, "not all 0"),
        (lambda: random_delays([1, -1], 5, None), ValueError, "finite numbers >= 0"),
        (lambda: random_delays([[1.0]], 5, None), ValueError, "must be a vector"),
    ],
)
def test_schedules_and_simulations_that_cannot_be_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("module", [schedules, pytest.param(simulation, marks=pytest.mark.slow)])
def test_the_examples_in_the_docstrings_hold(module):
    results = doctest.testmod(module)
    assert results.attempted > 2 and results.failed == 0
