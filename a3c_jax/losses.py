"""The losses of advantage actor-critic: pure functions on arrays.

Notation, after rlax: `_tm1` marks what belongs to the moment *before* a transition (the observation, the action taken
there, its value), `_t` what belongs to the moment *after* it (the reward, the discount, the value of the observation
that followed). Arrays are time-major: `[T, ...]`, with any trailing batch dimensions.

Three rules hold throughout.

* `v_t` is the value of the observation that *followed* the action, before any reset. Where an episode terminated it is
  multiplied by a discount of zero, and may be anything finite.
* A termination and a time limit differ. `discount_t = discount * (1 - terminated_t)` makes the future worth nothing;
  `lambda_t = 1 - truncated_t` cuts the return there and bootstraps from `v_t` instead. If both happen at once, the
  discount is zero, so that the termination wins.
* Losses are means over every step. The paper accumulates a sum over the t_max steps of one environment instead, whose
  gradient is T times that of the mean, so that a paper's learning rate for plain SGD is T times smaller than ours. Adam
  and RMSProp divide the scale out again, except for their epsilon, and unless gradients are clipped before.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from a3c_jax.array_checks import as_floats, as_valid_floats, check_mask, check_scalars

Array = jax.Array
Metrics: TypeAlias = dict[str, Array]


def n_step_returns(
    r_t: Array, discount_t: Array, v_t: Array, lambda_t: Array | float = 1.0
) -> Array:
    r"""The return of each step of a segment, bootstrapped from its end and wherever `lambda_t` is less than one.

    The recursion runs backwards from `G_T = v_T`:

    .. math::
      G_{t-1} = r_t + \gamma_t \left( (1 - \lambda_t) v_t + \lambda_t G_t \right)

    With `lambda_t = 1` everywhere this is the n-step return of A3C: the first step looks T steps ahead, the last one.
    A segment may hold several episodes.

    >>> n_step_returns(jnp.array([1., 1., 1.]), jnp.array([.5, 0., .5]), jnp.array([9., 9., 4.]))
    Array([1.5, 1. , 3. ], dtype=float32)

    Args:
      r_t: rewards, `[T, ...]`, float.
      discount_t: `discount * (1 - terminated_t)`, `[T, ...]`, float.
      v_t: values of the observations that followed each action, before any reset, `[T, ...]`, float.
      lambda_t: `lambda_ * (1 - truncated_t)`, `[T, ...]`; one for `lambda_` gives A3C's return, less a lambda-return. A
        scalar if no time limit cut anything.

    Returns:
      The return of each step, `[T, ...]`. It is differentiable: the losses below stop the gradient.

    Raises:
      AssertionError: if shapes differ or an array is not of floats.

    Source: Mnih et al. 2016, arXiv:1602.01783, section 4 and Algorithm S3; the recursion with a
    lambda per step is equation 12.18 of Sutton & Barto 2018.
    """
    if jnp.ndim(lambda_t) == 0:
        lambda_t = jnp.full_like(jnp.asarray(r_t), lambda_t)
    arrays = as_floats(r_t=r_t, discount_t=discount_t, v_t=v_t, lambda_t=lambda_t)

    def backwards(g_t: Array, step: tuple[Array, ...]) -> tuple[Array, Array]:
        r, discount, v, lambda_ = step
        g_tm1 = r + discount * ((1.0 - lambda_) * v + lambda_ * g_t)
        return g_tm1, g_tm1

    return jax.lax.scan(backwards, arrays[2][-1], tuple(arrays), reverse=True)[1]


def n_step_advantages(
    r_t: Array, discount_t: Array, v_tm1: Array, v_t: Array, lambda_t: Array | float = 1.0
) -> Array:
    r"""How much better each action turned out than the critic expected.

    .. math::
      A_{t-1} = G_{t-1} - v_{t-1}

    >>> n_step_advantages(jnp.array([1.]), jnp.array([.5]), jnp.array([2.]), jnp.array([4.]))
    Array([1.], dtype=float32)

    Args:
      r_t: rewards, `[T, ...]`, float.
      discount_t: `discount * (1 - terminated_t)`, `[T, ...]`, float.
      v_tm1: values of the observations acted upon, `[T, ...]`, float.
      v_t: values of the observations that followed, before any reset, `[T, ...]`, float.
      lambda_t: `lambda_ * (1 - truncated_t)`, `[T, ...]`, or a scalar; see `n_step_returns`.

    Returns:
      The advantage of each action, `[T, ...]`.

    Raises:
      AssertionError: if shapes differ or an array is not of floats.

    Source: Mnih et al. 2016, arXiv:1602.01783, section 4; with a constant `lambda_t` below one it is
    generalised advantage estimation, Schulman et al. 2016, arXiv:1506.02438.
    """
    r_t, v_tm1 = as_floats(r_t=r_t, v_tm1=v_tm1)
    return n_step_returns(r_t, discount_t, v_t, lambda_t) - v_tm1


def actor_loss(log_prob_tm1: Array, advantage_tm1: Array, valid_tm1: Array | None = None) -> Array:
    r"""The policy gradient's surrogate loss.

    .. math::
      L = -\frac{1}{N} \sum \log \pi(a | s) \; \text{stop\_gradient}(A)

    The advantage is a constant: no gradient reaches the critic through this loss.

    >>> actor_loss(jnp.array([-1., -2.]), jnp.array([3., -1.]))
    Array(0.5, dtype=float32)

    Args:
      log_prob_tm1: log-probabilities of the actions taken, `[T, ...]`, float, in nats.
      advantage_tm1: their advantages, `[T, ...]`, float.
      valid_tm1: which steps the mean is over, `[T, ...]` bool; None for all. What stands at others has no effect.

    Returns:
      The mean loss, a scalar.

    Raises:
      AssertionError: if shapes differ or an array is not of floats.

    Source: Mnih et al. 2016, arXiv:1602.01783, section 4.
    """
    log_prob_tm1, advantage_tm1 = as_valid_floats(
        valid_tm1, log_prob_tm1=log_prob_tm1, advantage_tm1=advantage_tm1
    )
    return -mean_over(valid_tm1, log_prob_tm1 * jax.lax.stop_gradient(advantage_tm1))


def critic_loss(v_tm1: Array, return_tm1: Array, valid_tm1: Array | None = None) -> Array:
    r"""Half the mean squared error of the values against their returns.

    .. math::
      L = \frac{1}{N} \sum \tfrac{1}{2} \left( \text{stop\_gradient}(G) - v \right)^2

    The return is a constant: the critic moves towards it and never drags it along.

    >>> critic_loss(jnp.array([1., 2.]), jnp.array([3., 2.]))
    Array(1., dtype=float32)

    Args:
      v_tm1: values of the observations acted upon, `[T, ...]`, float.
      return_tm1: their returns, `[T, ...]`, float.
      valid_tm1: which steps the mean is over, `[T, ...]` bool; None for all. What stands at others has no effect.

    Returns:
      The mean loss, a scalar.

    Raises:
      AssertionError: if shapes differ or an array is not of floats.

    Source: Mnih et al. 2016, arXiv:1602.01783, Algorithm S3 (whose squared error has no half).
    """
    v_tm1, return_tm1 = as_valid_floats(valid_tm1, v_tm1=v_tm1, return_tm1=return_tm1)
    return 0.5 * mean_over(valid_tm1, jnp.square(jax.lax.stop_gradient(return_tm1) - v_tm1))


def entropy_loss(entropy_tm1: Array, valid_tm1: Array | None = None) -> Array:
    r"""Minus the mean entropy, so that *adding* it, times a positive cost, rewards exploration.

    .. math::
      L = -\frac{1}{N} \sum H(\pi(\cdot | s))

    >>> entropy_loss(jnp.array([0.25, 0.75]))
    Array(-0.5, dtype=float32)

    Args:
      entropy_tm1: entropies of the whole action distributions, `[T, ...]`, float, in nats.
      valid_tm1: which steps the mean is over, `[T, ...]` bool; None for all. What stands at others has no effect.

    Returns:
      The mean loss, a scalar: never positive for a categorical distribution.

    Raises:
      AssertionError: if the array is not of floats.

    Source: Mnih et al. 2016, arXiv:1602.01783, section 4, after Williams & Peng 1991.
    """
    (entropy_tm1,) = as_valid_floats(valid_tm1, entropy_tm1=entropy_tm1)
    return -mean_over(valid_tm1, entropy_tm1)


def explained_variance(v_tm1: Array, return_tm1: Array, valid_tm1: Array | None = None) -> Array:
    r"""The share of the returns' variance that the critic explains.

    .. math::
      1 - \frac{\text{Var}[G - v]}{\text{Var}[G]}

    One means a perfect critic, zero one that is no better than a constant, and less than zero one that is worse. If the
    returns do not vary, or no step is valid, it is zero; if one is not finite, it is NaN.

    >>> explained_variance(jnp.array([1., 2.]), jnp.array([1., 3.]))
    Array(0.75, dtype=float32)

    Args:
      v_tm1: values, `[T, ...]`, float.
      return_tm1: returns, `[T, ...]`, float.
      valid_tm1: which steps the variances are over, `[T, ...]` bool; None for all.

    Returns:
      A scalar, at most one.

    Raises:
      AssertionError: if shapes differ or an array is not of floats.
    """
    v_tm1, return_tm1 = as_valid_floats(valid_tm1, v_tm1=v_tm1, return_tm1=return_tm1)
    # Of equal numbers the variance may be a tiny positive one, and of others zero if it underflows.
    variance = jnp.var(return_tm1, where=valid_tm1)
    lowest = jnp.min(return_tm1, initial=jnp.inf, where=valid_tm1)
    highest = jnp.max(return_tm1, initial=-jnp.inf, where=valid_tm1)
    is_constant = (highest <= lowest) | (variance == 0.0)  # False if a return is NaN
    unexplained = jnp.var(return_tm1 - v_tm1, where=valid_tm1)
    return jnp.where(is_constant, 0.0, 1.0 - unexplained / jnp.where(is_constant, 1.0, variance))


def a3c_loss(
    params: Any,
    apply_fn: Callable[[Any, Any], tuple[Any, Array, Array]],
    trajectory: Any,
    *,
    discount: Array | float = 0.99,
    critic_cost: Array | float = 0.5,
    entropy_cost: Array | float = 0.01,
    lambda_: Array | float = 1.0,
) -> tuple[Array, Metrics]:
    r"""The loss whose gradient an A3C worker sends to the shared parameters.

    .. math::
      L = L_{actor} + c_{critic} L_{critic} + c_{entropy} L_{entropy}

    Args:
      params: the parameters to differentiate: any tree, Flax's for instance.
      apply_fn: `apply_fn(params, trajectory) -> (distribution_tm1, v_tm1, v_t)`: the policy's distribution and the
        value at every observation acted upon, and the value of every observation that followed. Where an episode
        terminated `v_t` may be any finite number, because its discount is zero there.
        `a3c_jax.networks.trajectory_apply(network)` makes one from a Flax network.
      trajectory: anything with `action_tm1`, `reward_t`, `terminated_t` and `truncated_t`, each `[T, ...]`, and
        whatever `apply_fn` reads: `a3c_jax.rollout.Trajectory` for instance. Continuous actions, and several
        discrete ones at once, have one more dimension, over which the distribution's `log_prob` sums. Means
        leave out the steps where `valid_tm1`, `[T, ...]` bool, is False, if it has that.
      discount: the factor gamma, a scalar in [0, 1], the same at every step. So are the three numbers below.
      critic_cost: the weight of `critic_loss`. With the half inside that loss, 0.5 gives the `0.25 (R - V)^2` that
        the common implementations share; the paper names no value.
      entropy_cost: the weight of `entropy_loss`, the paper's beta.
      lambda_: 1 for A3C's n-step returns; less for generalised advantage estimation, in [0, 1].

    Returns:
      The scalar loss and its parts: `loss`, `actor_loss`, `critic_loss`, `entropy_loss`, `entropy` (the mean
      entropy, in nats: minus `entropy_loss`), `mean_advantage` and `explained_variance`.

    Raises:
      AssertionError: if shapes differ or an array is not of floats.

    Source: Mnih et al. 2016, arXiv:1602.01783, section 4 and Algorithm S3; generalised advantage estimation is
    that of Schulman et al. 2016, arXiv:1506.02438.
    """
    check_scalars(
        discount=discount, critic_cost=critic_cost, entropy_cost=entropy_cost, lambda_=lambda_
    )
    distribution_tm1, v_tm1, v_t = apply_fn(params, trajectory)
    r_t, valid_tm1 = trajectory.reward_t, getattr(trajectory, "valid_tm1", None)
    discount_t = discount * (1.0 - trajectory.terminated_t.astype(r_t.dtype))
    lambda_t = lambda_ * (1.0 - trajectory.truncated_t.astype(r_t.dtype))
    r_t, v_tm1 = as_floats(r_t=r_t, v_tm1=v_tm1)
    return_tm1 = n_step_returns(r_t, discount_t, v_t, lambda_t)
    advantage_tm1 = return_tm1 - v_tm1
    log_prob_tm1 = distribution_tm1.log_prob(trajectory.action_tm1)
    actor = actor_loss(log_prob_tm1, advantage_tm1, valid_tm1)
    critic = critic_loss(v_tm1, return_tm1, valid_tm1)
    entropy = entropy_loss(distribution_tm1.entropy(), valid_tm1)
    loss = actor + critic_cost * critic + entropy_cost * entropy
    return loss, {
        "loss": loss,
        "actor_loss": actor,
        "critic_loss": critic,
        "entropy_loss": entropy,
        "entropy": -entropy,
        "mean_advantage": mean_over(valid_tm1, advantage_tm1),
        "explained_variance": explained_variance(v_tm1, return_tm1, valid_tm1),
    }


def mean_over(valid_tm1: Array | None, x: Array) -> Array:
    """The mean of `x` over the steps that are valid, for parts of a loss of your own.

    >>> mean_over(jnp.array([True, False, True]), jnp.array([1., jnp.nan, 2.]))
    Array(1.5, dtype=float32)

    Args:
      valid_tm1: which steps the mean is over, `[T, ...]` bool, as in `Trajectory.valid_tm1`; None for all.
      x: one number for each step, `[T, ...]`. What stands at invalid steps reaches neither the mean nor its gradient.

    Returns:
      The mean, a scalar; zero if no step is valid.

    Raises:
      AssertionError: if the mask has another shape or is not of bools.
    """
    if valid_tm1 is None:
        return jnp.mean(x)
    check_mask(valid_tm1, x)
    return jnp.mean(jnp.where(valid_tm1, x, 0), where=valid_tm1 | ~jnp.any(valid_tm1))
