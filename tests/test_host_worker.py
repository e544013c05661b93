"""A worker's step on the host: what it learns from, the pure path as its twin, and that it is a pure function itself."""

import functools
import gc
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from host_games import (
    MODES,
    Factory,
    Stairs,
    Vector,
    Worker,
    environment_threads,
    make_vector,
    stairs,
)

import a3c_jax
from a3c_jax import A3CConfig, fixed_delay
from a3c_jax.algorithm import a3c
from a3c_jax.distributions import Categorical
from a3c_jax.environments import Transition
from a3c_jax.host_state import ActionLog
from a3c_jax.losses import a3c_loss, n_step_returns
from a3c_jax.networks import trajectory_apply
from a3c_jax.normalization import Moments, merge_moments

AT_NEWEST = functools.partial(a3c, learns_at_newest=True)


# Targets: a network that knows the true value of every state.


class Known(Vector):
    """N environments in which everything is known.

    Each step of an episode pays what its observation shows. It ends by a time limit that nobody sees, so that its
    value is that of going on for ever; or by itself, and then the observation counts the steps that are left. The
    observation that it terminates with is marked, and worth 1000 to the network, which nobody may look at.
    """

    LIMIT = 4

    def __init__(self, num_envs, mode, dense=True, both=False):
        self.num_envs, self.mode, self.dense, self.both = num_envs, mode, dense, both
        self.metadata = {"autoreset_mode": AutoresetMode(mode)}
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (3,))
        self.single_action_space = spaces.Discrete(2)
        self.envs = [KnownAlone(both) for _ in range(num_envs)]
        for n, env in enumerate(self.envs):
            env.number = n
        super().__init__(iter(self.envs).__next__, num_envs, mode, dense)


class KnownAlone(Stairs):
    action_space = spaces.Discrete(2)

    def __init__(self, both=False):
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,))
        self.both, self.number, self.episode = both, 0, 0

    def reset(self, *, seed=None, options=None):
        self.episode += 1
        self.terminates = (self.episode + self.number) % 2 == 0
        self.pays = float(1 + (7 * self.episode + 3 * self.number) % 5)
        self.left = 2 + (self.episode + 2 * self.number) % 4
        return self.observe(), {}

    def step(self, action):
        self.left -= 1
        last = self.left == 0
        terminated = last and self.terminates
        truncated = last and (not self.terminates or self.both)
        return self.observe(), self.pays, terminated, truncated, {}

    def observe(self):
        return np.float32([self.pays, self.left if self.terminates else -1, self.terminates])


DISCOUNT = 0.8


class Knows:
    """The network: nothing to learn, and the true value of every observation."""

    def init(self, key, observation):
        return {"nothing": jnp.zeros(2)}

    def apply(self, params, observation):
        pays, left, terminates = observation[..., 0], observation[..., 1], observation[..., 2]
        steps = jnp.where(terminates > 0, left, jnp.inf)
        value = pays * (1 - DISCOUNT**steps) / (1 - DISCOUNT)
        value = jnp.where((terminates > 0) & (left == 0), 1000.0, value)
        logits = params["nothing"] * jnp.ones((*pays.shape, 1))
        return Categorical(logits), value + 0 * params["nothing"].sum()


KNOWN = A3CConfig(num_workers=1, envs_per_worker=3, t_max=9, discount=DISCOUNT)


@pytest.mark.parametrize("both", [False, True], ids=["", "both"])
@pytest.mark.parametrize(
    ("mode", "dense"),
    [("Disabled", True), ("SameStep", True), ("SameStep", False), ("NextStep", True)],
)
def test_who_knows_the_true_values_has_nothing_to_learn(mode, dense, both):
    make = functools.partial(Known, mode=mode, dense=dense, both=both)
    worker = Worker(KNOWN, make, network=Knows())
    ended = 0
    for _, _, statistics in worker.segments(6):
        assert abs(statistics.metrics["critic_loss"]) < 1e-8
        assert abs(statistics.metrics["mean_advantage"]) < 1e-5
        ended += int(statistics.num_episodes)
    assert ended > 20


