"""Actor-critic networks in Flax linen: a torso, an optional recurrent core, a policy head and a value head.

A recurrent network has a carry: what it remembers of the episode so far. A feed-forward one has none, the
empty tuple, so that the same code drives both.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from a3c_jax import kernels, moments
from a3c_jax.distributions import Categorical, DiagonalGaussian

Array = jax.Array
Carry = Any
Distribution = Categorical | DiagonalGaussian

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "tanh": nn.tanh,
    "elu": nn.elu,
    "silu": nn.silu,
    "gelu": nn.gelu,
}

# The policy's head starts small, so that the first policy is close to uniform whatever the observation.
# The first argument is a variance: standard deviations of 0.01, 1 and sqrt(2) over the root of fan-in.
_POLICY_INIT = nn.initializers.variance_scaling(1e-4, "fan_in", "truncated_normal")
_VALUE_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
_TORSO_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")


# The gate that keeps what a core remembers: the LSTM's forget gate, the GRU's update gate.
_KEEPING_GATES = {"lstm": "hf", "gru": "iz"}

_SCALE_OFFSET = 0.5413  # softplus of it is one: the first policy has the standard deviation one
_MIN_SCALE = 1e-3


def _dense(size: int, kernel_init: Any) -> nn.Dense:
    return nn.Dense(size, kernel_init=kernel_init, dot_general=kernels.dot_general)


class MLP(nn.Module):
    """A multilayer perceptron that flattens each observation first.

    Attributes:
      hidden_sizes: width of each layer.
      activation: applied after each layer.
      observation_ndim: how many trailing dimensions make up one observation.
    """

    hidden_sizes: tuple[int, ...]
    activation: Callable[[Array], Array]
    observation_ndim: int = 1

    @nn.compact
    def __call__(self, observation: Array) -> Array:
        """Maps `[..., *observation]` of any dtype to `[..., hidden_sizes[-1]]` float32."""
        batch = observation.shape[: observation.ndim - self.observation_ndim]
        x = observation.reshape(*batch, -1).astype(jnp.float32)
        for size in self.hidden_sizes:
            x = self.activation(_dense(size, _TORSO_INIT)(x))
        return x


class Conv(nn.Module):
    """The torso of Young & Tian 2019 (arXiv:1903.03176) for MinAtar: one 3x3 convolution, then dense layers.

    Attributes:
      hidden_sizes: width of each dense layer.
      activation: applied after each layer.
      channels: number of the convolution's channels.
    """

    hidden_sizes: tuple[int, ...]
    activation: Callable[[Array], Array]
    channels: int = 16

    @nn.compact
    def __call__(self, observation: Array) -> Array:
        """Maps images `[..., height, width, channels]` of any dtype to `[..., hidden_sizes[-1]]` float32."""
        batch, image = observation.shape[:-3], observation.shape[-3:]
        x = observation.reshape(-1, *image).astype(jnp.float32)
        conv = nn.Conv(self.channels, (3, 3), padding="VALID", kernel_init=_TORSO_INIT)
        x = self.activation(conv(x)).reshape(*batch, -1)
        for size in self.hidden_sizes:
            x = self.activation(_dense(size, _TORSO_INIT)(x))
        return x


def initial_carry(core: str | None, core_size: int, num_envs: int) -> Carry:
    """A core's carry at an episode's start: zeros, `[N, core_size]`, a pair of them for an LSTM."""
    zeros = jnp.zeros((num_envs, core_size))
    return {None: (), "lstm": (zeros, zeros), "gru": zeros}[core]


class Trunk(nn.Module):
    """A torso and, where `core` names one, a recurrent core on top.

    Attributes:
      torso: maps observations `[..., *observation]` to features `[..., F]`.
      core: None, `lstm` or `gru`.
      core_size: the core's width.
    """

    torso: nn.Module
    core: str | None = None
    core_size: int = 256

    def setup(self) -> None:
        if self.core is not None:
            cell = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell}[self.core]
            self.cell = cell(self.core_size)

    def __call__(self, observation: Array, carry: Carry) -> tuple[Array, Carry]:
        """One step: features `[..., F]` and the carry after it."""
        features = self.torso(observation)
        if self.core is None:
            return features, carry
        carry, features = self.cell(carry, features)
        return features, carry

    def unroll(self, observation: Array, carry: Carry, starts: Array) -> tuple[Array, Carry]:
        """T steps.

        Args:
          observation: `[T, N, *observation]`.
          carry: at the first of them, `[N, ...]`.
          starts: whether an episode starts with this observation, `[T, N]` bool: the carry is reset first.

        Returns:
          Features `[T, N, F]`, and the carry after each step `[T, N, ...]`.
        """
        features = self.torso(observation)
        if self.core is None:
            return features, carry
        fresh = initial_carry(self.core, self.core_size, observation.shape[1])

        def step(cell: nn.Module, carry: Carry, inputs: Any) -> tuple[Carry, Any]:
            x, start = inputs
            carry, features = cell(select(start, fresh, carry), x)
            return carry, (features, carry)

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        _, (features, carries) = scan(self.cell, carry, (features, starts))
        return features, carries


class ActorCritic(nn.Module):
    """A policy and a state-value function.

    Attributes:
      num_actions: number of discrete actions, or of a continuous action's dimensions.
      hidden_sizes: width of each hidden layer.
      activation: name of the non-linearity, a key of `ACTIVATIONS`.
      shared_torso: whether actor and critic share everything but the heads.
      observation_ndim: how many trailing dimensions make up one observation.
      continuous: whether actions are continuous: the policy is then a diagonal Gaussian.
      torso: `mlp` or `conv`.
      core: None, `lstm` or `gru`.
      core_size: the core's width.
      forget_bias: at which the bias of the gate starts that keeps what a core remembers. At 0 it forgets half of it
        at every step.
      state_dependent_scale: whether a Gaussian's standard deviation is the softplus of a layer, as in the
        paper, or the exponential of a free parameter.
    """

    num_actions: int
    hidden_sizes: tuple[int, ...] = (128,)
    activation: str = "relu"
    shared_torso: bool = False
    observation_ndim: int = 1
    continuous: bool = False
    torso: str = "mlp"
    core: str | None = None
    core_size: int = 256
    forget_bias: float = 1.0
    state_dependent_scale: bool = True

    @nn.nowrap
    def init(self, *arguments: Any, **options: Any) -> Any:
        """As `flax.linen.Module.init`, whose cells start all biases at one value, and then `forget_bias`."""
        variables = super().init(*arguments, **options)
        if self.core is None:
            return variables
        keeping = ("cell", _KEEPING_GATES[self.core], "bias")

        def start(path: Any, x: Array) -> Array:
            names = tuple(part.key for part in path)
            return jnp.full_like(x, self.forget_bias) if names[-3:] == keeping else x

        return jax.tree_util.tree_map_with_path(start, variables)

    def setup(self) -> None:
        activation = ACTIVATIONS[self.activation]

        def trunk() -> Trunk:
            torso = (
                Conv(self.hidden_sizes, activation)
                if self.torso == "conv"
                else MLP(self.hidden_sizes, activation, self.observation_ndim)
            )
            return Trunk(torso, self.core, self.core_size)

        self.actor_trunk = trunk()
        self.critic_trunk = self.actor_trunk if self.shared_torso else trunk()
        self.policy_head = _dense(self.num_actions, _POLICY_INIT)
        self.value_head = _dense(1, _VALUE_INIT)
        if self.continuous and self.state_dependent_scale:
            self.scale_head = _dense(self.num_actions, _POLICY_INIT)
        elif self.continuous:
            self.log_scale = self.param("log_scale", nn.initializers.zeros, (self.num_actions,))

    def initialize_carry(self, num_envs: int) -> Carry:
        """What the network remembers at an episode's start, a tree of `[N, ...]`; `()` without a core."""
        carry = initial_carry(self.core, self.core_size, num_envs)
        return carry if self.core is None or self.shared_torso else (carry, carry)

    def __call__(self, observation: Array, carry: Carry = None) -> tuple[Distribution, Array]:
        """Maps observations `[..., *observation]` to a distribution and values, both of batch `[...]`.

        A recurrent network takes observations `[N, *observation]`; without a carry, each starts an episode.
        """
        carry = self._carry(observation, carry)
        return self.act(observation, carry)[0], self.value(observation, carry)

    def actor(self, observation: Array) -> Distribution:
        """The policy alone, at an episode's start where the network is recurrent."""
        return self.act(observation, self._carry(observation, None))[0]

    def critic(self, observation: Array) -> Array:
        """The value alone, `[...]`: no trailing dimension of one that could broadcast by accident."""
        return self.value(observation, self._carry(observation, None))

    def act(self, observation: Array, carry: Carry) -> tuple[Distribution, Carry]:
        """One step of the policy, and the carry after it. What only the critic needs is computed where it remembers."""
        actor_carry, critic_carry = self._split(carry)
        features, actor_carry = self.actor_trunk(observation, actor_carry)
        if self.core is None:
            return self._policy(features), ()
        if self.shared_torso:
            return self._policy(features), actor_carry
        _, critic_carry = self.critic_trunk(observation, critic_carry)
        return self._policy(features), (actor_carry, critic_carry)

    def value(self, observation: Array, carry: Carry) -> Array:
        """The value of an observation that follows the carry, `[...]`."""
        features, _ = self.critic_trunk(observation, self._split(carry)[1])
        return self._value(features)

    def unroll(
        self, observation: Array, carry: Carry, starts: Array
    ) -> tuple[Distribution, Array, Carry]:
        """T steps: see `Trunk.unroll`. Returns distribution and values `[T, N]`, and the carry after each step."""
        actor_carry, critic_carry = self._split(carry)
        features, actor_carries = self.actor_trunk.unroll(observation, actor_carry, starts)
        policy = self._policy(features)
        if self.shared_torso:
            return policy, self._value(features), actor_carries
        features, critic_carries = self.critic_trunk.unroll(observation, critic_carry, starts)
        carries = () if self.core is None else (actor_carries, critic_carries)
        return policy, self._value(features), carries

    def _carry(self, observation: Array, carry: Carry) -> Carry:
        return self.initialize_carry(observation.shape[0]) if carry is None else carry

    def _split(self, carry: Carry) -> tuple[Carry, Carry]:
        """The actor's carry and the critic's."""
        return (carry, carry) if self.core is None or self.shared_torso else carry

    def _policy(self, features: Array) -> Distribution:
        outputs = self.policy_head(features)  # logits, never probabilities; or means
        if not self.continuous:
            return Categorical(outputs)
        if self.state_dependent_scale:
            scale = nn.softplus(self.scale_head(features) + _SCALE_OFFSET) + _MIN_SCALE
        else:
            scale = jnp.broadcast_to(jnp.exp(self.log_scale), outputs.shape)
        return DiagonalGaussian(outputs, scale)

    def _value(self, features: Array) -> Array:
        return jnp.squeeze(self.value_head(features), axis=-1)


