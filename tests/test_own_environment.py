"""Environments of one's own: any object with gymnax's interface, wrappers, names, parameters in names."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import corridor
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from gymnax.environments import spaces
from gymnax.environments.classic_control.cartpole import CartPole
from gymnax.environments.environment import Environment, EnvParams
from gymnax.wrappers.purerl import LogWrapper

from a3c_jax import (
    A3CConfig,
    build,
    environments,
    evaluate,
    greedy_policy,
    make,
    sampled_policy,
    train,
)
from a3c_jax.blueprint import make_blueprint

TINY = {"num_workers": 2, "envs_per_worker": 2, "t_max": 5, "hidden_sizes": (8,)}


@pytest.fixture
def registered(monkeypatch):
    """`gymnax.register`, for one test."""
    monkeypatch.setattr(gymnax.registration, "_registry", dict(gymnax.registration._registry))
    names = list(gymnax.registered_envs)
    yield gymnax.register
    gymnax.registered_envs[:] = names


@pytest.mark.slow
def test_the_corridor_is_walked_in_the_fewest_steps_on_ten_of_ten_seeds():
    program = build(A3CConfig(max_steps=50_000, entropy_cost=0.05), environment=corridor.Corridor())
    for seed in range(10):
        result = train(program.replace(seed=seed))
        policy = greedy_policy(result.network)
        _, lengths = evaluate(policy, result.params, result.environment, result.evaluation_key, 20)
        assert lengths.mean() == 10, f"seed {seed}"
        # No episode is longer than the limit, or shorter than the corridor.
        assert result.episodes.length.min() >= 10 and result.episodes.length.max() <= 100


def test_its_registered_name_works_in_another_process_and_takes_parameters():
    """As a script does: `module:id` imports the module, which registers the id."""
    code = (
        "from a3c_jax.environments import make;"
        "environment = make('corridor:Corridor?max_steps_in_episode=50');"
        "print(environment, environment.params.max_steps_in_episode)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=120, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "GymnaxEnvironment('corridor:Corridor?max_steps_in_episode=50') 50\n"


def test_a_module_that_cannot_be_imported_is_named_with_a_remedy():
    with pytest.raises(
        ValueError, match=r"'nowhere:Corridor' names the module 'nowhere', .*; start"
    ):
        make("nowhere:Corridor")
    with pytest.raises(ValueError, match=r"got 'corridor:Corridr'; did you mean .*Corridor"):
        make("corridor:Corridr")


class Plain:
    """gymnax's interface without its base class, and without parameters."""

    def reset(self, key, params=None):
        return jnp.zeros(1), jnp.int32(0)

    def step(self, key, state, action, params=None):
        state = jnp.clip(state + 2 * action - 1, 0, 10)
        final, terminated = jnp.array([state / 10.0]), state == 10
        fresh, start = self.reset(key)
        observation = jnp.where(terminated, fresh, final)
        info = {"final_observation": final}
        return observation, jnp.where(terminated, start, state), -0.1, terminated, False, info

    def observation_space(self, params=None):
        return spaces.Box(0.0, 1.0, (1,))

    def action_space(self, params=None):
        return spaces.Discrete(2)


