"""Small environments that run on the host, alone and as vectors in all three ways of Gymnasium, to test with."""

import functools
import threading

import gymnasium
import jax
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

from a3c_jax import _compiled
from a3c_jax.blueprint import make_blueprint
from a3c_jax.host_worker import CompiledHostStep, HostStepFunctions

MODES = ["Disabled", "SameStep", "NextStep"]
FORMS = ["array", "dict", "tuple", "number"]
ENDS = [(True, False), (False, True), (True, True)]  # terminated, truncated, both


class Stairs(gymnasium.Env):
    """Episodes of 2 to 5 steps from a random start; where one stands and what it pays depends on all actions.

    The observation has the start, the time and the height, so that every moment of every episode has its own.

    Args:
      form: of the observation, one of `FORMS`.
      seeds: a list to write the seed of each reset to.
      draw: what to draw starts from instead of the environment's own generator.
    """

    metadata = {"render_modes": []}
    action_space = spaces.Discrete(3)

    def __init__(self, form="array", seeds=None, draw=None):
        self.form, self.seeds, self.draw = form, [] if seeds is None else seeds, draw
        part = functools.partial(spaces.Box, -np.inf, np.inf)
        self.observation_space = {
            "array": part((3,)),
            "dict": spaces.Dict({"start": part((1,)), "now": part((2,))}),
            "tuple": spaces.Tuple([part((1,)), part((2,))]),
            "number": spaces.Discrete(50, start=7),
        }[form]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        draw = self.np_random if self.draw is None else self.draw
        self.start, self.length = int(draw.integers(1, 10**6)), int(draw.integers(2, 6))
        self.end = ENDS[self.start % 3]
        self.time, self.height = 0, 0.0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.time, self.height = self.time + 1, 0.5 * self.height + float(action)
        ends = self.time == self.length
        reward = np.sin(self.start + self.height)
        return self.observe(), reward, ends and self.end[0], ends and self.end[1], {}

    def observe(self):
        start, now = np.float32([self.start]), np.float32([self.time, self.height])
        return {
            "array": np.concatenate([start, now]),
            "dict": {"start": start, "now": now},
            "tuple": (start, now),
            "number": np.int64(7 + (self.start + self.time + int(4 * self.height)) % 50),
        }[self.form]


class Vector:
    """A vector environment that has nothing of Gymnasium's but the interface, in any mode.

    All arrays that it returns are its own, and change in the next step or reset.

    Args:
      make: makes a single environment.
      num_envs: how many.
      mode: one of `MODES`.
      dense: whether `final_obs` is like an observation; otherwise it is an array of objects.
    """

    def __init__(self, make, num_envs, mode="Disabled", dense=True):
        self.envs, self.num_envs = [make() for _ in range(num_envs)], num_envs
        self.mode, self.dense, self.metadata = mode, dense, {"autoreset_mode": AutoresetMode(mode)}
        self.single_observation_space = self.envs[0].observation_space
        self.single_action_space = self.envs[0].action_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation, self.final = (
            create_empty_array(self.single_observation_space, num_envs, np.zeros) for _ in "ab"
        )
        self.now = [None] * num_envs
        self.reward = np.zeros(num_envs, np.float32)
        self.terminated, self.truncated, self.ended = (np.zeros(num_envs, bool) for _ in "abc")

    def reset(self, *, seed=None, options=None):
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        for n in np.flatnonzero(mask):
            self.now[n], _ = self.envs[n].reset(seed=None if seed is None else seed + int(n))
            self.ended[n] = self.terminated[n] = self.truncated[n] = False
            self.reward[n] = 0
        return self._together(self.now, self.observation), {}

    def step(self, actions):
        info, finals = {}, list(self.now)  # where no episode ends, it is not the last one
        actions = list(gymnasium.vector.utils.iterate(self.action_space, actions))
        for n, env in enumerate(self.envs):
            if self.ended[n] and self.mode == "NextStep":
                (self.now[n], _), self.reward[n] = env.reset(), 99.0  # which counts for nothing
                self.terminated[n] = self.truncated[n] = False
                continue
            assert not self.ended[n], "the episode has ended"
            self.now[n], self.reward[n], self.terminated[n], self.truncated[n], _ = env.step(
                actions[n]
            )
        self.ended = self.terminated | self.truncated
        if self.mode == "SameStep" and self.ended.any():
            info["final_obs"] = np.full(self.num_envs, None, object)
            for n in np.flatnonzero(self.ended):
                info["final_obs"][n] = finals[n] = self.now[n]
                self.now[n], _ = self.envs[n].reset()
            if self.dense:
                info["final_obs"] = self._together(finals, self.final)
            self.ended = np.zeros(self.num_envs, bool)
        observation = self._together(self.now, self.observation)
        return observation, self.reward, self.terminated, self.truncated, info

    def _together(self, observations, out):
        return concatenate(self.single_observation_space, observations, out)

    def close(self):
        for env in self.envs:
            env.close()


