"""Algorithms of one's own: how they act, what they keep, where they learn, and what is refused."""

import dataclasses
import functools
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from probes import Probe

import a3c_jax
from a3c_jax import A3CConfig, CheckpointFolder, Schedule, find_checkpoint, fixed_delay
from a3c_jax.algorithm import SHARED, Algorithm, a3c
from a3c_jax.algorithms import find_algorithm
from a3c_jax.asynchrony.trees import name_leaves
from a3c_jax.blueprint import make_blueprint

TINY = {"num_workers": 3, "envs_per_worker": 2, "t_max": 4, "hidden_sizes": (8,), "max_steps": 240}
PROBE = Probe(3, lambda sign, action, last: sign * (2 * action - 1) + 0.25 * last)


def config(**changes):
    return A3CConfig(**TINY | changes)


def tempered(config, environment, network, *, decay=0.5):
    """A3C in which worker w acts at random with probability w / 2, and whose workers share a falling temperature."""
    base = a3c(config, environment, network)

    def act(params, key, observation, carry, own):
        explore_key, action_key = jax.random.split(key)
        action, log_prob, carry = base.act(params, key, observation, carry, own)
        explores = jax.random.uniform(explore_key, action.shape) < own["worker"] / 2
        other = jax.random.randint(action_key, action.shape, 0, environment.num_actions)
        return jnp.where(explores, other, action), log_prob, carry

    def loss(params, trajectory, own):
        temperature = params[SHARED]["temperature"]
        value, metrics = base.loss(params, trajectory, own)
        own_number = own["worker"].astype(jnp.float32)
        return temperature * value, {**metrics, "worker": own_number, "temperature": temperature}

    def after_update(params):
        shared = params[SHARED]
        cooler = {"temperature": shared["temperature"] * decay, "count": shared["count"] + 1}
        return {**params, SHARED: cooler}

    return base._replace(
        act=act,
        loss=loss,
        init_own=lambda key, worker: {"worker": worker, "draw": jax.random.uniform(key)},
        init_shared=lambda params: {"temperature": jnp.float32(1.0), "count": jnp.int32(0)},
        after_update=after_update,
    )


@pytest.fixture(scope="module")
def program():
    return a3c_jax.build(config(), environment=PROBE, algorithm=tempered)


def rows(program, schedule, **options):
    """The metrics of each update of a replay."""
    seen = []
    a3c_jax.replay(program, schedule, on_update=lambda *update: seen.append(update[-1]), **options)
    return seen


def assert_same(one, other):
    chex.assert_trees_all_equal(one.params, other.params)
    chex.assert_trees_all_equal(one.opt_state, other.opt_state)
    np.testing.assert_array_equal(one.episodes.episode_return, other.episodes.episode_return)


# What an algorithm keeps


def test_the_number_of_its_worker_and_what_all_share_reach_the_loss(program):
    schedule = Schedule(np.int32([0, 1, 2, 0, 2]), np.int64([0, 1, 1, 3, 4]))
    seen = rows(program, schedule)
    assert [row["worker"] for row in seen] == [0, 1, 2, 0, 2]
    # Half of the temperature is left by every update, of whichever worker, and is pulled with its version.
    assert [row["temperature"] for row in seen] == [1, 0.5, 0.5, 0.125, 0.0625]


def test_each_worker_has_a_key_of_its_own_for_what_it_keeps(program):
    draws = [float(state.own["draw"]) for state in map(unpacked, program.initial_states())]
    assert len(set(draws)) == 3
    other = [float(unpacked(s).own["draw"]) for s in program.replace(seed=1).initial_states()]
    assert not set(draws) & set(other)


def unpacked(state):
    from a3c_jax import _compiled

    return _compiled.unpack(state)


def test_what_is_shared_is_part_of_the_parameters_and_nothing_to_the_optimizer(program):
    result = a3c_jax.train(program)
    assert result.params[SHARED]["count"] == result.version == 30
    names = "".join(name_leaves(result.opt_state))
    assert "temperature" not in names and SHARED not in names
    distribution, _ = result.network.apply(result.params, jnp.zeros((1, 2)))
    assert distribution.logits.shape == (1, 2)


def test_it_replays_and_goes_on_bit_for_bit_and_is_named_in_the_checkpoint(program, tmp_path):
    result = a3c_jax.train(program)
    assert_same(a3c_jax.replay(program, result.schedule), result)

    alone = program.replace(num_workers=1)
    whole = a3c_jax.train(alone)
    a3c_jax.train(alone.replace(max_steps=80), checkpoints=CheckpointFolder(tmp_path))
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.objects["algorithm"].endswith("tempered")
    assert checkpoint.params[f"{SHARED}/count"] == 10
    assert_same(a3c_jax.train(alone, resume=checkpoint), whole)
    with pytest.raises(ValueError, match="algorithm must be .*tempered"):
        a3c_jax.train(alone.config, environment=PROBE, resume=checkpoint)
    with pytest.raises(ValueError, match="algorithm must be .*tempered"):
        a3c_jax.load(tmp_path, environment=PROBE)
    loaded = a3c_jax.load(tmp_path, environment=PROBE, algorithm=tempered)
    assert loaded.params[SHARED]["count"] == 10


