"""Two algorithms of one's own, from end to end: V-trace, and PPO's clipped loss, both at the newest parameters.

In A3C other workers' updates come between a gradient and its update, and nothing corrects for that. Here a worker sends
what it has played instead of a gradient, and the loss is differentiated at the newest parameters. What is outdated then
is not the gradient but the policy that acted. The ratio of the two policies, whose log-probabilities the trajectory
holds, corrects for that. V-trace clips the ratio; PPO's loss also stops to push where the policy has already moved far.

    python -m experiments.cartpole --algorithm experiments.off_policy:ppo
    python -m experiments.measurements.staleness --optimizers adam --algorithms a3c experiments.off_policy:ppo

Source: Espeholt et al. 2018, arXiv:1802.01561, section 4; Schulman et al. 2017, arXiv:1707.06347, equation 7.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from a3c_jax.algorithm import Algorithm, a3c
from a3c_jax.config import A3CConfig
from a3c_jax.losses import critic_loss, entropy_loss, mean_over, n_step_returns


def off_policy_loss(
    params: Any,
    apply_fn: Any,
    trajectory: Any,
    *,
    discount: Any = 0.99,
    critic_cost: Any = 0.5,
    entropy_cost: Any = 0.01,
    clip: float | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A3C's loss with V-trace's targets and advantages.

    Args:
      params: the parameters to differentiate.
      apply_fn: `apply_fn(params, trajectory) -> (distribution_tm1, v_tm1, v_t)`.
      trajectory: a segment, with the log-probabilities of its actions under the policy that chose them.
      discount: the discount factor.
      critic_cost: the weight of the critic's loss.
      entropy_cost: the weight of the entropy bonus.
      clip: if given, the actor's loss is PPO's, with ratios clipped to [1 - clip, 1 + clip]; if None, V-trace's.
    """
    distribution, v_tm1, v_t = apply_fn(params, trajectory)
    log_prob = distribution.log_prob(trajectory.action_tm1)
    ratio = jnp.exp(log_prob - trajectory.log_prob_tm1)
    constants = jnp.minimum(1.0, ratio), v_tm1, v_t
    weight, value_tm1, value_t = jax.lax.stop_gradient(constants)

    r_t = trajectory.reward_t
    discount_t = discount * (1.0 - trajectory.terminated_t)
    goes_on = 1.0 - trajectory.truncated_t
    # The corrections obey the recursion of a return whose rewards are the weighted TD errors.
    td_error = weight * (r_t + discount_t * value_t - value_tm1)
    corrections = n_step_returns(td_error, discount_t * weight, jnp.zeros_like(r_t), goes_on)
    target_tm1 = value_tm1 + corrections
    target_t = jnp.concatenate([target_tm1[1:], value_t[-1:]])
    target_t = jnp.where(trajectory.truncated_t, value_t, target_t)
    advantage = r_t + discount_t * target_t - value_tm1

    if clip is None:
        gain = log_prob * weight * advantage
    else:
        near = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
        gain = jnp.minimum(ratio * advantage, near * advantage)
    valid = trajectory.valid_tm1  # None in most environments, where every step counts
    actor = -mean_over(valid, gain)
    critic = critic_loss(v_tm1, target_tm1, valid)
    entropy = entropy_loss(distribution.entropy(), valid)
    loss = actor + critic_cost * critic + entropy_cost * entropy
    return loss, {"loss": loss, "actor_loss": actor, "critic_loss": critic, "entropy": -entropy}


def vtrace(
    config: A3CConfig, environment: Any, network: Any = None, *, clip: float | None = None
) -> Algorithm:
    """A3C's policy and values, learnt with V-trace at the newest parameters.

    Raises:
      ValueError: if the configuration has a `gae_lambda`, which this loss does not read.
    """
    if config.gae_lambda != 1.0:
        raise ValueError(
            f"gae_lambda must be 1 for V-trace, got {config.gae_lambda}; leave it out."
        )
    loss = functools.partial(
        off_policy_loss,
        discount=config.discount,
        critic_cost=config.critic_cost,
        entropy_cost=config.entropy_cost,
        clip=clip,
    )
    return a3c(config, environment, network, loss=loss, learns_at_newest=True)


def ppo(
    config: A3CConfig, environment: Any, network: Any = None, *, clip: float = 0.2
) -> Algorithm:
    """The same with PPO's clipped loss of the actor."""
    return vtrace(config, environment, network, clip=clip)