@pytest.mark.parametrize("mode", MODES)
def test_targets_are_bootstrapped_from_what_followed_the_action(mode):
    """The target of each last step by hand: r + gamma V(last observation) at a time limit, and r at a termination."""
    worker = Worker(
        KNOWN, functools.partial(Known, mode=mode), network=Knows(), algorithm=AT_NEWEST
    )
    limits = terminations = 0
    for segment, _, statistics in worker.segments(6):
        x = jax.tree.map(np.asarray, segment.trajectory)
        value = lambda observation: np.asarray(Knows().apply(worker.params, observation)[1])  # noqa: E731
        returns = np.asarray(
            n_step_returns(
                jnp.asarray(x.reward_t),
                DISCOUNT * (1.0 - x.terminated_t),
                value(x.observation_t),
                1.0 - x.truncated_t,
            )
        )
        valid = np.ones(x.reward_t.shape, bool) if x.valid_tm1 is None else x.valid_tm1
        assert valid.all() == (mode != "NextStep")
        for t, n in np.argwhere((x.terminated_t | x.truncated_t) & valid):
            pays, left, terminates = x.observation_t[t, n]
            # A step that only begins an episode is none of its steps.
            assert statistics.episodes.ended[t, n]
            length = statistics.episodes.length[t, n]
            assert statistics.episodes.episode_return[t, n] == pays * length
            assert left == (0 if terminates else -1) and pays == x.observation_tm1[t, n, 0]
            if x.terminated_t[t, n]:
                assert returns[t, n] == x.reward_t[t, n]
                terminations += 1
            else:
                expected = x.reward_t[t, n] + DISCOUNT * pays / (1 - DISCOUNT)
                np.testing.assert_allclose(returns[t, n], expected, rtol=1e-6)
                limits += 1
    assert limits > 5 and terminations > 5


# Twins: the same environment in JAX and on the host. All its numbers are short in base two, so that both are exact.


class TwinInJax:
    """Episodes of 2 to 5 steps that only the actions change; every other one ends by a time limit."""

    name = "Twin"
    num_actions, continuous, observation_shape = 3, False, (3,)

    def reset(self, key, num_envs):
        state = self.begin(jnp.arange(num_envs), jnp.zeros(num_envs, jnp.int32))
        return self.observe(state), state

    def begin(self, number, episode):
        return number, episode, (number + 3 * episode) % 8 / 8, 2 + (number + episode) % 4

    def step(self, key, state, action):
        number, episode, height, left = state
        state = (number, episode, height / 2 + action, left - 1)
        _, _, height, left = state
        last, final = left == 0, self.observe(state)
        fresh = self.begin(number, episode + 1)
        state = jax.tree.map(lambda a, b: jnp.where(last, a, b), fresh, state)
        by_itself = last & (episode % 2 == 0)
        return Transition(
            self.observe(state), state, height - 1.25, by_itself, last & ~by_itself, final
        )

    def observe(self, state):
        _, episode, height, left = state
        return jnp.stack([jnp.round(height * 8) / 8, left / 8, episode % 4 / 4], axis=-1)


class TwinAlone(Stairs):
    """One of them on the host."""

    def __init__(self):
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,))
        self.number, self.episode = 0, -1

    def reset(self, *, seed=None, options=None):
        self.episode += 1
        self.height = (self.number + 3 * self.episode) % 8 / 8
        self.left = 2 + (self.number + self.episode) % 4
        return self.observe(), {}

    def step(self, action):
        self.height, self.left = self.height / 2 + float(action), self.left - 1
        last, by_itself = self.left == 0, self.episode % 2 == 0
        return self.observe(), self.height - 1.25, last and by_itself, last and not by_itself, {}

    def observe(self):
        return np.float32([np.round(self.height * 8) / 8, self.left / 8, self.episode % 4 / 4])


def twin(mode, num_envs):
    alone = [TwinAlone() for _ in range(num_envs)]
    for n, env in enumerate(alone):
        env.number = n
    return Vector(iter(alone).__next__, num_envs, mode)


def own_loss(params, apply_fn, trajectory):
    loss, metrics = a3c_loss(params, apply_fn, trajectory, discount=0.5)
    drift = jnp.mean(jnp.square(trajectory.log_prob_tm1))
    return loss + 0.1 * drift * jnp.mean(apply_fn(params, trajectory)[1]), metrics


Q = "target_interval=30&exploration_steps=100"
SMALL = {"num_workers": 1, "envs_per_worker": 3, "t_max": 7, "hidden_sizes": (5,), "seed": 4}
TWINS = {
    "plain": ({}, {}),
    "lstm": (
        {"t_max": 3, "core": "lstm", "core_size": 4, "normalize_observations": True, "reward_clip": 0.5}, {}
    ),
    "rewards": ({"normalize_rewards": True, "terminal_reward": -2.0}, {}),
    "one_step_q": ({"algorithm": f"one_step_q?{Q}"}, {}),
    "one_step_sarsa": ({"algorithm": f"one_step_sarsa?{Q}", "core": "gru", "core_size": 4}, {}),
    "n_step_q": ({"algorithm": f"n_step_q?{Q}", "normalize_observations": True}, {}),
    "own loss": ({}, {"loss": own_loss}),
}  # fmt: skip


