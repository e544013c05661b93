"""The paper's other three methods: their policy, their targets, their exploration, and that they learn."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
import scipy.stats
from probes import Probe
from small_runs import Walk

import a3c_jax
from a3c_jax import A3CConfig, CheckpointFolder, find_checkpoint, fixed_delay, round_robin
from a3c_jax.action_values import ActionValues, EpsilonGreedy
from a3c_jax.algorithm import SHARED, add_shared
from a3c_jax.algorithms import find_algorithm
from a3c_jax.asynchrony.evaluation import evaluate, greedy_policy
from a3c_jax.q_learning import EPSILON_PROBABILITIES, FINAL_EPSILONS, one_step_q
from a3c_jax.rollout import Trajectory
from experiments.q_learning import PRESETS

METHODS = ["one_step_q", "one_step_sarsa", "n_step_q"]
TINY = {"num_workers": 3, "envs_per_worker": 2, "t_max": 4, "hidden_sizes": (8,), "max_steps": 240}
PROBE = Probe(3, lambda sign, action, last: sign * (2 * action - 1) + 0.25 * last)


def config(method="n_step_q", arguments="target_interval=24&exploration_steps=200", **changes):
    return A3CConfig(algorithm=f"{method}?{arguments}", **TINY | changes)


# Epsilon-greedy


def test_the_best_action_has_what_exploration_leaves():
    # Three actions and epsilon 0.3: each gets 0.1 by exploration, and the best one 0.7 more.
    policy = EpsilonGreedy(jnp.array([[1.0, 5.0, 2.0], [3.0, 0.0, 3.0]]), jnp.array([0.3, 0.0]))
    np.testing.assert_allclose(policy.probabilities(), [[0.1, 0.8, 0.1], [1, 0, 0]], rtol=1e-6)
    assert policy.mode().tolist() == [1, 0]
    np.testing.assert_allclose(policy.log_prob(jnp.array([1, 0])), np.log([0.8, 1.0]), atol=1e-6)
    expected = [scipy.stats.entropy([0.1, 0.8, 0.1]), 0.0]
    np.testing.assert_allclose(policy.entropy(), expected, rtol=1e-5, atol=1e-6)
    assert jnp.isnan(policy.log_prob(jnp.array([3, -1]))).all()
    np.testing.assert_allclose(EpsilonGreedy(jnp.zeros(2), 0.5).log_prob(1), np.log(0.25))


def test_actions_are_drawn_with_their_probabilities():
    policy = EpsilonGreedy(jnp.array([0.0, 2.0, 1.0, -1.0]), 0.4)
    keys = jax.random.split(jax.random.key(0), 20_000)
    counts = np.bincount(jax.vmap(policy.sample)(keys), minlength=4)
    expected = 20_000 * np.array([0.1, 0.7, 0.1, 0.1])
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3


def test_it_is_the_same_under_jit_and_vmap():
    values, epsilon = jax.random.normal(jax.random.key(1), (5, 3)), jnp.linspace(0, 1, 5)
    probabilities = lambda values, epsilon: EpsilonGreedy(values, epsilon).probabilities()  # noqa: E731
    expected = probabilities(values, epsilon)
    chex.assert_trees_all_close(jax.jit(probabilities)(values, epsilon), expected)
    chex.assert_trees_all_close(jax.vmap(probabilities)(values, epsilon), expected)


@pytest.mark.parametrize("action", [jnp.zeros(2, jnp.int32), jnp.zeros(3)])
def test_an_action_of_another_shape_or_dtype_is_refused(action):
    with pytest.raises(AssertionError):
        EpsilonGreedy(jnp.zeros((3, 2)), 0.1).log_prob(action)


# The losses, on a segment by hand, against rlax


class Table:
    """The value of action a at observation x is `weight[a] * x`."""

    def init(self, key, observation):
        return {"weight": jnp.array([1.0, -1.0])}

    def apply(self, params, observation):
        values = params["weight"] * observation[..., :1]
        return EpsilonGreedy(values, 0.05), values.max(-1)


T, N = 4, 2
TRAJECTORY = Trajectory(
    observation_tm1=jax.random.normal(jax.random.key(1), (T, N, 1)),
    action_tm1=jnp.array([[0, 1], [1, 1], [0, 0], [1, 0]], jnp.int32),
    reward_t=jax.random.normal(jax.random.key(2), (T, N)),
    terminated_t=jnp.array([[0, 0], [1, 0], [0, 0], [0, 0]], bool),
    truncated_t=jnp.array([[0, 0], [0, 0], [0, 1], [0, 0]], bool),
    observation_t=jax.random.normal(jax.random.key(3), (T, N, 1)),
)
EPSILON = 0.2


def loss_of(method, target_weight):
    """A method's loss of the segment, with a target network of its own."""
    algorithm = find_algorithm(f"{method}?final_epsilons=({EPSILON},)&epsilon_probabilities=(1,)")(
        A3CConfig(envs_per_worker=N, t_max=T, discount=0.9), PROBE, Table()
    )
    params = add_shared(algorithm, Table().init(None, None))
    params[SHARED]["target"] = {"weight": jnp.array(target_weight)}
    params[SHARED]["num_updates"] = jnp.int32(10**6)  # exploration has ended
    own = algorithm.init_own(jax.random.key(0), 0)
    return algorithm.loss(params, TRAJECTORY, own)


