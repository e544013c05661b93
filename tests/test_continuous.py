"""Continuous actions: what the environment gets, what the loss sees, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces

from a3c_jax import A3CConfig, environments, evaluate, greedy_policy, rollout, train
from a3c_jax.blueprint import make_blueprint
from a3c_jax.distributions import DiagonalGaussian
from a3c_jax.losses import a3c_loss
from a3c_jax.networks import ActorCritic, trajectory_apply

INFINITE = float("inf")


class Box:
    """Shows what it got, and pays less the farther that is from a target."""

    def __init__(self, low, high, shape, target=0.0):
        self.box, self.target = spaces.Box(low, high, shape), target

    def reset(self, key, params=None):
        return jnp.zeros(self.box.shape), jnp.int32(0)

    def step(self, key, state, action, params=None):
        assert action.shape == self.box.shape
        reward = -jnp.sum(jnp.square(action - self.target))
        return action, state, reward, True, False, {"final_observation": action}

    def observation_space(self, params=None):
        return spaces.Box(-INFINITE, INFINITE, self.box.shape)

    def action_space(self, params=None):
        return self.box


BOXES = [
    pytest.param(Box(-2.0, 2.0, (1,)), id="symmetric"),
    pytest.param(Box(1.0, 5.0, (2,)), id="asymmetric"),
    pytest.param(Box(jnp.array([-1.0, 0.0]), jnp.array([3.0, 0.5]), (2,)), id="each-its-own"),
    pytest.param(Box(-1.0, 2.0, ()), id="scalar"),
    pytest.param(Box(0.0, 1.0, (2, 3)), id="matrix"),
]


def seen(environment, action):
    """What the environment gets for the policy's numbers `[N, D]`."""
    _, state = environment.reset(jax.random.key(0), len(action))
    return np.asarray(environment.step(jax.random.key(1), state, action).final_observation)


@pytest.mark.slow
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("bounds", ["clip", "tanh"])
def test_minus_one_and_one_are_the_bounds_and_nothing_is_beyond(box, bounds):
    environment = environments.adapt(box, bounds)
    assert environment.continuous
    assert environment.num_actions == np.prod(box.box.shape, dtype=int)
    low, high = (np.broadcast_to(x, box.box.shape) for x in (box.box.low, box.box.high))
    u = jnp.linspace(-4.0, 4.0, 33)
    numbers = jnp.broadcast_to(u[:, None], (33, environment.num_actions))
    got = seen(environment, numbers)
    shape = (-1, *(1,) * len(box.box.shape))
    squashed = (np.clip(u, -1, 1) if bounds == "clip" else np.tanh(u)).reshape(shape)
    np.testing.assert_allclose(got, (high + low) / 2 + (high - low) / 2 * squashed, atol=1e-6)
    assert (got >= low).all() and (got <= high).all()