def descend(params, gradients):
    """Parameters after a small step, so that no two segments have the same; with the moments of what was played."""
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, params["params"], gradients["params"])
    changed = {"params": moved}
    if "statistics" in params:
        is_moments = lambda x: isinstance(x, Moments)  # noqa: E731
        pair = (params["statistics"], gradients["statistics"])
        changed["statistics"] = jax.tree.map(merge_moments, *pair, is_leaf=is_moments)
    return {**params, **changed}


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("SameStep", "plain"),
        *(
            pytest.param("Disabled", name, marks=[pytest.mark.slow] * ("core" in fields))
            for name, (fields, _) in TWINS.items()
        ),
    ],
)
def test_the_host_and_the_pure_path_do_the_same(name, mode):
    fields, objects = TWINS[name]
    config = A3CConfig(**SMALL | fields)
    pure = Worker(config, TwinInJax(), **objects)
    host = Worker(config, functools.partial(twin, mode), **objects)
    chex.assert_trees_all_equal(pure.params, host.params)
    ended = 0
    for (a, state, statistics), (b, host_state, host_statistics) in zip(
        pure.segments(12), host.segments(12), strict=True
    ):
        # The observations and the returns depend on all the actions so far.
        for field in ("key", "observation", "episode_return", "episode_length", "own"):
            chex.assert_trees_all_equal(getattr(state, field), getattr(host_state, field))
        chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_close(state.carry, host_state.carry, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(
            state.discounted_return, host_state.discounted_return, rtol=1e-6
        )
        assert_equal_episodes(statistics, host_statistics)
        chex.assert_trees_all_close(
            statistics.metrics, host_statistics.metrics, rtol=1e-4, atol=1e-5
        )
        pure.params, host.params = descend(pure.params, a), descend(host.params, b)
        ended += int(statistics.num_episodes)
    assert ended > 20


def assert_equal_episodes(statistics, host_statistics):
    assert statistics.num_episodes == host_statistics.num_episodes
    ended = np.asarray(statistics.episodes.ended)
    np.testing.assert_array_equal(ended, host_statistics.episodes.ended)
    for field in ("episode_return", "length"):
        a, b = (np.asarray(getattr(s.episodes, field)) for s in (statistics, host_statistics))
        np.testing.assert_array_equal(a[ended], b[ended])


def test_what_is_learnt_from_at_the_newest_parameters_is_the_same_segment():
    config = A3CConfig(**SMALL, core="lstm", core_size=4)
    pure = Worker(config, TwinInJax(), algorithm=AT_NEWEST)
    host = Worker(config, functools.partial(twin, "Disabled"), algorithm=AT_NEWEST)
    for (a, *_), (b, *_) in zip(pure.segments(4), host.segments(4), strict=True):
        chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
        for field in (
            "observation_tm1",
            "action_tm1",
            "reward_t",
            "terminated_t",
            "truncated_t",
            "observation_t",
        ):
            x, y = (np.asarray(getattr(segment.trajectory, field)) for segment in (a, b))
            np.testing.assert_array_equal(x, y, err_msg=field)
        chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"normalize_rewards": True, "core": "gru"}])
def test_whole_runs_of_twins_are_the_same(fields):
    config = A3CConfig(**SMALL | {"num_workers": 2}, **fields)
    schedule = fixed_delay(1, 30, num_workers=2)
    pure = a3c_jax.replay(config, schedule, environment=TwinInJax())
    host = a3c_jax.replay(config, schedule, environment=functools.partial(twin, "Disabled"))
    for field in ("worker", "episode_return", "length", "environment_steps"):
        np.testing.assert_array_equal(*(getattr(run.episodes, field) for run in (pure, host)))
    chex.assert_trees_all_close(pure.params, host.params, rtol=1e-3, atol=1e-5)
    assert pure.best_mean_return == pytest.approx(host.best_mean_return)


# Memory