WEIGHT, TARGET = np.array([1.0, -1.0]), np.array([-0.5, 2.0])
Q_TM1 = WEIGHT * np.asarray(TRAJECTORY.observation_tm1)
Q_T = TARGET * np.asarray(TRAJECTORY.observation_t)
ONLINE_Q_T = WEIGHT * np.asarray(TRAJECTORY.observation_t)
DISCOUNT_T = 0.9 * (1.0 - np.asarray(TRAJECTORY.terminated_t))


def mean_of_squares(td_error):
    """`td_error(t, n)` over the whole segment, as the losses have it."""
    errors = [td_error(t, n) for t in range(T) for n in range(N)]
    return 0.5 * np.mean(np.square(errors))


def test_one_step_q_learning_bootstraps_from_the_best_value_of_the_target_network():
    def td_error(t, n):
        x = TRAJECTORY.action_tm1[t, n], TRAJECTORY.reward_t[t, n], DISCOUNT_T[t, n], Q_T[t, n]
        return rlax.q_learning(jnp.array(Q_TM1[t, n]), *x)

    loss, metrics = loss_of("one_step_q", TARGET)
    np.testing.assert_allclose(loss, mean_of_squares(td_error), rtol=1e-5)
    assert metrics["epsilon"] == pytest.approx(EPSILON)
    assert metrics["mean_value"] == pytest.approx(Q_TM1.max(-1).mean(), rel=1e-5)


def test_sarsa_bootstraps_from_the_next_action_and_where_it_is_unknown_from_the_policy():
    def td_error(t, n):
        x = TRAJECTORY.action_tm1[t, n], TRAJECTORY.reward_t[t, n], DISCOUNT_T[t, n], Q_T[t, n]
        if t + 1 < T and not TRAJECTORY.truncated_t[t, n]:
            return rlax.sarsa(jnp.array(Q_TM1[t, n]), *x, TRAJECTORY.action_tm1[t + 1, n])
        # The policy follows the parameters, not the target network.
        probabilities = np.full(2, EPSILON / 2)
        probabilities[ONLINE_Q_T[t, n].argmax()] += 1 - EPSILON
        return rlax.expected_sarsa(jnp.array(Q_TM1[t, n]), *x, jnp.array(probabilities))

    loss, _ = loss_of("one_step_sarsa", TARGET)
    np.testing.assert_allclose(loss, mean_of_squares(td_error), rtol=1e-5)


def test_n_step_q_learning_sums_rewards_up_to_the_segment_s_end_or_a_time_limit():
    returns, g = np.zeros((T, N)), Q_T[-1].max(-1)
    for t in reversed(range(T)):
        g = np.where(TRAJECTORY.truncated_t[t], Q_T[t].max(-1), g)
        g = TRAJECTORY.reward_t[t] + DISCOUNT_T[t] * g
        returns[t] = g
    chosen = np.take_along_axis(Q_TM1, np.asarray(TRAJECTORY.action_tm1)[..., None], -1)[..., 0]
    loss, _ = loss_of("n_step_q", TARGET)
    np.testing.assert_allclose(loss, 0.5 * np.mean((returns - chosen) ** 2), rtol=1e-5)


