"""Actor-critic networks in Flax linen: a torso, an optional recurrent core, a policy head and a value head.

A recurrent network has a carry: what it remembers of the episode so far. The carry of a feed-forward network is
the empty tuple, so that the same code drives both.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from a3c_jax import normalization
from a3c_jax.cells import Carry, initial_carry
from a3c_jax.distributions import Categorical, DiagonalGaussian, MultiCategorical
from a3c_jax.torsos import MLP, Atari, Conv, Trunk

Array = jax.Array
Distribution = Categorical | MultiCategorical | DiagonalGaussian

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "tanh": nn.tanh,
    "elu": nn.elu,
    "silu": nn.silu,
    "gelu": nn.gelu,
}

# The policy's head starts small, so that the first policy is close to uniform whatever the observation.
# The first argument is a variance: standard deviations of 0.01 and 1 over the root of fan-in.
_POLICY_INIT = nn.initializers.variance_scaling(1e-4, "fan_in", "truncated_normal")
_VALUE_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")

_SCALE_OFFSET = 0.5413  # its softplus is one, so that the first policy has standard deviation one
_MIN_SCALE = 1e-3


class ActorCritic(nn.Module):
    """A policy and a state-value function.

    The defaults are those of `A3CConfig`, so that `ActorCritic(num_actions)` is the network that the
    default configuration trains on an environment whose observations are vectors.

    Attributes:
      num_actions: number of discrete actions; for several discrete actions at once a tuple of such numbers, one
        for each (see `MultiCategorical`); for a continuous action the number of its dimensions.
      hidden_sizes: width of each hidden layer.
      activation: name of the non-linearity, a key of `ACTIVATIONS`.
      shared_torso: whether actor and critic share everything but the heads.
      observation_ndim: how many trailing dimensions make up one observation; a tuple of such numbers,
        one for each leaf, if observations are dicts or tuples (see `MLP`).
      continuous: whether actions are continuous. The policy is then a diagonal Gaussian.
      torso: `mlp`, `conv` or `atari`; see `a3c_jax.torsos`.
      core: None, `lstm` or `gru`.
      core_size: width of the core.
      forget_bias: the initial bias of the core's forget gate. With a larger value, a new core remembers longer.
      state_dependent_scale: whether a Gaussian's standard deviation is the softplus of a layer, or the
        exponential of a free parameter. (In the paper one variance for all dimensions is the softplus.)
    """

    num_actions: int | tuple[int, ...]
    hidden_sizes: tuple[int, ...] = (128,)
    activation: str = "tanh"
    shared_torso: bool = False
    observation_ndim: int | tuple[int, ...] = 1
    continuous: bool = False
    torso: str = "mlp"
    core: str | None = None
    core_size: int = 256
    forget_bias: float = 1.0
    state_dependent_scale: bool = True

    def __post_init__(self) -> None:
        # A list would make the module unhashable, and a function of it impossible to compile.
        object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))
        if not isinstance(self.observation_ndim, int):
            object.__setattr__(self, "observation_ndim", tuple(self.observation_ndim))
        if np.ndim(self.num_actions):
            object.__setattr__(self, "num_actions", tuple(np.asarray(self.num_actions).tolist()))
            if self.continuous:
                raise ValueError(
                    "num_actions must be one number of dimensions if continuous is True, got "
                    f"{self.num_actions}; set continuous to False for several discrete actions."
                )
        if self.torso not in ("mlp", "conv", "atari"):
            raise ValueError(
                f"torso must be 'mlp', 'conv' or 'atari', got {self.torso!r}; use 'mlp'."
            )
        super().__post_init__()

    @property
    def is_recurrent(self) -> bool:
        """Whether the network remembers anything: whether it has a core."""
        return self.core is not None

    def setup(self) -> None:
        self.actor_trunk = self.make_trunk()
        self.critic_trunk = self.actor_trunk if self.shared_torso else self.make_trunk()
        num_outputs = int(np.sum(self.num_actions))
        self.policy_head = nn.Dense(num_outputs, kernel_init=_POLICY_INIT)
        self.value_head = nn.Dense(1, kernel_init=_VALUE_INIT)
        if self.continuous and self.state_dependent_scale:
            self.scale_head = nn.Dense(num_outputs, kernel_init=_POLICY_INIT)
        elif self.continuous:
            self.log_scale = self.param("log_scale", nn.initializers.zeros, (num_outputs,))

    def make_trunk(self) -> Trunk:
        """Torso and core, everything but the heads."""
        activation = ACTIVATIONS[self.activation]
        torso: nn.Module
        if self.torso == "conv":
            torso = Conv(self.hidden_sizes, activation)
        elif self.torso == "atari":
            torso = Atari(self.hidden_sizes, activation)
        else:
            torso = MLP(self.hidden_sizes, activation, self.observation_ndim)
        return Trunk(torso, self.core, self.core_size, self.forget_bias)

    def initialize_carry(self, num_envs: int) -> Carry:
        """What the network remembers at an episode's start, a tree of `[N, ...]`; `()` without a core."""
        carry = initial_carry(self.core, self.core_size, num_envs)
        return self._join(carry, carry)

    def __call__(self, observation: Any, carry: Carry = None) -> tuple[Distribution, Array]:
        """Maps observations `[..., *observation]` to a distribution and values, both of batch `[...]`.

        A recurrent network takes observations `[N, *observation]`. Without a carry, each starts an episode.
        """
        if carry is None:
            carry = self._first_carry(observation)
        actor_carry, critic_carry = self._split(carry)
        features, _ = self.actor_trunk(observation, actor_carry)
        policy = self._policy(features)
        if not self.shared_torso:
            features, _ = self.critic_trunk(observation, critic_carry)
        return policy, self._value(features)

    def actor(self, observation: Any) -> Distribution:
        """The policy alone; that of an episode's start if the network is recurrent."""
        return self.act(observation, self._first_carry(observation))[0]

    def critic(self, observation: Any) -> Array:
        """The value alone, `[...]`: no trailing dimension of one that could broadcast by accident."""
        return self.value(observation, self._first_carry(observation))

    def act(self, observation: Any, carry: Carry) -> tuple[Distribution, Carry]:
        """One step of the policy, and the carry after it. The critic is computed only if it has a memory of its own."""
        actor_carry, critic_carry = self._split(carry)
        features, actor_carry = self.actor_trunk(observation, actor_carry)
        if self.core is not None and not self.shared_torso:
            _, critic_carry = self.critic_trunk(observation, critic_carry)
        return self._policy(features), self._join(actor_carry, critic_carry)

    def value(self, observation: Any, carry: Carry) -> Array:
        """The value of an observation that follows the carry, `[...]`."""
        features, _ = self.critic_trunk(observation, self._split(carry)[1])
        return self._value(features)

    def unroll(
        self, observation: Any, carry: Carry, starts: Array
    ) -> tuple[Distribution, Array, Carry]:
        """T steps: see `Trunk.unroll`. Returns distribution and values `[T, N]`, and the carry after each step."""
        actor_carry, critic_carry = self._split(carry)
        features, actor_carries = self.actor_trunk.unroll(observation, actor_carry, starts)
        policy, critic_carries = self._policy(features), actor_carries
        if not self.shared_torso:
            features, critic_carries = self.critic_trunk.unroll(observation, critic_carry, starts)
        return policy, self._value(features), self._join(actor_carries, critic_carries)

    def _first_carry(self, observation: Any) -> Carry:
        if self.core is None:
            return ()
        return self.initialize_carry(jax.tree.leaves(observation)[0].shape[0])

    def _split(self, carry: Carry) -> tuple[Carry, Carry]:
        """The actor's carry and the critic's."""
        return (carry, carry) if self.core is None or self.shared_torso else carry

    def _join(self, actor: Carry, critic: Carry) -> Carry:
        """What `_split` takes apart."""
        return actor if self.core is None or self.shared_torso else (actor, critic)

    def _policy(self, features: Array) -> Distribution:
        outputs = self.policy_head(features)  # logits, never probabilities; or means
        if isinstance(self.num_actions, tuple):
            return MultiCategorical(outputs, self.num_actions)
        if not self.continuous:
            return Categorical(outputs)
        if self.state_dependent_scale:
            scale = nn.softplus(self.scale_head(features) + _SCALE_OFFSET) + _MIN_SCALE
        else:
            scale = jnp.broadcast_to(jnp.exp(self.log_scale), outputs.shape)
        return DiagonalGaussian(outputs, scale)

    def _value(self, features: Array) -> Array:
        return jnp.squeeze(self.value_head(features), axis=-1)


