"""The paper's other three methods: asynchronous one-step Q-learning, one-step Sarsa and n-step Q-learning.

They learn the value of every action instead of a policy and a state value. A worker takes the action of the highest
value, but with a probability epsilon any action. Targets are bootstrapped from a target network: a copy of the
parameters that is renewed only now and then.

Source: Mnih et al. 2016, arXiv:1602.01783, section 4 and Algorithms 1 and S2.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from a3c_jax.action_values import ActionValues, EpsilonGreedy
from a3c_jax.algorithm import SHARED, Algorithm, describe_network
from a3c_jax.config import LOSS_FIELDS, A3CConfig, default_of
from a3c_jax.losses import mean_over
from a3c_jax.networks import NetworkFunctions, network_functions
from a3c_jax.normalization import STATISTICS
from a3c_jax.protocol import Environment
from a3c_jax.rollout import Trajectory
from a3c_jax.value_losses import n_step_q_loss, q_learning_loss, sarsa_loss

Array = jax.Array

FINAL_EPSILONS = (0.1, 0.01, 0.5)
EPSILON_PROBABILITIES = (0.4, 0.3, 0.3)


class Exploration(NamedTuple):
    """How epsilon falls from 1: linearly, and in each environment to a final value of its own.

    Attributes:
      steps: environment steps, of all workers together, until the final values are reached.
      final_epsilons: the values that each environment draws one of.
      probabilities: how probable each of them is.
    """

    steps: int
    final_epsilons: tuple[float, ...]
    probabilities: tuple[float, ...]

    def check(self) -> None:
        """Raises a ValueError if a value is outside its range."""
        _check_positive("exploration_steps", self.steps, "100_000")
        _check_fractions("final_epsilons", self.final_epsilons, FINAL_EPSILONS)
        _check_fractions("epsilon_probabilities", self.probabilities, EPSILON_PROBABILITIES)
        same_length = len(self.probabilities) == len(self.final_epsilons)
        if not same_length or abs(sum(self.probabilities) - 1) > 1e-6:
            raise ValueError(
                "epsilon_probabilities must hold a probability for each of final_epsilons, and sum to 1, got "
                f"{self.probabilities}; use {EPSILON_PROBABILITIES}."
            )

    def draw(self, key: Array, num_envs: int) -> Array:
        """The final values of `num_envs` environments, `[N]` float32."""
        values, probabilities = jnp.float32(self.final_epsilons), jnp.float32(self.probabilities)
        return jax.random.choice(key, values, (num_envs,), p=probabilities)

    def epsilon(self, final: Array, num_steps: Array) -> Array:
        """The values after so many steps, `[N]` float32."""
        progress = jnp.minimum(1.0, num_steps / self.steps)
        return 1.0 + progress * (final - 1.0)


class Values(NamedTuple):
    """What the three losses choose from.

    Attributes:
      q_tm1: values of all actions at the observations acted upon, `[T, N, A]`.
      q_t: those of the target network at the observations that followed, `[T, N, A]`.
      next_policy: gives the policy at the observations that followed, on `[T, N]`.
    """

    q_tm1: Array
    q_t: Array
    next_policy: Callable[[], EpsilonGreedy]


ValueLoss: TypeAlias = Callable[[Values, Trajectory, Array], Array]


def one_step_q(
    config: A3CConfig, environment: Environment, network: Any = None, **options: Any
) -> Algorithm:
    """Asynchronous one-step Q-learning: see `value_method`.

    Source: Mnih et al. 2016, arXiv:1602.01783, Algorithm 1.
    """

    def loss(values: Values, trajectory: Trajectory, discount_t: Array) -> Array:
        return q_learning_loss(
            values.q_tm1,
            trajectory.action_tm1,
            trajectory.reward_t,
            discount_t,
            values.q_t,
            trajectory.valid_tm1,
        )

    return value_method(config, environment, network, loss, **options)


def one_step_sarsa(
    config: A3CConfig, environment: Environment, network: Any = None, **options: Any
) -> Algorithm:
    """Asynchronous one-step Sarsa: see `value_method`.

    Where a segment or an episode was cut, the action that would have come next is not known. There the target has
    the expectation over the policy.

    Source: Mnih et al. 2016, arXiv:1602.01783, section 4: Algorithm 1 with another target.
    """

    def loss(values: Values, trajectory: Trajectory, discount_t: Array) -> Array:
        num_actions = values.q_t.shape[-1]
        probabilities = values.next_policy().probabilities()
        taken = jax.nn.one_hot(trajectory.action_tm1[1:], num_actions, dtype=probabilities.dtype)
        known = ~(trajectory.terminated_t | trajectory.truncated_t)[:-1, ..., None]
        inside = jnp.where(known, taken, probabilities[:-1])
        return sarsa_loss(
            values.q_tm1,
            trajectory.action_tm1,
            trajectory.reward_t,
            discount_t,
            values.q_t,
            jnp.concatenate([inside, probabilities[-1:]]),
            trajectory.valid_tm1,
        )

    return value_method(config, environment, network, loss, **options)


def n_step_q(
    config: A3CConfig, environment: Environment, network: Any = None, **options: Any
) -> Algorithm:
    """Asynchronous n-step Q-learning: see `value_method`.

    Source: Mnih et al. 2016, arXiv:1602.01783, Algorithm S2.
    """

    def loss(values: Values, trajectory: Trajectory, discount_t: Array) -> Array:
        lambda_t = 1.0 - trajectory.truncated_t.astype(jnp.float32)
        return n_step_q_loss(
            values.q_tm1,
            trajectory.action_tm1,
            trajectory.reward_t,
            discount_t,
            values.q_t,
            lambda_t,
            trajectory.valid_tm1,
        )

    return value_method(config, environment, network, loss, **options)


def value_method(
    config: A3CConfig,
    environment: Environment,
    network: Any,
    loss: ValueLoss,
    *,
    target_interval: int = 10_000,
    exploration_steps: int = 1_000_000,
    final_epsilons: tuple[float, ...] = FINAL_EPSILONS,
    epsilon_probabilities: tuple[float, ...] = EPSILON_PROBABILITIES,
    **unknown: Any,
) -> Algorithm:
    """What the three methods have in common.

    Each environment of each worker draws the epsilon at which its exploration ends. It falls there linearly from 1.

    Args:
      config: the configuration.
      environment: what is played.
      network: what to train: its distribution has `values`, like `ActionValues`. None takes the network that the
        configuration describes.
      loss: the method's own.
      target_interval: environment steps, of all workers together, between two renewals of the target network; the
        paper's value for Atari is 10,000 (40,000 frames).
      exploration_steps: environment steps, of all workers together, until epsilon reaches its final value; the
        paper's value is 1,000,000 (4 million frames).
      final_epsilons: the values that are drawn from.
      epsilon_probabilities: how probable each of them is.

    Raises:
      ValueError: if actions are continuous or several at once, or if an argument is unknown or outside its range.
    """
    if unknown:
        raise ValueError(
            "an argument of this algorithm must be one of target_interval, exploration_steps, final_epsilons and "
            f"epsilon_probabilities, got {', '.join(unknown)}; correct its name."
        )
    exploration = Exploration(exploration_steps, final_epsilons, epsilon_probabilities)
    exploration.check()
    _check(config, environment, target_interval)
    if network is None:
        network = describe_network(config, environment, ActionValues, shared_torso=True)
    functions = network_functions(network)
    updates_per_target = max(1, round(target_interval / config.steps_per_update))

    def epsilon(params: Any, own: Array) -> Array:
        num_steps = params[SHARED]["num_updates"] * float(config.steps_per_update)
        return exploration.epsilon(own, num_steps)

    def act(
        params: Any, key: Array, observation: Any, carry: Any, own: Array
    ) -> tuple[Array, Array, Any]:
        distribution, carry = functions.act(params, observation, carry)
        policy = EpsilonGreedy(_values_of(distribution), epsilon(params, own))
        action = policy.sample(key)
        return action, policy.log_prob(action), carry

    def algorithm_loss(
        params: Any, trajectory: Trajectory, own: Array
    ) -> tuple[Array, dict[str, Array]]:
        values = _values(functions, params, trajectory, epsilon(params, own))
        discount_t = config.discount * (1.0 - trajectory.terminated_t)
        value_loss = loss(values, trajectory, discount_t)
        return value_loss, {
            "loss": value_loss,
            "mean_value": mean_over(trajectory.valid_tm1, jnp.max(values.q_tm1, axis=-1)),
            "epsilon": jnp.mean(epsilon(params, own)),
        }

    return Algorithm(
        network=network,
        initialize_carry=functions.initialize_carry,
        act=act,
        loss=algorithm_loss,
        init_own=lambda key, worker: exploration.draw(key, config.envs_per_worker),
        init_shared=_init_shared,
        after_update=functools.partial(_after_update, updates_per_target),
    )


def _init_shared(params: Any) -> dict[str, Any]:
    """The target network, and the number of updates so far."""
    return {"target": _weights(params), "num_updates": jnp.int32(0)}


def _after_update(updates_per_target: int, params: Any) -> Any:
    """Counts an update, and renews the target network if it is time."""
    target, num_updates = params[SHARED]["target"], params[SHARED]["num_updates"] + 1
    renews = functools.partial(jnp.where, num_updates % updates_per_target == 0)
    target = jax.tree.map(renews, _weights(params), target)
    return {**params, SHARED: {"target": target, "num_updates": num_updates}}


def _values(
    functions: NetworkFunctions, params: Any, trajectory: Trajectory, epsilon: Array
) -> Values:
    target_params = {**params, **params[SHARED]["target"]}
    ended_t = trajectory.terminated_t | trajectory.truncated_t
    starts = jnp.concatenate([jnp.zeros_like(ended_t[:1]), ended_t[:-1]])

    def unroll(params: Any) -> tuple[Any, Callable[[], Array]]:
        """The values at the observations acted upon, and a function that gives those at what followed."""
        distribution, _, carries = functions.unroll(
            params, trajectory.observation_tm1, trajectory.carry, starts
        )

        observation_t = trajectory.observation_t
        return distribution.values, lambda: functions.act(params, observation_t, carries)[0].values

    q_tm1, online_q_t = unroll(params)
    _, target_q_t = unroll(target_params)
    return Values(
        q_tm1=q_tm1,
        q_t=jax.lax.stop_gradient(target_q_t()),
        next_policy=lambda: EpsilonGreedy(jax.lax.stop_gradient(online_q_t()), epsilon),
    )


def _weights(params: Any) -> dict[str, Any]:
    """The network's own parameters."""
    return {key: value for key, value in params.items() if key not in (SHARED, STATISTICS)}


