"""Environments of one's own: any object with gymnax's interface, wrappers, names, parameters in names."""

import dataclasses

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces
from gymnax.environments.classic_control.cartpole import CartPole

from a3c_jax import A3CConfig, environments, make, train
from a3c_jax.agent import make_agent

TINY = {"num_workers": 2, "envs_per_worker": 2, "t_max": 5, "hidden_sizes": (8,)}


class Corridor:
    """Walk right along ten cells; every step costs 0.1."""

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


def test_an_object_with_reset_and_the_six_value_step_is_learnt():
    config = A3CConfig(**TINY | {"envs_per_worker": 8}, max_steps=30_000)
    result = train(config, environment=Corridor())
    assert result.environment.name == "Corridor"
    assert result.episodes.length[-100:].mean() < 12
    lengths, returns = result.episodes.length, result.episodes.episode_return
    np.testing.assert_allclose(returns, -0.1 * lengths, rtol=1e-4)
    assert lengths.min() == 10


def test_what_it_shows_before_the_reset_must_be_told():
    class Forgets(Corridor):
        def step(self, key, state, action, params=None):
            return *super().step(key, state, action)[:5], {"discount": 1.0}

    with pytest.raises(
        ValueError, match=r"'Forgets' must return .*info\['final_observation'\], got"
    ):
        train(A3CConfig(**TINY, max_steps=10), environment=Forgets())


def test_what_is_no_environment_is_refused_with_what_it_lacks():
    class Half:
        def reset(self, key, params=None):
            pass

    message = (
        r"must have gymnax's interface, got Half without step, observation_space, action_space"
    )
    with pytest.raises(TypeError, match=message):
        make_agent(A3CConfig(**TINY), environment=Half())


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


def test_gymnax_registers_names(monkeypatch):
    monkeypatch.setattr(gymnax.registration, "_registry", dict(gymnax.registration._registry))
    names = list(gymnax.registered_envs)
    try:
        gymnax.register("Doubled-v0", Doubled)
        assert isinstance(make("Doubled-v0").gymnax, Doubled)
        agent = make_agent(A3CConfig(environment="Doubled-v0", **TINY))
        assert agent.environment.name == "Doubled-v0"
    finally:
        gymnax.registered_envs[:] = names


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
        ("CartPole-v1?gravity=heavy", r"must be numbers, as in"),
        ("CartPole-v1?gravity", r"must be numbers, as in"),
        ("CartPol-v1?gravity=3", r"got 'CartPol-v1\?gravity=3'; did you mean .*CartPole-v1"),
    ],
)
def test_a_wrong_parameter_is_answered_with_a_remedy(name, message):
    with pytest.raises(ValueError, match=message):
        make(name)


@pytest.mark.parametrize("which", ["observation", "action"])
def test_spaces_of_several_parts_are_refused_with_a_remedy(which):
    class Nested(Corridor):
        pass

    parts = spaces.Tuple((spaces.Discrete(2), spaces.Discrete(2)))
    setattr(Nested, f"{which}_space", lambda self, params=None: parts)
    with pytest.raises(ValueError, match=rf"'Nested' has the {which} space .*; flatten them"):
        make_agent(A3CConfig(**TINY), environment=Nested())


def test_the_configuration_may_name_what_an_object_replaces():
    config = A3CConfig(**TINY, environment="Corridor", max_steps=10)
    assert train(config, environment=Corridor()).version == 1
    assert dataclasses.asdict(config)["environment"] == "Corridor"
