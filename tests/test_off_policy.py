"""The examples of algorithms of one's own, V-trace and PPO's loss: against rlax, and through the threads."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
from probes import Probe

import a3c_jax
from a3c_jax import A3CConfig
from a3c_jax.algorithms import find_algorithm
from a3c_jax.distributions import Categorical
from a3c_jax.losses import a3c_loss
from a3c_jax.rollout import Trajectory
from experiments.off_policy import off_policy_loss

T, N, A = 6, 3, 4
PROBE = Probe(3, lambda sign, action, last: sign * (2 * action - 1) + 0.25 * last)


def segment(seed=0, truncated=False, on_policy=False):
    """A segment, and the parameters of a policy and of values for each of its steps."""
    keys = iter(jax.random.split(jax.random.key(seed), 9))
    logits = jax.random.normal(next(keys), (T, N, A))
    action = jax.random.randint(next(keys), (T, N), 0, A)
    behaviour = logits if on_policy else logits + jax.random.normal(next(keys), (T, N, A))
    terminated = jax.random.bernoulli(next(keys), 0.2, (T, N))
    cut = jax.random.bernoulli(next(keys), 0.3, (T, N)) & truncated & ~terminated
    trajectory = Trajectory(
        observation_tm1=(),
        action_tm1=action,
        reward_t=jax.random.normal(next(keys), (T, N)),
        terminated_t=terminated,
        truncated_t=cut,
        observation_t=(),
        log_prob_tm1=Categorical(behaviour).log_prob(action),
    )
    v_tm1 = jax.random.normal(next(keys), (T, N))
    # Inside an episode the value of what followed is that of what is acted upon next.
    v_t = jnp.concatenate([v_tm1[1:], jax.random.normal(next(keys), (1, N))])
    v_t = jnp.where(cut, jax.random.normal(next(keys), (T, N)), v_t)
    return {"logits": logits, "v_tm1": v_tm1, "v_t": v_t}, trajectory


def apply_fn(params, trajectory):
    return Categorical(params["logits"]), params["v_tm1"], params["v_t"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("truncated", [False, True])
def test_the_gradients_are_those_of_rlax(seed, truncated):
    params, trajectory = segment(seed, truncated)

    def of_one_environment(params, trajectory):
        """The loss with the errors and advantages of rlax, which knows time limits as a lambda of zero."""
        log_prob = Categorical(params["logits"]).log_prob(trajectory.action_tm1)
        result = rlax.vtrace_td_error_and_advantage(
            params["v_tm1"],
            jax.lax.stop_gradient(params["v_t"]),
            trajectory.reward_t,
            0.9 * (1.0 - trajectory.terminated_t),
            jnp.exp(log_prob - trajectory.log_prob_tm1),
            1.0 - trajectory.truncated_t,
        )
        entropy = Categorical(params["logits"]).entropy()
        actor = -jnp.mean(log_prob * jax.lax.stop_gradient(result.pg_advantage))
        return actor + 0.25 * jnp.mean(result.errors**2) - 0.01 * jnp.mean(entropy)

    def expected(params):
        numbers = jax.tree.map(lambda x: x, trajectory)
        columns = numbers._replace(observation_tm1=0, observation_t=0, carry=0)
        axes = Trajectory(None, 1, 1, 1, 1, None, None, 1)
        return jnp.mean(jax.vmap(of_one_environment, (1, axes))(params, columns))

    ours = jax.grad(lambda p: off_policy_loss(p, apply_fn, trajectory, discount=0.9)[0])(params)
    # At a time limit rlax's actor takes the value of the next episode's start for that of the final observation.
    for name in ("v_tm1",) if truncated else ("v_tm1", "logits"):
        np.testing.assert_allclose(ours[name], jax.grad(expected)(params)[name], atol=1e-5)


@pytest.mark.slow
def test_the_actor_bootstraps_from_the_final_observation_at_a_time_limit():
    params, trajectory = segment(truncated=True)

    def actor_gradient(params):
        return jax.grad(lambda p: off_policy_loss(p, apply_fn, trajectory)[0])(params)["logits"]

    cut = trajectory.truncated_t[:-1]
    assert cut.any()
    # The observation after a time limit belongs to another episode: its value has no part in the step before.
    other = {**params, "v_tm1": params["v_tm1"].at[1:].add(jnp.where(cut, 5.0, 0.0))}
    before, after = actor_gradient(params)[:-1], actor_gradient(other)[:-1]
    first = cut[0]
    np.testing.assert_allclose(before[0][first], after[0][first], atol=1e-6)


@pytest.mark.slow
def test_on_policy_it_is_a3c_s_loss():
    params, trajectory = segment(on_policy=True, truncated=True)
    ours, theirs = (
        jax.grad(lambda p, loss=loss: loss(p, apply_fn, trajectory, discount=0.9)[0])(params)
        for loss in (off_policy_loss, a3c_loss)
    )
    chex.assert_trees_all_close(ours, theirs, atol=1e-6)


def test_the_clipped_loss_is_that_of_rlax():
    params, trajectory = segment(truncated=True)

    def advantage():
        """The gradient of V-trace's actor is the advantage times the ratio, where that is below one."""

        def loss(params):
            return off_policy_loss(params, apply_fn, trajectory, critic_cost=0.0, entropy_cost=0.0)[
                0
            ]

        log_prob = Categorical(params["logits"]).log_prob(trajectory.action_tm1)
        weight = jnp.minimum(1.0, jnp.exp(log_prob - trajectory.log_prob_tm1))
        chosen = jax.nn.one_hot(trajectory.action_tm1, A)
        slope = jnp.sum(jax.grad(loss)(params)["logits"] * chosen, -1)
        probability = jnp.exp(log_prob)
        return -slope * T * N / (1.0 - probability) / weight

    log_prob = Categorical(params["logits"]).log_prob(trajectory.action_tm1)
    ratio = jnp.exp(log_prob - trajectory.log_prob_tm1)
    flat = lambda x: x.reshape(-1)  # noqa: E731
    expected = rlax.clipped_surrogate_pg_loss(flat(ratio), flat(advantage()), 0.2)
    _, metrics = off_policy_loss(params, apply_fn, trajectory, clip=0.2)
    np.testing.assert_allclose(metrics["actor_loss"], expected, rtol=1e-4)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_steps_that_only_begin_an_episode_teach_nothing(clip):
    params, trajectory = segment(on_policy=True, truncated=True)
    # Such a step follows an episode's end, and earns nothing.
    begins = jnp.zeros((T, N), bool).at[2, 1].set(True).at[5, 0].set(True)
    trajectory = trajectory._replace(truncated_t=trajectory.truncated_t | begins, valid_tm1=~begins)
    ours, theirs = (
        jax.jit(jax.grad(lambda p, loss=loss: loss(p, apply_fn, trajectory, discount=0.9)[0]))(
            params
        )
        for loss in (functools.partial(off_policy_loss, clip=clip), a3c_loss)
    )
    chex.assert_trees_all_close(ours, theirs, atol=1e-6)
    assert not ours["v_tm1"][begins].any() and not ours["logits"][begins].any()