@pytest.mark.slow
def test_an_object_with_reset_and_the_six_value_step_is_played_as_it_is():
    config = A3CConfig(**TINY | {"envs_per_worker": 8}, max_steps=5_000)
    result = train(config, environment=Plain())
    assert result.environment.name == "Plain"
    lengths, returns = result.episodes.length, result.episodes.episode_return
    np.testing.assert_allclose(returns, -0.1 * lengths, rtol=1e-4)
    assert lengths.min() >= 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("core", "kind"),
    [
        (None, "tuple"),
        (None, "dict"),
        ("gru", "tuple"),
        ("gru", "dict"),
    ],
)
def test_spaces_of_several_parts_are_learnt_from_end_to_end(kind, core):
    class Parts(Plain):
        def _show(self, x):
            category = jnp.int32(10 * x[0])
            return {"x": x, "at": category} if kind == "dict" else (x, category)

        def reset(self, key, params=None):
            observation, state = Plain().reset(key)
            return self._show(observation), state

        def step(self, key, state, action, params=None):
            observation, *rest, info = Plain().step(key, state, action)
            info = {"final_observation": self._show(info["final_observation"])}
            return self._show(observation), *rest, info

        def observation_space(self, params=None):
            box, category = spaces.Box(0.0, 1.0, (1,)), spaces.Discrete(11)
            if kind == "dict":
                return spaces.Dict({"x": box, "at": category})
            return spaces.Tuple((box, category))

    config = A3CConfig(**TINY, max_steps=200, core=core, core_size=4, normalize_observations=True)
    result = train(config, environment=Parts())
    shape = {"x": (1,), "at": (11,)} if kind == "dict" else ((1,), (11,))
    assert result.environment.observation_shape == shape
    kernel = result.params["params"]["actor_trunk"]["torso"]["Dense_0"]["kernel"]
    assert kernel.shape == (12, 8)
    policy = sampled_policy(result.network)
    _, lengths = evaluate(policy, result.params, result.environment, result.evaluation_key, 2)
    assert (lengths >= 10).all()


def test_what_it_shows_before_the_reset_must_be_told():
    class Forgets(Plain):
        def step(self, key, state, action, params=None):
            return *super().step(key, state, action)[:5], {"discount": 1.0}

    with pytest.raises(
        ValueError, match=r"'Forgets' must return .*info\['final_observation'\], got"
    ):
        train(A3CConfig(**TINY, max_steps=10), environment=Forgets())


# Results and parameters that are not gymnax's.


def moved(method, *order, base=corridor.Corridor):
    """An environment whose method returns its values in another order, or not as many of them."""

    class Moved(base):
        pass

    def call(self, *arguments):
        values = getattr(super(Moved, self), method)(*arguments)
        return tuple(values[k] for k in order) if len(order) > 1 else values[order[0]]

    setattr(Moved, method, call)
    return Moved()


RESET = r"\(observation, state\)"
STEP_ENV = r"\(observation, state, reward, terminated, info\)"
STEP = r"\(observation, state, reward, terminated, truncated, info\)"


@pytest.mark.parametrize(
    ("own", "expected", "got"),
    [
        (moved("reset_env", 1, 0), RESET, r"\(State, float32\[1\]\)"),
        (moved("reset_env", 0, 1, 1), RESET, r"\(float32\[1\], State, State\)"),
        (moved("reset_env", 0), RESET, r"\(float32\[1\]\)"),
        (moved("step_env", 0, 1, 2, 3, 3, 4), STEP_ENV, r"\(.*, bool\[\], bool\[\], dict\)"),
        (moved("step_env", 0, 1, 2, 3), STEP_ENV, r"\(.*, float32\[\], bool\[\]\)"),
        (moved("step_env", 1, 0, 2, 3, 4), STEP_ENV, r"\(State, float32\[1\], .*\)"),
        (moved("step_env", 0, 1, 3, 2, 4), STEP_ENV, r"\(.*, bool\[\], float32\[\], dict\)"),
        (moved("step_env", 0, 2, 3, 1, 4), STEP_ENV, r"\(.*, bool\[\], State, dict\)"),
        (moved("step", 0, 1, 2, 3, 5, base=Plain), STEP, r"\(.*, float32\[\], bool\[\], dict\)"),
        (moved("step", 0, 1, 3, 2, 4, 5, base=Plain), STEP, r"\(.*, bool\[\], float32\[\], .*\)"),
        (moved("step", 0, 1, 2, 3, 5, 4, base=Plain), STEP, r"\(.*, dict, bool\[\]\)"),
        (moved("reset", 0, base=Plain), RESET, r"\(float32\[1\]\)"),
    ],
)  # fmt: skip
def test_values_in_another_order_or_number_are_refused_with_what_came(own, expected, got):
    message = rf"environment 'Moved' must return {expected} in this order, got {got}; correct"
    with pytest.raises(ValueError, match=message):
        make_blueprint(A3CConfig(**TINY), environment=own)


