"""Environments: gymnax behind one batched protocol, unchanged to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces

from a3c_jax import environments
from a3c_jax.environments import Transition, make

gymnax = environments.gymnax  # imported there, after the process has been set up for JAX

CONTINUOUS = {
    "Pendulum-v1",
    "MountainCarContinuous-v0",
    "PointRobot-misc",
    "Reacher-misc",
    "Swimmer-misc",
}
DOWNLOADS_DATA = {"MNISTBandit-bsuite"}
SLOW_TO_COMPILE = {"Freeway-MinAtar", "Seaquest-MinAtar", "Asterix-MinAtar"}
DISCRETE = [n for n in gymnax.registered_envs if n not in CONTINUOUS | DOWNLOADS_DATA]


def play(environment, policy, num_envs, num_steps, seed=0):
    """Plays and returns the transitions, `[T, N, ...]`."""

    @jax.jit
    def run(key):
        def step(carry, key):
            observation, state = carry
            transition = environment.step(key, state, policy(observation))
            return (transition.observation, transition.state), transition

        carry = environment.reset(key, num_envs)
        return jax.lax.scan(step, carry, jax.random.split(key, num_steps))[1]

    return jax.tree.map(np.asarray, run(jax.random.key(seed)))


def balance(observation):
    """Keeps the pole up and the cart in the middle for thousands of steps."""
    return (observation @ jnp.array([0.05, 0.3, 1.0, 0.6]) > 0).astype(jnp.int32)


def push_right(observation):
    return jnp.ones(observation.shape[0], jnp.int32)


def gymnax_step(name, params):
    """The protocol's step by gymnax's own `step`, mapped over the copies."""
    environment = gymnax.make(name)[0]

    def step(key, state, action):
        observation, state, reward, terminated, truncated, info = jax.vmap(
            environment.step, (0, 0, 0, None)
        )(jax.random.split(key, action.shape[0]), state, action, params)
        return Transition(
            observation, state, reward, terminated, truncated, info["final_observation"]
        )

    return step


@pytest.mark.parametrize(
    ("name", "limit"), [("CartPole-v1", 4), pytest.param("Acrobot-v1", 3, marks=pytest.mark.slow)]
)
def test_a_step_is_gymnax_own_step_for_each_environment_bit_for_bit(name, limit):
    # Operation by operation: two compiled programs may round differently, equal arithmetic or not.
    environment = make(name, max_steps_in_episode=limit)
    theirs, params = gymnax.make(name)
    params = params.replace(max_steps_in_episode=limit)
    expected_step = gymnax_step(name, params)
    key = jax.random.key(1)
    observation, state = environment.reset(key, 3)
    expected = jax.vmap(theirs.reset, (0, None))(jax.random.split(key, 3), params)
    jax.tree.map(np.testing.assert_array_equal, (observation, state), expected)
    ends = 0
    with jax.disable_jit():
        for t in range(8):
            key, action_key = jax.random.split(jax.random.fold_in(key, t))
            action = jax.random.randint(action_key, (3,), 0, environment.num_actions)
            transition = environment.step(key, state, action)
            expected = expected_step(key, state, action)
            jax.tree.map(np.testing.assert_array_equal, transition, expected)
            state = transition.state
            ends += int((transition.terminated | transition.truncated).sum())
    assert ends >= 6  # all three environments were reset twice


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("CartPole-v1", 12),
        pytest.param("Acrobot-v1", 70, marks=pytest.mark.slow),
        ("Catch-bsuite", 1000),
    ],
)
def test_a_compiled_step_is_gymnax_own_step_over_hundreds_of_random_steps(name, limit):
    num_envs, num_steps = 5, 300
    environment = make(name, max_steps_in_episode=limit)
    expected_step = gymnax_step(name, gymnax.make(name)[1].replace(max_steps_in_episode=limit))

    @jax.jit
    def run(key):
        def step(state, key):
            key, action_key = jax.random.split(key)
            action = jax.random.randint(action_key, (num_envs,), 0, environment.num_actions)
            transition = environment.step(key, state, action)
            return transition.state, (transition, expected_step(key, state, action))

        state = environment.reset(key, num_envs)[1]
        return jax.lax.scan(step, state, jax.random.split(key, num_steps))[1]

    def compare(actual, expected):
        if jnp.issubdtype(expected.dtype, jnp.floating) and name != "Catch-bsuite":
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(actual, expected)

    transitions, expected = run(jax.random.key(1))
    jax.tree.map(compare, transitions, expected)
    # The random steps have met what there is to meet.
    terminated, truncated = np.asarray(transitions.terminated), np.asarray(transitions.truncated)
    ended = terminated | truncated
    assert ended.any(axis=0).all()
    if name == "CartPole-v1":
        assert (terminated & ~truncated).any()
        assert (truncated & ~terminated).any()
        assert (ended.any(axis=1) & ~ended.all(axis=1)).any(), "some end while others go on"


@pytest.mark.parametrize(
    ("name", "overrides", "limit"),
    [
        ("CartPole-v0", {}, 200),
        ("CartPole-v1", {}, 500),
        ("CartPole-v1", {"max_steps_in_episode": 30}, 30),
    ],
)
def test_a_balanced_cartpole_is_truncated_at_exactly_its_limit(name, overrides, limit):
    environment = make(name, **overrides)
    transitions = play(environment, balance, num_envs=4, num_steps=2 * limit + 1)
    expected = np.zeros((2 * limit + 1, 4), bool)
    expected[[limit - 1, 2 * limit - 1]] = True  # the limit counts afresh after each reset
    np.testing.assert_array_equal(transitions.truncated, expected)
    assert not transitions.terminated.any()
    assert environment.name == name


@pytest.fixture(scope="module")
def falling():
    """Eight poles that fall again and again."""
    return play(make("CartPole-v1"), push_right, num_envs=8, num_steps=60)


def test_the_final_observation_is_where_the_episode_ended_and_the_observation_is_a_fresh_start(
    falling,
):
    ended = falling.terminated
    assert ended.any(axis=0).all()
    # An episode of pushing right ends with the pole beyond 12 degrees; each starts within 0.05.
    angle = np.abs(falling.final_observation[..., 2])
    assert (angle[ended] > 12 * np.pi / 180).all()
    assert (angle[~ended] <= 12 * np.pi / 180).all()
    assert (np.abs(falling.observation[ended]) <= 0.05).all()
    np.testing.assert_array_equal(falling.observation[~ended], falling.final_observation[~ended])


def test_copies_start_and_restart_differently(falling):
    assert len(np.unique(falling.final_observation[0], axis=0)) == 8
    restarts = falling.observation[falling.terminated]
    assert len(restarts) > 20
    assert len(np.unique(restarts, axis=0)) == len(restarts)


IN_SHORT = {"CartPole-v1", "Catch-bsuite", "FrozenLake-misc", "SpaceInvaders-MinAtar"}
IN_SHORT |= SLOW_TO_COMPILE  # which is not done here


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in IN_SHORT else pytest.mark.slow) for n in DISCRETE]
)
def test_every_discrete_environment_resets_and_steps_with_the_shapes_it_announces(name):
    environment = make(name)
    assert environment.num_actions >= 2
    assert repr(environment) == f"GymnaxEnvironment({name!r})"

    def run(key):
        def step(state, key):
            transition = environment.step(key, state, jnp.zeros(2, jnp.int32))
            return transition.state, transition

        observation, state = environment.reset(key, 2)
        return observation, jax.lax.scan(step, state, jax.random.split(key, 2))[1]

    if name in SLOW_TO_COMPILE:  # traced only
        observation, transitions = jax.eval_shape(run, jax.random.key(0))
    else:
        compiled = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
        observation, transitions = compiled(jax.random.key(0))
        assert np.isfinite(transitions.observation).all()
    assert observation.shape == (2, *environment.observation_shape)
    assert transitions.observation.shape == (2, 2, *environment.observation_shape)
    assert transitions.final_observation.shape == transitions.observation.shape
    assert transitions.observation.dtype == observation.dtype
    for array, dtype in (
        (transitions.reward, jnp.float32),
        (transitions.terminated, jnp.bool_),
        (transitions.truncated, jnp.bool_),
    ):
        assert array.shape == (2, 2)
        assert array.dtype == dtype
    assert all(leaf.shape[:2] == (2, 2) for leaf in jax.tree.leaves(transitions.state))


def test_a_category_is_observed_as_one_hot():
    environment = make("FrozenLake-misc")
    params = gymnax.make("FrozenLake-misc")[1]
    raw_step = gymnax_step("FrozenLake-misc", params)
    steps = jax.jit(lambda *arguments: (environment.step(*arguments), raw_step(*arguments)))
    observation, state = environment.reset(jax.random.key(0), 3)
    assert environment.observation_shape == (16,)
    np.testing.assert_array_equal(observation, np.eye(16)[[0, 0, 0]])  # the lake's first field
    ended = np.zeros(3, bool)
    for t in range(20):  # far enough for some to fall in: final observations differ too
        transition, raw = steps(jax.random.key(t), state, jnp.array([1, 2, 1]))
        np.testing.assert_array_equal(transition.observation, np.eye(16)[raw.observation])
        np.testing.assert_array_equal(
            transition.final_observation, np.eye(16)[raw.final_observation]
        )
        state = transition.state
        ended |= np.asarray(transition.terminated)
    assert ended.any()


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("CartPole-v2", "CartPole-v"),
        ("cartpole-v1", "CartPole-v"),
        ("Cartpole", "CartPole-v"),
        ("Breakout", "Breakout-MinAtar"),
        ("acrobot-v0", "Acrobot-v1"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_known_ones(name, near):
    with pytest.raises(ValueError, match=rf"got '{name}'; did you mean .*{near}.*\? Gymnasium"):
        make(name)


def test_a_name_like_no_other_is_answered_with_all_known_ones():
    with pytest.raises(
        ValueError, match=r"got 'xyzzy'; known are .*CartPole-v1.*CartPole-v0\. Gymnasium"
    ):
        make("xyzzy")


class Nested:
    """Declares a space and shows what `show` makes of a category and a vector."""

    def __init__(self, space, show=None):
        self.space, self.show = space, show

    def reset(self, key, params):
        return self.show(jnp.int32(2), jnp.arange(3.0)), jnp.int32(0)

    def observation_space(self, params):
        return self.space

    def action_space(self, params):
        return spaces.Discrete(2)


def test_an_observation_of_several_parts_is_a_tree_whose_categories_are_one_hot():
    box, category = spaces.Box(0.0, 9.0, (3,)), spaces.Discrete(4)
    space = spaces.Dict({"a": category, "b": spaces.Tuple((box, category))})
    own = Nested(space, lambda c, v: {"b": (v, c), "a": c})
    environment = environments.GymnaxEnvironment("Nested", own, None)
    assert environment.observation_shape == {"a": (4,), "b": ((3,), (4,))}
    observation, _ = environment.reset(jax.random.key(0), 2)
    assert set(observation) == {"a", "b"} and type(observation["b"]) is tuple
    np.testing.assert_array_equal(observation["a"], [[0, 0, 1, 0]] * 2)
    np.testing.assert_array_equal(observation["b"][0], [[0, 1, 2]] * 2)
    np.testing.assert_array_equal(observation["b"][1], [[0, 0, 1, 0]] * 2)


def test_an_observation_of_another_space_is_refused_with_a_remedy():
    message = r"environment 'Nested' has the observation space .*only Box, Discrete, Dict and Tuple .*; turn"
    with pytest.raises(ValueError, match=message):
        environments.GymnaxEnvironment("Nested", Nested(object()), None)


def test_an_unknown_parameter_is_answered_with_the_known_ones():
    message = r"'CartPole-v0' has the parameters .*max_steps_in_episode, .*, got max_steps; use one"
    with pytest.raises(ValueError, match=message):
        make("CartPole-v0", max_steps=100)


def catch(name, actions):
    """The observations and rewards of a game of Catch in which these actions are asked for."""
    environment = make(name)
    observation, state = environment.reset(jax.random.key(3), 2)
    step = jax.jit(environment.step)
    played = []
    for key, action in zip(jax.random.split(jax.random.key(4), len(actions)), actions, strict=True):
        transition = step(key, state, jnp.full(2, action))
        observation, state = transition.observation, transition.state
        played.append((observation, transition.reward))
    return played


def test_a_sticky_action_repeats_the_one_before_it():
    right = [2] * 8
    always, never = (catch(f"Catch-bsuite?sticky_action_prob={p}", right) for p in (1.0, 0.0))
    left = catch("Catch-bsuite?sticky_action_prob=0.0", [0] * 8)  # what an episode begins with
    jax.tree.map(np.testing.assert_array_equal, always, left)
    jax.tree.map(np.testing.assert_array_equal, never, catch("Catch-bsuite", right))
    half = catch("Catch-bsuite?sticky_action_prob=0.5", right)
    assert not all(np.array_equal(x[0], y[0]) for x, y in zip(half, left, strict=True))
    with pytest.raises(ValueError, match=r"sticky_action_prob must lie in \[0, 1\].*got 2"):
        make("Catch-bsuite?sticky_action_prob=2")
    with pytest.raises(ValueError, match="one discrete action.*Pendulum"):
        make("Pendulum-v1", sticky_action_prob=0.1)


def test_an_integer_for_a_parameter_that_is_a_float_is_one():
    # This environment selects between it and another float, which JAX refuses to do with an integer.
    environment = environments.make("BernoulliBandit-misc?max_steps_in_episode=5")
    assert repr(environment.params.max_steps_in_episode) == "5.0"
