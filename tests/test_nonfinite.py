"""What is not finite never reaches the parameters, and whoever looks for it is told where it came from."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_runs import (
    OPTIMIZERS,
    Walk,
    assert_equal_runs,
    assert_exact_counters,
    cut_short,
    replay,
    small,
    train,
    words,
)

import a3c_jax
from a3c_jax import (
    CheckpointFolder,
    NonFiniteError,
    SharedParameters,
    WorkerError,
    find_checkpoint,
)
from a3c_jax.algorithm import a3c
from a3c_jax.asynchrony.checkpoint_files import read_mean_return, save_checkpoint
from a3c_jax.asynchrony.trees import name_leaves
from a3c_jax.normalization import STATISTICS, Moments
from a3c_jax.optimizers import make_optimizer, squared_norm

BAD = [np.nan, np.inf, -np.inf]
FIRST_BAD_STEP = 42
FIRST_BAD_UPDATE = 10  # of four steps each, counted from zero: the one of steps 41 to 44


def is_finite(tree):
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return all(np.isfinite(x).all() for x in leaves if x.dtype.kind == "f")


# The store.


def make_store(optimizer="adam", **options):
    rule = {"learning_rate": 0.1, "anneal_over": 20, "num_workers": 2, "max_gradient_norm": 0.5}
    store = SharedParameters(
        {"w": jnp.linspace(-1.0, 1.0, 4), "b": jnp.zeros(())},
        make_optimizer(optimizer, **rule | options.pop("rule", {})),
        2,
        **options,
    )
    for n in range(3):
        store.apply({"w": jnp.arange(4.0) - n, "b": jnp.ones(())}, n, n % 2)
    return store


def with_one(bad, where):
    gradients = {"w": np.ones(4, np.float32), "b": np.ones((), np.float32)}
    gradients[where][(2,) if where == "w" else ()] = bad
    return jax.tree.map(jnp.asarray, gradients)


@pytest.mark.parametrize("where", ["w", "b"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_is_refused_and_leaves_no_trace(optimizer, bad, where):
    store = make_store(optimizer)
    before, optimizer_state = store.pull(), words(store.optimizer_state)
    with pytest.raises(NonFiniteError, match="the update of version 3 by worker 1 has a NaN or an"):
        store.apply(with_one(bad, where), 3, 1)
    assert store.pull() is before
    assert words(store.optimizer_state) == optimizer_state
    assert len(store.schedule.worker) == 3
    store.apply(with_one(1.0, where), 3, 1)
    assert store.pull().version == 4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad", BAD)
def test_to_skip_counts_it_and_leaves_parameters_and_optimizer_bit_for_bit(optimizer, bad):
    store, untouched = (make_store(optimizer, skip_nonfinite=True) for _ in range(2))
    with store.applying(with_one(bad, "w"), 2, 1) as update:
        assert store.pull().version == 3
    assert (update.worker, update.staleness) == (1, 1)
    assert update.snapshot.version == store.pull().version == 4
    snapshot = update.snapshot
    assert words(snapshot.params) == words(untouched.pull().params)
    assert words(store.optimizer_state) == words(untouched.optimizer_state)
    state, _ = store.freeze(lambda: None)
    assert state.skipped == 1
    assert store.schedule.worker.tolist() == [0, 1, 0, 1]
    assert store.schedule.pulled_version.tolist() == [0, 1, 2, 2]
    # The next update is the one there would have been without it.
    store.apply(with_one(2.0, "w"), 4, 0)
    untouched.apply(with_one(2.0, "w"), 3, 0)
    assert words(store.pull().params) == words(untouched.pull().params)
    assert words(store.optimizer_state) == words(untouched.optimizer_state)
    assert store.freeze(lambda: None)[0].skipped == 1


def test_an_update_that_overflows_by_itself_is_refused():
    store = SharedParameters(jnp.full(3, 3e38), optax.sgd(3.0))
    with pytest.raises(NonFiniteError):
        store.apply(jnp.array([0.0, 0.0, -1e38]), 0)
    np.testing.assert_array_equal(store.pull().params, np.full(3, 3e38, np.float32))


@pytest.mark.parametrize("optimizer", ["adam", "shared_rmsprop", "rmsprop"])
def test_statistics_that_overflow_are_refused_though_the_parameters_would_be_finite(optimizer):
    # The square of 1e30 is an infinity, and what is divided by it is zero.
    store = make_store(optimizer, rule={"max_gradient_norm": None})
    optimizer_state = words(store.optimizer_state)
    with pytest.raises(NonFiniteError):
        store.apply({"w": jnp.full(4, 1e30), "b": jnp.zeros(())}, 3)
    assert words(store.optimizer_state) == optimizer_state


def test_large_and_tiny_numbers_that_are_finite_pass():
    store = SharedParameters(jnp.array([3e38, -3e38, 1e-45, -0.0]), optax.sgd(1.0))
    store.apply(jnp.array([1e-45, 1e-45, 1e-45, 1e18]), 0)
    assert store.pull().version == 1


@pytest.mark.parametrize("max_gradient_norm", [None, 0.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_norm_that_overflows_is_not_finite_though_each_number_is(optimizer, max_gradient_norm):
    # 1e25 squared is beyond float32's 3.4e38. Clipped by that norm, the update would be zero.
    rule = {"max_gradient_norm": max_gradient_norm}
    store = make_store(optimizer, rule=rule)
    before, optimizer_state = store.pull(), words(store.optimizer_state)
    message = "version 3 by worker 1 has gradients whose norm is infinite, .* up to 1e\\+25 in 'w'; make the"
    with pytest.raises(NonFiniteError, match=message):
        store.apply(with_one(1e25, "w"), 3, 1)
    assert store.pull() is before
    assert words(store.optimizer_state) == optimizer_state
    skipping = make_store(optimizer, rule=rule, skip_nonfinite=True)
    skipping.apply(with_one(1e25, "w"), 3, 1)
    assert skipping.freeze(lambda: None)[0].skipped == 1


def test_an_own_optimizer_that_would_not_notice_is_refused_the_same():
    store = SharedParameters(jnp.zeros(3), optax.sign_sgd(0.1))
    with pytest.raises(NonFiniteError, match="whose norm is infinite"):
        store.apply(jnp.full(3, 1e25), 0)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_small_floats_do_not_overflow_by_being_squared(dtype):
    # 300 squared is beyond float16's largest number, 65504.
    store = SharedParameters(jnp.zeros(3, dtype), optax.sgd(0.1))
    store.apply(jnp.full(3, 300.0, dtype), 0)
    np.testing.assert_allclose(np.float32(store.pull().params), -30.0, rtol=0.01)


def test_moments_that_gradients_carry_are_no_part_of_their_norm():
    moments = {"observation": Moments(jnp.float32(2), jnp.float32(0), jnp.float32(1e25))}
    assert squared_norm({"w": jnp.full(2, 2.0), STATISTICS: moments}) == 8.0


def test_the_message_says_which_number_is_not_finite_and_whether_it_was_the_optimizers():
    store = SharedParameters({"a": jnp.zeros(2), "b": jnp.zeros(2)}, optax.sgd(3e38))
    with pytest.raises(
        NonFiniteError,
        match="an infinity in its gradients, in 'b'; correct the environment if it shows",
    ):
        store.apply({"a": jnp.ones(2), "b": jnp.array([0.0, np.nan])}, 0)
    with pytest.raises(NonFiniteError, match="makes a NaN or an infinity of the parameters or of"):
        store.apply({"a": jnp.ones(2), "b": jnp.full(2, 10.0)}, 0)


# A run.


@pytest.mark.parametrize("where", ["reward", "observation"])
@pytest.mark.parametrize("bad", BAD)
def test_a_run_stops_at_what_is_not_finite_and_names_worker_update_and_losses(tmp_path, bad, where):
    environment = Walk(bad, bad_from=FIRST_BAD_STEP, where=where)
    config = small(max_steps=4_000)
    with pytest.raises(WorkerError) as caught:
        train(config, environment, checkpoints=CheckpointFolder(tmp_path))
    error = caught.value
    assert isinstance(error.__cause__, NonFiniteError)
    assert re.match(
        rf"worker 0 failed with NonFiniteError: the update of version {FIRST_BAD_UPDATE} by worker 0 "
        r"has a NaN or an infinity in its gradients, .* Not finite in its segment: .*loss",
        str(error),
    )
    names = str(error).partition("Not finite in its segment: ")[2].rstrip(".").split(", ")
    assert {"loss", "critic_loss", "gradient_norm"} <= set(names)
    # The entropy tells where it came from: it knows the observations and not the rewards.
    assert ("entropy" in names) == (where == "observation")
    assert [name for name in names if "environment" in name] == [f"{where}s of the environment"]

    # What there was before it is there, whole and finite.
    result = error.result
    assert (result.version, result.stop_reason) == (FIRST_BAD_UPDATE, "failed")
    good = replay(config, result.schedule, Walk(bad, bad_from=10**6, where=where))
    assert words(result.params) == words(good.params)
    checkpoint = find_checkpoint(tmp_path)
    chex.assert_trees_all_equal(checkpoint.params, name_leaves(good.params))
    assert is_finite((checkpoint.params, checkpoint.best_params, result.opt_state))
    assert_exact_counters(checkpoint)


@pytest.mark.parametrize("num_workers", [2, 5])
def test_nothing_that_is_not_finite_is_ever_seen_by_another_worker(num_workers):
    environment = Walk(np.nan, bad_from=FIRST_BAD_STEP)
    config = small(num_workers=num_workers, max_steps=None, max_episodes=10**6)
    with pytest.raises(WorkerError) as caught:
        train(config, environment)
    error, result = caught.value, caught.value.result
    # Every worker fails in its own eleventh segment; who did is the one named.
    assert (result.schedule.worker == error.worker).sum() == FIRST_BAD_UPDATE
    updates = []
    replay(config, result.schedule, environment, on_update=lambda *u: updates.append(u))
    assert len(updates) == result.version
    assert all(is_finite((u[1].params, u[2])) for u in updates)


@pytest.mark.parametrize(
    ("where", "leaf"), [("reward", "reward_t"), ("observation", "observation_tm1")]
)
def test_a_loss_at_the_newest_parameters_is_explained_as_well(where, leaf):
    learns = functools.partial(a3c, learns_at_newest=True)
    environment = Walk(np.nan, bad_from=FIRST_BAD_STEP, where=where)
    program = a3c_jax.build(small(), environment=environment, algorithm=learns)
    with pytest.raises(WorkerError) as caught:
        a3c_jax.train(program)
    assert re.search(
        rf"in its segment, in 'trajectory/{leaf}'; correct the environment, or lower the learning rate, .* "
        "Not finite in its segment: .*critic_loss",
        str(caught.value),
    )


def test_an_update_that_makes_it_stops_the_run_where_no_loss_shows_it():
    config = small(optimizer="momentum", learning_rate=1e30, max_gradient_norm=None)
    with pytest.raises(WorkerError, match="NonFiniteError: the update of version 0") as caught:
        # The rewards' gradients are of the order of 1e10.
        train(config, Walk(1e10, bad_from=0))
    assert str(caught.value).endswith("Not finite in its segment: nothing.")
    assert is_finite(caught.value.result.params)
    assert caught.value.result.version == 0


@pytest.mark.parametrize("fields", [{"entropy_cost": 1e30}, {"critic_cost": 1e38}], ids=str)
def test_a_cost_that_makes_every_update_zero_stops_the_run_with_the_reason(fields):
    with pytest.raises(WorkerError, match="NonFiniteError: .* Not finite .*") as caught:
        train(small(**fields))
    assert "gradient_norm" in str(caught.value)
    assert caught.value.result.version == 0


def test_rewards_that_make_every_update_zero_stop_the_run_and_are_named():
    with pytest.raises(WorkerError, match="NonFiniteError") as caught:
        train(small(), Walk(1e30, bad_from=0))
    assert "critic_loss" in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [
        np.inf,
        pytest.param(-np.inf, marks=pytest.mark.slow),
        pytest.param(np.nan, marks=pytest.mark.slow),
    ],
)
def test_a_return_that_is_not_finite_is_never_the_best_and_solves_nothing(tmp_path, bad):
    # Where an episode terminates, the loss sees another reward, so that every update is finite.
    config = small(terminal_reward=0.0, max_steps=800, solved_window=3, solved_return=1e6)
    result = train(config, LastReward(bad, ends=10**6), checkpoints=CheckpointFolder(tmp_path))
    assert not np.isfinite(result.episodes.episode_return).any()
    assert (result.stop_reason, result.best_mean_return) == ("max_steps", None)
    assert find_checkpoint(tmp_path).best_mean_return is None


@pytest.mark.parametrize("mean", [np.inf, -np.inf, np.nan])
def test_a_checkpoint_whose_mean_return_is_not_finite_is_not_the_best_that_is_kept(tmp_path, mean):
    train(small(), checkpoints=CheckpointFolder(tmp_path))
    checkpoint = find_checkpoint(tmp_path)
    returns = np.full_like(checkpoint.episodes.episode_return, mean)
    path = tmp_path / "infinite.checkpoint"
    episodes = checkpoint.episodes._replace(episode_return=returns)
    save_checkpoint(path, checkpoint._replace(episodes=episodes))
    assert read_mean_return(path) == -np.inf


# A run that skips.


def bad_updates(schedule, first_step, count, t_max=4):
    """Which updates hold a bad step, counted by hand: each worker's steps are those of its own segments."""
    played, bad = {}, []
    for k, worker in enumerate(schedule.worker.tolist()):
        begin = played.get(worker, 0)  # steps `begin + 1` to `begin + t_max` of its environments
        played[worker] = begin + t_max
        bad += [k] if begin + t_max >= first_step and begin + 1 < first_step + count else []
    return bad


