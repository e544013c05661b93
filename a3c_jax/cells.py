"""Recurrent cells in Flax linen whose initial forget-gate bias can be chosen.

The cells compute the same functions as Flax's `OptimizedLSTMCell` and `GRUCell`, from parameters of the same
names and shapes. Flax's own start all biases at one value, so that a new cell forgets half of its memory at
every step.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
Carry = Any

_INPUT_INIT = nn.initializers.lecun_normal()
_RECURRENT_INIT = nn.initializers.orthogonal()


class LSTMCell(nn.Module):
    r"""Long short-term memory.

    .. math::
      c' = \sigma(f) c + \sigma(i) \tanh(g), \quad h' = \sigma(o) \tanh(c')

    Each of i, f, g and o is a linear function of the input and of h.

    Attributes:
      features: the width of the cell.
      forget_bias: the initial bias of the forget gate f. With a larger value, a new cell remembers longer.

    Source: Hochreiter & Schmidhuber 1997; the bias is that of Gers, Schmidhuber & Cummins 2000.
    """

    features: int
    forget_bias: float = 1.0

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], Array]:
        """One step.

        Args:
          carry: c and h, `[..., features]` each.
          x: the input, `[..., F]`.

        Returns:
          The carry after the step, and h, the output.
        """
        c, h = carry
        input_layers, recurrent_layers = [], []
        for gate in "ifgo":
            bias = self.forget_bias if gate == "f" else 0.0
            input_layers.append(_Parameters(self.features, _INPUT_INIT, name=f"i{gate}")(x))
            recurrent_layers.append(
                _Parameters(self.features, _RECURRENT_INIT, bias, name=f"h{gate}")(h)
            )
        # One product for the four gates is faster than four.
        kernels, biases = (jnp.concatenate(x, -1) for x in zip(*recurrent_layers, strict=True))
        gates = h @ kernels + biases + x @ jnp.concatenate([k for k, _ in input_layers], -1)
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = nn.sigmoid(f) * c + nn.sigmoid(i) * nn.tanh(g)
        h = nn.sigmoid(o) * nn.tanh(c)
        return (c, h), h


class GRUCell(nn.Module):
    r"""The gated recurrent unit.

    .. math::
      h' = (1 - \sigma(z)) \tanh(n) + \sigma(z) h

    The update gate z is a linear function of the input and of h, and so is n, in which the part of h is
    multiplied by the reset gate.

    Attributes:
      features: the width of the cell.
      forget_bias: the initial bias of the update gate z. With a larger value, a new cell remembers longer.

    Source: Cho et al. 2014, arXiv:1406.1078.
    """

    features: int
    forget_bias: float = 1.0

    @nn.compact
    def __call__(self, h: Array, x: Array) -> tuple[Array, Array]:
        """One step.

        Args:
          h: the carry, `[..., features]`.
          x: the input, `[..., F]`.

        Returns:
          The carry after the step, and the output. The two are the same.
        """

        def input_layer(gate: str, bias: float = 0.0) -> Array:
            layer = nn.Dense(
                self.features, kernel_init=_INPUT_INIT, bias_init=_constant(bias), name=f"i{gate}"
            )
            return layer(x)

        def recurrent_layer(gate: str, use_bias: bool = False) -> Array:
            layer = nn.Dense(
                self.features, use_bias=use_bias, kernel_init=_RECURRENT_INIT, name=f"h{gate}"
            )
            return layer(h)

        r = nn.sigmoid(input_layer("r") + recurrent_layer("r"))
        z = nn.sigmoid(input_layer("z", self.forget_bias) + recurrent_layer("z"))
        n = nn.tanh(input_layer("n") + r * recurrent_layer("n", use_bias=True))
        h = (1.0 - z) * n + z * h
        return h, h


def make_cell(core: str, core_size: int, forget_bias: float) -> LSTMCell | GRUCell:
    """The cell named `lstm` or `gru`."""
    cells: dict[str, Any] = {"lstm": LSTMCell, "gru": GRUCell}
    return cells[core](core_size, forget_bias)


def initial_carry(core: str | None, core_size: int, num_envs: int) -> Carry:
    """The carry at an episode's start: zeros, `[N, core_size]`; a pair of them for an LSTM, `()` without a core."""
    zeros = jnp.zeros((num_envs, core_size))
    return {None: (), "lstm": (zeros, zeros), "gru": zeros}[core]


def where_tree(flags: Array, new: Any, old: Any) -> Any:
    """Selects between two trees of `[N, ...]`: `new` where the flags `[N]` are set, and `old` elsewhere."""
    return jax.tree.map(
        lambda x, y: jnp.where(flags.reshape(flags.shape + (1,) * (y.ndim - 1)), x, y), new, old
    )


class _Parameters(nn.Module):
    """The kernel and the bias of a linear layer, under the names that `flax.linen.Dense` gives them."""

    features: int
    kernel_init: Any
    initial_bias: float | None = None

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        if self.initial_bias is None:
            return kernel, jnp.zeros(())
        return kernel, self.param("bias", _constant(self.initial_bias), (self.features,))


def _constant(value: float) -> Any:
    return nn.initializers.constant(value)