class NetworkFunctions(NamedTuple):
    """A network as pure functions of its parameters: all that the rest of the package knows of it.

    Attributes:
      initialize_carry: `(num_envs) -> carry`.
      act: `(params, observation, carry) -> (distribution, carry)`, on `[N, ...]`.
      value: `(params, observation, carry) -> v`, on any leading dimensions.
      unroll: `(params, observation, carry, starts) -> (distribution, v, carries)`, on `[T, N, ...]`.
    """

    initialize_carry: Callable[[int], Carry]
    act: Callable[[Any, Any, Carry], tuple[Any, Carry]]
    value: Callable[[Any, Any, Carry], Array]
    unroll: Callable[[Any, Any, Carry, Array], tuple[Any, Array, Carry]]


def network_functions(network: Any) -> NetworkFunctions:
    """The pure functions of a network. If the parameters hold running moments, observations are normalised first.

    Args:
      network: anything with `init(key, observation) -> params` and
        `apply(params, observation) -> (distribution, values)`, on observations `[..., *observation]`: a Flax
        module with `__call__`, for instance. If it is a Flax module with the methods `actor` and `critic`, each
        is used where only one of the two is needed. A recurrent network is a Flax module that says so by an
        attribute or property `is_recurrent` that is True, and has the methods `initialize_carry`, `act`, `value`
        and `unroll`, like `ActorCritic`.
    """

    def apply(params: Any, observation: Any, *inputs: Any, method: str) -> Any:
        observation = normalization.normalize_observation(params, observation)
        return network.apply(params, observation, *inputs, method=method)

    def both(params: Any, observation: Any) -> tuple[Any, Array]:
        outputs = network.apply(params, normalization.normalize_observation(params, observation))
        if not isinstance(outputs, tuple) or len(outputs) != 2:
            raise TypeError(
                "network must give a pair (distribution, values) when it is applied, got "
                f"{type(outputs).__name__} from {type(network).__name__}; return both."
            )
        return outputs

    if getattr(network, "is_recurrent", False):
        return NetworkFunctions(
            initialize_carry=network.initialize_carry,
            act=functools.partial(apply, method="act"),
            value=functools.partial(apply, method="value"),
            unroll=functools.partial(apply, method="unroll"),
        )

    def part(method: str, number: int) -> Callable[[Any, Any], Any]:
        # A submodule of that name is another thing, which need not give the distribution or the values.
        if isinstance(network, nn.Module) and inspect.isfunction(
            getattr(type(network), method, None)
        ):
            return lambda params, observation: apply(params, observation, method=method)
        # What of the other part is computed for nothing, the compiler leaves out.
        return lambda params, observation: both(params, observation)[number]

    actor, critic = part("actor", 0), part("critic", 1)
    return NetworkFunctions(
        initialize_carry=lambda num_envs: (),
        act=lambda params, observation, _: (actor(params, observation), ()),
        value=lambda params, observation, _: critic(params, observation),
        unroll=lambda params, observation, *_: (*both(params, observation), ()),
    )


