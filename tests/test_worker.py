"""The worker step: what it learns from, what it reports, and observations of every form."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from initial import initialize
from probes import DictProbe, Probe

from a3c_jax import _compiled, rollout
from a3c_jax.config import A3CConfig
from a3c_jax.distributions import Categorical
from a3c_jax.losses import a3c_loss
from a3c_jax.networks import network_functions, trajectory_apply

TINY = {"num_workers": 1, "envs_per_worker": 2, "t_max": 7}


def first_segment(config, **objects):
    """Parameters, first state, and what the worker step makes of them."""
    blueprint, params, states = initialize(config, **objects)
    step = _compiled.compile_for_few_calls(blueprint.worker_step)
    return blueprint, params, states[0], step(params, states[0])


def test_rewards_are_clipped_for_learning_and_reported_as_they_were():
    large = Probe(2, lambda sign, action, last: 3.0 * sign + 0.5 * last)
    clipped = Probe(2, lambda sign, action, last: jnp.clip(3.0 * sign + 0.5 * last, -0.7, 0.7))
    config = A3CConfig(
        num_workers=1, envs_per_worker=4, t_max=6, hidden_sizes=(4,), reward_clip=0.7
    )
    *_, (gradients, _, statistics) = first_segment(config, environment=large)
    *_, (expected, _, _) = first_segment(config, environment=clipped)
    chex.assert_trees_all_close(gradients, expected, rtol=1e-5, atol=1e-6)
    episodes = statistics.episodes
    returns = np.asarray(episodes.episode_return)[np.asarray(episodes.ended)]
    assert set(returns.tolist()) == {6.5, -5.5}


@pytest.fixture(scope="module")
def segment():
    """Seven steps of two environments, whose episodes last three steps: two ends in each environment."""
    probe = Probe(3, lambda sign, action, last: sign * (2 * action - 1) + 0.25 * last)
    return first_segment(A3CConfig(**TINY, hidden_sizes=(4,)), environment=probe)


def test_every_episode_that_ended_is_counted_and_reported(segment):
    *_, (_, state, statistics) = segment
    assert statistics.num_episodes == 4 and statistics.num_episodes.dtype == jnp.int32
    ended = np.asarray(statistics.episodes.ended)
    np.testing.assert_array_equal(ended.sum(1), [0, 0, 2, 0, 0, 2, 0])
    np.testing.assert_array_equal(statistics.episodes.length[ended], 3)
    np.testing.assert_array_equal(state.episode_length, 1)


def test_the_gradients_are_those_of_the_loss_of_the_segment_that_was_played(segment):
    blueprint, params, state, (gradients, _, statistics) = segment
    functions = network_functions(blueprint.network)

    @jax.jit
    def expected(params, state):
        def policy(key, observation, carry):
            distribution, carry = functions.act(params, observation, carry)
            return distribution.sample(key), (), carry

        trajectory = rollout.unroll(blueprint.environment, policy, state, 7)[1]
        apply_fn = trajectory_apply(blueprint.network)
        return jax.grad(lambda p: a3c_loss(p, apply_fn, trajectory)[0])(params)

    chex.assert_trees_all_close(gradients, expected(params, state), rtol=1e-5, atol=1e-6)
    norm = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(gradients)))
    assert norm > 0.1
    np.testing.assert_allclose(statistics.metrics["gradient_norm"], norm, rtol=1e-5)


def test_metrics_are_scalars_by_name(segment):
    *_, (_, _, statistics) = segment
    assert {"loss", "entropy", "gradient_norm"} <= set(statistics.metrics)
    for value in statistics.metrics.values():
        assert value.shape == () and value.dtype == jnp.float32


class OwnForDicts(nn.Module):
    """A network that reads a dict by its names."""

    def setup(self):
        self.policy, self.values = nn.Dense(2), nn.Dense(1)

    def _features(self, observation):
        return jnp.concatenate([observation["sign"], observation["time"][..., None]], axis=-1)

    def actor(self, observation):
        return Categorical(self.policy(self._features(observation)))

    def critic(self, observation):
        return self.values(self._features(observation))[..., 0]

    def __call__(self, observation):
        return self.actor(observation), self.critic(observation)


GRU, NORMALIZED = {"core": "gru", "core_size": 3}, {"normalize_observations": True}


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        pytest.param({}, dict, id="dict"),
        pytest.param({}, tuple, id="tuple", marks=pytest.mark.slow),
        pytest.param(GRU, dict, id="gru-dict", marks=pytest.mark.slow),
        pytest.param(GRU, tuple, id="gru-tuple", marks=pytest.mark.slow),
        pytest.param(NORMALIZED, dict, id="normalized-dict", marks=pytest.mark.slow),
        pytest.param(NORMALIZED, tuple, id="normalized-tuple", marks=pytest.mark.slow),
    ],
)
def test_observations_that_are_trees_give_the_gradients_of_their_leaves_side_by_side(kind, fields):
    reward = lambda sign, action, last: sign * (2 * action - 1) + 0.25 * last  # noqa: E731
    config = A3CConfig(**TINY, hidden_sizes=(4,), **fields)
    _, params, _, (gradients, state, statistics) = first_segment(
        config, environment=DictProbe(3, reward, truncates=True, kind=kind)
    )
    _, _, _, (expected, plain, expected_statistics) = first_segment(
        config, environment=Probe(3, reward, truncates=True)
    )
    chex.assert_trees_all_close(gradients["params"], expected["params"], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
        statistics.metrics, expected_statistics.metrics, rtol=1e-5, atol=1e-6
    )
    sign, time = state.observation.values() if kind is dict else state.observation
    np.testing.assert_array_equal(jnp.column_stack([sign, time]), plain.observation)


def test_an_own_network_reads_a_dict_by_its_names():
    reward = lambda sign, action, last: sign * (2 * action - 1)  # noqa: E731
    *_, (gradients, _, statistics) = first_segment(
        A3CConfig(**TINY), environment=DictProbe(3, reward), network=OwnForDicts()
    )
    assert np.isfinite(statistics.metrics["loss"])
    assert jnp.any(gradients["params"]["policy"]["kernel"] != 0)
