"""The losses of the paper's other three methods: one-step Q-learning, one-step Sarsa, n-step Q-learning.

They learn the value of every action instead of a policy and a state value. The notation and the three rules are
those of `a3c_jax.losses`: arrays are time-major, `_tm1` is before a transition and `_t` after it, `q_t` belongs
to the observation that *followed* the action before any reset, and a loss is a mean.

The values `q_t` that targets are bootstrapped from are a constant to the gradient. In the paper they are those of
a target network, a copy of the parameters that is renewed only now and then.
"""

import jax
import jax.numpy as jnp

from a3c_jax.array_checks import as_floats
from a3c_jax.distributions import at_action
from a3c_jax.losses import critic_loss, n_step_returns

Array = jax.Array


def q_learning_loss(
    q_tm1: Array,
    action_tm1: Array,
    r_t: Array,
    discount_t: Array,
    q_t: Array,
    valid_tm1: Array | None = None,
) -> Array:
    r"""Half the mean squared error of one-step Q-learning.

    .. math::
      L = \frac{1}{N} \sum \tfrac{1}{2} \left( r_t + \gamma_t \max_a q_t(a) - q_{t-1}(a_{t-1}) \right)^2

    >>> q_learning_loss(jnp.array([[1., 9.]]), jnp.array([0]), jnp.array([1.]), jnp.array([.5]),
    ...                 jnp.array([[2., 4.]]))
    Array(2., dtype=float32)

    Args:
      q_tm1: values of all actions at the observations acted upon, `[T, ..., A]`, float.
      action_tm1: the actions taken, `[T, ...]`, int. One that does not exist makes the loss NaN.
      r_t: rewards, `[T, ...]`, float.
      discount_t: `discount * (1 - terminated_t)`, `[T, ...]`, float.
      q_t: values of all actions at the observations that followed, `[T, ..., A]`, float.
      valid_tm1: which steps the mean is over, `[T, ...]` bool; None for all. What stands at others has no effect.

    Returns:
      The mean loss, a scalar.

    Raises:
      AssertionError: if shapes differ, or an array is not of floats, or the actions are not of integers.

    Source: Mnih et al. 2016, arXiv:1602.01783, Algorithm 1.
    """
    # With lambda zero the return looks one step ahead.
    return n_step_q_loss(q_tm1, action_tm1, r_t, discount_t, q_t, 0.0, valid_tm1)


def sarsa_loss(
    q_tm1: Array,
    action_tm1: Array,
    r_t: Array,
    discount_t: Array,
    q_t: Array,
    probabilities_t: Array,
    valid_tm1: Array | None = None,
) -> Array:
    r"""Half the mean squared error of one-step Sarsa.

    .. math::
      L = \frac{1}{N} \sum \tfrac{1}{2} \left( r_t + \gamma_t \sum_a p_t(a) \, q_t(a) - q_{t-1}(a_{t-1}) \right)^2

    Sarsa bootstraps from the action that was taken next: give its one-hot vector as `p_t`. If the next action
    is not known, because the segment or the episode was cut there, give the probabilities with which it would
    be chosen: the target then has the same expectation.

    >>> sarsa_loss(jnp.array([[1., 9.]]), jnp.array([0]), jnp.array([1.]), jnp.array([.5]),
    ...            jnp.array([[2., 4.]]), jnp.array([[1., 0.]]))
    Array(0.5, dtype=float32)

    Args:
      q_tm1: values of all actions at the observations acted upon, `[T, ..., A]`, float.
      action_tm1: the actions taken, `[T, ...]`, int. One that does not exist makes the loss NaN.
      r_t: rewards, `[T, ...]`, float.
      discount_t: `discount * (1 - terminated_t)`, `[T, ...]`, float.
      q_t: values of all actions at the observations that followed, `[T, ..., A]`, float.
      probabilities_t: the next action, one-hot, or the probabilities of all, `[T, ..., A]`, float.
      valid_tm1: which steps the mean is over, `[T, ...]` bool; None for all. What stands at others has no effect.

    Returns:
      The mean loss, a scalar.

    Raises:
      AssertionError: if shapes differ, or an array is not of floats, or the actions are not of integers.

    Source: Mnih et al. 2016, arXiv:1602.01783, section 4: Algorithm 1 with another target; the expectation is that of
    expected Sarsa, section 6.6 of Sutton & Barto 2018.
    """
    q_tm1, q_t, probabilities_t = as_floats(q_tm1=q_tm1, q_t=q_t, probabilities_t=probabilities_t)
    v_t = jnp.sum(probabilities_t * q_t, axis=-1)
    return _squared_error(q_tm1, action_tm1, r_t, discount_t, v_t, 0.0, valid_tm1)


def n_step_q_loss(
    q_tm1: Array,
    action_tm1: Array,
    r_t: Array,
    discount_t: Array,
    q_t: Array,
    lambda_t: Array | float = 1.0,
    valid_tm1: Array | None = None,
) -> Array:
    r"""Half the mean squared error of n-step Q-learning, in the forward view.

    .. math::
      L = \frac{1}{N} \sum \tfrac{1}{2} \left( G_{t-1} - q_{t-1}(a_{t-1}) \right)^2

    with the returns `G` of `a3c_jax.losses.n_step_returns`, bootstrapped from the value of the best action.
    The last step of a segment looks one step ahead, and its first step T steps.

    >>> n_step_q_loss(jnp.array([[1., 9.]]), jnp.array([0]), jnp.array([1.]), jnp.array([.5]),
    ...               jnp.array([[2., 4.]]))
    Array(2., dtype=float32)

    Args:
      q_tm1: values of all actions at the observations acted upon, `[T, ..., A]`, float.
      action_tm1: the actions taken, `[T, ...]`, int. One that does not exist makes the loss NaN.
      r_t: rewards, `[T, ...]`, float.
      discount_t: `discount * (1 - terminated_t)`, `[T, ...]`, float.
      q_t: values of all actions at the observations that followed, `[T, ..., A]`, float.
      lambda_t: `1 - truncated_t`, `[T, ...]` or a scalar.
      valid_tm1: which steps the mean is over, `[T, ...]` bool; None for all. What stands at others has no effect.

    Returns:
      The mean loss, a scalar.

    Raises:
      AssertionError: if shapes differ, or an array is not of floats, or the actions are not of integers.

    Source: Mnih et al. 2016, arXiv:1602.01783, Algorithm S2.
    """
    q_tm1, q_t = as_floats(q_tm1=q_tm1, q_t=q_t)
    return _squared_error(q_tm1, action_tm1, r_t, discount_t, q_t.max(-1), lambda_t, valid_tm1)


def _squared_error(
    q_tm1: Array,
    action_tm1: Array,
    r_t: Array,
    discount_t: Array,
    v_t: Array,
    lambda_t: Array | float,
    valid_tm1: Array | None,
) -> Array:
    """Half the mean squared error of the actions' values against returns that are bootstrapped from `v_t`."""
    r_t, discount_t, v_t = as_floats(r_t=r_t, discount_t=discount_t, **{"q_t.max(-1)": v_t})
    target_tm1 = n_step_returns(r_t, discount_t, v_t, lambda_t)
    return critic_loss(at_action(q_tm1, action_tm1), target_tm1, valid_tm1)