def test_what_a_loss_reports_at_the_newest_parameters_is_in_the_rows_and_in_a_replay():
    config = A3CConfig(
        algorithm="experiments.off_policy:ppo", num_workers=1, envs_per_worker=2, t_max=4, hidden_sizes=(8,),
        max_steps=40,
    )  # fmt: skip
    program, rows, seen = a3c_jax.build(config, environment=PROBE), [], []
    result = a3c_jax.train(program, on_progress=rows.append, updates_per_row=1)
    a3c_jax.replay(program, result.schedule, on_update=lambda *update: seen.append(update))
    loss = find_algorithm(config.algorithm)(config, PROBE, None).loss
    params = program.initial_params()
    for row, (_, snapshot, played, metrics) in zip(rows, seen, strict=True):
        expected, _ = loss(params, played.trajectory, played.own)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
        assert {"loss", "actor_loss", "critic_loss", "entropy", "gradient_norm"} == set(metrics)
        assert metrics.items() <= row.items()
        params = snapshot.params
    assert len(rows) == 5


@pytest.mark.slow
def test_a_simulation_has_what_a_loss_reports_at_the_newest_parameters():
    config = A3CConfig(
        algorithm="experiments.off_policy:ppo", num_workers=1, envs_per_worker=2, t_max=4, hidden_sizes=(8,),
    )  # fmt: skip
    schedule, seen = a3c_jax.fixed_delay(0, 5), []
    a3c_jax.replay(
        config, schedule, environment=PROBE, on_update=lambda *update: seen.append(update[-1])
    )
    simulated = a3c_jax.make_simulation(config, 0, environment=PROBE)(0, 2e-3, schedule).metrics
    assert set(simulated) == set(seen[0])
    for name, values in simulated.items():
        np.testing.assert_allclose(
            values, [metrics[name] for metrics in seen], rtol=1e-4, atol=1e-6
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vtrace", "ppo?clip=0.1"])
def test_it_runs_by_its_name_and_replays_bit_for_bit(name):
    config = A3CConfig(
        algorithm=f"experiments.off_policy:{name}", num_workers=3, envs_per_worker=2, t_max=4, hidden_sizes=(8,),
        max_steps=240,
    )  # fmt: skip
    program = a3c_jax.build(config, environment=PROBE)
    result = a3c_jax.train(program)
    again = a3c_jax.replay(program, result.schedule)
    chex.assert_trees_all_equal(again.params, result.params)
