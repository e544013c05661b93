"""Evaluation: whole first episodes, exact returns, its own randomness."""

import signal
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import Probe
from small_runs import program

from a3c_jax import A3CConfig, evaluate, greedy_policy, make, random_policy, sampled_policy, train
from a3c_jax.asynchrony import evaluation
from a3c_jax.asynchrony.evaluation import Policy
from a3c_jax.asynchrony.signals import noted_signals
from a3c_jax.distributions import Categorical
from a3c_jax.networks import ActorCritic
from experiments.report import _side_by_side


class TwoLengths(Probe):
    """Episodes of one step where the sign is negative, and of nine where it is positive."""

    def reset(self, key, num_envs):
        sign = jax.random.rademacher(key, (num_envs,), jnp.float32)
        remaining = jnp.where(sign > 0, 9, 1)
        return self.observe(sign, remaining), (sign, remaining)


def constant(action):
    def act(params, key, observation, carry):
        return jnp.full(observation.shape[:1], action, jnp.int32), carry

    return Policy(act, lambda num_envs: ())


def test_each_environment_counts_its_first_episode_from_start_to_end():
    environment = TwoLengths(None, lambda sign, action, last: jnp.full_like(sign, 2.0))
    returns, lengths = evaluate(constant(0), None, environment, jax.random.key(0), 200)
    np.testing.assert_array_equal(returns, 2.0 * lengths)
    assert set(lengths) == {1, 9}
    # Counting the first 200 episodes to end would count nearly nine short ones for each long one.
    assert 70 < (lengths == 9).sum() < 130


def counting(first):
    """Takes action 1 as soon as it has acted so many times: it has a memory."""

    def act(params, key, observation, carry):
        return (carry >= first).astype(jnp.int32), carry + 1

    return Policy(act, lambda num_envs: jnp.zeros(num_envs, jnp.int32))


def test_policies_side_by_side_play_as_many_environments_each_with_their_own_memory():
    environment = Probe(5, lambda sign, action, last: action)  # the return counts the actions 1
    beside = _side_by_side([constant(1), counting(3), constant(0), counting(1)])
    returns, _ = evaluate(beside, None, environment, jax.random.key(0), 8)
    np.testing.assert_array_equal(returns, [5, 5, 2, 2, 0, 0, 4, 4])


def test_a_time_limit_ends_an_episode_too():
    environment = Probe(4, lambda sign, action, last: jnp.ones_like(sign), truncates=True)
    returns, lengths = evaluate(constant(1), None, environment, jax.random.key(0), 3)
    np.testing.assert_array_equal(returns, 4.0)
    np.testing.assert_array_equal(lengths, 4)


def test_equal_keys_give_equal_episodes_and_others_do_not():
    environment = make("CartPole-v1")
    policy = random_policy(environment)
    first = evaluate(policy, None, environment, jax.random.key(1), 20)
    chex.assert_trees_all_equal(first, evaluate(policy, None, environment, jax.random.key(1), 20))
    other = evaluate(policy, None, environment, jax.random.key(2), 20)
    assert (first.returns != other.returns).any()


@pytest.mark.slow
def test_a_random_policy_is_as_bad_as_it_is_known_to_be():
    environment = make("CartPole-v1")
    returns, _ = evaluate(random_policy(environment), None, environment, jax.random.key(0), 500)
    assert 20 < returns.mean() < 25


@pytest.mark.slow
def test_greedy_takes_the_mode_and_sampled_does_not_always():
    network = ActorCritic(num_actions=2, hidden_sizes=(8,))
    observation = jax.random.normal(jax.random.key(0), (100, 4))
    params = network.init(jax.random.key(1), observation)
    greedy, _ = greedy_policy(network).act(params, jax.random.key(2), observation, ())
    distribution, _ = network.apply(params, observation)
    np.testing.assert_array_equal(greedy, distribution.mode())
    sampled, _ = sampled_policy(network).act(params, jax.random.key(2), observation, ())
    assert 20 < (sampled != greedy).sum() < 80


@pytest.mark.slow
def test_evaluation_disturbs_no_training():
    run = program(A3CConfig(num_workers=1, envs_per_worker=2, t_max=4, max_steps=800))
    before = train(run)
    evaluate(
        sampled_policy(before.network), before.params, before.environment, before.evaluation_key, 5
    )
    chex.assert_trees_all_equal(before.params, train(run).params)