def trajectory_apply(network: Any) -> Callable[[Any, Any], tuple[Any, Array, Array]]:
    """An `apply_fn` for `a3c_jax.losses.a3c_loss` from a network (see `network_functions`).

    Returns:
      A function from parameters and a trajectory to the distribution at `observation_tm1`, its values
      `v_tm1`, and `v_t`, the values of the observations that followed.

    A recurrent network is unrolled from the carry at the segment's start. The carry is reset where an
    episode ended, and the gradient flows through the whole segment.

    `v_t` costs one small forward pass, because inside an episode the observation that followed is the next
    one acted upon: there `v_t` is `v_tm1` one step on. The exceptions are the segment's last step and time
    limits, where the network continues from its carry before the reset. The pass over all final observations
    runs only if there was a time limit. After a termination `v_t` is never read, because its discount is zero.
    """
    functions = network_functions(network)

    def apply_fn(params: Any, trajectory: Any) -> tuple[Any, Array, Array]:
        ended_t = trajectory.terminated_t | trajectory.truncated_t
        starts = jnp.concatenate([jnp.zeros_like(ended_t[:1]), ended_t[:-1]])
        distribution_tm1, v_tm1, carries = functions.unroll(
            params, trajectory.observation_tm1, trajectory.carry, starts
        )
        last = jax.tree.map(lambda x: x[-1:], (trajectory.observation_t, carries))
        v_last = functions.value(params, *last)
        v_next = jnp.concatenate([v_tm1[1:], v_last])
        v_t = jax.lax.cond(
            jnp.any(trajectory.truncated_t),
            lambda: jnp.where(
                trajectory.truncated_t,
                functions.value(params, trajectory.observation_t, carries),
                v_next,
            ),
            lambda: v_next,
        )
        return distribution_tm1, v_tm1, v_t

    return apply_fn