@pytest.mark.slow
def test_the_simulation_makes_the_same_updates(program):
    schedule = fixed_delay(2, num_updates=9)
    objects = {"environment": PROBE, "algorithm": tempered}
    simulated = a3c_jax.make_simulation(config(), 2, **objects)(0, 2e-3, schedule)
    replayed = a3c_jax.replay(program, schedule)
    chex.assert_trees_all_close(simulated.params, replayed.params, rtol=1e-4, atol=1e-6)


def test_an_update_that_is_not_finite_renews_nothing():
    def failing(config, environment, network):
        made = tempered(config, environment, network)

        def loss(params, trajectory, own):
            value, metrics = made.loss(params, trajectory, own)
            return jnp.where(params[SHARED]["count"] == 2, jnp.nan, 1.0) * value, metrics

        return made._replace(loss=loss)

    settings = config(num_workers=1, nonfinite="skip")
    schedule = fixed_delay(0, num_updates=5)
    result = a3c_jax.replay(settings, schedule, environment=PROBE, algorithm=failing)
    assert (result.version, result.skipped) == (5, 3)
    assert result.params[SHARED]["count"] == 2


@pytest.mark.slow
def test_running_moments_and_what_is_shared_lie_side_by_side():
    settings = config(num_workers=1, normalize_observations=True, normalize_rewards=True)
    result = a3c_jax.train(settings, environment=PROBE, algorithm=tempered)
    assert result.params[SHARED]["count"] == 30
    assert result.params["statistics"]["observation"].num_values == 30 * 8


# Where it learns


def moved_by_hand(learns_at_newest, schedule, learning_rate=0.5):
    """The parameters after the updates of a schedule, with the gradients taken where they ought to be."""
    settings = config(num_workers=3)
    blueprint = a3c_jax.blueprint.make_blueprint(settings, environment=PROBE)
    states = [jax.jit(blueprint.start)(np.uint32(0), np.int32(w)) for w in range(3)]
    versions = [jax.jit(blueprint.init)(np.uint32(0), states[0].observation)]
    algorithm = a3c(settings, PROBE)

    @jax.jit
    def play(params, state):
        policy = lambda key, observation, carry: algorithm.act(params, key, observation, carry, ())  # noqa: E731
        return a3c_jax.rollout.unroll(PROBE, policy, state, 4)[:2]

    gradient = jax.jit(
        lambda params, trajectory: jax.grad(algorithm.loss, has_aux=True)(params, trajectory, ())[0]
    )
    for worker, pulled in zip(*schedule, strict=True):
        states[worker], trajectory = play(versions[pulled], states[worker])
        at = versions[-1] if learns_at_newest else versions[pulled]
        moves = gradient(at, trajectory)
        versions.append(jax.tree.map(lambda p, g: p - learning_rate * g, versions[-1], moves))
    return versions[-1]