def test_long_episodes_are_played_in_several_calls_and_those_that_may_never_end_say_so(monkeypatch):
    environment = Probe(9, lambda sign, action, last: jnp.ones_like(sign))
    policy = counting(4)
    whole = evaluate(policy, None, environment, jax.random.key(0), 3)
    monkeypatch.setattr(evaluation, "_STEPS_AT_A_TIME", 2)
    monkeypatch.setattr(evaluation, "_MANY_STEPS", 8)
    with pytest.warns(RuntimeWarning, match="after 8 steps .* have not ended"):
        in_parts = evaluate(policy, None, environment, jax.random.key(0), 3)
    chex.assert_trees_all_equal(whole, in_parts)
    monkeypatch.setattr(evaluation, "_MANY_STEPS", 10)
    with warnings.catch_warnings(action="error"):
        evaluate(policy, None, environment, jax.random.key(0), 3)


def test_an_evaluation_that_never_ends_can_be_interrupted(monkeypatch):
    class Never(Probe):
        def step(self, key, state, action):
            transition = super().step(key, state, action)
            return transition._replace(terminated=jnp.zeros_like(transition.terminated))

    monkeypatch.setattr(evaluation, "_STEPS_AT_A_TIME", 2)
    go_on = evaluation._go_on

    def interrupt_the_third(*arguments):
        if isinstance(arguments[-1], int) and arguments[-1] == 6:
            signal.raise_signal(signal.SIGINT)
        return go_on(*arguments)

    monkeypatch.setattr(evaluation, "_go_on", interrupt_the_third)
    environment = Never(9, lambda sign, action, last: jnp.ones_like(sign))
    with noted_signals(), pytest.raises(KeyboardInterrupt):
        evaluate(constant(0), None, environment, jax.random.key(0), 3)


def test_equal_networks_and_other_parameters_share_one_compiled_evaluation():
    traces = []

    class Counted(Probe):
        def step(self, key, state, action):
            traces.append(action)
            return super().step(key, state, action)

    environment = Counted(2, lambda sign, action, last: sign)
    for seed in range(3):
        network = ActorCritic(num_actions=2, hidden_sizes=(4,), activation="tanh")
        params = network.init(jax.random.key(seed), jnp.zeros(2))
        for policy in (greedy_policy, sampled_policy):
            evaluate(policy(network), params, environment, jax.random.key(seed), 2)
    assert len(traces) == 2  # one for each policy
    evaluate(greedy_policy(network), params, environment, jax.random.key(0), 3)
    assert len(traces) == 3  # another number of episodes is another program


class Unhashable:
    """A network that is equal to others, as a dataclass is."""

    __hash__ = None

    def __init__(self, weight):
        self.weight = weight

    def __eq__(self, other):
        return True

    def init(self, key, observation):
        return {}

    def apply(self, params, observation):
        logits = jnp.stack(
            [jnp.zeros(len(observation)), jnp.full(len(observation), self.weight)], -1
        )
        return Categorical(logits), jnp.zeros(len(observation))


def test_networks_that_cannot_be_hashed_are_told_apart_by_their_identity():
    first, second = Unhashable(1.0), Unhashable(-1.0)
    assert greedy_policy(first) is greedy_policy(first)
    observation, key = jnp.zeros((3, 1)), jax.random.key(0)
    actions = [greedy_policy(n).act({}, key, observation, ())[0][0] for n in (first, second)]
    assert actions == [1, 0]


@pytest.mark.parametrize(
    ("policy", "key", "message"),
    [
        (
            lambda *_: 0,
            None,
            "policy must be an a3c_jax.asynchrony.evaluation.Policy, got function",
        ),
        (constant(0), 3, r"key must be a PRNG key, got 3; give jax.random.key\(3\)"),
    ],
)
def test_what_is_no_policy_or_no_key_is_refused(policy, key, message):
    with pytest.raises(TypeError, match=message):
        evaluate(policy, {}, TwoLengths(None, None), key)


def test_a_number_of_episodes_must_be_positive():
    with pytest.raises(ValueError, match=r"num_episodes must be >= 1, got 0; use 100\."):
        evaluate(constant(0), None, make("CartPole-v1"), jax.random.key(0), 0)
