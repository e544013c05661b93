"""What a configuration describes, built: environment, network, first parameters and states, worker step, optimizer."""

from collections.abc import Callable
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


class Blueprint(NamedTuple):
    """What a configuration describes before anything is computed: functions whose arguments may be traced.

    Attributes:
      environment: what is played.
      network: the network.
      worker_step: what each worker does again and again.
      start: `start(seed, worker)` gives a worker's initial state.
      init: `init(seed, observation)` gives the initial parameters; only the observation's shape matters.
      optimizer: `optimizer(learning_rate)` gives the optax transformation.
    """

    environment: environments.Environment
    network: nn.Module
    worker_step: WorkerStep
    start: Callable[[Any, Any], WorkerState]
    init: Callable[[Any, Any], Any]
    optimizer: Callable[[Any], optax.GradientTransformation]


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
    blueprint = make_blueprint(config, environment=environment, network=network)
    start = kernels.jit_for_one_call(blueprint.start)
    init = kernels.jit_for_one_call(blueprint.init)
    seed = np.uint32(config.seed)
    states = [start(seed, np.int32(worker)) for worker in range(config.num_workers)]
    return Agent(
        config=config,
        environment=blueprint.environment,
        network=blueprint.network,
        params=init(seed, states[0].observation),
        states=states,
        worker_step=blueprint.worker_step,
        optimizer=blueprint.optimizer(config.learning_rate),
    )


def make_blueprint(
    config: A3CConfig,
    *,
    environment: environments.Environment | None = None,
    network: nn.Module | None = None,
) -> Blueprint:
    """Builds what a configuration describes but for its seed and its learning rate; arguments as `make_agent`'s."""
    if environment is None:
        environment = environments.make(config.environment, action_bounds=config.action_bounds)
    played = environments.adapt(environment, config.action_bounds)
    trained = _describe_network(config, played) if network is None else network
    functions = model(trained)
    statistics = _first_statistics(config, played)

    def start(seed: Any, worker: Any) -> WorkerState:
        _, workers_key, _ = _keys(seed)
        key = jax.random.fold_in(workers_key, worker)
        carry = functions.initialize_carry(config.envs_per_worker)
        state = rollout.start(played, key, config.envs_per_worker, carry)
        if config.normalize_rewards:
            state = state._replace(discounted_return=jnp.zeros(config.envs_per_worker))
        return state

    def init(seed: Any, observation: Any) -> Any:
        network_key, _, _ = _keys(seed)
        params = trained.init(network_key, observation)
        return {**params, moments.STATISTICS: statistics} if statistics else params

    def optimizer(learning_rate: Any) -> optax.GradientTransformation:
        moves = make_optimizer(
            config.optimizer,
            learning_rate=learning_rate,
            anneal_over=config.max_updates if config.learning_rate_schedule == "linear" else None,
            max_gradient_norm=config.max_gradient_norm,
            adam_epsilon=config.adam_epsilon,
            momentum=config.momentum,
            rmsprop_decay=config.rmsprop_decay,
            rmsprop_epsilon=config.rmsprop_epsilon,
            num_workers=config.num_workers,
        )
        return moments.merging(moves, statistics) if statistics else moves

    return Blueprint(
        environment=played,
        network=trained,
        worker_step=make_worker_step(
            played,
            trained,
            t_max=config.t_max,
            discount=config.discount,
            critic_cost=config.critic_cost,
            entropy_cost=config.entropy_cost,
            lambda_=config.gae_lambda,
            reward_clip=config.reward_clip,
            terminal_reward=config.terminal_reward,
        ),
        start=start,
        init=init,
        optimizer=optimizer,
    )


def _describe_network(config: A3CConfig, environment: environments.Environment) -> nn.Module:
    shape = environment.observation_shape
    torso = config.torso
    if torso == "auto":
        torso = "conv" if len(shape) == 3 and shape[:2] == (10, 10) else "mlp"
    return ActorCritic(
        num_actions=environment.num_actions,
        continuous=environment.continuous,
        hidden_sizes=config.hidden_sizes,
        activation=config.activation,
        shared_torso=config.shared_torso,
        observation_ndim=len(shape),
        torso=torso,
        core=config.core,
        core_size=config.core_size,
        forget_bias=config.forget_bias,
        state_dependent_scale=config.state_dependent_scale,
    )


def _first_statistics(
    config: A3CConfig, environment: environments.Environment
) -> dict[str, moments.Moments]:
    statistics = {}
    if config.normalize_observations:
        statistics["observation"] = moments.empty(environment.observation_shape)
    if config.normalize_rewards:
        statistics["reward"] = moments.empty(())
    return statistics


def evaluation_key(config: A3CConfig) -> jax.Array:
    """A key for evaluation that no worker has used."""
    return _keys(config.seed)[2]


def _keys(seed: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The keys of the network, the workers and the evaluation."""
    network, workers, evaluation = jax.random.split(jax.random.key(seed), 3)
    return network, workers, evaluation