class Model(NamedTuple):
    """A network as pure functions of its parameters: all that the rest of the package knows of it.

    Attributes:
      initialize_carry: `(num_envs) -> carry`.
      act: `(params, observation, carry) -> (distribution, carry)`, on `[N, ...]`.
      value: `(params, observation, carry) -> v`, on any leading dimensions.
      unroll: `(params, observation, carry, starts) -> (distribution, v, carries)`, on `[T, N, ...]`.
    """

    initialize_carry: Callable[[int], Carry]
    act: Callable[[Any, Array, Carry], tuple[Any, Carry]]
    value: Callable[[Any, Array, Carry], Array]
    unroll: Callable[[Any, Array, Carry, Array], tuple[Any, Array, Carry]]


def model(network: nn.Module) -> Model:
    """The pure functions of a network. Where the parameters hold the observations' moments, it sees them normalised.

    Args:
      network: a module like `ActorCritic`; or any feed-forward one that maps observations, with the methods
        `__call__` (a distribution and values), `actor` and `critic`.
    """
    recurrent = hasattr(network, "initialize_carry")

    def apply(params: Any, observation: Array, *inputs: Any, method: str) -> Any:
        observation = moments.normalize_observation(params, observation)
        return network.apply(params, observation, *inputs, method=method)

    if recurrent:
        return Model(
            network.initialize_carry,
            lambda params, *inputs: apply(params, *inputs, method="act"),
            lambda params, *inputs: apply(params, *inputs, method="value"),
            lambda params, *inputs: apply(params, *inputs, method="unroll"),
        )
    return Model(
        lambda num_envs: (),
        lambda params, observation, _: (apply(params, observation, method="actor"), ()),
        lambda params, observation, _: apply(params, observation, method="critic"),
        lambda params, observation, *_: (*apply(params, observation, method="__call__"), ()),
    )