@pytest.mark.slow
@pytest.mark.parametrize("newest", [False, True])
def test_the_loss_is_differentiated_where_the_algorithm_says(newest):
    schedule = Schedule(np.int32([0, 1, 2, 1, 0, 2]), np.int64([0, 0, 0, 2, 1, 3]))
    learns = functools.partial(a3c, learns_at_newest=newest)
    result = a3c_jax.replay(
        config(), schedule, environment=PROBE, algorithm=learns, optimizer=optax.sgd(0.5)
    )
    chex.assert_trees_all_close(
        result.params, moved_by_hand(newest, schedule), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(
            result.params, moved_by_hand(not newest, schedule), rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
def test_learning_at_the_newest_parameters_trains_in_threads_replays_and_is_simulated():
    learns = functools.partial(a3c, learns_at_newest=True)
    objects = {"environment": PROBE, "algorithm": learns}
    program = a3c_jax.build(config(normalize_rewards=True), **objects)
    result = a3c_jax.train(program)
    assert_same(a3c_jax.replay(program, result.schedule), result)
    simulate = a3c_jax.make_simulation(program.config, 40, **objects)
    simulated = simulate(0, 2e-3, result.schedule)
    chex.assert_trees_all_close(simulated.params, result.params, rtol=1e-3, atol=1e-5)


def test_a_segment_that_is_sent_has_the_log_probabilities_of_the_policy_that_acted():
    seen = []

    def note(k, snapshot, segment, metrics):
        trajectory = segment.trajectory
        distribution, _ = program.network.apply(snapshots[pulled[k]], trajectory.observation_tm1)
        expected = distribution.log_prob(trajectory.action_tm1)
        np.testing.assert_allclose(trajectory.log_prob_tm1, expected, rtol=1e-4)
        snapshots.append(snapshot.params)
        seen.append(k)

    learns = functools.partial(a3c, learns_at_newest=True)
    program = a3c_jax.build(config(learning_rate=0.1), environment=PROBE, algorithm=learns)
    snapshots = [program.initial_params()]
    schedule = fixed_delay(2, num_updates=6)
    pulled = schedule.pulled_version
    a3c_jax.replay(program, schedule, on_update=note)
    assert len(seen) == 6


def test_what_a_worker_keeps_is_drawn_with_a_key_of_its_own():
    def keeps_its_key(config, environment, network):
        own = lambda key, worker: jax.random.key_data(key)  # noqa: E731
        return a3c(config, environment, network)._replace(init_own=own)

    blueprint = make_blueprint(config(), environment=PROBE, algorithm=keeps_its_key)
    _, workers, _ = jax.random.split(jax.random.key(5), 3)
    used = jax.random.key_data(jax.random.split(jax.random.fold_in(workers, 1)))
    kept = blueprint.start(5, 1)
    np.testing.assert_array_equal(jax.random.key_data(kept.key), used[0])
    assert not (kept.own == used).all(axis=-1).any()


# Names


def test_an_algorithm_can_be_named_by_its_module(monkeypatch, tmp_path, program):
    module = types.ModuleType("my_algorithms")
    module.tempered = tempered
    monkeypatch.setitem(sys.modules, "my_algorithms", module)
    named = config(algorithm="my_algorithms:tempered?decay=0.25")
    a3c_jax.train(named, environment=PROBE, checkpoints=CheckpointFolder(tmp_path))
    loaded = a3c_jax.load(tmp_path, environment=PROBE)  # its name is enough
    np.testing.assert_allclose(loaded.params[SHARED]["temperature"], 0.25**30)


def test_the_name_a3c_is_the_default():
    assert find_algorithm("a3c") is a3c
    assert A3CConfig().algorithm == "a3c"


# What is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a2c", "must be one of a3c, one_step_q, one_step_sarsa, n_step_q, or module:function, got 'a2c'"),
        ("json:nonsense", "must be a function of json, got 'json:nonsense'"),
        ("no_such_module:f", "names the module 'no_such_module', which cannot be imported"),
        ("json:__name__", "must be a function of json, got 'json:__name__'"),
        ("n_step_q?target_interval=soon", "parameters of algorithm .* must be numbers"),
        ("a3c?learns_at_newest=True&learns_at_newest=False", "parameter of algorithm .* must be given once"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        a3c_jax.build(config(algorithm=name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "a3c?learns_late=True",
            "which are loss, learns_at_newest, got 'a3c.learns_late=True' .*; corr",
        ),
        ("a3c?config=3", r"got 'a3c.config=3' \(multiple values for argument 'config'\)"),
        (
            "n_step_q?target=5",
            "one of target_interval, exploration_steps, .*, got target; correct its",
        ),
        (
            "my_algorithms:tempered?decoy=1",
            "which are decay, got 'my_algorithms:tempered.decoy=1' .*",
        ),
    ],
)
def test_an_unknown_argument_of_an_algorithm_is_refused(monkeypatch, name, message):
    module = types.ModuleType("my_algorithms")
    module.tempered = tempered
    monkeypatch.setitem(sys.modules, "my_algorithms", module)
    with pytest.raises(ValueError, match=message):
        a3c_jax.build(config(algorithm=name))


def test_an_algorithm_beside_a_name_or_a_loss_is_refused():
    with pytest.raises(ValueError, match="A3CConfig.algorithm must stay at its default"):
        a3c_jax.build(config(algorithm="n_step_q"), algorithm=tempered)
    loss = lambda params, apply_fn, trajectory: (0.0, {})  # noqa: E731
    with pytest.raises(ValueError, match="loss belongs to the algorithm 'a3c'"):
        a3c_jax.build(config(), environment=PROBE, loss=loss, algorithm=tempered)
    with pytest.raises(ValueError, match="loss belongs to the algorithm 'a3c'"):
        a3c_jax.build(config(algorithm="n_step_q"), loss=loss)


def test_what_is_no_algorithm_is_refused():
    with pytest.raises(TypeError, match="must be a function"):
        a3c_jax.build(config(), environment=PROBE, algorithm="a3c")
    with pytest.raises(TypeError, match="must return an a3c_jax.algorithm.Algorithm, got int"):
        a3c_jax.build(config(), environment=PROBE, algorithm=lambda *arguments: 3)


def test_what_the_loss_of_an_algorithm_returns_is_checked():
    def broken(config, environment, network):
        return a3c(config, environment, network)._replace(loss=lambda *arguments: jnp.zeros(3))

    with pytest.raises(TypeError, match="loss must return a pair"):
        a3c_jax.build(config(), environment=PROBE, algorithm=broken)


def test_an_algorithm_that_shares_something_needs_parameters_in_a_dict():
    class Network:
        def init(self, key, observation):
            return (jnp.zeros((2, 2)),)

        def apply(self, params, observation):
            logits = observation @ params[0]
            return a3c_jax.distributions.Categorical(logits), logits[..., 0]

    with pytest.raises(TypeError, match="init_shared needs a network whose parameters are a dict"):
        a3c_jax.build(A3CConfig(), environment=PROBE, network=Network(), algorithm=tempered)


def test_the_documentation_lists_every_part_of_an_algorithm():
    for field in Algorithm._fields:
        assert f"  {field}: " in Algorithm.__doc__, field
    assert dataclasses.fields(A3CConfig)[1].name == "algorithm"
