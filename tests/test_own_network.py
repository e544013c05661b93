"""Networks of other kinds than `ActorCritic`: a lone `__call__`, plain functions, flax.nnx, Equinox."""

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from probes import Probe

import a3c_jax
from a3c_jax import A3CConfig
from a3c_jax.distributions import Categorical, DiagonalGaussian
from a3c_jax.networks import network_functions

TINY = {"num_workers": 2, "envs_per_worker": 4, "t_max": 4, "max_steps": 320}
PROBE = Probe(3, lambda sign, action, last: sign * (2 * action - 1) + 0.25 * last)


class Parts(nn.Module):
    """One layer for both outputs, with methods for each."""

    def setup(self):
        self.layer = nn.Dense(3)

    def actor(self, observation):
        return Categorical(self.layer(observation)[..., :2])

    def critic(self, observation):
        return self.layer(observation)[..., 2]

    def __call__(self, observation):
        return self.actor(observation), self.critic(observation)


class CallAlone(nn.Module):
    """The same layer, with `__call__` alone."""

    def setup(self):
        self.layer = nn.Dense(3)

    def __call__(self, observation):
        outputs = self.layer(observation)
        return Categorical(outputs[..., :2]), outputs[..., 2]


class Functions:
    """Plain functions of a dict."""

    def init(self, key, observation):
        return {"w": 0.1 * jax.random.normal(key, (observation.shape[-1], 3)), "b": jnp.zeros(3)}

    def apply(self, params, observation):
        outputs = observation @ params["w"] + params["b"]
        return Categorical(outputs[..., :2]), outputs[..., 2]


class Bridged(nnx.Module):
    """A module of flax.nnx that `nnx.bridge.to_linen` turns into a network."""

    def __init__(self, rngs):
        self.hidden, self.heads = nnx.Linear(2, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, observation):
        outputs = self.heads(nnx.tanh(self.hidden(observation)))
        return Categorical(outputs[..., :2]), outputs[..., 2]


def bridged():
    return nnx.bridge.to_linen(Bridged)


class Equinox:
    """A network of Equinox. Its modules take one observation without leading dimensions."""

    def init(self, key, observation):
        module = eqx.nn.MLP(observation.shape[-1], 3, width_size=8, depth=1, key=key)
        params, self.rest = eqx.partition(module, eqx.is_array)
        return params

    def apply(self, params, observation):
        module = eqx.combine(params, self.rest)
        outputs = jnp.vectorize(module, signature="(i)->(o)")(observation)
        return Categorical(outputs[..., :2]), outputs[..., 2]