def _values_of(distribution: Any) -> Array:
    if not hasattr(distribution, "values"):
        raise TypeError(
            "the network's distribution must have values, one for each action, got "
            f"{type(distribution).__name__}; use a3c_jax.action_values.ActionValues, or one like it."
        )
    return distribution.values


def _check(config: A3CConfig, environment: Environment, target_interval: int) -> None:
    for field in LOSS_FIELDS:
        value, default = getattr(config, field), default_of(field)
        if isinstance(value, jax.core.Tracer) or value != default:  # traced in a simulation
            raise ValueError(
                f"A3CConfig.{field} belongs to A3C's loss and must stay {default} beside another algorithm, got "
                f"{value}; leave it out."
            )
    if environment.continuous or np.ndim(environment.num_actions):
        kind = "continuous actions" if environment.continuous else "several actions at once"
        raise ValueError(
            f"A3CConfig.algorithm: action values need one discrete action, but {environment.name!r} has {kind}; "
            "use 'a3c'."
        )
    _check_positive("target_interval", target_interval, "10_000")


def _check_positive(name: str, value: Any, example: str) -> None:
    if not isinstance(value, int | float | np.number) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}; use {example}.")


def _check_fractions(name: str, values: Any, example: tuple[float, ...]) -> None:
    numbers = np.asarray(values).tolist() if np.iterable(values) else [None]
    if not all(isinstance(x, int | float) and 0 <= x <= 1 for x in numbers):
        raise ValueError(
            f"{name} must be a tuple of numbers that lie in [0, 1], got {values!r}; use {example}."
        )
