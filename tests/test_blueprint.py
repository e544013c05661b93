"""What a configuration describes, built: the same each time, and each field where it belongs."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from initial import initialize
from probes import Probe

from a3c_jax import _compiled, rollout
from a3c_jax.algorithm import a3c
from a3c_jax.blueprint import make_blueprint
from a3c_jax.config import A3CConfig
from a3c_jax.distributions import Categorical
from a3c_jax.environments import Transition
from a3c_jax.losses import a3c_loss
from a3c_jax.networks import ActorCritic
from a3c_jax.optimizers import make_updater
from a3c_jax.worker import make_worker_step

BARE = {"num_workers": 3, "envs_per_worker": 2, "t_max": 4}
SMALL = BARE | {"hidden_sizes": (4,)}
PROBE = Probe(3, lambda sign, action, last: sign * (2 * action - 1) + 0.25 * last)


def bits(tree):
    """Every leaf as an array, typed keys too."""
    typed = jax.dtypes.prng_key
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, typed) else x)
        for x in jax.tree.leaves(tree)
    ]


def words(key):
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


class ShowsKeys:
    """Its observations are the keys that it was called with."""

    name, num_actions, continuous, observation_shape = "ShowsKeys", 2, False, (2,)

    def reset(self, key, num_envs):
        return jnp.tile(jax.random.key_data(key), (num_envs, 1)), ()

    def step(self, key, state, action):
        observation, _ = self.reset(key, len(action))
        never = jnp.zeros(len(action), bool)
        return Transition(observation, (), jnp.zeros(len(action)), never, never, observation)


SHOWS_KEYS = ShowsKeys()


class KeepsKey(ActorCritic):
    """Its parameters are the key that they were drawn with."""

    num_actions: int = 2

    def init(self, key, observation):
        return jax.random.key_data(key)

    def apply(self, params, observation, method="__call__"):
        policy, value = (
            Categorical(jnp.zeros((*observation.shape[:-1], 2))),
            observation[..., 0] * 0.0,
        )
        return {"__call__": (policy, value), "actor": policy, "critic": value}[method]


@pytest.fixture(scope="module")
def first():
    return initialize(A3CConfig(**SMALL, seed=5))


def test_a_configuration_gives_the_same_parameters_and_states_bit_for_bit(first):
    again = initialize(A3CConfig(**SMALL, seed=5))
    for one, other in ((first.params, again.params), (first.states, again.states)):
        chex.assert_trees_all_equal_structs(one, other)
        chex.assert_trees_all_equal(bits(one), bits(other))


def test_another_seed_gives_other_parameters_and_states(first):
    other = initialize(A3CConfig(**SMALL, seed=6))
    for x, y in zip(jax.tree.leaves(first.params), jax.tree.leaves(other.params), strict=True):
        assert x.ndim == 1 or not np.any(np.equal(x, y))  # biases begin at zero
    for x, y in zip(first.states, other.states, strict=True):
        assert words(x.key) != words(y.key)
        assert not np.any(np.equal(x.observation, y.observation))


def test_every_worker_has_its_own_environments_and_its_own_key(first):
    assert len(first.states) == 3
    assert len({words(state.key) for state in first.states}) == 3
    # 3 workers with 2 environments each, and each of the six begins elsewhere.
    observations = np.concatenate([state.observation for state in first.states])
    assert observations.shape == (6, 4)
    assert len(np.unique(observations, axis=0)) == 6


def test_a_worker_starts_alike_however_many_others_there_are(first):
    alone = initialize(A3CConfig(**SMALL | {"num_workers": 1}, seed=5))
    chex.assert_trees_all_equal(bits(alone.states[0]), bits(first.states[0]))
    chex.assert_trees_all_equal(alone.params, first.params)


def test_the_largest_seed_is_a_seed_like_any_other():
    largest, zero, half = (
        initialize(
            A3CConfig(**BARE | {"num_workers": 1}, seed=seed),
            environment=SHOWS_KEYS,
            network=KeepsKey(),
        )
        for seed in (2**32 - 1, 0, 2**31)
    )
    assert len({words(a.states[0].key) for a in (largest, zero, half)}) == 3
    key = zero.blueprint.evaluation_key
    assert len({words(key(np.uint32(seed))) for seed in (2**32 - 1, 0, 2**31)}) == 3
    assert words(key(2**32 - 1)) == words(key(np.uint32(2**32 - 1)))


def test_the_environment_and_the_network_are_those_that_the_configuration_names(first):
    assert first.blueprint.environment.name == "CartPole-v1"
    config = A3CConfig(
        **SMALL | {"hidden_sizes": (5, 3), "num_workers": 1},
        environment="Catch-bsuite",
        activation="elu",
        shared_torso=True,
    )
    other = initialize(config)
    assert other.blueprint.environment.name == "Catch-bsuite"
    # Catch has three actions, and its observation is an image of 10 x 5.
    assert other.blueprint.network == ActorCritic(
        num_actions=3,
        hidden_sizes=(5, 3),
        activation="elu",
        shared_torso=True,
        observation_ndim=2,
    )
    assert other.states[0].observation.shape == (2, 10, 5)


class Linear(nn.Module):
    """One weight a feature for each of two logits, and one for the value."""

    def setup(self):
        self.logits, self.values = nn.Dense(2, use_bias=False), nn.Dense(1, use_bias=False)

    def actor(self, observation):
        return Categorical(self.logits(observation))

    def critic(self, observation):
        return self.values(observation)[..., 0]

    def __call__(self, observation):
        return self.actor(observation), self.critic(observation)


def test_an_environment_and_a_network_that_are_given_are_used():
    probe = Probe(1, PROBE.reward)
    network = Linear()
    agent = initialize(A3CConfig(**BARE), environment=probe, network=network)
    assert agent.blueprint.environment is probe
    assert agent.blueprint.network is network
    shapes = jax.tree.map(jnp.shape, agent.params)
    assert shapes == {"params": {"logits": {"kernel": (2, 2)}, "values": {"kernel": (2, 1)}}}
    # A probe's observation is a random sign, and how many steps remain: one.
    np.testing.assert_array_equal(np.abs(agent.states[0].observation), np.ones((2, 2)))


def test_the_worker_step_has_the_configurations_numbers():
    numbers = {
        "t_max": 5,
        "discount": 0.7,
        "critic_cost": 0.3,
        "entropy_cost": 0.2,
        "terminal_reward": -3.0,
        "reward_clip": 0.6,
    }
    config = A3CConfig(num_workers=1, envs_per_worker=3, gae_lambda=0.4, **numbers)
    agent = initialize(config, environment=PROBE, network=Linear())
    expected = _compiled.compile_for_few_calls(
        make_worker_step(
            PROBE,
            a3c(
                config,
                PROBE,
                Linear(),
                loss=functools.partial(
                    a3c_loss, discount=0.7, critic_cost=0.3, entropy_cost=0.2, lambda_=0.4
                ),
            ),
            t_max=5,
            normalizing_discount=0.7,
            terminal_reward=-3.0,
            reward_clip=0.6,
        )
    )
    arguments = agent.params, agent.states[0]
    step = _compiled.compile_for_few_calls(agent.blueprint.worker_step)
    gradients, _, statistics = step(*arguments)
    expected_gradients, _, expected_statistics = expected(*arguments)
    assert statistics.episodes.ended.shape == (5, 3)
    chex.assert_trees_all_close(gradients, expected_gradients, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(
        statistics.metrics, expected_statistics.metrics, rtol=1e-5, atol=1e-7
    )


# The optimizer. What each does is tested by itself; here, that the configuration reaches it.


def optimizer(**fields):
    config = A3CConfig(**BARE | fields)
    blueprint = make_blueprint(config, environment=SHOWS_KEYS, network=KeepsKey())
    return blueprint.optimizer(config.learning_rate)


def moves(transformation, gradients, worker=0):
    """What each gradient in turn adds to a parameter vector at zero, `[updates, P]`."""
    transformation = optax.with_extra_args_support(transformation)
    params = jnp.zeros(len(gradients[0]))
    update = jax.jit(lambda g, state: transformation.update(g, state, params, worker=worker))
    state, updates = transformation.init(params), []
    for gradient in gradients:
        moved, state = update(np.float32(gradient), state)
        updates.append(np.asarray(moved))
    return np.array(updates)


PLAIN = {"optimizer": "momentum", "momentum": 0.0, "max_gradient_norm": None}


def test_the_learning_rate_is_annealed_over_as_many_updates_as_the_budget_has():
    # A segment is 4 steps of 2 environments, so that 25 steps take 4 updates: 3 would play 24.
    budget = {"max_steps": 25, "learning_rate": 0.5}
    linear = optimizer(**PLAIN, **budget, learning_rate_schedule="linear")
    steps = moves(linear, np.ones((6, 1)))
    np.testing.assert_allclose(steps[:, 0], [-0.5, -0.375, -0.25, -0.125, 0, 0], rtol=1e-6)
    constant = optimizer(**PLAIN, **budget, learning_rate_schedule="constant")
    np.testing.assert_array_equal(moves(constant, np.ones((6, 1))), -0.5)


def test_gradients_are_clipped_to_the_configurations_norm():
    # The norm of (3, -4) is 5: (0.6, -0.8) for a norm of one.
    clipped = optimizer(**PLAIN | {"max_gradient_norm": 1.0}, learning_rate=1.0)
    np.testing.assert_allclose(moves(clipped, [[3.0, -4.0]]), [[-0.6, 0.8]], rtol=1e-6)
    free = optimizer(**PLAIN, learning_rate=1.0)
    np.testing.assert_array_equal(moves(free, [[3.0, -4.0]]), [[-3, 4]])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # Velocities 1 and 0.25 * 1 + 1.
        ({"optimizer": "momentum", "momentum": 0.25}, [-1.0, -1.25]),
        # Both moments are 1 once their bias is corrected: 1 / (1 + 3).
        ({"optimizer": "adam", "adam_epsilon": 3.0}, [-0.25, -0.25]),
        # Squares 0.5 and 0.75 in the mean: 1 / sqrt(0.5 + 3.5), 1 / sqrt(0.75 + 3.5).
        (
            {"optimizer": "shared_rmsprop", "rmsprop_decay": 0.5, "rmsprop_epsilon": 3.5},
            [-0.5, -1 / np.sqrt(4.25)],
        ),
        (
            {"optimizer": "rmsprop", "rmsprop_decay": 0.5, "rmsprop_epsilon": 3.5},
            [-0.5, -1 / np.sqrt(4.25)],
        ),
    ],
    ids=["momentum", "adam", "shared_rmsprop", "rmsprop"],
)
def test_the_optimizer_is_the_one_named_with_its_own_numbers(fields, expected):
    transformation = optimizer(**fields, learning_rate=1.0, max_gradient_norm=None)
    actual = moves(transformation, np.ones((2, 1)), worker=2)
    np.testing.assert_allclose(actual[:, 0], expected, rtol=1e-5)


def test_rmsprop_keeps_statistics_for_as_many_workers_as_there_are():
    state = optimizer(optimizer="rmsprop").init(jnp.zeros(7))
    assert optax.tree.get(state, "nu").shape == (3, 7)
    state = optimizer(optimizer="shared_rmsprop").init(jnp.zeros(7))
    assert optax.tree.get(state, "nu").shape == (7,)


def test_the_evaluation_key_is_none_that_the_network_or_a_worker_has_used():
    config = A3CConfig(**BARE | {"envs_per_worker": 1}, seed=5)
    agent = initialize(config, environment=SHOWS_KEYS, network=KeepsKey())
    evaluation_key = agent.blueprint.evaluation_key

    @jax.jit
    def play(state):
        def policy(key, observation, carry):
            return jax.random.key_data(key)[None], (), carry

        return rollout.unroll(SHOWS_KEYS, policy, state, 3)[:2]

    @jax.jit
    def derived(key):
        folded = jax.vmap(lambda worker: jax.random.fold_in(key, worker))(jnp.arange(3))
        children = jax.vmap(jax.random.split)(folded).reshape(6)
        return jax.random.key_data(jnp.concatenate([jax.random.split(key), folded, children]))

    used = [agent.params]
    for state in agent.states:
        after, trajectory = play(state)
        used += [*state.observation, *trajectory.action_tm1[:, 0], *trajectory.observation_t[:, 0]]
        used += [jax.random.key_data(state.key), jax.random.key_data(after.key)]
    used = [tuple(np.asarray(key).tolist()) for key in used]
    # One for the network; for each of 3 workers one to reset, 3 to act, 3 to step, and the source of
    # those to come, before and after.
    assert len(used) == len(set(used)) == 1 + 3 * (1 + 3 + 3 + 2)
    # Nor does the evaluation's key, or the network's, lead to what another uses.
    for key in (evaluation_key(5), jax.random.wrap_key_data(agent.params)):
        assert not {tuple(words) for words in np.asarray(derived(key)).tolist()} & set(used)
    assert words(evaluation_key(5)) not in used
    assert words(evaluation_key(5)) == words(make_blueprint(A3CConfig()).evaluation_key(5))
    assert words(evaluation_key(5)) != words(evaluation_key(6))


# The bits that a seed must go on giving, whatever is rebuilt.


def test_a_seed_gives_the_parameters_and_environments_that_it_has_always_given():
    start = initialize(A3CConfig(num_workers=2, seed=3))
    first = start.states[1]
    assert words(first.key) == (20958803, 1257672766)
    observation = [0.0041952245, -0.03143984, 0.04266003, -0.027100444]
    np.testing.assert_allclose(first.observation[0], observation, rtol=1e-6)
    kernel = start.params["params"]["actor_trunk"]["torso"]["Dense_0"]["kernel"]
    expected = [0.07366668, 0.10093379, 0.34444275, -0.18348426]
    np.testing.assert_allclose(kernel[0, :4], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"normalize_observations": True, "normalize_rewards": True},
        pytest.param({"optimizer": "rmsprop", "normalize_rewards": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_optimizer_takes_the_parameter_tree_with_its_moments(fields):
    config = A3CConfig(**SMALL, **fields)
    blueprint, params, states = initialize(config)
    gradients, _, _ = _compiled.compile_for_few_calls(blueprint.worker_step)(params, states[0])
    chex.assert_trees_all_equal_structs(gradients, params)
    updater = make_updater(blueprint.optimizer(1e-3))
    new, state, _ = updater.update(gradients, updater.init(params), params, 1)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, params)
    assert state.finite
    for moments in new.get("statistics", {}).values():
        assert moments.num_values == 4 * 2
