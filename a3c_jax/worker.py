"""A worker as a pure function: play a segment, return the gradients of its loss.

(parameters, worker state)  ->  (gradients, worker state, statistics)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from a3c_jax import rollout
from a3c_jax.environments import Environment
from a3c_jax.losses import a3c_loss
from a3c_jax.networks import trajectory_apply
from a3c_jax.packing import Packing

Array = jax.Array
WorkerState = rollout.RolloutState


class Statistics(NamedTuple):
    """What a segment reports.

    Attributes:
      metrics: the parts of the loss (`a3c_jax.losses.a3c_loss`) and `gradient_norm`, scalars.
      episodes: the episodes that ended.
    """

    metrics: dict[str, Array]
    episodes: rollout.Episodes


WorkerStep = Callable[[Any, WorkerState], tuple[Any, WorkerState, Statistics]]


def make_worker_step(
    environment: Environment,
    network: nn.Module,
    *,
    t_max: int,
    discount: float,
    critic_cost: float,
    entropy_cost: float,
    terminal_reward: float | None = None,
) -> WorkerStep:
    """Makes the function that every worker thread calls again and again.

    Args:
      environment: what to play.
      network: a module like `a3c_jax.networks.ActorCritic`.
      t_max: steps played in each environment between two updates.
      discount: the factor gamma, per step.
      critic_cost: weight of the critic's loss.
      entropy_cost: weight of the entropy loss.
      terminal_reward: if given, what the loss sees as the reward of a step that terminated its episode.

    Returns:
      `worker_step(params, state) -> (gradients, state, statistics)`: pure, to be compiled by its caller.
    """
    apply_fn = trajectory_apply(network)
    apply: Callable[..., Any] = network.apply

    def worker_step(params: Any, state: WorkerState) -> tuple[Any, WorkerState, Statistics]:
        def policy(key: Array, observation: Array) -> Array:
            return apply(params, observation, method="actor").sample(key)

        state, trajectory, episodes = rollout.unroll(environment, policy, state, t_max)
        if terminal_reward is not None:
            reward_t = jnp.where(trajectory.terminated_t, terminal_reward, trajectory.reward_t)
            trajectory = trajectory._replace(reward_t=reward_t)
        gradients, metrics = jax.grad(a3c_loss, has_aux=True)(
            params,
            apply_fn,
            trajectory,
            discount=discount,
            critic_cost=critic_cost,
            entropy_cost=entropy_cost,
        )
        squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)]
        metrics["gradient_norm"] = jnp.sqrt(sum(squares))
        return gradients, state, Statistics(metrics, episodes)

    return worker_step


class PackedWorkerStep:
    """A worker step compiled over one vector of parameters and one of state, as the threads call it.

    An array that enters or leaves a compiled call costs microseconds, however small; a network has eight,
    a worker's state a dozen. The trees are rebuilt inside the program, where that is free.

    Args:
      worker_step: what `make_worker_step` made.
      params: parameters like those to come.
      state: a worker's state like those to come.
    """

    def __init__(self, worker_step: WorkerStep, params: Any, state: WorkerState) -> None:
        self.unflatten: Callable[[Array], Any] = ravel_pytree(params)[1]
        """The parameter tree from its vector."""
        packing = Packing(state)
        self.pack_state: Callable[[WorkerState], Array] = jax.jit(packing.pack)
        """A worker's state as a vector."""
        self._statistics = Packing(jax.eval_shape(worker_step, params, state)[2])

        @jax.jit
        def step(flat_params: Array, packed_state: Array) -> tuple[Array, Array, Array]:
            gradients, state, statistics = worker_step(
                self.unflatten(flat_params), packing.unpack(packed_state)
            )
            return (
                self.flatten(gradients),
                packing.pack(state),
                self._statistics.pack(statistics),
            )

        self._step = step

    @staticmethod
    def flatten(params: Any) -> Array:
        """The parameters, or their gradients, as one vector."""
        return ravel_pytree(params)[0]

    def __call__(
        self, flat_params: Array, packed_state: Array
    ) -> tuple[Array, Array, tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]]:
        """Plays a segment and waits for it.

        Returns:
          The flat gradients, the packed state, and on the host: the metrics, and the returns and the
          lengths of the episodes that ended, `[E]` each.
        """
        outputs = self._step(flat_params, packed_state)
        gradients, packed_state, statistics = jax.block_until_ready(outputs)
        metrics, episodes = self._statistics.unpack_on_host(statistics)
        ended = episodes.ended
        return (
            gradients,
            packed_state,
            (metrics, episodes.episode_return[ended], episodes.length[ended]),
        )