def test_what_has_no_bounds_is_passed_on():
    box = Box(jnp.array([-INFINITE, 0.0]), jnp.array([INFINITE, 2.0]), (2,))
    got = seen(environments.adapt(box), jnp.array([[7.5, 7.5], [-300.0, -300.0]]))
    np.testing.assert_allclose(got, [[7.5, 2.0], [-300.0, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("bounds", ["clip", "tanh"])
def test_random_actions_are_uniform_in_the_box(bounds):
    environment = environments.adapt(
        Box(jnp.array([-1.0, 2.0]), jnp.array([3.0, 3.0]), (2,)), bounds
    )
    got = seen(environment, environment.random_action(jax.random.key(0), 4000))
    share = (got - np.array([-1.0, 2.0])) / np.array([4.0, 1.0])
    for column in share.T:
        counts, _ = np.histogram(column, bins=8, range=(0.0, 1.0))
        assert counts.sum() == 4000
        assert np.abs(counts - 500).max() < 110  # five standard deviations


@pytest.mark.slow
@pytest.mark.parametrize("state_dependent", [True, False])
def test_the_first_policy_has_the_standard_deviation_one_everywhere(state_dependent):
    network = ActorCritic(2, (16,), continuous=True, state_dependent_scale=state_dependent)
    observation = jax.random.normal(jax.random.key(0), (50, 3))
    params = network.init(jax.random.key(1), observation)
    distribution, _ = network.apply(params, observation)
    np.testing.assert_allclose(distribution.scale, 1.0, atol=0.05)
    assert np.ptp(distribution.scale) > 0 if state_dependent else np.ptp(distribution.scale) == 0
    names = set(params["params"])
    assert ("scale_head" in names, "log_scale" in names) == (state_dependent, not state_dependent)
    # A layer that says x gives the softplus of x, but for a constant and the smallest deviation.
    raised = jax.tree.map(lambda x: x, params)
    raised["params"][names.intersection({"log_scale", "scale_head"}).pop()] = (
        {"kernel": jnp.zeros((16, 2)), "bias": jnp.array([2.0, -1.0])}
        if state_dependent
        else jnp.array([2.0, -1.0])
    )
    scale = network.apply(raised, observation)[0].scale[0]
    expected = np.log1p(np.exp([2.5413, -0.4587])) + 1e-3 if state_dependent else np.exp([2, -1])
    np.testing.assert_allclose(scale, expected, rtol=1e-5)
    # However far the layer's output falls, the deviation stays positive.
    low = jax.tree.map(lambda x: x - 1e4, params)
    assert (network.apply(low, observation)[0].scale > 0).all() == state_dependent


@pytest.mark.slow
def test_the_loss_takes_the_log_probability_of_the_number_before_it_is_clipped():
    environment = environments.adapt(Box(-0.1, 0.1, (1,)))
    network = ActorCritic(1, (4,), continuous=True)
    state = rollout.start(environment, jax.random.key(0), 16)
    params = network.init(jax.random.key(1), state.observation)

    def policy(key, observation, carry):
        return network.apply(params, observation, method="actor").sample(key), (), carry

    _, trajectory, _ = rollout.unroll(environment, policy, state, 3)
    assert np.abs(trajectory.action_tm1).max() > 1.0  # not those that the environment got
    assert np.abs(trajectory.observation_t).max() <= 0.1 + 1e-6
    _, metrics = a3c_loss(params, trajectory_apply(network), trajectory)
    distribution, v_tm1 = network.apply(params, trajectory.observation_tm1)
    advantage = trajectory.reward_t - v_tm1
    expected = -jnp.mean(distribution.log_prob(trajectory.action_tm1) * advantage)
    np.testing.assert_allclose(metrics["actor_loss"], expected, rtol=1e-5, atol=1e-6)


def test_the_entropy_bonus_widens_the_policy():
    scale = jnp.full((1, 2), 0.5)
    gradient = jax.grad(lambda s: -DiagonalGaussian(jnp.zeros((1, 2)), s).entropy().mean())(scale)
    np.testing.assert_allclose(
        gradient, -1 / scale, rtol=1e-6
    )  # a step against it makes the scale larger


@pytest.mark.parametrize("bounds", ["clip", pytest.param("tanh", marks=pytest.mark.slow)])
def test_a_target_is_learnt(bounds):
    box = Box(jnp.array([-2.0, 0.0]), jnp.array([2.0, 10.0]), (2,), jnp.array([1.0, 3.0]))
    config = A3CConfig(
        num_workers=2, envs_per_worker=32, t_max=5, max_steps=100_000, hidden_sizes=(16,),
        entropy_cost=1e-4, action_bounds=bounds, learning_rate=1e-2, learning_rate_schedule="linear",
        normalize_rewards=True,
    )  # fmt: skip
    result = train(config, environment=box)
    policy = greedy_policy(result.network)
    returns, _ = evaluate(policy, result.params, result.environment, result.evaluation_key, 8)
    assert returns.mean() > -8.0  # random actions get -17


def test_pendulum_gets_torques_within_its_bounds_as_its_own_step_does():
    environment = environments.make("Pendulum-v1")
    blueprint = make_blueprint(A3CConfig(environment="Pendulum-v1"))
    assert blueprint.environment.continuous
    _, state = environment.reset(jax.random.key(0), 3)
    numbers = jnp.array([[-9.0], [0.25], [9.0]])
    transition = environment.step(jax.random.key(1), state, numbers)
    np.testing.assert_allclose(transition.state.last_u.ravel(), [-2.0, 0.5, 2.0], rtol=1e-6)
