"""The losses, against forward sums in NumPy, hand arithmetic, identities, rlax and gradients."""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
from jax.test_util import check_grads

from a3c_jax.distributions import Categorical, DiagonalGaussian
from a3c_jax.losses import (
    a3c_loss,
    actor_loss,
    critic_loss,
    entropy_loss,
    explained_variance,
    mean_over,
    n_step_advantages,
    n_step_returns,
)
from a3c_jax.rollout import Trajectory

SHAPES = [(12,), (12, 4), (8, 3, 2)]
with_and_without_jit = pytest.mark.parametrize(
    "variant", [lambda f: f, jax.jit], ids=["without_jit", "with_jit"]
)


def assert_close(actual, expected, rtol=1e-5, atol=1e-5):
    chex.assert_trees_all_close(
        actual, jax.tree.map(np.float32, expected), rtol=rtol, atol=atol, strict=True
    )


def assert_exactly_zero(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.all(np.asarray(leaf) == 0.0), leaf


def forward_sum_returns(reward, terminated, truncated, value, discount, lambda_=1.0):
    """Sums forward from each start, stopping to bootstrap with a chance of `1 - lambda_` a step."""
    num_steps = len(reward)
    returns = np.zeros(reward.shape, np.float64)
    for batch in np.ndindex(reward.shape[1:]):
        for start in range(num_steps):
            so_far, factor, going_on = 0.0, 1.0, 1.0
            for step in range(start, num_steps):
                at = (step, *batch)
                so_far += factor * float(reward[at])
                factor *= discount
                if terminated[at]:
                    returns[start, *batch] += going_on * so_far
                    break
                must_stop = truncated[at] or step == num_steps - 1
                stops = going_on * (1.0 if must_stop else 1.0 - lambda_)
                returns[start, *batch] += stops * (so_far + factor * float(value[at]))
                if must_stop:
                    break
                going_on -= stops
    return returns


def random_segment(shape, seed=0):
    """Rewards, both flags and the values before and after, with every kind of ending among them."""
    rng = np.random.default_rng(seed)
    ending = rng.choice(4, shape, p=[0.5, 0.2, 0.2, 0.1])
    ending.reshape(len(ending), -1)[[1, 3, 4, -1], 0] = 1, 2, 3, 0
    terminated, truncated = (ending == 1) | (ending == 3), ending >= 2
    return SimpleNamespace(
        reward=rng.normal(size=shape).astype(np.float32),
        terminated=terminated,
        truncated=truncated,
        v_tm1=rng.normal(size=shape).astype(np.float32),
        v_t=rng.normal(size=shape).astype(np.float32),
    )


def discount_and_lambda(segment, discount, lambda_=1.0):
    return (
        jnp.float32(discount) * (1.0 - segment.terminated),
        jnp.float32(lambda_) * (1.0 - segment.truncated),
    )


def random_arrays(shape, number, seed=0):
    uniform = np.random.default_rng(seed).uniform(0.1, 0.9, (number, *shape))
    return [jnp.asarray(array, jnp.float32) for array in uniform]


def random_normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Returns and advantages.


@with_and_without_jit
@pytest.mark.parametrize("lambda_", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_returns_and_advantages_equal_a_forward_sum(shape, lambda_, variant):
    segment = random_segment(shape, seed=1)
    discount_t, lambda_t = discount_and_lambda(segment, 0.97, lambda_)
    expected = forward_sum_returns(
        segment.reward, segment.terminated, segment.truncated, segment.v_t, 0.97, lambda_
    )
    returns = variant(n_step_returns)(segment.reward, discount_t, segment.v_t, lambda_t)
    advantages = variant(n_step_advantages)(
        segment.reward, discount_t, segment.v_tm1, segment.v_t, lambda_t
    )
    assert_close(returns, expected)
    assert_close(advantages, expected - segment.v_tm1)


def test_returns_by_hand_over_three_episodes_in_one_segment():
    terminated = jnp.array([0.0, 1.0, 0.0, 0.0, 0.0])
    truncated = jnp.array([0.0, 0.0, 1.0, 0.0, 0.0])
    returns = n_step_returns(
        r_t=jnp.array([1.0, 2.0, 3.0, 4.0, 5.0]),
        discount_t=0.5 * (1.0 - terminated),
        v_t=jnp.array([90.0, 90.0, 10.0, 90.0, 8.0]),
        lambda_t=1.0 - truncated,
    )
    expected = [
        2.0,  # 1 + 0.5 * 2: on to the termination
        2.0,  # 2: nothing follows a termination
        8.0,  # 3 + 0.5 * 10: bootstrapped at the time limit
        8.5,  # 4 + 0.5 * 5 + 0.25 * 8: on to the end of the segment
        9.0,  # 5 + 0.5 * 8: bootstrapped at the end of the segment
    ]
    assert_close(returns, np.array(expected))


def test_returns_by_hand_with_lambda_below_one():
    returns = n_step_returns(
        jnp.array([1.0, 2.0]), jnp.array([0.5, 0.5]), jnp.array([4.0, 8.0]), lambda_t=0.25
    )
    # The last step has no choice but to bootstrap: 2 + 0.5 * 8 = 6.
    # The first is 0.75 * (1 + 0.5 * 4) + 0.25 * (1 + 0.5 * 2 + 0.25 * 8) = 2.25 + 1.
    assert_close(returns, np.array([3.25, 6.0]))


def test_advantages_by_hand():
    advantages = n_step_advantages(
        r_t=jnp.array([1.0, 1.0]),
        discount_t=jnp.array([0.5, 0.5]),
        v_tm1=jnp.array([3.0, -1.0]),
        v_t=jnp.array([90.0, 6.0]),
    )
    # (1 + 0.5 * 1 + 0.25 * 6) - 3 = 0, and (1 + 0.5 * 6) - (-1) = 5.
    assert_close(advantages, np.array([0.0, 5.0]))


def test_a_time_limit_bootstraps_and_a_termination_does_not_and_wins_over_it():
    terminated = jnp.array([[0.0, 0.0, 1.0, 1.0]])
    truncated = jnp.array([[0.0, 1.0, 0.0, 1.0]])
    r_t, v_t, next_r_t = jnp.full((1, 4), 1.0), jnp.full((1, 4), 10.0), jnp.full((1, 4), 100.0)
    zeros = jnp.zeros((1, 4))
    returns = n_step_returns(
        jnp.concatenate([r_t, next_r_t]),
        0.5 * (1.0 - jnp.concatenate([terminated, zeros])),
        jnp.concatenate([v_t, zeros]),
        1.0 - jnp.concatenate([truncated, zeros]),
    )
    # Neither: 1 + 0.5 * 100. A time limit: 1 + 0.5 * 10. A termination, with one or without: 1.
    assert_close(returns[0], np.array([51.0, 6.0, 1.0, 1.0]))


def test_a_single_step_gives_the_temporal_difference_target_whatever_lambda():
    r_t, discount_t, v_t, lambda_t = random_arrays((1, 5), 4)
    assert_close(n_step_returns(r_t, discount_t, v_t, lambda_t), r_t + discount_t * v_t)


def test_lambda_zero_gives_one_step_targets():
    r_t, discount_t, v_t = random_arrays((6, 2), 3)
    assert_close(n_step_returns(r_t, discount_t, v_t, 0.0), r_t + discount_t * v_t)


def test_discount_zero_gives_the_rewards_alone():
    r_t, v_t, lambda_t = random_arrays((6, 2), 3)
    assert_close(n_step_returns(r_t, jnp.zeros_like(r_t), v_t, lambda_t), r_t)


def test_a_scalar_lambda_equals_a_constant_array_of_it():
    r_t, discount_t, v_t = random_arrays((6, 2), 3)
    for scalar in (0.75, jnp.float32(0.75), np.float64(0.75)):
        assert_close(
            n_step_returns(r_t, discount_t, v_t, scalar),
            n_step_returns(r_t, discount_t, v_t, jnp.full((6, 2), 0.75)),
        )


def test_only_the_last_value_matters_where_nothing_cuts_the_return():
    r_t, discount_t, v_t, other = random_arrays((6, 2), 4)
    other = other.at[-1].set(v_t[-1])
    chex.assert_trees_all_equal(
        n_step_returns(r_t, discount_t, v_t), n_step_returns(r_t, discount_t, other)
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_returns_and_advantages_equal_those_of_rlax(seed):
    r_t, discount_t, v_t, lambda_t, v_tm1 = random_arrays((9,), 5, seed)
    returns = n_step_returns(r_t, discount_t, v_t, lambda_t)
    assert_close(returns, rlax.lambda_returns(r_t, discount_t, v_t, lambda_t))
    assert_close(returns, rlax.n_step_bootstrapped_returns(r_t, discount_t, v_t, 9, lambda_t))
    assert_close(
        n_step_returns(r_t, discount_t, v_t),
        rlax.n_step_bootstrapped_returns(r_t, discount_t, v_t, 9),
    )
    # Generalised advantage estimation takes the values of one unbroken stream.
    values = jnp.concatenate([v_tm1[:1], v_t])
    assert_close(
        n_step_advantages(r_t, discount_t, values[:-1], v_t, 0.8),
        rlax.truncated_generalized_advantage_estimation(r_t, discount_t, 0.8, values),
    )


# The losses.


def test_losses_by_hand():
    # -(-1 * 2 + -3 * -4) / 2 = -5
    assert_close(actor_loss(jnp.array([-1.0, -3.0]), jnp.array([2.0, -4.0])), -5.0)
    # (0.5 * (4 - 1)**2 + 0.5 * (0 - 2)**2) / 2 = (4.5 + 2) / 2
    assert_close(critic_loss(jnp.array([1.0, 2.0]), jnp.array([4.0, 0.0])), 3.25)
    # -(0.5 + 0.25 + 0.25 + 0) / 4
    assert_close(entropy_loss(jnp.array([[0.5, 0.25], [0.25, 0.0]])), -0.25)


@with_and_without_jit
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_equal_numpy_means(shape, variant):
    first, second = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    wide_first, wide_second = first.astype(np.float64), second.astype(np.float64)
    count = first.size
    assert_close(variant(actor_loss)(first, second), -(wide_first * wide_second).sum() / count)
    assert_close(
        variant(critic_loss)(first, second), ((wide_second - wide_first) ** 2).sum() / (2 * count)
    )
    assert_close(variant(entropy_loss)(first), -wide_first.sum() / count)
    assert_close(
        variant(explained_variance)(first, second),
        1.0 - np.var(wide_second - wide_first) / np.var(wide_second),
    )


FUNCTIONS = {
    n_step_returns: 4,
    n_step_advantages: 5,
    actor_loss: 2,
    critic_loss: 2,
    entropy_loss: 1,
    explained_variance: 2,
}


@with_and_without_jit
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_vmap_equals_stacked_singles(function, variant):
    arrays = random_arrays((7, 3), FUNCTIONS[function])
    mapped = variant(jax.vmap(function, in_axes=1, out_axes=-1))(*arrays)
    singles = [variant(function)(*[array[:, column] for array in arrays]) for column in range(3)]
    assert_close(mapped, jnp.stack(singles, axis=-1))


def test_policy_gradient_and_entropy_losses_equal_those_of_rlax():
    logits, advantage, weight = random_normal((6, 3)), random_normal((6,), seed=1), jnp.ones(6)
    action = jnp.array([0, 1, 2, 2, 1, 0])

    def ours(logits):
        return actor_loss(Categorical(logits).log_prob(action), advantage)

    def theirs(logits):
        return rlax.policy_gradient_loss(logits, action, advantage, weight)

    assert_close(
        jax.jit(jax.value_and_grad(ours))(logits), jax.jit(jax.value_and_grad(theirs))(logits)
    )
    assert_close(
        entropy_loss(Categorical(logits).entropy()),
        jax.jit(rlax.entropy_loss)(logits, weight),
    )


@pytest.mark.parametrize("num_actions", [2, 18])
def test_the_entropy_loss_of_a_uniform_policy_is_minus_log_of_the_number_of_actions(num_actions):
    uniform = Categorical(jnp.full((5, num_actions), 3.0))
    assert_close(entropy_loss(uniform.entropy()), -np.log(num_actions))


# Gradients.


def test_gradients_equal_finite_differences_with_the_targets_held_constant():
    with jax.enable_x64(True):
        r_t, discount_t, v_tm1, v_t, lambda_t = np.random.default_rng(0).uniform(
            0.1, 0.9, size=(5, 6, 2)
        )
        for function, arguments in [
            (n_step_returns, (r_t, discount_t, v_t, lambda_t)),
            (n_step_advantages, (r_t, discount_t, v_tm1, v_t, lambda_t)),
            (lambda log_prob: actor_loss(log_prob, r_t), (v_tm1,)),
            (lambda v: critic_loss(v, r_t), (v_tm1,)),
            (entropy_loss, (v_tm1,)),
        ]:
            check_grads(jax.jit(function), arguments, order=1, atol=1e-6, rtol=1e-6)


def test_the_policy_gradient_is_the_policy_minus_one_hot_times_the_advantage():
    logits, advantage = random_normal((6, 2, 3)), random_normal((6, 2), seed=1)
    action = jnp.asarray(np.random.default_rng(2).integers(0, 3, (6, 2)))

    @jax.grad
    def gradient_of(logits):
        return actor_loss(Categorical(logits).log_prob(action), advantage)

    gradient = jax.jit(gradient_of)(logits)
    policy, one_hot = jax.nn.softmax(logits), jnp.eye(3)[action]
    assert_close(gradient, (policy - one_hot) * advantage[..., None] / 12)


def test_the_critic_gradient_is_the_value_minus_the_return():
    v_tm1, return_tm1 = random_arrays((6, 2), 2)
    assert_close(jax.grad(critic_loss)(v_tm1, return_tm1), (v_tm1 - return_tm1) / 12)


def test_targets_and_advantages_are_constants_to_the_gradient():
    first, second = random_arrays((6, 2), 2)
    assert_exactly_zero(jax.grad(actor_loss, argnums=1)(first, second))
    assert_exactly_zero(jax.grad(critic_loss, argnums=1)(first, second))


# The whole loss, with a linear policy and a linear critic of their own.


def linear_apply(params, trajectory):
    return (
        Categorical(trajectory.observation_tm1 @ params["actor"]),
        trajectory.observation_tm1 @ params["critic"],
        trajectory.observation_t @ params["critic"],
    )


def linear_params(seed=0, num_actions=3):
    return {"actor": random_normal((4, num_actions), seed), "critic": random_normal((4,), seed + 1)}


def random_trajectory(shape=(8, 3), seed=0):
    segment = random_segment(shape, seed)
    rng = np.random.default_rng(seed + 100)
    observation_tm1, observation_t = rng.normal(size=(2, *shape, 4)).astype(np.float32)
    return Trajectory(
        observation_tm1=observation_tm1,
        action_tm1=rng.integers(0, 3, shape).astype(np.int32),
        reward_t=segment.reward,
        terminated_t=segment.terminated,
        truncated_t=segment.truncated,
        observation_t=observation_t,
    )


METRICS = {
    "loss",
    "actor_loss",
    "critic_loss",
    "entropy_loss",
    "entropy",
    "mean_advantage",
    "explained_variance",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_a3c_loss_is_the_weighted_sum_of_its_parts(shape):
    params, trajectory = linear_params(), random_trajectory(shape)

    @jax.jit
    def loss_of(params):
        fields = SimpleNamespace(**trajectory._asdict())  # anything with the fields will do
        return a3c_loss(
            params, linear_apply, fields, discount=0.9, critic_cost=0.7, entropy_cost=0.2
        )

    loss, metrics = loss_of(params)

    actor, critic = (np.asarray(params[name], np.float64) for name in ("actor", "critic"))
    logits = trajectory.observation_tm1 @ actor
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    log_prob = np.take_along_axis(log_probs, trajectory.action_tm1[..., None], -1)[..., 0]
    entropy = -(np.exp(log_probs) * log_probs).sum(-1).mean()
    value = trajectory.observation_tm1 @ critic
    returns = forward_sum_returns(
        trajectory.reward_t, trajectory.terminated_t, trajectory.truncated_t,
        trajectory.observation_t @ critic, 0.9,
    )  # fmt: skip
    actor_part = -(log_prob * (returns - value)).mean()
    critic_part = 0.5 * ((returns - value) ** 2).mean()
    total = actor_part + 0.7 * critic_part - 0.2 * entropy

    assert_close(loss, total)
    assert_close(
        metrics,
        {
            "loss": total,
            "actor_loss": actor_part,
            "critic_loss": critic_part,
            "entropy_loss": -entropy,
            "entropy": entropy,
            "mean_advantage": (returns - value).mean(),
            "explained_variance": 1.0 - np.var(returns - value) / np.var(returns),
        },
    )
    assert metrics.keys() == METRICS
    assert metrics["entropy"] == -metrics["entropy_loss"] > 0.0


@pytest.mark.parametrize("lambda_", [0.0, 0.7, 1.0])
def test_lambda_gives_generalised_advantage_estimation(lambda_):
    trajectory, params = random_trajectory((9, 4), 3), linear_params()
    first = trajectory.observation_tm1[:1]  # what followed a step is what the next one acts upon
    observation_tm1 = np.concatenate([first, trajectory.observation_t[:-1]])
    trajectory = trajectory._replace(observation_tm1=observation_tm1)
    assert trajectory.truncated_t[:-1].any() and trajectory.terminated_t.any()
    loss, metrics = a3c_loss(params, linear_apply, trajectory, discount=0.9, lambda_=lambda_)
    distribution, v_tm1, v_t = linear_apply(params, trajectory)
    log_prob = np.asarray(distribution.log_prob(trajectory.action_tm1))
    advantage = np.zeros((10, 4))
    for t in reversed(range(9)):  # Schulman et al. 2016, equation 16, cut at every end
        alive, cut = ~trajectory.terminated_t[t], trajectory.truncated_t[t]
        delta = trajectory.reward_t[t] + 0.9 * alive * v_t[t] - v_tm1[t]
        advantage[t] = delta + 0.9 * lambda_ * (alive & ~cut) * advantage[t + 1]
    assert_close(metrics["actor_loss"], -(log_prob * advantage[:-1]).mean())
    assert_close(metrics["critic_loss"], 0.5 * np.square(advantage[:-1]).mean())
    assert np.isfinite(loss)
    if lambda_ == 1.0:
        assert loss == a3c_loss(params, linear_apply, trajectory, discount=0.9)[0]


def test_without_a_time_limit_the_lambda_of_the_a3c_loss_is_that_of_rlax():
    params, trajectory = linear_params(), random_trajectory((9,))
    stream = random_normal((10, 4), 5)
    trajectory = trajectory._replace(
        observation_tm1=stream[:-1], observation_t=stream[1:], truncated_t=jnp.zeros(9, bool)
    )
    assert trajectory.terminated_t[:-1].any()
    _, metrics = a3c_loss(params, linear_apply, trajectory, discount=0.9, lambda_=0.8)
    expected = rlax.truncated_generalized_advantage_estimation(
        trajectory.reward_t, 0.9 * (1.0 - trajectory.terminated_t), 0.8, stream @ params["critic"]
    )
    assert_close(metrics["mean_advantage"], expected.mean())
    assert_close(metrics["critic_loss"], 0.5 * jnp.square(expected).mean())


def test_the_a3c_loss_takes_continuous_actions_of_one_more_dimension():
    params, trajectory = linear_params(num_actions=2), random_trajectory()
    trajectory = trajectory._replace(action_tm1=trajectory.observation_t[..., :2])

    def apply_fn(params, trajectory):
        distribution, v_tm1, v_t = linear_apply(params, trajectory)
        mean = distribution.logits
        return DiagonalGaussian(mean, jnp.full_like(mean, 0.5)), v_tm1, v_t

    _, metrics = a3c_loss(params, apply_fn, trajectory, discount=0.9)
    # Each of two independent components of scale 0.5 has an entropy of 0.5 * log(2 pi e 0.25).
    assert_close(metrics["entropy"], np.log(2 * np.pi * np.e * 0.25))
    distribution, v_tm1, v_t = apply_fn(params, trajectory)
    returns = forward_sum_returns(
        trajectory.reward_t, trajectory.terminated_t, trajectory.truncated_t, v_t, 0.9
    )
    log_prob = np.asarray(distribution.log_prob(trajectory.action_tm1), np.float64)
    assert_close(metrics["actor_loss"], -(log_prob * (returns - v_tm1)).mean())


def test_the_actor_loss_never_moves_the_critic_nor_the_critic_loss_the_actor():
    params, trajectory = linear_params(), random_trajectory()

    @jax.jit
    @jax.jacrev
    def gradients_of_every_metric(params):
        return a3c_loss(params, linear_apply, trajectory)[1]

    gradients_of = gradients_of_every_metric(params)
    for part, moved, still in [
        ("actor_loss", "actor", "critic"),
        ("entropy_loss", "actor", "critic"),
        ("critic_loss", "critic", "actor"),
    ]:
        gradients = gradients_of[part]
        assert_exactly_zero(gradients[still])
        assert np.all(np.asarray(gradients[moved]) != 0.0)


def test_a_critic_cost_of_zero_leaves_a_separate_critic_exactly_alone():
    params, trajectory = linear_params(), random_trajectory()

    def gradients_at(critic_cost):
        def loss(params):
            return a3c_loss(params, linear_apply, trajectory, critic_cost=critic_cost)[0]

        return jax.grad(loss)(params)

    without, with_it = gradients_at(0.0), gradients_at(2.0)
    assert_exactly_zero(without["critic"])
    assert np.all(np.asarray(with_it["critic"]) != 0.0)
    chex.assert_trees_all_equal(without["actor"], with_it["actor"])


def test_without_surprise_only_the_entropy_moves_the_actor():
    params, trajectory = linear_params(), random_trajectory()
    params["critic"] = jnp.zeros(4)  # with rewards of zero, every advantage is exactly zero
    trajectory = trajectory._replace(reward_t=jnp.zeros((8, 3)))

    def actor_gradient(entropy_cost):
        gradients, _ = jax.grad(a3c_loss, has_aux=True)(
            params, linear_apply, trajectory, entropy_cost=entropy_cost
        )
        return gradients["actor"]

    assert_exactly_zero(actor_gradient(0.0))
    assert np.any(np.asarray(actor_gradient(0.01)) != 0.0)


def test_the_critic_follows_its_targets_and_never_drags_them_along():
    params, trajectory = linear_params(), random_trajectory()

    @jax.jit
    @jax.grad
    def gradients_of(params):
        return a3c_loss(params, linear_apply, trajectory)[1]["critic_loss"]

    gradients = gradients_of(params)
    v_tm1 = trajectory.observation_tm1 @ np.asarray(params["critic"], np.float64)
    returns = forward_sum_returns(
        trajectory.reward_t, trajectory.terminated_t, trajectory.truncated_t,
        trajectory.observation_t @ np.asarray(params["critic"], np.float64), 0.99,
    )  # fmt: skip
    # The semi-gradient: the mean of (v - return) times the gradient of v, which is the observation.
    semi_gradient = ((v_tm1 - returns)[..., None] * trajectory.observation_tm1).mean((0, 1))
    assert_close(gradients["critic"], semi_gradient)


def test_the_jitted_loss_and_its_gradient_compile_once():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def loss_and_gradient(params, trajectory):
        return jax.value_and_grad(a3c_loss, has_aux=True)(params, linear_apply, trajectory)

    for seed in range(4):
        params, trajectory = linear_params(seed), random_trajectory(seed=seed)
        (loss, metrics), gradients = loss_and_gradient(params, trajectory)
        chex.assert_shape([loss, *metrics.values()], ())
        chex.assert_tree_all_finite((loss, metrics, gradients))


# Exploration: the sign of the entropy, by gradient descent on a bandit of three arms.

ARM_REWARDS = jnp.array([1.0, 0.5, 0.0])


def bandit_policy_after_descent(actor_cost, entropy_cost, num_steps=300):
    def loss(logits):
        # Every arm once, weighted by its probability: the exact expectation of the actor loss.
        log_prob = Categorical(jnp.tile(logits, (3, 1))).log_prob(jnp.arange(3))
        expected_advantage = 3.0 * jax.nn.softmax(logits) * ARM_REWARDS
        entropy = Categorical(logits[None]).entropy()
        return actor_cost * actor_loss(log_prob, expected_advantage) + entropy_cost * entropy_loss(
            entropy
        )

    def descend(_, logits):
        return logits - 2.0 * jax.grad(loss)(logits)

    return Categorical(jax.lax.fori_loop(0, num_steps, descend, jnp.array([2.0, 0.0, -1.0])))


def test_minimising_the_entropy_loss_alone_makes_a_skewed_policy_uniform():
    start = bandit_policy_after_descent(0.0, 1.0, num_steps=0)
    end = bandit_policy_after_descent(0.0, 1.0)
    assert start.entropy() < 0.6 < np.log(3)
    assert_close(jnp.exp(end.log_probs()), np.full(3, 1 / 3))


def test_an_entropy_cost_keeps_the_policy_more_random_and_at_the_known_optimum():
    greedy, exploring = (bandit_policy_after_descent(1.0, cost) for cost in (0.0, 0.5))
    assert exploring.entropy() > greedy.entropy() + 0.5
    assert jnp.exp(greedy.log_probs())[0] > 0.99
    # The policy that maximises reward + 0.5 * entropy is softmax(reward / 0.5).
    assert_close(exploring.log_probs(), jax.nn.log_softmax(ARM_REWARDS / 0.5), rtol=1e-4)


# The explained variance.


def test_a_mean_over_steps_needs_one_number_for_each():
    x = jnp.arange(6.0).reshape(3, 2)
    assert mean_over(None, x) == 2.5
    assert mean_over(x > 3, x) == 4.5
    for wrong in (jnp.ones((3, 1), bool), jnp.ones(2, bool), jnp.ones((3, 2), int), x):
        message = (
            r"valid_tm1 must be a bool array of shape \(3, 2\), one for each step, got .* nothing"
        )
        with pytest.raises(AssertionError, match=message):
            mean_over(wrong, x)
        with pytest.raises(AssertionError, match=message):
            explained_variance(x, x, wrong)


def test_a_mean_over_no_step_is_zero():
    nothing = jnp.zeros(3, bool)
    x = jnp.array([1.0, jnp.inf, jnp.nan])
    for f in (lambda x: mean_over(nothing, x), lambda x: critic_loss(x, x, nothing)):
        assert f(x) == 0.0
        assert_close(jax.grad(f)(x), jnp.zeros(3))
    assert explained_variance(x, x, nothing) == 0.0


def test_a_mean_of_numbers_that_are_not_floats():
    assert mean_over(jnp.array([True, False, True]), jnp.array([1, 5, 2])) == 1.5
    assert mean_over(jnp.array([True, False, True]), jnp.array([True, True, False])) == 0.5


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_in_half_precision_a_mask_of_all_steps_changes_nothing(dtype):
    x, everything = jnp.full(5000, 30.0, dtype), jnp.ones(5000, bool)  # the sum overflows float16
    zeros = jnp.zeros_like(x)
    for loss in (
        entropy_loss,
        lambda x, valid=None: critic_loss(zeros, x, valid),
        lambda x, valid=None: actor_loss(x, x, valid),
    ):
        assert loss(x, everything) == loss(x) and jnp.isfinite(loss(x))
        assert loss(x, everything).dtype == dtype


def test_what_stands_at_an_invalid_step_reaches_neither_value_nor_gradient():
    valid, bad = jnp.array([True, False, True]), jnp.array([1.0, jnp.nan, 3.0])
    zeros = jnp.zeros(3)
    # Each of these numbers is wrong at the same step: the array of the gradient, or the other one.
    for loss, expected in (
        (lambda x: critic_loss(zeros + x, bad, valid), [-0.5, 0.0, -1.5]),  # half the mean of (1 - x)^2 and (3 - x)^2
        (lambda x: actor_loss(zeros + x, bad, valid), [-0.5, 0.0, -1.5]),
        (lambda x: critic_loss(bad + x, zeros, valid), [0.5, 0.0, 1.5]),
        (lambda x: actor_loss(bad + x, jnp.ones(3), valid), [-0.5, 0.0, -0.5]),
        (lambda x: entropy_loss(bad + x, valid), [-0.5, 0.0, -0.5]),
        (lambda x: mean_over(valid, bad + x), [0.5, 0.0, 0.5]),
    ):  # fmt: skip
        value, gradient = jax.value_and_grad(loss)(zeros)
        assert jnp.isfinite(value)
        assert_close(gradient, jnp.array(expected))
    assert explained_variance(bad, bad, valid) == 1.0


def test_returns_that_are_not_finite_have_no_explained_variance():
    returns = jnp.array([1.0, 2.0, 4.0])
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert jnp.isnan(explained_variance(returns, returns.at[1].set(bad)))
        assert not jnp.isfinite(explained_variance(returns.at[1].set(bad), returns))


def test_the_explained_variance_of_returns_whose_variance_underflows_is_zero():
    returns = jnp.array([0.0, 1e-30])
    assert jnp.var(returns) == 0.0
    assert explained_variance(returns, returns) == 0.0


@pytest.mark.parametrize("name", ["discount", "critic_cost", "entropy_cost", "lambda_"])
def test_the_a3c_loss_refuses_numbers_that_differ_from_step_to_step(name):
    trajectory = random_trajectory((5, 5))
    with pytest.raises(AssertionError, match=rf"^{name} must be a scalar.* got shape \(5,\)"):
        a3c_loss(linear_params(), linear_apply, trajectory, **{name: jnp.ones(5)})
    loss, _ = a3c_loss(linear_params(), linear_apply, trajectory, **{name: jnp.float32(0.5)})
    assert jnp.isfinite(loss)


def test_the_explained_variance_by_hand_and_at_its_landmarks():
    returns = jnp.array([1.0, 3.0, 5.0, 7.0])
    # Errors 1, -1, 1, -1 have variance 1; the returns' variance is (9 + 1 + 1 + 9) / 4 = 5.
    v_tm1 = jnp.array([0.0, 4.0, 4.0, 8.0])
    assert_close(explained_variance(v_tm1, returns), 0.8)
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(returns + 10.0, returns) == 1.0  # a constant error has no variance
    assert explained_variance(jnp.full(4, 2.0), returns) == 0.0
    assert_close(explained_variance(-returns, returns), -3.0)  # 1 - Var[2 G] / Var[G] = 1 - 4


def test_the_explained_variance_of_constant_returns_is_zero_without_a_nan_in_its_gradient():
    v_tm1, returns = jnp.array([1.0, 2.0, 3.0]), jnp.full(3, 2.0)
    value, gradients = jax.value_and_grad(explained_variance, (0, 1))(v_tm1, returns)
    assert value == 0.0
    chex.assert_tree_all_finite(gradients)
    chex.assert_tree_all_finite(jax.grad(explained_variance, (0, 1))(v_tm1, v_tm1))


@pytest.mark.parametrize("size", [3, 7, 100])
def test_the_explained_variance_of_constant_returns_is_zero_in_spite_of_rounding(size):
    assert explained_variance(jnp.arange(size, dtype=jnp.float32), jnp.full(size, 0.1)) == 0.0


# Errors: what is wrong is said by name, with the shapes, when the function is traced.

traced = pytest.mark.parametrize(
    "variant",
    [lambda f: f, jax.jit, lambda f: lambda *arrays: jax.eval_shape(f, *arrays)],
    ids=["without_jit", "with_jit", "only_traced"],
)
NAMES = {
    n_step_returns: ["r_t", "discount_t", "v_t", "lambda_t"],
    actor_loss: ["log_prob_tm1", "advantage_tm1"],
    critic_loss: ["v_tm1", "return_tm1"],
    explained_variance: ["v_tm1", "return_tm1"],
}


@traced
@pytest.mark.parametrize("function", NAMES, ids=lambda f: f.__name__)
def test_an_array_with_a_trailing_one_is_refused_and_never_broadcast(function, variant):
    names = NAMES[function]
    for wrong in range(len(names)):
        arrays = [jnp.ones((4, 1) if i == wrong else (4,)) for i in range(len(names))]
        found = ", ".join(
            rf"{name}: \(4, 1\) float32" if i == wrong else rf"{name}: \(4,\) float32"
            for i, name in enumerate(names)
        )
        match = f"^{' and '.join(names)} must be float arrays of one shape .* got {found}; nothing"
        with pytest.raises(AssertionError, match=match):
            variant(function)(*arrays)


@traced
def test_advantages_name_the_arrays_whose_shapes_differ(variant):
    good, bad = jnp.ones(4), jnp.ones((4, 1))
    with pytest.raises(
        AssertionError, match=r"got r_t: \(4,\) float32, v_tm1: \(4, 1\) float32; nothing"
    ):
        variant(n_step_advantages)(good, good, bad, good)
    with pytest.raises(AssertionError, match=r"discount_t: \(4,\) float32, v_t: \(4, 1\) float32"):
        variant(n_step_advantages)(good, good, good, bad)


@traced
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_], ids=["int32", "bool"])
@pytest.mark.parametrize("function", [*NAMES, entropy_loss], ids=lambda f: f.__name__)
def test_an_array_that_is_not_of_floats_is_refused(function, dtype, variant):
    number, dtype = FUNCTIONS[function], jnp.dtype(dtype)
    for wrong in range(number):
        arrays = [jnp.ones(4, dtype if i == wrong else jnp.float32) for i in range(number)]
        name = NAMES.get(function, ["entropy_tm1"])[wrong]
        match = rf"must be float arrays .*{name}: \(4,\) {dtype}"
        with pytest.raises(AssertionError, match=match):
            variant(function)(*arrays)


@traced
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_arrays_without_time_or_without_elements_are_refused(function, shape, variant):
    shape_pattern = str(shape).replace("(", r"\(").replace(")", r"\)")
    match = (
        r"_t(m1)? must have a leading time dimension \[T, \.\.\.\] and at least one element, "
        rf"got shape {shape_pattern}"
    )
    with pytest.raises(AssertionError, match=match):
        variant(function)(*[jnp.ones(shape)] * FUNCTIONS[function])


@pytest.mark.parametrize("field", ["reward_t", "terminated_t", "truncated_t"])
def test_the_a3c_loss_refuses_a_trajectory_whose_shapes_differ(field):
    trajectory = random_trajectory((8,))
    wrong = trajectory._replace(**{field: getattr(trajectory, field)[:, None]})
    with pytest.raises(AssertionError, match=r"\(8, 1\).* nothing is broadcast"):
        jax.eval_shape(lambda p, t: a3c_loss(p, linear_apply, t), linear_params(), wrong)


def test_the_a3c_loss_refuses_values_with_a_trailing_one():
    def apply_fn(params, trajectory):
        distribution, v_tm1, v_t = linear_apply(params, trajectory)
        return distribution, v_tm1[..., None], v_t[..., None]

    with pytest.raises(
        AssertionError, match=r"r_t: \(8, 3\) float32, v_tm1: \(8, 3, 1\) float32; nothing"
    ):
        jax.eval_shape(lambda p, t: a3c_loss(p, apply_fn, t), linear_params(), random_trajectory())


def test_numpy_s_own_floats_are_taken_as_jnp_takes_them():
    expected = n_step_returns(jnp.ones(2), jnp.full(2, 0.5), jnp.ones(2))
    for arrays in (
        (np.ones(2), np.full(2, 0.5), np.ones(2)),  # float64
        (np.ones(2), jnp.full(2, 0.5), jnp.ones(2)),
    ):
        returns = n_step_returns(*arrays)
        assert returns.dtype == jnp.float32
        np.testing.assert_array_equal(returns, expected)
    assert actor_loss(np.array([-1.0, -2.0]), np.array([3.0, -1.0])) == 0.5
    np.testing.assert_array_equal(n_step_returns([1.0, 1.0], [0.5, 0.5], [1.0, 1.0]), expected)


def test_the_dtypes_that_a_message_shows_are_those_that_were_given():
    message = (
        r"of one dtype, got r_t: \(2,\) float64, discount_t: \(2,\) float16, v_t: \(2,\) float64"
    )
    with pytest.raises(AssertionError, match=message):
        n_step_returns(np.ones(2), np.ones(2, np.float16), np.ones(2))
    with pytest.raises(AssertionError, match=r"must be float arrays.* entropy_tm1: \(2,\) int64"):
        entropy_loss(np.ones(2, np.int64))
