"""What a configuration describes, built: environment, network, first parameters and states, worker step, optimizer."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from a3c_jax import environments, kernels, moments, rollout
from a3c_jax.config import A3CConfig
from a3c_jax.networks import ActorCritic, model
from a3c_jax.parameters import make_optimizer
from a3c_jax.worker import WorkerState, WorkerStep, make_worker_step


class Agent(NamedTuple):
    """Everything that a run starts from. It is the same for the same configuration, bit for bit.

    Attributes:
      config: the configuration.
      environment: what is played.
      network: the network; `network.apply(params, observation)` gives a distribution and values.
      params: the initial parameters, Flax variables.
      states: each worker's initial state.
      worker_step: what each worker does again and again, a pure function (`a3c_jax.worker`).
      optimizer: an optax transformation; it makes no difference whether it moves the tree or a flat vector.
    """

    config: A3CConfig
    environment: environments.Environment
    network: nn.Module
    params: Any
    states: list[WorkerState]
    worker_step: WorkerStep
    optimizer: optax.GradientTransformation


def make_agent(
    config: A3CConfig,
    *,
    environment: environments.Environment | None = None,
    network: nn.Module | None = None,
) -> Agent:
    """Builds what a configuration describes.

    Args:
      config: the configuration.
      environment: what to play instead of the environment that it names.
      network: what to train instead of the network that it describes.

    Raises:
      ValueError: where the environment is unknown or not supported.
    """
    if environment is None:
        environment = environments.make(config.environment, action_bounds=config.action_bounds)
    environment = environments.adapt(environment, config.action_bounds)
    is_image = len(environment.observation_shape) == 3 and environment.observation_shape[:2] == (
        10,
        10,
    )
    network = network or ActorCritic(
        num_actions=environment.num_actions,
        continuous=getattr(environment, "continuous", False),
        hidden_sizes=config.hidden_sizes,
        activation=config.activation,
        shared_torso=config.shared_torso,
        observation_ndim=len(environment.observation_shape),
        torso={"auto": "conv" if is_image else "mlp"}.get(config.torso, config.torso),
        core=config.core,
        core_size=config.core_size,
        state_dependent_scale=config.state_dependent_scale,
    )
    functions = model(network)
    statistics = {}
    if config.normalize_observations:
        statistics["observation"] = moments.empty(environment.observation_shape)
    if config.normalize_rewards:
        statistics["reward"] = moments.empty(())

    @kernels.jit_for_one_call
    def start(seed: Any, worker: Any) -> WorkerState:
        _, workers_key, _ = _keys(seed)
        key = jax.random.fold_in(workers_key, worker)
        carry = functions.initialize_carry(config.envs_per_worker)
        state = rollout.start(environment, key, config.envs_per_worker, carry)
        if config.normalize_rewards:
            state = state._replace(discounted_return=jnp.zeros(config.envs_per_worker))
        return state

    @kernels.jit_for_one_call
    def init(seed: Any, observation: Any) -> Any:
        network_key, _, _ = _keys(seed)
        params = network.init(network_key, observation)
        return {**params, moments.STATISTICS: statistics} if statistics else params

    seed = np.uint32(config.seed)
    states = [start(seed, np.int32(worker)) for worker in range(config.num_workers)]
    optimizer: optax.GradientTransformation = make_optimizer(
        config.optimizer,
        learning_rate=config.learning_rate,
        anneal_over=config.max_updates if config.learning_rate_schedule == "linear" else None,
        max_gradient_norm=config.max_gradient_norm,
        adam_epsilon=config.adam_epsilon,
        momentum=config.momentum,
        rmsprop_decay=config.rmsprop_decay,
        rmsprop_epsilon=config.rmsprop_epsilon,
        num_workers=config.num_workers,
    )
    if statistics:
        optimizer = moments.merging(optimizer, statistics)
    return Agent(
        config=config,
        environment=environment,
        network=network,
        params=init(seed, states[0].observation),
        states=states,
        worker_step=make_worker_step(
            environment,
            network,
            t_max=config.t_max,
            discount=config.discount,
            critic_cost=config.critic_cost,
            entropy_cost=config.entropy_cost,
            lambda_=config.gae_lambda,
            reward_clip=config.reward_clip,
            terminal_reward=config.terminal_reward,
        ),
        optimizer=optimizer,
    )


def evaluation_key(config: A3CConfig) -> jax.Array:
    """A key for evaluation that no worker has used."""
    return _keys(config.seed)[2]


def _keys(seed: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The keys of the network, the workers and the evaluation."""
    network, workers, evaluation = jax.random.split(jax.random.key(seed), 3)
    return network, workers, evaluation