@pytest.mark.slow
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_a_run_that_skips_counts_what_is_not_finite_and_learns_from_the_rest(
    tmp_path, bad, num_workers, optimizer
):
    environment = Walk(bad, bad_from=FIRST_BAD_STEP, bad_count=10)
    config = small(
        nonfinite="skip", num_workers=num_workers, optimizer=optimizer, max_steps=1_600, **LINEAR
    )
    result = train(config, environment, checkpoints=CheckpointFolder(tmp_path))
    expected = bad_updates(result.schedule, FIRST_BAD_STEP, 10)
    assert len(expected) >= 3
    assert result.skipped == find_checkpoint(tmp_path).skipped == len(expected)
    assert result.version == 200
    assert is_finite((result.params, result.best_params, result.opt_state))
    assert_exact_counters(find_checkpoint(tmp_path))

    snapshots = []
    again = replay(
        config, result.schedule, environment, on_update=lambda *u: snapshots.append(u[1].params)
    )
    assert again.skipped == result.skipped
    same = [words(a) == words(b) for a, b in zip(snapshots, snapshots[1:], strict=False)]
    assert [k + 1 for k, equal in enumerate(same) if equal] == expected


LINEAR = {"learning_rate_schedule": "linear"}


def test_skipped_updates_are_counted_on_when_a_run_goes_on(tmp_path):
    environment = Walk(np.nan, bad_from=FIRST_BAD_STEP, bad_count=10)
    config = small(nonfinite="skip")
    whole = train(config, environment)
    assert whole.skipped == 3
    for updates in (10, 11, 12, 13, 30):
        checkpoint = cut_short(config, updates, tmp_path / str(updates), environment)
        assert checkpoint.skipped == min(max(updates - FIRST_BAD_UPDATE, 0), 3)
        assert_equal_runs(train(config, environment, resume=checkpoint), whole)


