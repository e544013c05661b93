"""Whole runs in environments on the host: replay, resume, evaluation, many runs of one program."""

import functools
import pickle
import re
import threading
import warnings

import gymnasium
import jax
import numpy as np
import pytest
from gymnasium import spaces
from host_games import Factory, Stairs, environment_threads, make_vector, stairs
from small_runs import (
    assert_equal_runs,
    assert_exact_counters,
    cut_short,
    program,
    replay,
    small,
    train,
    train_together,
    words,
)

import a3c_jax
from a3c_jax import (
    CheckpointFolder,
    evaluate,
    find_checkpoint,
    greedy_policy,
    random_policy,
    sampled_policy,
)
from a3c_jax.asynchrony import evaluation
from a3c_jax.environments import HostEnvironment

# One object each, so that each program is built once.
GAMES = {
    "Disabled": stairs("sync", "Disabled"),
    "NextStep": stairs("sync", "NextStep"),
    "SameStep": stairs("sync", "SameStep"),
    "marked": stairs("wrapped", "NextStep"),
    "cartpole": Factory(lambda num_envs: gymnasium.make_vec("CartPole-v1", num_envs)),
}
PUT_BACK, OTHERS = ["Disabled", "NextStep"], ["SameStep", "marked", "cartpole"]


@pytest.fixture(autouse=True)
def everything_is_closed():
    yield
    assert [game.open for game in GAMES.values()] == [0] * len(GAMES)
    assert not environment_threads()


@pytest.mark.parametrize("name", GAMES)
def test_a_replay_is_the_run_bit_for_bit(name):
    config = small(num_workers=3, optimizer="rmsprop", max_steps=960)
    result = train_together(config, GAMES[name])
    assert len(result.episodes.length) > 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal_runs(replay(config, result.schedule, GAMES[name]), result)


@pytest.mark.parametrize("name", PUT_BACK)
def test_one_worker_goes_on_as_if_nothing_had_been(tmp_path, name):
    config, game, checkpoint = small(core="lstm", core_size=4), GAMES[name], None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for updates in (1, 12, 20):
            checkpoint = cut_short(config, updates, tmp_path, game, resume=checkpoint)
            assert_exact_counters(checkpoint)
        result = train(config, game, resume=checkpoint)
    assert_equal_runs(result, train(config, game))


@pytest.mark.parametrize("name", PUT_BACK)
def test_several_workers_go_on_and_the_whole_can_be_replayed_from_anywhere(tmp_path, name):
    config, game, checkpoint, saved = small(num_workers=3, max_steps=1_200), GAMES[name], None, []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for updates in (30, 50):
            checkpoint = cut_short(config, updates, tmp_path, game, resume=checkpoint)
            assert_exact_counters(checkpoint)
            saved.append(checkpoint)
        result = train(config, game, resume=checkpoint, checkpoints=CheckpointFolder(tmp_path))
        assert result.version == 150
        assert_exact_counters(find_checkpoint(tmp_path))
        assert_equal_runs(replay(config, result.schedule, game), result)
        for start in saved:
            assert_equal_runs(replay(config, result.schedule, game, start=start), result)


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_put_back_begins_anew_with_a_warning(tmp_path, name):
    config, game = small(num_workers=2, max_steps=1_200), GAMES[name]
    checkpoint = cut_short(config, 40, tmp_path, game)
    message = "cannot be put back into the middle of an episode, because it cannot begin an episode with a seed"
    with pytest.warns(RuntimeWarning, match=message) as warned:
        result = train(config, game, resume=checkpoint)
    assert len([w for w in warned if message in str(w.message)]) <= 2
    assert result.version == 150
    assert (result.episodes.length > 0).all()
    assert words([c[:40] for c in result.schedule]) == words(list(checkpoint.schedule))


def test_a_game_that_is_not_the_same_twice_begins_anew_with_a_warning(tmp_path):
    chance = np.random.default_rng(0)  # which no seed reaches
    game = stairs("sync", "Disabled", draw=chance)
    config = small(max_steps=800)
    checkpoint = cut_short(config, 40, tmp_path, game)
    with pytest.warns(
        RuntimeWarning, match="because it does not do the same again with the same seed"
    ):
        result = train(config, game, resume=checkpoint, checkpoints=CheckpointFolder(tmp_path))
    assert result.version == 100 and game.open == 0
    # Nothing is counted of the episodes that were left, and nothing else is lost.
    ended, running = (
        result.episodes.length.sum(),
        find_checkpoint(tmp_path).states["episode_length"].sum(),
    )
    left = checkpoint.states["episode_length"].sum()
    assert left > 0 and ended + running + left == 100 * config.steps_per_update


