"""What a configuration describes, as pure functions, before anything is compiled or started."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from a3c_jax import environments, normalization, rollout
from a3c_jax.checks import check_setup
from a3c_jax.config import A3CConfig
from a3c_jax.losses import a3c_loss
from a3c_jax.networks import ActorCritic, network_functions
from a3c_jax.optimizers import make_optimizer
from a3c_jax.own_checks import checked_loss, checked_optimizer
from a3c_jax.worker import Loss, WorkerState, WorkerStep, make_worker_step

MakeOptimizer: TypeAlias = Callable[[Any], optax.GradientTransformation]
Optimizer: TypeAlias = optax.GradientTransformation | MakeOptimizer


class Blueprint(NamedTuple):
    """What a configuration describes: functions whose arguments may be traced.

    Attributes:
      environment: what is played.
      network: the network that is trained.
      worker_step: what each worker does again and again.
      start: `start(seed, worker)` gives the initial state of a worker.
      init: `init(seed, observation)` gives the initial parameters. Only the observation's shape matters.
      optimizer: `optimizer(learning_rate)` gives an optax transformation of the parameter tree.
      evaluation_key: `evaluation_key(seed)` gives a key for evaluation that no worker has used.
    """

    environment: environments.Environment
    network: Any
    worker_step: WorkerStep
    start: Callable[[Any, Any], WorkerState]
    init: Callable[[Any, Any], Any]
    optimizer: Callable[[Any], optax.GradientTransformation]
    evaluation_key: Callable[[Any], jax.Array]


def make_blueprint(
    config: A3CConfig,
    *,
    environment: Any = None,
    network: Any = None,
    loss: Loss | None = None,
    optimizer: Optimizer | None = None,
) -> Blueprint:
    """Makes what a configuration describes, but for its seed and its learning rate, which are arguments.

    Args:
      config: the configuration.
      environment: what to play instead of the environment that the configuration names.
      network: what to train instead of the network that the configuration describes.
      loss: what to minimise instead of A3C's loss: `loss(params, apply_fn, trajectory) -> (scalar, metrics)`.
      optimizer: an optax transformation of the parameter tree instead of the optimizer that the configuration
        describes, or a function that makes one of the learning rate.

    Raises:
      ValueError: if the environment is unknown or not supported, or if configuration, environment and network
        do not go together (see `a3c_jax.checks`).
      TypeError: if the environment or the network lacks a method.
    """
    environment_given, network_given = environment is not None, network is not None
    if not environment_given:
        environment = environments.make(config.environment, action_bounds=config.action_bounds)
    environment = environments.adapt(environment, config.action_bounds)
    if network is None:
        network = _describe_network(config, environment)
    check_setup(
        config,
        environment,
        network,
        environment_given=environment_given,
        network_given=network_given,
    )
    loss_given = loss is not None
    loss = _describe_loss(config) if loss is None else checked_loss(config, loss)
    make_weights_optimizer = (
        functools.partial(_describe_optimizer, config)
        if optimizer is None
        else checked_optimizer(config, optimizer)
    )
    worker_step = make_worker_step(
        environment,
        network,
        loss=loss,
        t_max=config.t_max,
        discount=config.discount,
        reward_clip=config.reward_clip,
        terminal_reward=config.terminal_reward,
    )
    blueprint = Blueprint(
        environment=environment,
        network=network,
        worker_step=worker_step,
        start=_make_start(config, environment, network),
        init=_make_init(config, environment, network),
        optimizer=_with_moments(config, make_weights_optimizer),
        evaluation_key=lambda seed: _split_seed(seed)[2],
    )
    if loss_given:  # traced once, so that its errors come before anything is compiled
        seed, worker = jax.ShapeDtypeStruct((), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32)
        state = jax.eval_shape(blueprint.start, seed, worker)
        params = jax.eval_shape(blueprint.init, seed, state.observation)
        jax.eval_shape(worker_step, params, state)
    return blueprint


def _describe_network(config: A3CConfig, environment: environments.Environment) -> ActorCritic:
    shape = environment.observation_shape
    torso = config.torso
    if torso == "auto":
        is_image = normalization.is_shape(shape) and len(shape) == 3 and shape[:2] == (10, 10)
        torso = "conv" if is_image else "mlp"
    ndims = [len(shape) for shape in jax.tree.leaves(shape, is_leaf=normalization.is_shape)]
    return ActorCritic(
        num_actions=environment.num_actions,
        continuous=environment.continuous,
        hidden_sizes=config.hidden_sizes,
        activation=config.activation,
        shared_torso=config.shared_torso,
        observation_ndim=ndims[0] if normalization.is_shape(shape) else tuple(ndims),
        torso=torso,
        core=config.core,
        core_size=config.core_size,
        forget_bias=config.forget_bias,
        state_dependent_scale=config.state_dependent_scale,
    )


def _make_start(
    config: A3CConfig, environment: environments.Environment, network: Any
) -> Callable[[Any, Any], WorkerState]:
    functions = network_functions(network)

    def start(seed: Any, worker: Any) -> WorkerState:
        _, workers_key, _ = _split_seed(seed)
        key = jax.random.fold_in(workers_key, worker)
        carry = functions.initialize_carry(config.envs_per_worker)
        state = rollout.start(environment, key, config.envs_per_worker, carry)
        if config.normalize_rewards:
            state = state._replace(discounted_return=jnp.zeros(config.envs_per_worker))
        return state

    return start


def _make_init(
    config: A3CConfig, environment: environments.Environment, network: Any
) -> Callable[[Any, Any], Any]:
    normalizes = config.normalize_observations or config.normalize_rewards

    def init(seed: Any, observation: Any) -> Any:
        network_key, _, _ = _split_seed(seed)
        params = network.init(network_key, observation)
        statistics = {}
        if normalizes and not isinstance(params, dict):
            raise TypeError(
                "A3CConfig.normalize_observations and normalize_rewards need a network whose parameters are a "
                f"dict, as Flax linen's are, got {type(params).__name__}; turn them off."
            )
        if config.normalize_observations:
            shape = environment.observation_shape
            statistics["observation"] = normalization.initial_moments(shape)
        if config.normalize_rewards:
            statistics["reward"] = normalization.initial_moments(())
        return {**params, normalization.STATISTICS: statistics} if statistics else params

    return init


def _describe_loss(config: A3CConfig) -> Loss:
    return functools.partial(
        a3c_loss,
        discount=config.discount,
        critic_cost=config.critic_cost,
        entropy_cost=config.entropy_cost,
        lambda_=config.gae_lambda,
    )


def _with_moments(config: A3CConfig, make_optimizer: MakeOptimizer) -> MakeOptimizer:
    """The optimizer of the weights; if the parameters hold running moments, it merges those as well."""
    if not (config.normalize_observations or config.normalize_rewards):
        return make_optimizer
    return lambda learning_rate: normalization.merge_statistics(make_optimizer(learning_rate))


def _describe_optimizer(config: A3CConfig, learning_rate: Any) -> optax.GradientTransformation:
    is_linear = config.learning_rate_schedule == "linear"
    optimizer = make_optimizer(
        config.optimizer,
        learning_rate=learning_rate,
        anneal_over=config.max_updates if is_linear else None,
        max_gradient_norm=config.max_gradient_norm,
        adam_epsilon=config.adam_epsilon,
        momentum=config.momentum,
        rmsprop_decay=config.rmsprop_decay,
        rmsprop_epsilon=config.rmsprop_epsilon,
        num_workers=config.num_workers,
    )
    # These optimizers treat every number alike, so that one vector gives the same update as the tree
    # of many small arrays, in less time.
    return optax.flatten(optimizer)


def _split_seed(seed: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The keys of the network, the workers and the evaluation."""
    network, workers, evaluation = jax.random.split(jax.random.key(seed), 3)
    return network, workers, evaluation
