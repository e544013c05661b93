"""Small runs for the tests of checkpoints, replay and faults, and programs shared between them.

A run of a few updates takes milliseconds, but building its program takes a second. `program` builds what a
configuration describes once, and gives it to every test that asks for the same functions.
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
from a3c_jax import A3CConfig, CheckpointFolder, WorkerError, find_checkpoint
from a3c_jax.environments import Transition

SMALL = {"num_workers": 1, "envs_per_worker": 2, "t_max": 4, "hidden_sizes": (8,), "seed": 3}
OPTIMIZERS = ["adam", "momentum", "shared_rmsprop", "rmsprop"]

_BUDGETS = {"max_steps": 10**6, "max_episodes": None, "solved_return": None, "solved_window": 100}


def program(config, environment=None, network=None):
    """The program of a configuration; compiled once for all configurations that can share it."""
    common = _BUDGETS | {"seed": 0, "nonfinite": "stop", "max_concurrent_workers": None}
    if config.learning_rate_schedule == "linear":
        del common["max_steps"]
    if config.optimizer != "rmsprop":
        common["num_workers"] = 1
    built = _build(dataclasses.replace(config, **common), environment, network)
    return built.replace(**{name: getattr(config, name) for name in common})


def _build(config, environment, network):
    if type(environment) is not Walk:  # a subclass is another program
        return _build_once(config, environment, network)
    built = _build_once(config, WALK, network)
    return dataclasses.replace(
        built,
        blueprint=built.blueprint._replace(environment=environment),
        start=lambda seed, worker: environment.adopt(built.start(seed, worker)),
    )


@functools.cache
def _build_once(config, environment, network):
    return a3c_jax.build(config, environment=environment, network=network)


def files_in(folder):
    """What the files of a run hold."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def train_together(config, environment=None, **options):
    """A run to which every worker contributes: none goes on before all have begun their first segment."""
    everyone = threading.Barrier(config.num_workers)
    begun = threading.local()
    built = program(config, environment)

    def step(params, state):
        if not hasattr(begun, "by_this_thread"):
            begun.by_this_thread = True
            everyone.wait(60)
        return built.step(params, state)

    together = dataclasses.replace(built, step=step, max_concurrent_calls=lambda *_: None)
    result = a3c_jax.train(together, **options)
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
    return a3c_jax.train(program(config, environment), **options)


def replay(config, schedule, environment=WALK, **options):
    return a3c_jax.replay(program(config, environment), schedule, **options)


_TOLD = RuntimeError("as told")


def fail_after(built, count, error=_TOLD, once=False):
    """The program with a step that raises from call number `count` on, counted over all workers; or only there."""
    calls, lock = iter(range(10**9)), threading.Lock()

    def step(params, state):
        with lock:
            number = next(calls)
        if number == count or (number > count and not once):
            raise error
        return built.step(params, state)

    return dataclasses.replace(built, step=step, max_concurrent_calls=lambda *_: None)


def cut_short(config, updates, folder, environment=WALK, **options):
    """Makes exactly so many updates of a run, and returns its checkpoint, as an interruption leaves it."""
    resumed = options.get("resume")
    before = 0 if resumed is None else resumed.version
    try:
        a3c_jax.train(
            fail_after(program(config, environment), updates),
            checkpoints=CheckpointFolder(folder),
            **options,
        )
    except WorkerError as error:
        assert error.result.version == before + updates
    return find_checkpoint(folder)


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
    """The lengths of the episodes that run in each worker's environments."""
    return checkpoint.states["episode_length"]


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


def refused(capsys, program, arguments):
    """What a script prints that refuses its arguments, in one line."""
    with pytest.raises(SystemExit) as caught:
        program.main(arguments)
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())
