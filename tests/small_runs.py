"""Small runs for the tests of checkpoints, replay and faults, and programs shared between them.

A run of a few updates takes milliseconds, but each call of `train` traces and compiles its programs, which
takes a second. `shared_programs` keeps what a configuration builds, all of it pure, for the next run.
"""

import dataclasses
import functools
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import a3c_jax
from a3c_jax import A3CConfig, CheckpointFolder, agent, kernels, parameters, training, worker
from a3c_jax.checkpoints import find
from a3c_jax.environments import Transition

SMALL = {"num_workers": 1, "envs_per_worker": 2, "t_max": 4, "hidden_sizes": (8,), "seed": 3}
OPTIMIZERS = ["adam", "momentum", "shared_rmsprop", "rmsprop"]

_BUDGETS = {"max_steps": 10**6, "max_episodes": None, "solved_return": None, "solved_window": 100}
_OF_THE_STEP = ("environment", "envs_per_worker", "t_max", "discount", "critic_cost", "entropy_cost",
                "terminal_reward", "hidden_sizes", "activation", "shared_torso", "gae_lambda", "reward_clip",
                "normalize_observations", "normalize_rewards", "torso", "core", "core_size", "forget_bias",
                "action_bounds", "state_dependent_scale")  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def shared_programs():
    """Has every `train` and `replay` of a module share what equal configurations compile. Import it to use it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_agent", _make_agent)
        patch.setattr(training, "PackedWorkerStep", _packed_step)
        patch.setattr(training, "SharedParameters", _Store)
        yield


_steps, _jits = {}, {}
_key_of = {}
_kept = []


def _make_agent(config, *, environment=None, network=None):
    budgets = dict(_BUDGETS)
    if config.learning_rate_schedule == "linear":
        del budgets["max_steps"]
    built = _agent(dataclasses.replace(config, **budgets), environment, network)
    return built._replace(config=config)


@functools.cache
def _agent(config, environment, network):
    walk = environment if type(environment) is Walk else None
    program = "walk" if walk else id(environment)
    key = (program, id(network), *(getattr(config, name) for name in _OF_THE_STEP))

    jit = kernels.jit_for_one_call

    def jit_once(function):
        if (function.__name__, key) not in _jits:
            _jits[function.__name__, key] = jit(function)
        return _jits[function.__name__, key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "jit_for_one_call", jit_once)
        built = agent.make_agent(config, environment=WALK if walk else environment, network=network)
    if walk:
        states = [walk.adopt(state) for state in built.states]
        built = built._replace(environment=walk, states=states)
    _kept.append((built, environment, network))  # lest an id is used again
    _key_of[id(built.worker_step)] = key
    return built


def _packed_step(worker_step, params, state):
    key = _key_of[id(worker_step)]
    if key not in _steps:
        _steps[key] = worker.PackedWorkerStep(worker_step, params, state)
    return _steps[key]


class _Store(parameters.SharedParameters):
    """Its compiled update is that of the first store with the same optimizer: a function of arrays alone."""

    def __init__(self, params, optimizer, *arguments, **options):
        super().__init__(params, optimizer, *arguments, **options)
        self._update = _updates.setdefault(id(optimizer), self._update)


_updates = {}


def train_together(config, **arguments):
    """A run to which every worker contributes: none plays on before all have begun their first segment."""
    everyone = threading.Barrier(config.num_workers)

    class Together(training.WorkerThreads):
        def __init__(self, step, *arguments, max_running, **rest):
            begun = threading.local()

            def with_everyone(params, state):
                if not hasattr(begun, "by_this_thread"):
                    begun.by_this_thread = True
                    everyone.wait(60)
                return step(params, state)

            super().__init__(with_everyone, *arguments, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "WorkerThreads", Together)
        result = a3c_jax.train(config, **arguments)
    assert set(result.schedule.worker) == set(range(config.num_workers))
    return result


class Walk:
    """A walk whose position grows by the action, in episodes of 3 to 8 steps; it pays its position's sine.

    Any change in an action, a key or a state shows in all that follows. From step `bad_from` on, counted in
    each environment over all its episodes, `bad` is what it pays (`where="reward"`) or shows
    (`where="observation"`), for `bad_count` steps.
    """

    name = "Walk"
    num_actions = 2
    continuous = False
    observation_shape = (3,)

    def __init__(self, bad=np.nan, bad_from=None, where="reward", bad_count=10**6):
        # All of it is in the state, so that every walk is the same program.
        begin = 10**9 if bad_from is None else bad_from
        self._bad = (np.float32(bad), np.int32(begin), np.int32(begin + bad_count))
        self._in_observation = np.bool_(where == "observation")

    def reset(self, key, num_envs):
        return self._reset(key, self._carried(num_envs))

    def adopt(self, state):
        """Another walk's first state as this one's."""
        *rest, (played, *_) = state.environment
        return state._replace(environment=(*rest, self._carried(len(played))))

    def _carried(self, num_envs):
        zeros = jnp.zeros(num_envs, jnp.int32)
        constants = [zeros.astype(x.dtype) + x for x in self._bad]
        return zeros, *constants, zeros.astype(bool) | self._in_observation

    def step(self, key, state, action):
        position, remaining, (played, *constants) = state
        position, remaining, played = position + 0.7 * action, remaining - 1, played + 1
        last = remaining == 0
        carried = (played, *constants)
        state = (position, remaining, carried)
        final = self._observe(state)
        is_bad, in_observation, bad = self._is_bad(carried)
        reward = jnp.where(is_bad & ~in_observation, bad, jnp.sin(position))
        fresh_observation, fresh = self._reset(key, carried)
        state = jax.tree.map(lambda a, b: jnp.where(last, a, b), fresh, state)
        observation = jnp.where(last[:, None], fresh_observation, final)
        # Every other episode ends by itself, the rest by a time limit.
        terminated = last & (played % 2 == 0)
        return Transition(observation, state, reward, terminated, last & ~terminated, final)

    def _is_bad(self, carried):
        played, bad, begin, end, in_observation = carried
        return (played >= begin) & (played < end), in_observation, bad

    def _reset(self, key, carried):
        position_key, length_key = jax.random.split(key)
        position = jax.random.normal(position_key, carried[0].shape)
        remaining = jax.random.randint(length_key, carried[0].shape, 3, 9)
        state = (position, remaining, carried)
        return self._observe(state), state

    def _observe(self, state):
        position, remaining, carried = state
        observation = jnp.stack([jnp.sin(position), jnp.cos(position), remaining / 8.0], axis=-1)
        is_bad, in_observation, bad = self._is_bad(carried)
        return jnp.where((is_bad & in_observation)[:, None], bad[:, None], observation)


WALK = Walk()


def small(**changes):
    return A3CConfig(**SMALL | {"max_steps": 400, "solved_window": 5} | changes)


def train(config, environment=WALK, **options):
    return a3c_jax.train(config, environment=environment, **options)


def replay(config, schedule, environment=WALK, **options):
    return a3c_jax.replay(config, schedule, environment=environment, **options)


def cut_short(config, updates, folder, environment=WALK, **options):
    """Makes exactly so many updates of a longer run, and returns its checkpoint: as an interruption leaves it."""

    class Fewer(training.WorkerThreads):
        def __init__(self, *arguments, max_updates, **rest):
            super().__init__(*arguments, max_updates=updates, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "WorkerThreads", Fewer)
        train(config, environment, checkpoints=CheckpointFolder(folder), **options)
    return find(folder)


class StopAt:
    """A sink that stops the run as Ctrl-C does, at the first row from an update on."""

    def __init__(self, update):
        self.update = update

    def write(self, row, episodes):
        if self.update is not None and row["updates"] >= self.update:
            self.update = None
            raise KeyboardInterrupt

    def close(self):
        pass


def words(tree):
    """All of a tree's bits: NaNs and negative zeros count."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def assert_equal_runs(a, b):
    """Bit for bit, but for the seconds."""
    chex.assert_trees_all_equal_structs(a.params, b.params)
    assert words(a.params) == words(b.params)
    assert words(a.opt_state) == words(b.opt_state)
    assert words(a.best_params) == words(b.best_params)
    assert repr(a.best_mean_return) == repr(b.best_mean_return)
    assert (a.version, a.environment_steps, a.skipped) == (
        b.version, b.environment_steps, b.skipped,
    )  # fmt: skip
    for name in ("worker", "episode_return", "length", "environment_steps"):
        np.testing.assert_array_equal(getattr(a.episodes, name), getattr(b.episodes, name), name)
    assert words(a.schedule) == words(b.schedule)


def running_lengths(checkpoint):
    """The lengths of the episodes that run in each worker's environments: a state's last words."""
    return checkpoint.states[:, -checkpoint.config.envs_per_worker :].view(np.int32)


def assert_exact_counters(checkpoint):
    """Every step that was played is in an episode that ended or in one that is running: worker by worker."""
    config, schedule, episodes = checkpoint.config, checkpoint.schedule, checkpoint.episodes
    assert checkpoint.version == len(schedule.worker) == len(schedule.pulled_version)
    assert checkpoint.environment_steps == checkpoint.version * config.steps_per_update
    assert (schedule.staleness >= 0).all()
    assert (schedule.pulled_version >= 0).all()
    running = running_lengths(checkpoint)
    for w in range(config.num_workers):
        played = config.steps_per_update * int((schedule.worker == w).sum())
        ended = int(episodes.length[episodes.worker == w].sum())
        assert played == ended + int(running[w].sum()), f"worker {w}"
    # Each episode was reported by an update of the worker that played it.
    updates = episodes.environment_steps // config.steps_per_update - 1
    np.testing.assert_array_equal(schedule.worker[updates], episodes.worker)
    assert (np.diff(updates) >= 0).all()
