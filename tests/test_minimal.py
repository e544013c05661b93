"""`experiments/minimal.py`: it is one page, it treats the ends of episodes right, and it learns with real threads."""

import ast
import inspect
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import minimal


def test_it_is_one_page_and_imports_nothing_else_of_the_package():
    source = inspect.getsource(minimal)
    assert len(source.splitlines()) <= 100
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{name.name}" for name in node.names}
    assert "a3c_jax.losses" in imported
    others = {name for name in imported if name != "a3c_jax.losses"}
    allowed = {"jax", "flax", "optax", "gymnax", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in others} <= allowed


def state_of(time, theta=0.0, theta_dot=0.0):
    """An environment's state, as `unroll` takes it, with the pole at an angle and an episode of so many steps."""
    key = jax.random.key(0)
    observation, env_state = minimal.env.reset(key)
    env_state = env_state.replace(
        time=jnp.asarray(time, env_state.time.dtype),
        theta=jnp.asarray(theta),
        theta_dot=jnp.asarray(theta_dot),
    )
    return key, observation, env_state, jnp.float32(time)


def params_of_zeros():
    observation, _ = minimal.env.reset(jax.random.key(0))
    params = {
        "actor": minimal.actor.init(jax.random.key(1), observation),
        "critic": minimal.critic.init(jax.random.key(2), observation),
    }
    return jax.tree.map(jnp.zeros_like, params)


def test_a_time_limit_is_bootstrapped_and_a_fall_is_not():
    params = params_of_zeros()
    _, seen = minimal.unroll(params, state_of(time=499))  # the limit of CartPole-v1 is 500
    assert seen["ended"][0] and seen["episode_return"][0] == 500
    assert (seen["discount_t"][0], seen["lambda_t"][0]) == (np.float32(0.99), 0)
    # What the next step starts from is the first observation of a new episode, not what the action led to.
    assert not np.array_equal(seen["obs_t"][0], seen["obs_tm1"][1])
    np.testing.assert_array_equal(seen["obs_t"][1], seen["obs_tm1"][2])
    assert seen["episode_return"][1] == 1

    _, seen = minimal.unroll(
        params, state_of(time=10, theta=0.2, theta_dot=5.0)
    )  # it falls: the limit is 0.21
    assert seen["ended"][0] and seen["episode_return"][0] == 11
    assert (seen["discount_t"][0], seen["lambda_t"][0]) == (0, 1)
    assert seen["obs_t"][0][2] > 0.21


def test_the_loss_is_the_sum_of_its_parts():
    # Zero parameters: all values are 0 and both actions equally likely, whatever is observed.
    seen = {
        "obs_tm1": jnp.ones((2, 1, 4)), "obs_t": jnp.ones((2, 1, 4)),
        "action_tm1": jnp.array([[0], [1]]), "r_t": jnp.array([[1.0], [2.0]]),
        "discount_t": jnp.array([[0.5], [0.5]]), "lambda_t": jnp.array([[1.0], [1.0]]),
    }  # fmt: skip
    # Returns 1 + 0.5 * 2 = 2 and 2; actor log(2) * 2, critic 0.5 * 0.5 * 4, entropy -0.01 * log(2).
    expected = np.log(2) * 2 + 1.0 - 0.01 * np.log(2)
    np.testing.assert_allclose(minimal.loss(params_of_zeros(), seen), expected, rtol=1e-6)


def test_its_threads_learn():
    mean_return, steps = minimal.train(seed=3, solved=100.0)
    assert mean_return >= 100.0  # a random policy has 22
    assert steps < 300_000 and steps % (8 * 16) == 0


def test_its_threads_stop_at_the_budget():
    _, steps = minimal.train(seed=0, solved=1e9, max_updates=10)
    assert steps == 10 * 8 * 16


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_it_solves_cartpole(seed):
    mean_return, steps = minimal.train(seed)
    assert mean_return >= 475.0
    assert steps < 2_000_000