@pytest.mark.parametrize("kind", ["sync", "wrapped"])
def test_an_episode_begins_without_memory_of_the_last_one_and_so_it_is_learnt_from(kind):
    """Each time one action is chosen, or several: the learner remembers what the actor remembered, step by step."""
    for t_max in (1, 5):
        config = A3CConfig(**SMALL | {"t_max": t_max, "core": "gru", "core_size": 4})
        worker = Worker(config, stairs(kind, "NextStep"), algorithm=AT_NEWEST)
        apply_fn = jax.jit(trajectory_apply(worker.blueprint.network))
        begun = invalid = 0
        for segment, state, _ in worker.segments(60 // t_max):
            x = segment.trajectory
            distribution, _, _ = apply_fn(worker.params, x)
            np.testing.assert_allclose(
                distribution.log_prob(x.action_tm1), x.log_prob_tm1, rtol=1e-4, atol=1e-5
            )
            begins = np.asarray(state.episode_length) == 0
            for carry in jax.tree.leaves(state.carry):
                np.testing.assert_array_equal(np.all(np.asarray(carry) == 0.0, axis=-1), begins)
            begun += begins.sum()
            invalid += 0 if x.valid_tm1 is None else np.sum(~x.valid_tm1)
        assert begun > 5 and (invalid > 5) == (kind == "wrapped")


# A pure function


@pytest.mark.parametrize("mode", ["Disabled", "NextStep"])
@pytest.mark.parametrize("core", [None, "lstm"])
def test_a_step_from_the_same_state_gives_the_same_whatever_was_played_in_between(mode, core):
    factory = stairs("sync", mode)
    config = A3CConfig(**SMALL, core=core, core_size=4)
    worker = Worker(config, factory)
    states, results = [worker.state], []
    for _ in range(5):
        result = worker.step(worker.params, states[-1])
        results.append(result)
        states.append(result[1])
    for k in [4, 0, 3, 3, 1, 4, 2]:
        again = worker.step(worker.params, states[k])
        chex.assert_trees_all_equal(again, results[k])
    # A state that came over a disk has no environments.
    leaves, structure = jax.tree.flatten(states[3])
    saved = jax.tree.unflatten(structure, leaves)
    assert saved.environment.live is not states[3].environment.live
    chex.assert_trees_all_equal(worker.step(worker.params, saved), results[3])
    assert factory.open == 2
    for state in (saved, states[0]):
        state.environment.live.close()
    assert factory.open == 0


def test_a_step_that_fails_may_be_tried_again():
    class Fails(Stairs):
        fails_at = None

        def step(self, action):
            Fails.played += 1
            if Fails.played in Fails.fails_at:
                raise OSError("lost")
            return super().step(action)

    Fails.played, Fails.fails_at = 0, ()
    worker = Worker(
        A3CConfig(**SMALL), Factory(lambda n: make_vector("sync", "Disabled", Fails, n))
    )
    states = [worker.state]
    for _ in range(6):
        states.append(worker.step(worker.params, states[-1])[1])
    expected = worker.step(worker.params, states[5])
    # It fails in a segment; or while the environments are put back, after which they stand nowhere.
    for at in (10, 2):
        newest = worker.step(worker.params, states[4])[1]
        Fails.fails_at = [Fails.played + at]
        with pytest.raises(OSError, match="lost"):
            worker.step(worker.params, states[2])
        chex.assert_trees_all_equal(worker.step(worker.params, newest), expected)
    states[0].environment.live.close()


def test_nobody_has_to_close_what_nobody_holds():
    factory = stairs()
    worker = Worker(A3CConfig(**SMALL), factory)
    state = worker.step(worker.params, worker.state)[1]
    (thread,) = environment_threads()
    del state, worker.state
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


# The actions of running episodes


def test_the_log_gives_the_last_actions_and_what_it_gave_stays():
    rng = np.random.default_rng(0)
    log, everything, given = ActionLog(np.zeros((0, 2), np.uint8)), np.zeros((0, 2), np.uint8), []
    longest = 0
    for _ in range(400):
        played = rng.integers(0, 200, (rng.integers(1, 30), 2)).astype(np.uint8)
        everything = np.concatenate([everything, played])
        longest = int(rng.integers(0, longest + len(played) + 1))
        log.append(played, longest)
        given.append((log.snapshot(longest), everything[len(everything) - longest :]))
    assert len(log.snapshot(10**9)()) < len(everything)  # it forgets
    for snapshot, expected in given:
        np.testing.assert_array_equal(snapshot(), expected)


class Endless(Stairs):
    def reset(self, **options):
        observation = super().reset(**options)
        self.length = 10**9
        return observation


def test_an_episode_that_is_too_long_to_be_remembered_begins_anew(monkeypatch):
    monkeypatch.setattr("a3c_jax.host_state.MOST_REMEMBERED", 20)
    config = A3CConfig(**SMALL | {"t_max": 400})
    worker = Worker(config, lambda n: make_vector("sync", "Disabled", Endless, n))
    states = [worker.state]
    for _ in range(4):
        states.append(worker.step(worker.params, states[-1])[1])
    assert [len(s.environment.actions) for s in states] == [0, 400, 800, 20, 420]
    for k, is_known in enumerate([True, True, True, False, False]):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            _, state, _ = worker.step(worker.params, states[k])
        told = ["too long to be remembered" in str(w.message) for w in warned]
        assert told == ([] if is_known else [True])
        np.testing.assert_array_equal(state.episode_length, 400 * (k + 1) if is_known else 400)
        if not is_known:  # it is another episode
            np.testing.assert_array_equal(
                state.environment.episode, states[k].environment.episode + 1
            )
    state.environment.live.close()