@pytest.mark.slow
def test_a_lone_call_trains_as_a_network_with_its_parts_does():
    schedule = a3c_jax.fixed_delay(0, num_updates=6)
    parts, alone = (
        a3c_jax.replay(A3CConfig(**TINY), schedule, environment=PROBE, network=network())
        for network in (Parts, CallAlone)
    )
    chex.assert_trees_all_close(parts.params, alone.params, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("make", [CallAlone, Functions, bridged, Equinox])
def test_it_trains_replays_resumes_and_is_evaluated(make, tmp_path):
    program = a3c_jax.build(A3CConfig(**TINY), environment=PROBE, network=make())
    result = a3c_jax.train(program)
    assert result.version == 20
    again = a3c_jax.replay(program, result.schedule)
    chex.assert_trees_all_equal(again.params, result.params)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(result.params, program.initial_params())

    alone = program.replace(num_workers=1)
    a3c_jax.train(alone.replace(max_steps=160), checkpoints=a3c_jax.CheckpointFolder(tmp_path))
    resumed = a3c_jax.train(alone, resume=a3c_jax.find_checkpoint(tmp_path))
    chex.assert_trees_all_equal(resumed.params, a3c_jax.train(alone).params)
    loaded = a3c_jax.load(tmp_path, environment=PROBE, network=make())
    policy = a3c_jax.greedy_policy(loaded.network)
    returns, _ = a3c_jax.evaluate(
        policy, loaded.params, loaded.environment, loaded.evaluation_key, 4
    )
    assert returns.shape == (4,)


class Submodules(nn.Module):
    """Its `actor` and `critic` are layers, and no methods that give a distribution and values."""

    actor: nn.Module
    critic: nn.Module

    def __call__(self, observation):
        return Categorical(self.actor(observation)), self.critic(observation)[..., 0]


def test_submodules_named_like_the_two_parts_are_not_taken_for_them():
    network, observation = Submodules(nn.Dense(2), nn.Dense(1)), jnp.ones((4, 3))
    params = network.init(jax.random.key(0), observation)
    functions = network_functions(network)
    distribution, values = network.apply(params, observation)
    got, _ = functions.act(params, observation, ())
    chex.assert_trees_all_equal(got.logits, distribution.logits)
    chex.assert_trees_all_equal(functions.value(params, observation, ()), values)


def test_a_module_of_flax_nnx_is_named_in_the_checkpoint_by_its_own_class(tmp_path):
    class Other(Bridged):
        """Another class with parameters of the same shapes."""

    program = a3c_jax.build(A3CConfig(**TINY), environment=PROBE, network=bridged())
    a3c_jax.train(program, checkpoints=a3c_jax.CheckpointFolder(tmp_path))
    message = r"network must be test_own_network.Bridged, .* got test_own_network.*Other; hand over"
    with pytest.raises(ValueError, match=message):
        a3c_jax.load(tmp_path, environment=PROBE, network=nnx.bridge.to_linen(Other))


def test_normalisation_needs_parameters_that_are_a_dict():
    config = A3CConfig(**TINY, normalize_observations=True)
    assert a3c_jax.train(config, environment=PROBE, network=Functions()).version == 20
    with pytest.raises(TypeError, match="need a network whose parameters are a dict"):
        a3c_jax.build(config, environment=PROBE, network=Equinox())


def network_of(output):
    """A network of dense layers: `output(dense, observation)` says what it gives."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, observation):
            return output(lambda size, x: nn.Dense(size)(x), observation)

    return Network()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda dense, x: (dense(2, x), dense(1, x)[..., 0]), r"got float32\[4, 2\] .*; return first a dis"),
        (lambda dense, x: (dense(1, x)[..., 0], Categorical(dense(2, x))), r"got float32\[4\] .*; return first"),
        (lambda dense, x: (Categorical(dense(3, x)), dense(1, x)[..., 0]), "let its last layer have 2 outputs"),
        (lambda dense, x: (DiagonalGaussian(dense(2, x), jnp.ones(2)), x[..., 0]), "return one over discrete"),
        (lambda dense, x: (Categorical(dense(2, x.reshape(-1))), x[..., 0]), r"got \[2\]; keep the leading"),
        (lambda dense, x: (Categorical(dense(2, x)), dense(1, x)), r"got \[4, 1\]; squeeze the last"),
        (lambda dense, x: (Categorical(dense(2, x)), x.sum()), r"got \[\]; keep the leading dimensions of"),
    ],
    ids=["logits", "order", "head", "kind", "flat", "value", "sum"],
)  # fmt: skip
def test_the_remedy_is_one_for_a_network_of_one_s_own(output, message):
    with pytest.raises((TypeError, ValueError), match=message):
        a3c_jax.build(A3CConfig(**TINY), environment=PROBE, network=network_of(output))


def test_a_network_that_flattens_segments_is_told_so():
    def output(dense, observation):
        flat = observation.reshape(observation.shape[0], -1)
        return Categorical(dense(2, flat)), flat[:, 0]

    with pytest.raises(Exception, match="shape") as caught:
        a3c_jax.build(A3CConfig(**TINY), environment=PROBE, network=network_of(output))
    assert "keep the leading dimensions of observations" in "".join(caught.value.__notes__)


@pytest.mark.parametrize(
    "network", [eqx.nn.MLP(2, 3, 8, 1, key=jax.random.key(0)), Bridged(nnx.Rngs(0))]
)
def test_a_module_that_needs_an_adapter_is_sent_to_the_page_that_has_it(network):
    with pytest.raises(
        TypeError, match=r"without init, apply; .*docs/build-your-own\.md shows how"
    ):
        a3c_jax.build(A3CConfig(**TINY), environment=PROBE, network=network)
