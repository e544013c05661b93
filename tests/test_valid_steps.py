"""Steps that only begin the next episode: the losses and their gradients are means over the others."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import Probe

from a3c_jax import A3CConfig, _compiled
from a3c_jax.action_values import EpsilonGreedy
from a3c_jax.algorithm import SHARED, add_shared
from a3c_jax.algorithms import find_algorithm
from a3c_jax.distributions import Categorical
from a3c_jax.losses import a3c_loss
from a3c_jax.networks import trajectory_apply
from a3c_jax.normalization import batch_moments, initial_moments, merge_moments
from a3c_jax.rollout import Episodes, RolloutState, Trajectory
from a3c_jax.worker import learn

T, N, A, K = 12, 3, 4, 100  # steps, environments, actions, observations
DISCOUNT, EPSILON = 0.9, 0.3


class FourActions(Probe):
    num_actions = A


PROBE = FourActions(3, lambda sign, action, last: sign)


class Step(NamedTuple):
    """One step of one environment: two observations by number, and what lies between."""

    before: int
    action: int
    reward: float
    terminated: bool
    truncated: bool
    after: int
    valid: bool


def draw_steps(rng):
    """The steps of one environment whose episodes begin in a step of their own, as `HostSegment` writes them."""
    numbers, steps = iter(rng.permutation(K)), []
    now, begins = next(numbers), rng.random() < 0.2
    for _ in range(T):
        action, after = int(rng.integers(A)), next(numbers)
        if begins:
            steps.append(Step(now, action, 0.0, False, True, after, False))
            now, begins = after, False
            continue
        terminated, truncated = rng.random(2) < 0.2
        steps.append(Step(now, action, rng.normal(), terminated, truncated, after, True))
        # Even the observation that an episode ends with is acted upon, in vain.
        now, begins = after, terminated or truncated
    return steps


def as_trajectory(columns):
    """The steps of all environments as one segment; observations are one-hot."""
    step = Step(
        *(np.array(x).T for x in zip(*(zip(*c, strict=True) for c in columns), strict=True))
    )
    return Trajectory(
        observation_tm1=np.eye(K, dtype=np.float32)[step.before],
        action_tm1=step.action.astype(np.int32),
        reward_t=step.reward.astype(np.float32),
        terminated_t=step.terminated,
        truncated_t=step.truncated,
        observation_t=np.eye(K, dtype=np.float32)[step.after],
        valid_tm1=step.valid,
    )


SEEDS = [0, 1, 2]
DRAWN = {seed: [draw_steps(np.random.default_rng([seed, n])) for n in range(N)] for seed in SEEDS}


def num_valid(columns):
    return sum(step.valid for column in columns for step in column)


def return_of(column, t, value):
    """What step t earned, up to the end of its episode, a time limit or the segment's end; in float64."""
    total, weight = 0.0, 1.0
    for k, step in enumerate(column[t:], t):
        assert step.valid
        total, weight = total + weight * step.reward, weight * DISCOUNT
        if step.terminated:
            return total
        if step.truncated or k == T - 1:
            return total + weight * value[step.after]
    raise AssertionError


def gradient_of(loss):
    """`loss(params, trajectory)` as a function that gives the gradient and the metrics."""
    return _compiled.compile_for_few_calls(jax.grad(loss, has_aux=True, allow_int=True))


class PolicyTable:
    """Logits and a value for each observation."""

    def init(self, key, observation):
        keys = jax.random.split(key)
        return {
            "logits": jax.random.normal(keys[0], (K, A)),
            "values": jax.random.normal(keys[1], (K,)),
        }

    def apply(self, params, observation):
        return Categorical(observation @ params["logits"]), observation @ params["values"]


def test_some_segments_have_invalid_steps_wherever_they_can_be():
    valid = np.array([[step.valid for step in column] for s in SEEDS for column in DRAWN[s]])
    assert not valid[:, 0].all() and not valid[:, -1].all() and not valid[:, 1:-1].all()
    ends = {(s.terminated, s.truncated) for d in DRAWN.values() for c in d for s in c if s.valid}
    assert len(ends) == 4


