"""An algorithm of one's own, from end to end: V-trace, which corrects for updates that others have made meanwhile.

In A3C other workers' updates come between a gradient and its update, and nothing corrects for that. Here a worker sends
what it has played instead of a gradient, and the loss is differentiated at the newest parameters. What is outdated then
is not the gradient but the policy that acted. The ratio of the two policies, whose log-probabilities the trajectory
holds, corrects for that; V-trace clips it so that it cannot become large.

    python -m experiments.cartpole --algorithm experiments.vtrace:vtrace
    python -m experiments.measurements.staleness --optimizers adam --algorithms a3c experiments.vtrace:vtrace

Source: Espeholt et al. 2018, arXiv:1802.01561, section 4.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from a3c_jax.algorithm import Algorithm, a3c
from a3c_jax.config import A3CConfig
from a3c_jax.losses import critic_loss, entropy_loss, n_step_returns


def vtrace_loss(
    params: Any,
    apply_fn: Any,
    trajectory: Any,
    *,
    discount: Any = 0.99,
    critic_cost: Any = 0.5,
    entropy_cost: Any = 0.01,
    max_ratio: float = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A3C's loss with V-trace's targets: the arguments are those of `a3c_jax.losses.a3c_loss`.

    Args:
      params: the parameters to differentiate.
      apply_fn: `apply_fn(params, trajectory) -> (distribution_tm1, v_tm1, v_t)`.
      trajectory: a segment, with the log-probabilities of its actions under the policy that chose them.
      discount: the discount factor.
      critic_cost: the weight of the critic's loss.
      entropy_cost: the weight of the entropy bonus.
      max_ratio: where ratios are clipped, both of the paper's rho and c.
    """
    distribution, v_tm1, v_t = apply_fn(params, trajectory)
    log_prob = distribution.log_prob(trajectory.action_tm1)
    ratio = jnp.exp(log_prob - trajectory.log_prob_tm1)
    values = jax.lax.stop_gradient((jnp.minimum(max_ratio, ratio), v_tm1, v_t))
    clipped, value_tm1, value_t = values

    r_t = trajectory.reward_t
    discount_t = discount * (1.0 - trajectory.terminated_t)
    goes_on = 1.0 - trajectory.truncated_t
    # The corrections obey the recursion of a return whose rewards are the weighted TD errors.
    td_error = clipped * (r_t + discount_t * value_t - value_tm1)
    corrections = n_step_returns(td_error, discount_t * clipped, jnp.zeros_like(r_t), goes_on)
    target_tm1 = value_tm1 + corrections
    target_t = jnp.concatenate([target_tm1[1:], value_t[-1:]])
    target_t = jnp.where(trajectory.truncated_t, value_t, target_t)
    advantage = clipped * (r_t + discount_t * target_t - value_tm1)

    actor = -jnp.mean(log_prob * advantage)
    critic = critic_loss(v_tm1, target_tm1)
    entropy = entropy_loss(distribution.entropy())
    loss = actor + critic_cost * critic + entropy_cost * entropy
    return loss, {"loss": loss, "actor_loss": actor, "critic_loss": critic, "entropy": -entropy}


def vtrace(config: A3CConfig, environment: Any, network: Any = None) -> Algorithm:
    """A3C's policy and values, learnt with V-trace at the newest parameters."""
    loss = functools.partial(
        vtrace_loss,
        discount=config.discount,
        critic_cost=config.critic_cost,
        entropy_cost=config.entropy_cost,
    )
    return a3c(config, environment, network, loss=loss, learns_at_newest=True)