def test_flags_of_a_step_that_resets_itself_may_be_numbers():
    class Numbers(Plain):
        def step(self, key, state, action, params=None):
            observation, state, reward, terminated, _, info = super().step(key, state, action)
            return observation, state, reward, jnp.float32(terminated), 0, info

    make_blueprint(A3CConfig(**TINY), environment=Numbers())


class Unlimited(corridor.Corridor):
    """Inherits gymnax's parameters."""

    default_params = Environment.default_params


class NoParams(corridor.Corridor):
    default_params = None


@struct.dataclass
class Longer(EnvParams):
    length: int = 6


class Forgets(corridor.Corridor):
    """Has parameters of its own, which do not say the limit."""

    default_params = Longer()


class Remembers(corridor.Corridor):
    default_params = Longer(max_steps_in_episode=9)


class Once(corridor.Corridor):
    """Wants episodes of one step."""

    default_params = EnvParams(max_steps_in_episode=1)


class CutsItself(Unlimited):
    def is_truncated(self, state, params):
        return state.time >= 30


LIMIT = (
    r"must have default_params of its own, which say after how many steps an episode is cut, got "
)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (Unlimited(), LIMIT + r"EnvParams\(max_steps_in_episode=1\) from gymnax, which .* one step; write"),
        (LogWrapper(Unlimited()), LIMIT + r"EnvParams\(max_steps_in_episode=1\) from gymnax"),
        (Forgets(), LIMIT + r"Longer\(max_steps_in_episode=1, length=6\) from gymnax"),
        (NoParams(), LIMIT + "None; write default_params"),
    ],
    ids=["inherited", "in a wrapper", "in own parameters", "none"],
)  # fmt: skip
def test_an_environment_without_the_parameters_that_it_needs_is_refused(own, message):
    with pytest.raises(ValueError, match=message):
        make_blueprint(A3CConfig(**TINY), environment=own)


@pytest.mark.parametrize(
    "own", [Once(), Remembers(), CutsItself()], ids=["one step", "own parameters", "own limit"]
)
def test_an_environment_may_choose_its_limit(own):
    make_blueprint(A3CConfig(**TINY), environment=own)


def test_a_name_may_say_the_limit_that_its_environment_leaves_out(registered):
    registered("Unlimited-v0", Unlimited)
    assert make("Unlimited-v0?max_steps_in_episode=5").params.max_steps_in_episode == 5
    for name in ("Unlimited-v0", "Unlimited-v0?sticky_action_prob=0.1"):
        with pytest.raises(ValueError, match=LIMIT):
            make_blueprint(A3CConfig(environment=name, **TINY))


def test_what_is_no_environment_is_refused_with_what_it_lacks():
    class Half:
        def reset(self, key, params=None):
            pass

    message = (
        r"must have gymnax's interface, got Half without step, observation_space, action_space"
    )
    with pytest.raises(TypeError, match=message):
        make_blueprint(A3CConfig(**TINY), environment=Half())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("Pendulum-v1", r"got the name 'Pendulum-v1'; name it in A3CConfig\(environment=...\)"),
        (Plain, r"got the class Plain; make an object of it"),
    ],
)
def test_names_and_classes_are_refused_as_objects(environment, message):
    with pytest.raises(TypeError, match=message):
        make_blueprint(A3CConfig(**TINY), environment=environment)


def test_a_single_environment_of_gymnasium_is_refused_in_one_sentence():
    gymnasium = pytest.importorskip("gymnasium")
    message = (
        r"must have gymnax's interface or be a gymnasium.vector.VectorEnv, got .*, whose observation_space is no "
        r"method, as in Gymnasium's single environments; give a function that makes a vector of them"
    )
    with pytest.raises(TypeError, match=message):
        make_blueprint(A3CConfig(), environment=gymnasium.make("CartPole-v1"))