def test_a_game_whose_rewards_alone_differ_begins_anew_with_a_warning(tmp_path):
    chance = np.random.default_rng(0)

    class Pays(Stairs):
        def step(self, action):
            observation, _, *rest = super().step(action)
            return observation, chance.random(), *rest

    game = Factory(lambda num_envs: make_vector("sync", "Disabled", Pays, num_envs))
    checkpoint = cut_short(small(max_steps=800), 41, tmp_path, game)
    assert checkpoint.states["episode_length"].any()
    with pytest.warns(
        RuntimeWarning, match="because it does not do the same again with the same seed"
    ):
        train(small(max_steps=800), game, resume=checkpoint)


@pytest.mark.parametrize("named", [True, False])
def test_checkpoints_can_be_loaded_and_evaluated(tmp_path, named):
    game = None if named else GAMES["Disabled"]
    name = {"environment": "gymnasium:CartPole-v1?max_episode_steps=30"} if named else {}
    config = small(max_steps=80, **name)
    result = train(config, game, checkpoints=CheckpointFolder(tmp_path))
    run = a3c_jax.load(tmp_path, environment=game)
    assert words(run.params) == words(result.params)
    assert isinstance(run.environment, HostEnvironment)
    policy = greedy_policy(run.network)
    evaluation = evaluate(policy, run.params, run.environment, run.evaluation_key, 5)
    assert (evaluation.lengths > 0).all()
    again = evaluate(policy, result.params, result.environment, result.evaluation_key, 5)
    assert words(list(again)) == words(list(evaluation))
    if not named:
        with pytest.raises(ValueError, match="environment"):
            a3c_jax.load(tmp_path)


def test_a_result_and_its_environment_can_be_pickled():
    name = "gymnasium:CartPole-v1?max_episode_steps=30"
    result = train(small(max_steps=80, environment=name), None)
    again = pickle.loads(pickle.dumps(result))
    assert words(again.params) == words(result.params)
    a, b = (
        evaluate(greedy_policy(r.network), r.params, r.environment, r.evaluation_key, 3)
        for r in (result, again)
    )
    np.testing.assert_array_equal(a.returns, b.returns)


# Evaluation


class Counts(gymnasium.Env):
    """The first episode pays 1 a step, and each later one 1000 a step; its length is drawn."""

    observation_space, action_space = spaces.Box(0, 100, (1,)), spaces.Discrete(2)

    def __init__(self):
        self.episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.length, self.time = int(self.np_random.integers(1, 9)), 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.time += 1
        reward = 1.0 if self.episode == 1 else 1000.0
        return np.float32([self.time]), reward, self.time == self.length, False, {}


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("sync", "Disabled"), ("sync", "NextStep"), ("sync", "SameStep"), ("dense", "NextStep")],
)
def test_only_the_first_episode_of_each_environment_counts(kind, mode):
    sizes = []

    def make(num_envs):
        sizes.append(num_envs)
        return make_vector(kind, mode, Counts, num_envs)

    factory = Factory(make)
    environment = HostEnvironment("Counts", factory)
    sizes.clear()
    policy = random_policy(environment)
    a, b, other = (evaluate(policy, None, environment, jax.random.key(k), 70) for k in (0, 0, 1))
    assert sizes == [32, 32, 6] * 3 and factory.open == 0
    np.testing.assert_array_equal(a.returns, a.lengths)
    assert set(a.lengths) == set(range(1, 9))  # the environments are not all the same
    np.testing.assert_array_equal(a.lengths, b.lengths)
    assert (a.lengths != other.lengths).any() and (a.lengths[:32] != a.lengths[32:64]).any()


def test_greedy_and_sampled_policies_act_as_they_say():
    result = train(small(max_steps=80), GAMES["Disabled"])
    environment, key = result.environment, jax.random.key(0)
    greedy, sampled = (
        evaluate(policy(result.network), result.params, environment, key, 40)
        for policy in (greedy_policy, sampled_policy)
    )
    # The same episodes by hand, in environments with the seeds that an evaluation gives them.
    _, seed_key, _ = jax.random.split(key, 3)
    with environment.playing(32, jax.random.key_data(seed_key)) as player:
        observation = environment.begin(player, np.zeros(32, np.int32))
        returns, running = np.zeros(32, np.float32), np.ones(32, bool)
        while running.any():
            action = np.asarray(result.network.apply(result.params, observation)[0].mode())
            stepped = player.step(environment.decode(action))
            returns += np.where(running, stepped.reward, 0)
            running &= ~(stepped.terminated | stepped.truncated)
            observation = environment.encode(stepped.observation)
    np.testing.assert_allclose(greedy.returns[:32], returns, rtol=1e-5)
    np.testing.assert_array_equal(greedy.lengths, sampled.lengths)  # which depend on seeds alone
    assert (greedy.returns != sampled.returns).any()


def test_an_evaluation_that_may_never_end_says_so(monkeypatch):
    environment = HostEnvironment("Stairs", lambda n: make_vector("sync", "Disabled", Stairs, n))
    arguments = random_policy(environment), None, environment, jax.random.key(0), 8
    monkeypatch.setattr(evaluation, "_MANY_STEPS", 3)
    with pytest.warns(RuntimeWarning, match="after 3 steps .* environment 'Stairs' have not ended"):
        evaluate(*arguments)
    monkeypatch.setattr(evaluation, "_MANY_STEPS", 5)  # which are the longest
    with warnings.catch_warnings(action="error"):
        evaluate(*arguments)


