"""The losses of Q-learning, Sarsa and n-step Q-learning, against rlax, NumPy and hand-worked cases."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
from jax.test_util import check_grads

from a3c_jax.value_losses import n_step_q_loss, q_learning_loss, sarsa_loss

T, N, A = 6, 3, 4


def arrays(seed=0, batch=(N,)):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "q_tm1": normal(T, *batch, A),
        "action_tm1": jnp.asarray(rng.integers(0, A, (T, *batch)), jnp.int32),
        "r_t": normal(T, *batch),
        "discount_t": jnp.asarray(0.9 * (rng.random((T, *batch)) > 0.3), jnp.float32),
        "q_t": normal(T, *batch, A),
    }


def next_actions(seed=0, batch=(N,)):
    actions = np.random.default_rng(seed + 1).integers(0, A, (T, *batch))
    return jnp.asarray(actions, jnp.int32), jnp.asarray(np.eye(A)[actions], jnp.float32)


def half_mean_square(td_errors):
    return 0.5 * np.mean(np.square(np.asarray(td_errors, np.float64)))


def each(function):
    """rlax's functions are for one transition: over time and environments."""
    return jax.vmap(jax.vmap(function))


@pytest.mark.parametrize("seed", range(3))
def test_one_step_q_learning_is_that_of_rlax(seed):
    x = arrays(seed)
    expected = half_mean_square(each(rlax.q_learning)(*x.values()))
    np.testing.assert_allclose(q_learning_loss(**x), expected, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_sarsa_with_the_action_taken_is_that_of_rlax(seed):
    x, (actions, one_hot) = arrays(seed), next_actions(seed)
    expected = half_mean_square(each(rlax.sarsa)(*x.values(), actions))
    np.testing.assert_allclose(sarsa_loss(**x, probabilities_t=one_hot), expected, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_sarsa_with_probabilities_is_expected_sarsa_of_rlax(seed):
    x = arrays(seed)
    probabilities = jax.nn.softmax(arrays(seed + 9)["q_t"])
    expected = half_mean_square(each(rlax.expected_sarsa)(*x.values(), probabilities))
    np.testing.assert_allclose(sarsa_loss(**x, probabilities_t=probabilities), expected, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_n_step_q_learning_is_the_forward_sum(seed):
    x = {name: np.asarray(array, np.float64) for name, array in arrays(seed).items()}
    cut = np.random.default_rng(seed + 5).random((T, N)) > 0.7  # time limits
    errors = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            target, weight = 0.0, 1.0
            for k in range(t, T):
                target += weight * x["r_t"][k, n]
                weight *= x["discount_t"][k, n]
                if cut[k, n] or k == T - 1:
                    target += weight * x["q_t"][k, n].max()
                    break
            errors[t, n] = target - x["q_tm1"][t, n, int(x["action_tm1"][t, n])]
    loss = n_step_q_loss(**arrays(seed), lambda_t=jnp.asarray(1.0 - cut, jnp.float32))
    np.testing.assert_allclose(loss, half_mean_square(errors), rtol=1e-5)


def test_a_hand_worked_case():
    x = {
        "q_tm1": jnp.array([[1.0, 5.0], [2.0, 3.0]]),
        "action_tm1": jnp.array([0, 1]),
        "r_t": jnp.array([1.0, 2.0]),
        "discount_t": jnp.array([0.5, 0.5]),
        "q_t": jnp.array([[4.0, 6.0], [8.0, 0.0]]),
    }
    # Targets 1 + 0.5 * 6 = 4 and 2 + 0.5 * 8 = 6; errors 4 - 1 = 3 and 6 - 3 = 3; half the mean of 9 and 9.
    assert q_learning_loss(**x) == 4.5
    # The next action was the second one, then the first: targets 1 + 0.5 * 6 and 2 + 0.5 * 8.
    assert sarsa_loss(**x, probabilities_t=jnp.array([[0.0, 1.0], [1.0, 0.0]])) == 4.5
    # The first one, then the second: 1 + 0.5 * 4 = 3 and 2 + 0 = 2; errors 2 and -1; half the mean of 4 and 1.
    assert sarsa_loss(**x, probabilities_t=jnp.array([[1.0, 0.0], [0.0, 1.0]])) == 1.25
    # n steps: 2 + 0.5 * 8 = 6, and before it 1 + 0.5 * 6 = 4.
    assert n_step_q_loss(**x) == 4.5
    # A time limit after the first step: it bootstraps from 6 at once, which here is the same.
    assert n_step_q_loss(**x, lambda_t=jnp.array([0.0, 1.0])) == 4.5
    # The best action there is worth 10 instead: one step sees 1 + 0.5 * 10 = 6, n steps still 4. Errors 5 and 3, or 3 and 3.
    x["q_t"] = x["q_t"].at[0, 1].set(10.0)
    assert q_learning_loss(**x) == n_step_q_loss(**x, lambda_t=jnp.array([0.0, 1.0])) == 8.5
    assert n_step_q_loss(**x) == n_step_q_loss(**x, lambda_t=1.0) == 4.5
    # A termination after the first step: the target is the reward alone, and its error 0.
    terminated = x | {"discount_t": jnp.array([0.0, 0.5])}
    assert q_learning_loss(**terminated) == n_step_q_loss(**terminated) == 2.25


def test_one_step_is_one_step_whatever_follows():
    x = arrays()
    for loss in (q_learning_loss, n_step_q_loss):
        last = {name: array[-1:] for name, array in x.items()}
        np.testing.assert_allclose(loss(**last), q_learning_loss(**last))
    later = x | {"r_t": x["r_t"].at[-1].add(100.0)}
    first = jax.grad(lambda q, x: q_learning_loss(q, *list(x.values())[1:]))
    before, after = first(x["q_tm1"], x)[:-1], first(later["q_tm1"], later)[:-1]
    chex.assert_trees_all_equal(before, after)


@pytest.mark.parametrize("loss", [q_learning_loss, n_step_q_loss])
def test_the_gradient_is_minus_the_error_of_the_action_taken_and_none_reaches_the_target(loss):
    x = arrays()
    rest = [x[name] for name in ("action_tm1", "r_t", "discount_t")]
    q_gradient, target_gradient = jax.grad(lambda q, q_t: loss(q, *rest, q_t), (0, 1))(
        x["q_tm1"], x["q_t"]
    )
    assert not target_gradient.any()
    chosen = np.eye(A)[np.asarray(x["action_tm1"])].astype(bool)
    assert not q_gradient[~chosen].any()
    assert q_gradient[chosen].all()
    check_grads(
        lambda q: loss(q, *rest, x["q_t"]), (x["q_tm1"],), order=1, modes=["rev"], rtol=1e-2
    )


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_any_batch_dimensions_with_and_without_jit(batch):
    x, (_, one_hot) = arrays(batch=batch), next_actions(batch=batch)
    for loss, extra in ((q_learning_loss, {}), (sarsa_loss, {"probabilities_t": one_hot}),
                        (n_step_q_loss, {})):  # fmt: skip
        np.testing.assert_allclose(jax.jit(loss)(**x, **extra), loss(**x, **extra), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_t": jnp.zeros((T, N, A + 1))}, r"q_tm1 and q_t.* of one shape .* q_t: \(6, 3, 5\)"),
        ({"q_t": jnp.zeros((T, N, A), int)}, r"q_tm1 and q_t.* of one dtype, got .* q_t: .* int32"),
        ({"q_tm1": jnp.zeros((T, N, A), jnp.float16)}, r"got q_tm1: .* float16, q_t: .* float32"),
        ({"action_tm1": jnp.zeros((T, N))}, "input 0 has type float32"),
        ({"action_tm1": jnp.zeros((T, N, 1), int)}, r"input 0 has shape \(6, 3, 1\) but expected"),
        ({"r_t": jnp.zeros((T, 1))}, r"r_t and discount_t and q_t.max\(-1\) .* one shape .* r_t: \(6, 1\)"),
        ({"discount_t": jnp.zeros((T, N), int)}, r"one dtype, got .* discount_t: \(6, 3\) int32"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(change, message):
    x = arrays() | change
    for loss, extra in ((q_learning_loss, {}), (n_step_q_loss, {}),
                        (sarsa_loss, {"probabilities_t": jnp.ones_like(x["q_t"])})):  # fmt: skip
        with pytest.raises(AssertionError, match=message):
            loss(**x, **extra)


@pytest.mark.parametrize("action", [-1, A, A + 3])
def test_an_action_that_does_not_exist_makes_the_loss_nan(action):
    x = arrays()
    x["action_tm1"] = x["action_tm1"].at[2, 1].set(action)
    assert jnp.isnan(q_learning_loss(**x)) and jnp.isnan(n_step_q_loss(**x))
    assert jnp.isnan(sarsa_loss(**x, probabilities_t=next_actions()[1]))
    valid = jnp.ones((T, N), bool).at[2, 1].set(False)
    assert jnp.isfinite(q_learning_loss(**x, valid_tm1=valid))


def test_a_sarsa_target_needs_a_probability_for_each_action():
    with pytest.raises(AssertionError):
        sarsa_loss(**arrays(), probabilities_t=jnp.zeros((T, N)))
