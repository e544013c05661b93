"""What a worker does: how it chooses actions, and what it minimises. A3C is one such algorithm.

An algorithm is a few pure functions. Neither the threads nor the store, the checkpoints or the replay know which one
runs. So another one, written with the same means, works with all of them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax

from a3c_jax import normalization
from a3c_jax.config import A3CConfig
from a3c_jax.losses import Metrics, a3c_loss
from a3c_jax.networks import ActorCritic, network_functions, trajectory_apply
from a3c_jax.protocol import Environment
from a3c_jax.rollout import Trajectory
from a3c_jax.torsos import choose_torso

Array = jax.Array
Loss: TypeAlias = Callable[[Any, Callable[[Any, Any], Any], Trajectory], tuple[Array, Metrics]]

SHARED = "algorithm"
"""The key of what an algorithm shares among its workers in a parameter tree."""


class Algorithm(NamedTuple):
    """How a worker chooses actions and what it minimises.

    `own` below is what the algorithm keeps for one worker, and what it shares among all workers is in the
    parameters, as `params["algorithm"]`. Both belong to the run as its parameters do: snapshots, checkpoints,
    replay and simulation hold them.

    Attributes:
      network: the network that is trained.
      initialize_carry: `(num_envs) -> carry`: what a recurrent network remembers at an episode's start, a tree
        of `[N, ...]`; `()` for a feed-forward network.
      act: `(params, key, observation, carry, own) -> (action, log_prob, carry)`, on `[N, ...]`. The
        log-probability is that of the action, `[N]` float32, in nats.
      loss: `(params, trajectory, own) -> (scalar, metrics)`: what a worker minimises, and what to report about
        it, scalars by name.
      init_own: `(key, worker) -> own`: what to keep for the worker of this number, a tree of arrays. By
        default nothing, `()`.
      init_shared: `(params) -> shared`: what all workers share besides the parameters, a target network for
        instance; a dict of trees of arrays. The optimizer does not see it. None shares nothing.
      after_update: `(params) -> params`: called after every update, as part of it, to renew what is shared.
      learns_at_newest: where the loss is differentiated. If False, at the parameters that the worker pulled and
        played with, as in the paper: other workers' updates come between gradient and update. If True, at the
        newest parameters, when the update is made. Then other workers' updates come between action and
        gradient: `trajectory.log_prob_tm1` tells how probable the action was when it was chosen.
    """

    network: Any
    initialize_carry: Callable[[int], Any]
    act: Callable[[Any, Array, Any, Any, Any], tuple[Array, Array, Any]]
    loss: Callable[[Any, Trajectory, Any], tuple[Array, Metrics]]
    init_own: Callable[[Array, Array], Any] = lambda key, worker: ()
    init_shared: Callable[[Any], Any] | None = None
    after_update: Callable[[Any], Any] | None = None
    learns_at_newest: bool = False


MakeAlgorithm: TypeAlias = Callable[[A3CConfig, Environment, Any], Algorithm]
"""`(config, environment, network) -> Algorithm`. The network is None if the algorithm shall make its own."""


def a3c(
    config: A3CConfig,
    environment: Environment,
    network: Any = None,
    *,
    loss: Loss | None = None,
    learns_at_newest: bool = False,
) -> Algorithm:
    """Asynchronous advantage actor-critic, or another method that learns a policy and a state value.

    Args:
      config: the configuration.
      environment: what is played.
      network: what to train; None takes the network that the configuration describes.
      loss: `loss(params, apply_fn, trajectory) -> (scalar, metrics)`; None takes A3C's loss.
        `a3c_jax.losses.a3c_loss` says what `apply_fn` is.
      learns_at_newest: see `Algorithm`.

    Source: Mnih et al. 2016, arXiv:1602.01783, Algorithm S3.
    """
    network = describe_network(config, environment) if network is None else network
    loss = describe_loss(config) if loss is None else loss
    functions = network_functions(network)
    apply_fn = trajectory_apply(network)

    def act(
        params: Any, key: Array, observation: Any, carry: Any, own: Any
    ) -> tuple[Array, Array, Any]:
        distribution, carry = functions.act(params, observation, carry)
        action = distribution.sample(key)
        return action, distribution.log_prob(action), carry

    return Algorithm(
        network=network,
        initialize_carry=functions.initialize_carry,
        act=act,
        loss=lambda params, trajectory, own: loss(params, apply_fn, trajectory),
        learns_at_newest=learns_at_newest,
    )


def describe_loss(config: A3CConfig) -> Loss:
    """A3C's loss with a configuration's weights."""

    return functools.partial(
        a3c_loss,
        discount=config.discount,
        critic_cost=config.critic_cost,
        entropy_cost=config.entropy_cost,
        lambda_=config.gae_lambda,
    )


def describe_network(
    config: A3CConfig,
    environment: Environment,
    kind: Callable[..., Any] = ActorCritic,
    **options: Any,
) -> Any:
    """The network that a configuration describes.

    Args:
      config: the configuration.
      environment: what is played.
      kind: what to make it with: `ActorCritic`, or a class whose attributes have the same names.
      **options: attributes that the configuration does not determine.
    """
    shape = environment.observation_shape
    torso = choose_torso(shape) if config.torso == "auto" else config.torso
    ndims = [len(shape) for shape in jax.tree.leaves(shape, is_leaf=normalization.is_shape)]
    described = {
        "num_actions": environment.num_actions,
        "continuous": environment.continuous,
        "hidden_sizes": config.hidden_sizes,
        "activation": config.activation,
        "shared_torso": config.shared_torso,
        "observation_ndim": ndims[0] if normalization.is_shape(shape) else tuple(ndims),
        "torso": torso,
        "core": config.core,
        "core_size": config.core_size,
        "forget_bias": config.forget_bias,
        "state_dependent_scale": config.state_dependent_scale,
    }
    return kind(**described | options)


def add_shared(algorithm: Algorithm, params: Any) -> Any:
    """The parameters with what the algorithm shares among its workers.

    Raises:
      TypeError: if it shares something and the parameters are no dict.
    """
    if algorithm.init_shared is None:
        return params
    if not isinstance(params, dict):
        raise TypeError(
            "an algorithm with init_shared needs a network whose parameters are a dict, as Flax linen's are, got "
            f"{type(params).__name__}; let the network's init return one."
        )
    return {**params, SHARED: algorithm.init_shared(params)}


def split_shared(params: Any) -> tuple[Any, dict[str, Any]]:
    """The parameters that are trained, and in a dict under the key `SHARED` what is shared besides, if anything."""
    if not isinstance(params, dict) or SHARED not in params:
        return params, {}
    weights = {key: value for key, value in params.items() if key != SHARED}
    return weights, {SHARED: params[SHARED]}


def join_shared(weights: Any, shared: dict[str, Any]) -> Any:
    """What `split_shared` took apart."""
    return {**weights, **shared} if shared else weights