def test_an_evaluation_that_fails_closes_its_environments():
    class Fails(Stairs):
        def step(self, action):
            raise OSError("lost")

    factory = Factory(lambda n: make_vector("sync", "Disabled", Fails, n))
    environment = HostEnvironment("Fails", factory)
    with pytest.raises(OSError, match="lost"):
        evaluate(random_policy(environment), None, environment, jax.random.key(0), 3)
    assert factory.made == 2 and factory.open == 0


# Programs


def test_a_simulation_refuses_in_one_sentence():
    for environment, name in ((GAMES["Disabled"], "factory"), (None, "gymnasium:CartPole-v1")):
        config = small(**{} if environment else {"environment": name})
        message = f"needs an environment written in JAX, got {name!r}, which runs on the host; use train, or replay"
        with pytest.raises(ValueError, match=re.escape(message)):
            a3c_jax.make_simulation(config, 2, environment=environment)


def test_a_program_is_built_once_and_run_with_many_seeds():
    game = stairs()
    built = a3c_jax.build(small(max_steps=160), environment=game)
    assert game.open == 0 and game.made <= 1  # for its spaces
    results = {seed: a3c_jax.train(built.replace(seed=seed)) for seed in (1, 2, 3)}
    assert game.made <= 4 and game.open == 0
    again = a3c_jax.train(built.replace(seed=2))
    assert_equal_runs(again, results[2])
    assert len({tuple(words(result.params)) for result in results.values()}) == 3
    other = a3c_jax.train(built.replace(seed=2, optimizer="momentum"))
    assert other.version == 20 and game.open == 0


def test_several_runs_of_one_program_at_the_same_time_do_not_disturb_each_other():
    built = program(small(max_steps=400), GAMES["Disabled"])
    seeds = [1, 2, 3, 4]
    expected = {seed: a3c_jax.train(built.replace(seed=seed)) for seed in seeds}
    found, together = {}, threading.Barrier(len(seeds))

    def run(seed):
        together.wait(60)
        found[seed] = a3c_jax.train(built.replace(seed=seed))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for seed in seeds:
        assert_equal_runs(found[seed], expected[seed])


def test_each_worker_has_environments_of_its_own():
    seeds = []
    game = stairs(seeds=seeds)
    result = train_together(small(num_workers=3, max_steps=240), game)
    assert game.made == 1 + 3 and result.version == 30
    assert len(set(seeds)) == len(seeds) > 9


# An environment as an object


def test_an_object_plays_for_one_worker_again_and_again_and_stays_open():
    vector = make_vector("sync", "Disabled", Stairs, 2)
    closed = []
    vector.close = functools.partial(closed.append, "closed")
    built = a3c_jax.build(small(max_steps=80), environment=vector)
    first, second = a3c_jax.train(built), a3c_jax.train(built)
    assert_equal_runs(first, second)
    assert not closed
    environment = first.environment
    policy = greedy_policy(first.network)
    two, three = (
        evaluate(policy, first.params, environment, first.evaluation_key, n).returns for n in (2, 3)
    )
    assert len(three) == 3
    np.testing.assert_array_equal(three[:2], two)
    assert_equal_runs(a3c_jax.train(built), first)  # it was given back
    vector.reset(seed=0)


def test_a_function_that_gives_one_object_twice_is_refused():
    vector = make_vector("sync", "Disabled", Stairs, 2)
    with pytest.raises(ValueError, match="must be made anew each time, got one that was given"):
        make = HostEnvironment("Stairs", lambda num_envs: vector).make
        make(2)
        make(2)


def test_an_object_in_use_is_refused_elsewhere():
    vector = make_vector("sync", "Disabled", Stairs, 2)
    environment = HostEnvironment("Stairs", vector)
    with (
        environment.playing(2),
        pytest.raises(
            ValueError, match="was given as one object, which is in use; give a function"
        ),
    ):
        environment.make(2)
    environment.make(2).close()


@pytest.mark.parametrize("changes", [{"num_workers": 3}, {"envs_per_worker": 5}])
def test_an_object_is_refused_for_several_workers_or_another_number_of_environments(changes):
    vector = make_vector("sync", "Disabled", Stairs, 2)
    threads = threading.active_count()
    message = (
        "given as one object with 2 environments, which only one worker can play, got num_workers"
    )
    with pytest.raises(ValueError, match=message):
        a3c_jax.train(small(**changes), environment=vector)
    if "num_workers" in changes:
        built = a3c_jax.build(small(), environment=vector)
        with pytest.raises(ValueError, match=message):
            built.replace(**changes)
    assert threading.active_count() == threads
