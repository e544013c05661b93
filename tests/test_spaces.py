"""Spaces of Gymnasium: what the network sees, what the environment gets, and what is refused."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import Env, spaces
from gymnasium.vector import SyncVectorEnv
from host_games import Vector, Worker

from a3c_jax import A3CConfig, WorkerError, train
from a3c_jax.distributions import Categorical
from a3c_jax.environments import HostEnvironment

N = 3
SMALL = {"num_workers": 1, "envs_per_worker": N, "t_max": 4, "hidden_sizes": (5,)}


class Shows(Env):
    """Shows random members of a space, and takes only members of another. Episodes of three steps."""

    def __init__(self, observation_space=None, action_space=None):
        self.observation_space = observation_space or spaces.Box(-1, 1, (2,))
        self.action_space = action_space or spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), (self.action_space, action)
        self.time += 1
        return self.observation_space.sample(), 1.0, self.time == 3, False, {}


def vector(observation_space=None, action_space=None, num_envs=N):
    return SyncVectorEnv(
        [lambda: Shows(observation_space, action_space)] * num_envs, autoreset_mode="Disabled"
    )


def host(observation_space=None, action_space=None, **options):
    make = lambda num_envs: vector(observation_space, action_space, num_envs)  # noqa: E731
    return HostEnvironment("Shows", make, **options)


# Observations


def one_hot(numbers, size):
    return np.eye(size, dtype=np.float32)[numbers]


OBSERVATIONS = {  # the space, and the encoded members by hand
    "discrete": (spaces.Discrete(4), lambda x: one_hot(x, 4)),
    "discrete with a start": (spaces.Discrete(4, start=-2), lambda x: one_hot(x + 2, 4)),
    "float64": (spaces.Box(-1.0, 1.0, (2, 3), np.float64), lambda x: x.astype(np.float32)),
    "float16": (spaces.Box(-1.0, 1.0, (2,), np.float16), lambda x: x),
    "bytes": (spaces.Box(0, 255, (5, 4, 3), np.uint8), lambda x: x),
    "int64": (spaces.Box(-9, 9, (2,), np.int64), lambda x: x.astype(np.int32)),
    "a scalar": (spaces.Box(-1.0, 1.0, ()), lambda x: x),
    "bits": (spaces.MultiBinary(6), lambda x: x),
    "more bits": (spaces.MultiBinary((2, 3)), lambda x: x),
    "multi-discrete": (spaces.MultiDiscrete([3, 5]), lambda x: x.astype(np.int32)),
    "dict": (
        spaces.Dict(
            {
                "z": spaces.Discrete(3),
                "a": spaces.Tuple([spaces.Box(0, 1, (2,)), spaces.MultiBinary(2)]),
            }
        ),
        lambda x: {"z": one_hot(x["z"], 3), "a": x["a"]},
    ),
    "tuple": (
        spaces.Tuple([spaces.Discrete(2), spaces.Dict({"k": spaces.Box(0, 1, (1,))})]),
        lambda x: (one_hot(x[0], 2), x[1]),
    ),
}


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_observations_are_what_the_network_is_told_they_are(name):
    space, by_hand = OBSERVATIONS[name]
    environment = host(space)
    raw, _ = vector(space).reset(seed=3)
    encoded = environment.encode(raw)
    assert_equal_trees(encoded, by_hand(raw))
    shapes = jax.tree.map(lambda x: x.shape[1:], encoded)
    assert environment.observation_shape == shapes
    example = environment.observation_example()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), example) == jax.tree.map(
        lambda x: (x.shape[1:], x.dtype), encoded
    )
    first, _ = jax.eval_shape(lambda key: environment.reset(key, N), jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), first) == jax.tree.map(
        lambda x: (x.shape, x.dtype), encoded
    )


EVERYTHING = spaces.Dict(
    {name.replace(" ", "_"): space for name, (space, _) in OBSERVATIONS.items()}
)


@pytest.mark.parametrize("normalizes", [False, True])
def test_a_segment_of_observations_of_all_kinds_at_once(normalizes):
    config = A3CConfig(**SMALL, normalize_observations=normalizes)
    worker = Worker(config, lambda num_envs: vector(EVERYTHING, None, num_envs))
    for gradients, state, statistics in worker.segments(2):
        assert np.isfinite(statistics.metrics["loss"])
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state.observation) == jax.tree.map(
            lambda x: (x.shape, x.dtype), worker.state.observation
        )


@pytest.mark.parametrize(
    "space",
    [
        spaces.Text(3),
        spaces.Graph(spaces.Box(0, 1, (2,)), None),
        spaces.Sequence(spaces.Discrete(2)),
        spaces.OneOf([spaces.Discrete(2), spaces.Discrete(3)]),
        spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Text(3)}),
        spaces.Tuple([spaces.OneOf([spaces.Discrete(2)])]),
    ],
    ids=lambda space: type(space).__name__,
)
def test_observations_of_other_kinds_are_refused(space):
    with pytest.raises(
        ValueError, match="'Shows' has the observation space .* but only Box, Discrete, Dict"
    ):
        host(space)


# Observations that are not what their space says


class LyingVector:
    """A vector that returns what it is told."""

    metadata = {"autoreset_mode": "Disabled"}

    def __init__(self, num_envs, shown, space):
        self.num_envs, self.shown = num_envs, shown
        self.single_observation_space, self.single_action_space = space, spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return self.shown, {}

    def step(self, action):
        ended = np.zeros(self.num_envs, bool)
        return self.shown, np.ones(self.num_envs), ended, ended, {}

    def close(self):
        pass


BYTES = spaces.Box(0, 255, (3,), np.uint8)


@pytest.mark.parametrize(
    ("space", "shown", "found"),
    [
        (BYTES, np.full((N, 3), 0.5, np.float32), r"float32\[3, 3\]"),
        (BYTES, np.zeros((N, 1), np.uint8), r"uint8\[3, 1\]"),
        pytest.param(BYTES, np.zeros((1, 3), np.uint8), r"uint8\[1, 3\]", marks=pytest.mark.slow),
        (spaces.Box(-1, 1, (3,)), np.zeros(3, np.float32), r"float32\[3\]"),
    ],
    ids=["dtype", "shape", "number", "single"],
)
def test_observations_that_are_not_in_their_space_are_refused(space, shown, found):
    worker = Worker(A3CConfig(**SMALL), lambda n: LyingVector(n, shown, space))
    with pytest.raises(
        ValueError, match=f"environment '<lambda>' .* got {found}; correct its space"
    ):
        list(worker.segments(1))


def test_float64_where_float32_was_said_is_narrowed():
    shown = np.full((N, 3), 0.5)
    worker = Worker(A3CConfig(**SMALL), lambda n: LyingVector(n, shown, spaces.Box(-1, 1, (3,))))
    ((_, state, _),) = worker.segments(1)
    assert state.observation.dtype == np.float32


# Actions

ACTIONS = {
    "discrete": (spaces.Discrete(5), 5),
    "discrete with a start": (spaces.Discrete(3, start=-1), 3),
    "multi-discrete": (spaces.MultiDiscrete([3, 2, 7]), (3, 2, 7)),
    "multi-discrete with a start": (spaces.MultiDiscrete([3, 2], start=[-1, 4]), (3, 2)),
    "dict": (spaces.Dict({"z": spaces.Discrete(2), "a": spaces.Discrete(4, start=2)}), (4, 2)),
    "tuple": (spaces.Tuple([spaces.Discrete(2), spaces.Discrete(4, start=2)]), (2, 4)),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_every_discrete_action_of_the_policy_is_one_of_the_environment_s(name):
    space, num_actions = ACTIONS[name]
    environment = host(action_space=space)
    assert environment.num_actions == num_actions and not environment.continuous
    every = np.stack(np.meshgrid(*[np.arange(n) for n in np.ravel(num_actions)]), -1)
    every = every.reshape(-1, np.size(num_actions))
    every = every if np.ndim(num_actions) else every[:, 0]
    steps = vector(action_space=space, num_envs=len(every))
    steps.reset(seed=0)
    steps.step(environment.decode(every.astype(np.int32)))  # each environment checks its action
    decoded = [
        tuple(
            np.ravel(jax.tree.leaves(jax.tree.map(lambda x, n=n: x[n], environment.decode(every))))
        )
        for n in range(len(every))
    ]
    assert len({*decoded}) == len(every) == np.prod(num_actions)


@pytest.mark.parametrize("name", ACTIONS)
def test_random_actions_are_the_environment_s_and_each_is_drawn(name):
    space, num_actions = ACTIONS[name]
    environment = host(action_space=space)
    drawn = np.asarray(environment.random_action(jax.random.key(0), 500))
    steps = vector(action_space=space, num_envs=500)
    steps.reset(seed=0)
    steps.step(environment.decode(drawn))
    assert len(np.unique(drawn, axis=0)) == np.prod(num_actions)


BOXES = {
    "unit": spaces.Box(-1.0, 1.0, (2,)),
    "uneven": spaces.Box(np.float32([-0.1, 2.0]), np.float32([0.3, 7.5])),
    "matrix": spaces.Box(-2.0, 2.0, (2, 3)),
    "a scalar": spaces.Box(-2.0, 2.0, ()),
    "float64": spaces.Box(-1e9, 3e9, (2,), np.float64),
    "huge": spaces.Box(np.finfo(np.float32).min, np.finfo(np.float32).max, (2,)),
    "unbounded": spaces.Box(-np.inf, np.inf, (2,)),
    "half": spaces.Box(np.float32([-np.inf, 0.0]), np.float32([1.0, np.inf])),
    "bytes": spaces.Box(0, 255, (2,), np.uint8),
    "int8": spaces.Box(-128, 127, (2,), np.int8),
    "int32": spaces.Box(-7, 2**31 - 1, (2,), np.int32),
}


@pytest.mark.parametrize("action_bounds", ["clip", "tanh"])
@pytest.mark.parametrize("name", BOXES)
def test_real_numbers_become_actions_within_their_bounds(name, action_bounds):
    space = BOXES[name]
    environment = host(action_space=space, action_bounds=action_bounds)
    assert environment.continuous and environment.num_actions == int(np.prod(space.shape))
    size = environment.num_actions
    extreme = np.float32([-50, -1, -0.999999, -0.3, 0, 1 / 3, 0.7, 1, 50])
    numbers = np.repeat(extreme[:, None], size, axis=1)
    decoded = environment.decode(numbers)
    assert decoded.shape == (len(extreme), *space.shape) and decoded.dtype == space.dtype
    if name == "half":  # as there is no scale, it is passed on, and clipped where there is a bound
        np.testing.assert_array_equal(decoded, np.clip(numbers, space.low, space.high))
        return
    steps = vector(action_space=space, num_envs=len(extreme))
    steps.reset(seed=0)
    steps.step(decoded)
    flat = np.float64(decoded.reshape(len(extreme), -1))
    assert (np.diff(flat, axis=0) >= 0).all()
    if (
        name in ("bytes", "int8") and action_bounds == "clip"
    ):  # the last one is as wide as the others
        np.testing.assert_array_equal(flat[2], flat[0])
    if name != "unbounded":
        low, high = np.float64(space.low).ravel(), np.float64(space.high).ravel()
        np.testing.assert_allclose(flat[0], low, rtol=1e-6)
        np.testing.assert_allclose(flat[-1], high, rtol=1e-6)
        tolerance = {
            "rtol": 1e-6,
            "atol": (high - low).max() * 1e-6 + 0.51 * (space.dtype.kind != "f"),
        }
        np.testing.assert_allclose(flat[4], (low / 2 + high / 2), **tolerance)
    drawn = environment.decode(np.asarray(environment.random_action(jax.random.key(0), 400)))
    steps = vector(action_space=space, num_envs=400)
    steps.reset(seed=0)
    steps.step(drawn)


def test_actions_stay_within_any_bounds():
    rng = np.random.default_rng(0)
    low = rng.normal(size=2000).astype(np.float32) * 10.0 ** rng.integers(-3, 4, 2000)
    space = spaces.Box(
        low.astype(np.float32), (low + rng.exponential(size=2000)).astype(np.float32)
    )
    environment = host(action_space=space)
    for number in (-1.0, 1.0, 2.0, 0.9999999):
        assert space.contains(environment.decode(np.full((1, 2000), number, np.float32))[0])


@pytest.mark.parametrize(
    "space",
    [
        spaces.MultiBinary(3),
        spaces.MultiDiscrete([[2, 3], [4, 5]]),
        spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Box(0, 1, (1,))}),
        spaces.Tuple([spaces.MultiDiscrete([2, 2])]),
        spaces.Dict({"a": spaces.Dict({"b": spaces.Discrete(2)})}),
        spaces.Sequence(spaces.Discrete(2)),
        spaces.OneOf([spaces.Discrete(2), spaces.Discrete(3)]),
        spaces.Text(2),
    ],
    ids=lambda space: type(space).__name__,
)
def test_actions_of_other_kinds_are_refused(space):
    with pytest.raises(
        ValueError, match="(?s)'Shows' has the action space .* but only Discrete and Box"
    ):
        host(action_space=space)


@pytest.mark.parametrize("name", ACTIONS)
def test_actions_out_of_range_never_reach_the_environment(name):
    space, num_actions = ACTIONS[name]
    environment = host(action_space=space)
    good = np.zeros((N, *np.shape(num_actions)), np.int32)
    environment.decode(good)
    for wrong in (np.asarray(num_actions), -1):
        bad = good.copy()
        bad[1] = wrong
        with pytest.raises(
            ValueError, match=r"actions of environment 'Shows' must be .* less than .*; correct the"
        ):
            environment.decode(bad)


class OneTooMany:
    """A network whose policy has an action that the environment lacks."""

    def init(self, key, observation):
        return {"logits": jnp.array([0.0, 0.0])}

    def apply(self, params, observation):
        logits = params["logits"] + 0 * observation[..., :1]
        return Shifted(logits), jnp.sum(observation, axis=-1)


@jax.tree_util.register_dataclass
class Shifted(Categorical):
    def sample(self, key):
        return super().sample(key) + 1


def test_a_policy_of_one_s_own_with_an_action_out_of_range_is_told_so():
    began = time.monotonic()
    config = A3CConfig(num_workers=1, envs_per_worker=N)
    worker = Worker(config, lambda n: vector(num_envs=n), network=OneTooMany())
    with pytest.raises(ValueError, match=r"at least 0 and less than 2, got .*2"):
        list(worker.segments(10))
    assert time.monotonic() - began < 60


def test_actions_that_are_no_numbers_are_refused():
    environment = host(action_space=BOXES["unit"])
    with pytest.raises(
        ValueError, match="actions of environment 'Shows' must be numbers, got a NaN"
    ):
        environment.decode(np.float32([[0.0, np.nan]]))


@pytest.mark.parametrize(
    ("space", "dtype"),
    [
        (spaces.Box(-(2**31), 2**31 - 1, (2,), np.int64), np.int32),
        (spaces.Box(0, 2**31, (2,), np.int64), np.float32),
        (spaces.Box(0, 2**32 - 1, (2,), np.uint64), np.uint32),
        (spaces.Box(0, 2**32, (2,), np.uint64), np.float32),
    ],
)
def test_large_integers_do_not_wrap_around(space, dtype):
    environment = host(spaces.Dict({"a": space, "b": spaces.Discrete(2)}))
    seen = environment.encode({"a": np.stack([space.low, space.high]), "b": np.array([0, 1])})["a"]
    assert seen.dtype == dtype == environment.observation_example()["a"].dtype
    np.testing.assert_array_equal(seen, np.stack([space.low, space.high]).astype(dtype))


class Other(Shows):
    """Says that it shows integers, and shows those that it is told to show after a reset and after a step."""

    first, then = np.int32([1, 2]), np.int32([3, 4])

    def __init__(self):
        super().__init__(spaces.Box(-9, 9, (2,), np.int32))

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed) and (self.first, {})

    def step(self, action):
        return (self.then, *super().step(action)[1:])


def test_observations_of_a_narrower_kind_are_taken_and_others_refused_after_a_step_as_well(
    monkeypatch,
):
    class Bare(Vector):
        def _together(self, observations, out):
            return np.stack(observations)  # Gymnasium's own vectors make the space's dtype of it

    environment = HostEnvironment("Other", lambda num_envs: Bare(Other, num_envs))
    config = A3CConfig(**SMALL, max_steps=12)
    monkeypatch.setattr(Other, "first", np.int8([1, 2]))
    assert train(config, environment=environment).version == 1
    monkeypatch.setattr(Other, "then", np.float32([0.75, 2]))
    with pytest.raises(
        WorkerError, match="must show observations like its space .* int32.*, got float"
    ):
        train(config, environment=environment)


@pytest.mark.parametrize("loss", ["no", 1, None])
def test_life_loss_is_true_or_false(loss):
    with pytest.raises(ValueError, match="life_loss of environment 'Shows' must be True or False"):
        host(life_loss=loss)


@pytest.mark.parametrize("episodes", [0, -1, 1.0, True, "a", None])
def test_episodes_per_seed_is_a_positive_integer(episodes):
    with pytest.raises(
        ValueError, match="episodes_per_seed of environment 'Shows' must be a positive integer"
    ):
        host(episodes_per_seed=episodes)


@pytest.mark.parametrize("seconds", [0, -1.0, "a", True, np.nan])
def test_a_limit_of_a_step_must_be_a_positive_number(seconds):
    with pytest.raises(ValueError, match="step_seconds of environment 'Shows' must be a positive"):
        host(step_seconds=seconds)