def make_vector(kind, mode, make, num_envs):
    """A vector of one of the `KINDS`.

    Args:
      kind: which one.
      mode: one of `MODES`.
      make: makes a single environment.
      num_envs: how many.
    """
    if kind in ("dense", "objects"):
        return Vector(make, num_envs, mode, dense=kind == "dense")
    vector = SyncVectorEnv([make] * num_envs, copy=kind != "shared", autoreset_mode=mode)
    return gymnasium.vector.VectorWrapper(vector) if kind == "wrapped" else vector


KINDS = ["sync", "shared", "wrapped", "dense", "objects"]


class Factory:
    """Makes vectors, and counts those that are open.

    Args:
      make: `make(num_envs)` makes one.

    Attributes:
      made: how many were made.
      open: how many of them are open.
    """

    def __init__(self, make):
        self._make, self._lock = make, threading.Lock()
        self.made = self.open = 0
        self.__name__ = "factory"

    def __call__(self, num_envs):
        with self._lock:
            number, self.made, self.open = self.made, self.made + 1, self.open + 1
        try:
            vector = self._make(num_envs)
        except BaseException:
            self._closed()
            raise
        vector.number, close = number, vector.close

        def close_and_count():
            self._closed()
            close()

        vector.close = close_and_count
        return vector

    def _closed(self):
        with self._lock:
            self.open -= 1


def environment_threads():
    """The living threads in which environments are stepped."""
    return [t for t in threading.enumerate() if t.name.endswith("-environments")]


def stairs(kind="sync", mode="Disabled", **options):
    """A factory of vectors of `Stairs`."""
    make = functools.partial(Stairs, **options)
    return Factory(lambda num_envs: make_vector(kind, mode, make, num_envs))


class Quick:
    """A function that is compiled quickly instead of well."""

    in_single_kernel = False

    def __init__(self, function, *examples, **options):
        self._compiled = _compiled.compile_for_few_calls(function)
        self(*examples)

    def __call__(self, *arguments):
        return jax.block_until_ready(self._compiled(*arguments))


class Worker:
    """One worker of a configuration, whose steps are made here one by one."""

    def __init__(self, config, environment, **objects):
        self.config = config
        self.blueprint = make_blueprint(config, environment=environment, **objects)
        seed = np.uint32(config.seed)
        self.start = functools.partial(self.blueprint.start, seed)
        self.state = self.start(np.int32(0))
        self.params = self.blueprint.init(seed, self.state.observation)
        step = self.blueprint.worker_step
        examples = self.params, self.state
        self.step = (
            CompiledHostStep(step, Quick, *examples)
            if isinstance(step, HostStepFunctions)
            else Quick(step, *examples)
        )

    def segments(self, count):
        """So many gradients and statistics, each with the state after it."""
        state = self.state
        for _ in range(count):
            gradients, state, statistics = self.step(self.params, state)
            yield gradients, state, statistics
        if hasattr(state.environment, "live"):
            state.environment.live.close()