def trajectory_apply(network: nn.Module) -> Callable[[Any, Any], tuple[Any, Array, Array]]:
    """An `apply_fn` for `a3c_jax.losses.a3c_loss` from a network (see `model`).

    Returns:
      A function from parameters and a trajectory to the distribution at `observation_tm1`, its values
      `v_tm1`, and `v_t`, the values of the observations that followed.

    A recurrent network is unrolled from the carry at the segment's start, which is reset where an episode
    ended, and the gradient flows through the whole segment.

    `v_t` costs one small forward pass. Inside an episode the observation that followed is the next one
    acted upon, so that `v_t` is `v_tm1` one step on. Only after the segment's last step and at a time
    limit is it not: there the network goes on from its carry before the reset. The pass over all final
    observations runs only where a time limit was met. (After a termination `v_t` is never read: its
    discount is zero.)
    """

    functions = model(network)

    def apply_fn(params: Any, trajectory: Any) -> tuple[Any, Array, Array]:
        ended_t = trajectory.terminated_t | trajectory.truncated_t
        starts = jnp.concatenate([jnp.zeros_like(ended_t[:1]), ended_t[:-1]])
        distribution_tm1, v_tm1, carries = functions.unroll(
            params, trajectory.observation_tm1, trajectory.carry, starts
        )
        v_last = functions.value(
            params, trajectory.observation_t[-1:], jax.tree.map(lambda x: x[-1:], carries)
        )
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


def select(flags: Array, new: Any, old: Any) -> Any:
    """The tree `new` where the flags `[N]` are set, and `old` elsewhere; leaves are `[N, ...]`."""
    return jax.tree.map(
        lambda x, y: jnp.where(flags.reshape(flags.shape + (1,) * (y.ndim - 1)), x, y), new, old
    )