@pytest.mark.parametrize(
    "seed", [SEEDS[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SEEDS[1:])]
)
def test_a3c_s_loss_and_gradient_are_means_over_the_valid_steps(seed):
    columns, params = DRAWN[seed], PolicyTable().init(jax.random.key(seed), None)
    logits, values = (np.float64(params[name]) for name in ("logits", "values"))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    entropies = -(probabilities * np.log(probabilities)).sum(-1)
    count, critic_cost, entropy_cost = num_valid(columns), 0.7, 0.03
    parts, gradient = np.zeros(4), {"logits": np.zeros((K, A)), "values": np.zeros(K)}
    for column in columns:
        for t, step in enumerate(column):
            if not step.valid:
                continue
            x, pi = step.before, probabilities[step.before]
            advantage = return_of(column, t, values) - values[x]
            parts += [
                -np.log(pi[step.action]) * advantage,
                advantage**2 / 2,
                -entropies[x],
                advantage,
            ]
            gradient["logits"][x] += (pi - np.eye(A)[step.action]) * advantage
            gradient["logits"][x] += entropy_cost * pi * (np.log(pi) + entropies[x])
            gradient["values"][x] -= critic_cost * advantage
    actor, critic, entropy, advantage = parts / count
    found, metrics = jax.grad(a3c_loss, has_aux=True)(
        params, trajectory_apply(PolicyTable()), as_trajectory(columns),
        discount=DISCOUNT, critic_cost=critic_cost, entropy_cost=entropy_cost,
    )  # fmt: skip
    chex.assert_trees_all_close(found, jax.tree.map(lambda g: g / count, gradient), atol=1e-6)
    expected = {
        "loss": actor + critic_cost * critic + entropy_cost * entropy,
        "actor_loss": actor,
        "critic_loss": critic,
        "entropy_loss": entropy,
        "entropy": -entropy,
        "mean_advantage": advantage,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


class ValueTable:
    """A value of each action for each observation."""

    def init(self, key, observation):
        return {"table": jax.random.normal(key, (K, A))}

    def apply(self, params, observation):
        values = observation @ params["table"]
        return EpsilonGreedy(values, 0.05), values.max(-1)


def q_target(method, column, t, online, target):
    """The target of a step by hand."""
    step = column[t]
    if method == "n_step_q":
        return return_of(column, t, target.max(-1))
    if step.terminated:
        return step.reward
    if method == "one_step_q":
        return step.reward + DISCOUNT * target[step.after].max()
    if not step.truncated and t < T - 1:
        return step.reward + DISCOUNT * target[step.after][column[t + 1].action]
    probabilities = np.full(A, EPSILON / A)
    probabilities[online[step.after].argmax()] += 1 - EPSILON
    return step.reward + DISCOUNT * probabilities @ target[step.after]


def make(method, network=None, **config):
    name = (
        method
        if method == "a3c"
        else f"{method}?final_epsilons=({EPSILON},)&epsilon_probabilities=(1,)"
    )
    config = A3CConfig(t_max=T, discount=DISCOUNT, algorithm=name, **config)
    algorithm = find_algorithm(name)(config, PROBE, network)
    return algorithm, algorithm.init_own(jax.random.key(0), 0)


Q_METHODS = ["one_step_q", "one_step_sarsa", "n_step_q"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", Q_METHODS)
def test_the_q_methods_losses_and_gradients_are_means_over_the_valid_steps(method, seed):
    algorithm, own = make(method, ValueTable(), envs_per_worker=N)
    weights, target = (ValueTable().init(jax.random.key(k), None) for k in (seed, 50 + seed))
    shared = add_shared(algorithm, weights)[SHARED]
    shared |= {"target": target, "num_updates": jnp.int32(10**6)}  # exploration has ended
    columns, online = DRAWN[seed], np.float64(weights["table"])
    loss, best, gradient, count = 0.0, 0.0, np.zeros((K, A)), num_valid(columns)
    for column in columns:
        for t, step in enumerate(column):
            if step.valid:
                error = q_target(method, column, t, online, np.float64(target["table"]))
                error -= online[step.before, step.action]
                loss, best = loss + error**2 / 2, best + online[step.before].max()
                gradient[step.before, step.action] -= error
    found, metrics = gradient_of(
        lambda w, trajectory: algorithm.loss({**w, SHARED: shared}, trajectory, own)
    )(weights, as_trajectory(columns))
    np.testing.assert_allclose(metrics["loss"], loss / count, rtol=1e-5)
    np.testing.assert_allclose(metrics["mean_value"], best / count, rtol=1e-5)
    np.testing.assert_allclose(found["table"], gradient / count, atol=1e-6)


# Whatever the algorithm and the network: the invalid steps might as well not be there.

SHORTENED = [column for column in (draw_steps(np.random.default_rng(s)) for s in range(60))
             if num_valid([column]) == T - 3]  # fmt: skip
METHODS = {
    "a3c": {},
    "gae": {"gae_lambda": 0.8},
    "lstm": {"core": "lstm", "core_size": 5},
    "gru": {"core": "gru", "core_size": 5},
    **{method: {} for method in Q_METHODS},
    "sarsa-lstm": {"core": "lstm", "core_size": 5},
    "n_step_q-gru": {"core": "gru", "core_size": 5},
}


SLOW = {"gae", "gru", "lstm", "n_step_q-gru", "sarsa-lstm"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in METHODS]
)
def test_a_segment_without_its_invalid_steps_gives_the_same(name):
    method = next((m for m in Q_METHODS if name.split("-")[0] in m), "a3c")
    algorithm, own = make(method, envs_per_worker=1, hidden_sizes=(6,), **METHODS[name])
    params = add_shared(algorithm, algorithm.network.init(jax.random.key(0), jnp.zeros((1, 2))))
    sees = np.random.default_rng(1).normal(size=(K, 2)).astype(np.float32)

    def loss(params, trajectory):
        trajectory = trajectory._replace(
            observation_tm1=trajectory.observation_tm1 @ sees,
            observation_t=trajectory.observation_t @ sees,
            carry=algorithm.initialize_carry(1),
        )
        return algorithm.loss(params, trajectory, own)

    gradient = gradient_of(loss)
    for column in SHORTENED:
        whole = as_trajectory([column])
        without = as_trajectory([[step for step in column if step.valid]])
        assert len(without.valid_tm1) == T - 3
        # They have no marks, because none are needed.
        expected, expected_metrics = gradient(params, without._replace(valid_tm1=None))
        found, metrics = gradient(params, whole)
        chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(found["params"], expected["params"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["a3c", *Q_METHODS])
def test_a_segment_of_nothing_but_invalid_steps_teaches_nothing(method):
    algorithm, own = make(method, envs_per_worker=N, hidden_sizes=(6,))
    params = add_shared(algorithm, algorithm.network.init(jax.random.key(0), jnp.zeros((1, 2))))
    flags = np.zeros((T, N), bool)
    rng = np.random.default_rng(0)
    trajectory = Trajectory(
        observation_tm1=rng.normal(size=(T, N, 2)).astype(np.float32),
        action_tm1=rng.integers(0, 2, (T, N)).astype(np.int32),
        reward_t=np.zeros((T, N), np.float32),
        terminated_t=flags,
        truncated_t=~flags,
        observation_t=rng.normal(size=(T, N, 2)).astype(np.float32),
        valid_tm1=flags,
    )
    found, metrics = gradient_of(lambda *arguments: algorithm.loss(*arguments, own))(
        params, trajectory
    )
    assert metrics["loss"] == 0.0
    assert all(np.isfinite(value) for value in metrics.values())
    for leaf in jax.tree.leaves(found["params"]):
        np.testing.assert_array_equal(leaf, 0.0)


class Unmarked(NamedTuple):
    """A trajectory of somebody else's, that knows nothing of invalid steps."""

    observation_tm1: Any
    action_tm1: Any
    reward_t: Any
    terminated_t: Any
    truncated_t: Any
    observation_t: Any
    carry: Any = ()


def test_trajectories_without_marks_give_what_they_always_gave():
    params = PolicyTable().init(jax.random.key(0), None)
    trajectory = as_trajectory(DRAWN[0])
    loss = functools.partial(a3c_loss, params, trajectory_apply(PolicyTable()))
    unmarked = Unmarked(*trajectory[:6])
    all_valid = trajectory._replace(valid_tm1=np.ones((T, N), bool))
    a, b, c = (loss(x)[1] for x in (unmarked, trajectory._replace(valid_tm1=None), all_valid))
    chex.assert_trees_all_equal(a, b)
    chex.assert_trees_all_close(a, c, rtol=1e-5, atol=1e-6)
    assert abs(loss(trajectory)[0] - a["loss"]) > 1e-3


@pytest.mark.parametrize(
    "seed", [SEEDS[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SEEDS[1:])]
)
def test_running_moments_are_those_of_the_valid_steps(seed):
    columns = DRAWN[seed]
    algorithm, own = make("a3c", PolicyTable(), envs_per_worker=N)
    params = PolicyTable().init(jax.random.key(0), None)
    running = {"observation": initial_moments((K,)), "reward": initial_moments(())}
    state = RolloutState(
        jax.random.key(0), (), (), jnp.zeros(N), jnp.zeros(N, jnp.int32), (), jnp.full(N, 0.5), own
    )
    nothing = Episodes(*jnp.zeros((3, T, N), jnp.int32))
    gradients, _, _ = learn(
        algorithm, params | {"statistics": running}, state, as_trajectory(columns), nothing,
        normalizing_discount=DISCOUNT,
    )  # fmt: skip
    seen, returns = [], []
    for column in columns:
        discounted = 0.5
        for step in column:
            if step.valid:
                seen.append(np.eye(K)[step.before])
                returns.append(discounted := DISCOUNT * discounted + step.reward)
            if step.terminated or step.truncated:
                discounted = 0.0
    assert len(seen) < T * N
    for name, values in ("observation", np.array(seen)), ("reward", np.array(returns)):
        found = gradients["statistics"][name]
        assert found.num_values == len(values)
        np.testing.assert_allclose(found.mean, values.mean(0), atol=1e-6)
        np.testing.assert_allclose(
            found.squared_deviations, len(values) * values.var(0), rtol=1e-5, atol=1e-6
        )


def test_moments_of_no_valid_step_change_none():
    before = batch_moments(jnp.arange(6.0).reshape(3, 2), 1)
    found = batch_moments(jnp.full((4, 2), jnp.nan), 1, jnp.zeros(4, bool))
    chex.assert_trees_all_equal(merge_moments(before, found), before)