# The target network and exploration


@pytest.fixture(scope="module")
def program():
    return a3c_jax.build(config(), environment=PROBE)


def test_the_target_network_is_a_copy_that_is_renewed_now_and_then(program):
    weights = [program.initial_params()["params"]]
    targets = []

    def note(k, snapshot, gradients, metrics):
        weights.append(snapshot.params["params"])
        targets.append(snapshot.params[SHARED]["target"]["params"])

    a3c_jax.replay(program, round_robin(3, num_updates=8), on_update=note)
    for k, target in enumerate(targets):  # 24 steps are three updates
        chex.assert_trees_all_equal(target, weights[3 * ((k + 1) // 3)])


def test_epsilon_falls_from_one_to_a_value_of_each_environment_s_own(program):
    epsilons = []
    note = lambda *update: epsilons.append(update[-1]["epsilon"])  # noqa: E731
    alone = program.replace(num_workers=1)
    a3c_jax.replay(alone, fixed_delay(0, num_updates=30), on_update=note)
    final = epsilons[-1]
    # 8 steps an update, 200 steps: the 26th update is the first that played with the final values.
    expected = 1 + np.minimum(1, 8 * np.arange(30) / 200) * (final - 1)
    np.testing.assert_allclose(epsilons, expected, rtol=1e-5)
    assert final < 0.51


def test_the_final_values_have_the_paper_s_distribution():
    algorithm = find_algorithm("n_step_q")(A3CConfig(envs_per_worker=4000), PROBE, None)
    drawn = np.asarray(algorithm.init_own(jax.random.key(0), 0))
    shares = [np.mean(drawn == np.float32(epsilon)) for epsilon in FINAL_EPSILONS]
    np.testing.assert_allclose(shares, EPSILON_PROBABILITIES, atol=0.03)
    assert not np.array_equal(drawn, algorithm.init_own(jax.random.key(1), 0))


# Runs


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_it_replays_goes_on_and_is_simulated_like_a3c(method, tmp_path):
    program = a3c_jax.build(config(method), environment=PROBE)
    result = a3c_jax.train(program)
    again = a3c_jax.replay(program, result.schedule)
    chex.assert_trees_all_equal(again.params, result.params)
    chex.assert_trees_all_equal(again.opt_state, result.opt_state)
    np.testing.assert_array_equal(again.episodes.episode_return, result.episodes.episode_return)

    alone = program.replace(num_workers=1)
    whole = a3c_jax.train(alone)
    a3c_jax.train(alone.replace(max_steps=80), checkpoints=CheckpointFolder(tmp_path))
    resumed = a3c_jax.train(alone, resume=find_checkpoint(tmp_path))
    chex.assert_trees_all_equal(resumed.params, whole.params)

    simulate = a3c_jax.make_simulation(program.config, 30, environment=PROBE)
    simulated = simulate(0, 2e-3, result.schedule)
    chex.assert_trees_all_close(simulated.params, result.params, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_known_values_of_a_probe_are_learnt_in_threads(method):
    # The best action earns 1 in each of three steps and 0.25 more in the last one.
    settings = config(
        method, "target_interval=64&exploration_steps=2000", num_workers=2, envs_per_worker=8, t_max=8,
        hidden_sizes=(32,), discount=0.9, learning_rate=1e-2, learning_rate_schedule="linear",
        max_steps=40_000,
    )  # fmt: skip
    result = a3c_jax.train(settings, environment=PROBE)
    greedy = evaluate(greedy_policy(result.network), result.params, PROBE, jax.random.key(0), 50)
    np.testing.assert_allclose(greedy.returns, 3.25, rtol=1e-6)
    if method == "one_step_q":  # the others learn values of the policy that explores
        observation = jnp.array([[sign, left] for sign in (-1.0, 1.0) for left in (1.0, 2.0, 3.0)])
        _, value = result.network.apply(result.params, observation)
        last, middle = 1.25, 1 + 0.9 * 1.25
        expected = [last, middle, 1 + 0.9 * middle] * 2
        np.testing.assert_allclose(value, expected, atol=0.15)


@pytest.mark.slow
def test_a_recurrent_network_and_running_moments_work_as_with_a3c():
    settings = config("one_step_sarsa", core="lstm", core_size=4, normalize_observations=True)
    program = a3c_jax.build(settings, environment=PROBE)
    result = a3c_jax.train(program)
    again = a3c_jax.replay(program, result.schedule)
    chex.assert_trees_all_equal(again.params, result.params)
    assert set(result.params[SHARED]["target"]) == {"params"}, "moments are no part of the target"


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_cartpole_is_solved(preset):
    settings = dataclasses.replace(PRESETS[preset], num_workers=2)
    program = a3c_jax.build(settings)
    solved = []
    for seed in (11, 12, 13):
        result = a3c_jax.train(program.replace(seed=seed))
        policy = greedy_policy(result.network)
        returns = evaluate(policy, result.params, result.environment, result.evaluation_key).returns
        solved.append(returns.mean() >= 475)
    assert sum(solved) >= 2


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("target_interval=0", "target_interval must be a finite number > 0, got 0"),
        ("exploration_steps=-1", "exploration_steps must be a finite number > 0, got -1"),
        ("target_interval='x'", "target_interval must be a finite number > 0, got 'x'; use 10_000"),
        ("final_epsilons=(2,)", r"final_epsilons must be .* lie in \[0, 1\], got \(2,\)"),
        ("final_epsilons=0.1", "final_epsilons must be a tuple of numbers .*, got 0.1; use"),
        (
            "final_epsilons=('a',0.1,0.1)",
            r"final_epsilons must be a tuple of numbers .*, got \('a'",
        ),
        (
            "epsilon_probabilities=(1.5,-0.5,0)",
            r"epsilon_probabilities must .* lie in \[0, 1\], got",
        ),
        ("epsilon_probabilities=(0.5,0.5)", "a probability for each of final_epsilons"),
        ("epsilon_probabilities=(0.5,0.4,0.3)", "sum to 1"),
    ],
)
def test_an_argument_outside_its_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        a3c_jax.build(config(arguments=arguments))


def test_a_probability_that_is_no_number_is_refused():
    method = functools.partial(
        one_step_q, final_epsilons=(0.1, 0.2), epsilon_probabilities=(1.0, np.nan)
    )
    with pytest.raises(ValueError, match=r"epsilon_probabilities must .*, got \(1.0, nan\); use"):
        a3c_jax.build(A3CConfig(**TINY), algorithm=method)


def test_continuous_actions_are_refused():
    with pytest.raises(
        ValueError, match="need one discrete action, but 'Pendulum-v1' has continuous actions; use"
    ):
        a3c_jax.build(A3CConfig(environment="Pendulum-v1", algorithm="one_step_q"))


def test_the_number_of_actions_may_be_one_of_numpy():
    walk = Walk()
    walk.num_actions = np.int64(2)
    network = one_step_q(A3CConfig(), walk).network
    (distribution, _), _ = jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.zeros(3))
    assert distribution.values.shape == (2,)


@pytest.mark.parametrize("field", ["critic_cost", "entropy_cost", "gae_lambda"])
def test_an_option_of_a3c_s_loss_is_refused(field):
    with pytest.raises(ValueError, match=f"A3CConfig.{field} belongs to"):
        a3c_jax.build(config(**{field: 0.125}))


def test_a_network_without_values_is_refused():
    network = a3c_jax.ActorCritic(2)
    with pytest.raises(TypeError, match="distribution must have values.*ActionValues"):
        a3c_jax.build(A3CConfig(algorithm="one_step_q"), network=network)


def test_a_network_for_another_number_of_actions_is_refused():
    with pytest.raises(ValueError, match="2 actions of environment"):
        a3c_jax.build(A3CConfig(algorithm="one_step_q"), network=ActionValues(5))


def test_its_value_is_that_of_the_best_action():
    network = ActionValues(3)
    observation = jax.random.normal(jax.random.key(0), (7, 4))
    params = network.init(jax.random.key(1), observation)
    distribution, value = network.apply(params, observation)
    np.testing.assert_array_equal(value, distribution.values.max(-1))
    act = functools.partial(network.apply, params, observation)
    np.testing.assert_array_equal(act((), method="act")[0].values, distribution.values)
