"""What a configuration describes, as pure functions, before anything is compiled or started."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from a3c_jax import environments, normalization, rollout
from a3c_jax.algorithm import Algorithm, Loss, MakeAlgorithm, a3c, add_shared
from a3c_jax.algorithms import find_algorithm
from a3c_jax.checks import check_setup
from a3c_jax.config import A3CConfig, default_of
from a3c_jax.host_environment import HostEnvironment
from a3c_jax.host_worker import HostStepFunctions, rehearse
from a3c_jax.optimizers import Updater, make_optimizer, make_updater
from a3c_jax.own_checks import check_config, check_loss, checked_algorithm, checked_optimizer
from a3c_jax.worker import differentiate, make_worker_step

MakeOptimizer: TypeAlias = Callable[[Any], optax.GradientTransformation]
Optimizer: TypeAlias = optax.GradientTransformation | MakeOptimizer


class Blueprint(NamedTuple):
    """What a configuration describes: functions whose arguments may be traced.

    Attributes:
      environment: what is played.
      network: the network that is trained.
      worker_step: what each worker does again and again, a `WorkerStep`; if the environment is on the host, a
        `HostStepFunctions`.
      start: `start(seed, worker)` gives the initial state of a worker.
      init: `init(seed, observation)` gives the initial parameters. Only the observation's shape matters.
      optimizer: `optimizer(learning_rate)` gives an optax transformation of the parameter tree.
      updater: `updater(learning_rate)` gives one update of the parameters by it, as pure functions.
      evaluation_key: `evaluation_key(seed)` gives a key for evaluation that no worker has used.
    """

    environment: environments.Environment
    network: Any
    worker_step: Any
    start: Callable[[Any, Any], rollout.RolloutState]
    init: Callable[[Any, Any], Any]
    optimizer: MakeOptimizer
    updater: Callable[[Any], Updater]
    evaluation_key: Callable[[Any], jax.Array]


class Parts(NamedTuple):
    """What goes into a blueprint besides the configuration, checked to fit it.

    Attributes:
      environment: what is played.
      network: what is trained if it was given as an object; None otherwise.
      make_algorithm: makes the algorithm.
      make_optimizer: `make_optimizer(config, learning_rate)` gives an optax transformation.
    """

    environment: environments.Environment
    network: Any
    make_algorithm: MakeAlgorithm
    make_optimizer: Callable[[A3CConfig, Any], optax.GradientTransformation]


def make_blueprint(config: A3CConfig, **objects: Any) -> Blueprint:
    """Makes what a configuration describes, but for its seed and its learning rate, which are arguments.

    Args and Raises are those of `make_parts`.
    """
    return describe(config, make_parts(config, **objects))


def make_parts(
    config: A3CConfig,
    *,
    environment: Any = None,
    network: Any = None,
    loss: Loss | None = None,
    optimizer: Optimizer | None = None,
    algorithm: MakeAlgorithm | None = None,
) -> Parts:
    """Finds what a configuration names, takes what is given instead, and checks that all of it goes together.

    Args:
      config: the configuration.
      environment: what to play instead of the environment that the configuration names.
      network: what to train instead of the network that the configuration describes.
      loss: what to minimise instead of A3C's loss: `loss(params, apply_fn, trajectory) -> (scalar, metrics)`.
      optimizer: an optax transformation of the parameter tree instead of the optimizer that the configuration
        describes, or a function that makes one of the learning rate.
      algorithm: what to do instead of the algorithm that the configuration names:
        `algorithm(config, environment, network) -> a3c_jax.algorithm.Algorithm`.

    Raises:
      ValueError: if the environment is unknown or not supported, or if configuration, environment and network
        do not go together (see `a3c_jax.checks`).
      TypeError: if the environment, the network or the algorithm lacks a part.
    """
    check_config(config)
    environment_given = environment is not None
    if not environment_given:
        environment = environments.make(config.environment, action_bounds=config.action_bounds)
    environment = environments.adapt(environment, config.action_bounds)
    parts = Parts(
        environment=environment,
        network=network,
        make_algorithm=_choose_algorithm(config, algorithm, loss),
        make_optimizer=(
            _describe_optimizer if optimizer is None else checked_optimizer(config, optimizer)
        ),
    )
    check_setup(
        config,
        environment,
        parts.make_algorithm(config, environment, network).network,
        environment_given=environment_given,
        network_given=network is not None,
    )
    # Traced once, so that errors of a loss or an algorithm come before anything is compiled. Whoever has disabled
    # compilation wants to look at numbers in their functions, of which a traced function sees none.
    settings: Any = jax.config
    is_own = loss is not None or algorithm is not None or config.algorithm != "a3c"
    if is_own and not settings.jax_disable_jit:
        check_traceable(describe(config, parts), config.learning_rate)
    return parts


def describe(config: A3CConfig, parts: Parts) -> Blueprint:
    """The blueprint of a configuration, some of whose numbers may be traced (`A3CConfig.with_traced`)."""
    environment = parts.environment
    algorithm = parts.make_algorithm(config, environment, parts.network)

    def optimizer(learning_rate: Any) -> optax.GradientTransformation:
        of_weights = parts.make_optimizer(config, learning_rate)
        has_moments = config.normalize_observations or config.normalize_rewards
        return normalization.merge_statistics(of_weights) if has_moments else of_weights

    at_newest = functools.partial(differentiate, algorithm) if algorithm.learns_at_newest else None
    return Blueprint(
        environment=environment,
        network=algorithm.network,
        worker_step=_make_step(config, environment, algorithm),
        start=_make_start(config, environment, algorithm),
        init=_make_init(config, environment, algorithm),
        optimizer=optimizer,
        updater=lambda learning_rate: make_updater(
            optimizer(learning_rate),
            after_update=algorithm.after_update,
            differentiate=at_newest,
        ),
        evaluation_key=lambda seed: _split_seed(seed)[2],
    )


def _make_step(config: A3CConfig, environment: Any, algorithm: Algorithm) -> Any:
    """The worker step, for environments in JAX or on the host."""
    is_host = isinstance(environment, HostEnvironment)
    make: Callable[..., Any] = HostStepFunctions if is_host else make_worker_step
    return make(
        environment,
        algorithm,
        t_max=config.t_max,
        normalizing_discount=config.discount,
        reward_clip=config.reward_clip,
        terminal_reward=config.terminal_reward,
    )


def check_traceable(blueprint: Blueprint, learning_rate: float) -> None:
    """Traces one step of a worker and its update, so that what they raise is raised now."""
    seed, worker = jax.ShapeDtypeStruct((), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.eval_shape(blueprint.start, seed, worker)
    params = jax.eval_shape(blueprint.init, seed, state.observation)
    step = functools.partial(rehearse, blueprint.worker_step)
    gradients, _, _ = jax.eval_shape(step, params, state)
    updater = blueprint.updater(learning_rate)
    optimizer_state = jax.eval_shape(updater.init, params)
    jax.eval_shape(updater.update, gradients, optimizer_state, params, worker)


def _choose_algorithm(
    config: A3CConfig, algorithm: MakeAlgorithm | None, loss: Loss | None
) -> MakeAlgorithm:
    """The algorithm that was given or named, with the loss that was given, both checked."""
    if algorithm is not None and config.algorithm != default_of("algorithm"):
        raise ValueError(
            "A3CConfig.algorithm must stay at its default beside algorithm=..., got "
            f"{config.algorithm!r}; leave it out."
        )
    found: Any = find_algorithm(config.algorithm) if algorithm is None else algorithm
    # A3C may come with arguments bound to it, such as a loss.
    is_a3c = getattr(found, "func", found) is a3c
    if loss is not None:
        if not is_a3c:
            raise ValueError(
                "loss belongs to the algorithm 'a3c' and must not be given beside another one; bind it to your "
                "algorithm with functools.partial."
            )
        found = functools.partial(found, loss=loss)
    own_loss = getattr(found, "keywords", {}).get("loss") if is_a3c else None
    if own_loss is not None:
        check_loss(config, own_loss)
    return checked_algorithm(found)


def _make_start(
    config: A3CConfig, environment: environments.Environment, algorithm: Algorithm
) -> Callable[[Any, Any], rollout.RolloutState]:
    def start(seed: Any, worker: Any) -> rollout.RolloutState:
        _, workers_key, _ = _split_seed(seed)
        key = jax.random.fold_in(workers_key, worker)
        carry = algorithm.initialize_carry(config.envs_per_worker)
        state = rollout.start(environment, key, config.envs_per_worker, carry)
        if config.normalize_rewards:
            state = state._replace(discounted_return=jnp.zeros(config.envs_per_worker))
        # Numbers 0 and 1 would be the keys into which the start of a rollout splits this one.
        return state._replace(own=algorithm.init_own(jax.random.fold_in(key, 2), worker))

    return start


def _make_init(
    config: A3CConfig, environment: environments.Environment, algorithm: Algorithm
) -> Callable[[Any, Any], Any]:
    def init(seed: Any, observation: Any) -> Any:
        network_key, _, _ = _split_seed(seed)
        params = algorithm.network.init(network_key, observation)
        statistics = {}
        if config.normalize_observations:
            shape = environment.observation_shape
            statistics["observation"] = normalization.initial_moments(shape)
        if config.normalize_rewards:
            statistics["reward"] = normalization.initial_moments(())
        if statistics:
            if not isinstance(params, dict):
                raise TypeError(
                    "A3CConfig.normalize_observations and normalize_rewards need a network whose parameters are "
                    f"a dict, as Flax linen's are, got {type(params).__name__}; turn them off."
                )
            params = {**params, normalization.STATISTICS: statistics}
        return add_shared(algorithm, params)

    return init


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