@pytest.mark.parametrize("nonfinite", ["skip", pytest.param("stop", marks=pytest.mark.slow)])
def test_a_return_that_is_no_number_does_not_end_the_search_for_the_best(nonfinite):
    # The first episodes return NaN. Where it terminates an episode, the loss sees another reward.
    environment = LastReward()
    config = small(nonfinite=nonfinite, terminal_reward=0.0, max_steps=1_600, solved_window=3)
    result = train(config, environment)
    returns = result.episodes.episode_return
    assert result.skipped == 0
    assert np.isnan(returns[:3]).all()
    means = (returns[2:] + returns[1:-1] + returns[:-2]) / 3
    assert np.isfinite(means).sum() > 100
    # Several episodes may end in one update: the best is at least that of those after an update.
    last_of_update = np.append(np.diff(result.episodes.environment_steps) > 0, True)[2:]
    np.testing.assert_allclose(result.best_mean_return, np.nanmax(means[last_of_update]))


class LastReward(Walk):
    """Pays `bad` for the last step of each of an environment's first episodes, all of which terminate."""

    def __init__(self, bad=np.nan, ends=40):
        super().__init__()
        self._paid, self._ends = bad, ends

    def step(self, key, state, action):
        transition = super().step(key, state, action)
        last = transition.terminated | transition.truncated
        reward = jnp.where(last & (state[2][0] < self._ends), self._paid, transition.reward)
        return transition._replace(reward=reward, terminated=last, truncated=jnp.zeros_like(last))