class Doubled(CartPole):
    """A step of its own, beside the parts that it inherits: they must not be taken instead."""

    def step(self, key, state, action, params=None):
        observation, state, reward, *rest = super().step(key, state, action, params)
        return observation, state, 2.0 * reward, *rest


class Wrapper:
    def __init__(self, wrapped):
        self._wrapped = wrapped

    def __getattr__(self, name):
        return getattr(self._wrapped, name)

    def step(self, key, state, action, params=None):
        observation, state, reward, *rest = self._wrapped.step(key, state, action, params)
        return observation, state, 2.0 * reward, *rest


@pytest.mark.parametrize("own", [Doubled(), Wrapper(CartPole())], ids=["subclass", "wrapper"])
def test_a_step_of_its_own_is_not_bypassed(own):
    adapted, plain = environments.adapt(own), make("CartPole-v1")
    observation, state = adapted.reset(jax.random.key(0), 4)
    transition = adapted.step(jax.random.key(1), state, jnp.zeros(4, jnp.int32))
    np.testing.assert_array_equal(transition.reward, 2.0)
    assert not transition.terminated.any()
    _, plain_state = plain.reset(jax.random.key(0), 4)
    assert observation.shape == (4, 4)
    assert jax.tree.structure(plain_state) == jax.tree.structure(state)


def test_gymnax_registers_names(registered):
    registered("Doubled-v0", Doubled)
    assert isinstance(make("Doubled-v0").gymnax, Doubled)
    blueprint = make_blueprint(A3CConfig(environment="Doubled-v0", **TINY))
    assert blueprint.environment.name == "Doubled-v0"


def test_parameters_follow_a_name():
    environment = make("MemoryChain-bsuite?memory_length=12&num_bits=3")
    assert environment.observation_shape == (5,)
    assert environment.params.memory_length == 12
    assert make("CartPole-v0?gravity=3.5").params.gravity == 3.5
    assert make("CartPole-v0?gravity=3.5").params.max_steps_in_episode == 200
    assert make("FrozenLake-misc?max_steps_in_episode=7").params.max_steps_in_episode == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "CartPole-v1?mass=3",
            r"'CartPole-v1\?mass=3' has the parameters .*gravity.*, got mass; use",
        ),
        ("CartPole-v1?gravity=heavy", r"must be numbers, or words in quotes, as in"),
        ("CartPole-v1?gravity", r"must be numbers, or words in quotes, as in"),
        ("CartPole-v1?gravity='x'", r"gravity of environment .* must be a number, got 'x'; leave"),
        ("CartPole-v1?gravity=(1,2)", r"gravity of .* must be a number, got \(1, 2\); leave"),
        ("CartPole-v1?max_steps_in_episode='x'", r"must be a positive integer, got 'x'; leave"),
        ("CartPole-v0?max_steps_in_episode=0", r"must be a positive integer, got 0; leave"),
        ("CartPole-v1?max_steps_in_episode=2.5", r"must be a positive integer, got 2.5; leave"),
        ("BernoulliBandit-misc?max_steps_in_episode=-5", r"must be a positive integer, got -5; le"),
        ("CartPol-v1?gravity=3", r"got 'CartPol-v1\?gravity=3'; did you mean .*CartPole-v1"),
    ],
)
def test_a_wrong_parameter_is_answered_with_a_remedy(name, message):
    with pytest.raises(ValueError, match=message):
        make(name)


def test_actions_of_parts_that_are_not_all_discrete_are_refused_with_a_remedy():
    class Nested(Plain):
        def action_space(self, params=None):
            return spaces.Tuple((spaces.Discrete(2), spaces.Box(0.0, 1.0, (1,))))

    with pytest.raises(ValueError, match=r"'Nested' has the action space .*; flatten them"):
        make_blueprint(A3CConfig(**TINY), environment=Nested())


def test_the_configuration_may_name_what_an_object_replaces():
    config = A3CConfig(**TINY, environment="Plain", max_steps=10)
    assert train(config, environment=Plain()).version == 1
    assert dataclasses.asdict(config)["environment"] == "Plain"
