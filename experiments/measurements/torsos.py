"""Networks as users write them, with plain Flax: what `networks` and `convolutions`, beside this file, measure."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from a3c_jax.networks import ActorCritic
from a3c_jax.torsos import Trunk, background


class MLP(nn.Module):
    """Dense layers, each with an activation, and with a LayerNorm in between if wanted."""

    sizes: tuple[int, ...]
    activation: Callable[..., Any] = nn.tanh
    normalized: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for size in self.sizes:
            x = nn.Dense(size)(x)
            x = self.activation(nn.LayerNorm()(x) if self.normalized else x)
        return x


class Attention(nn.Module):
    """Attention with two heads over four tokens of 16 numbers."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        tokens = nn.Dense(64)(x).reshape(*x.shape[:-1], 4, 16)
        tokens += nn.MultiHeadDotProductAttention(num_heads=2)(tokens, tokens)
        return nn.tanh(nn.Dense(32)(tokens.reshape(*x.shape[:-1], 64)))


class Convolution(nn.Module):
    """A convolution with eight channels along the observation."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        features = nn.relu(nn.Conv(8, (3,))(x.reshape(-1, x.shape[-1], 1)))
        return nn.tanh(nn.Dense(32)(features.reshape(*x.shape[:-1], -1)))


class Residual(nn.Module):
    """Four residual blocks."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(32)(x)
        for _ in range(4):
            x += nn.Dense(32)(nn.gelu(nn.Dense(64)(x)))
        return x


class Fourier(nn.Module):
    """Fourier features with fixed frequencies, then a dense layer."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        phases = x @ jax.random.normal(jax.random.key(0), (x.shape[-1], 32))
        return nn.tanh(
            nn.Dense(64)(jax.numpy.concatenate([jax.numpy.sin(phases), jax.numpy.cos(phases)], -1))
        )


class MinAtar(nn.Module):
    """The torso of MinAtar's paper: `a3c_jax.torsos.Conv` with XLA's convolution."""

    hidden_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        batch, image = x.shape[:-3], x.shape[-3:]
        x = x.reshape(-1, *image).astype(jnp.float32)
        x = nn.relu(nn.Conv(16, (3, 3), padding="VALID")(x)).reshape(*batch, -1)
        for size in self.hidden_sizes:
            x = nn.relu(nn.Dense(size)(x))
        return x


class Atari(nn.Module):
    """The torso of A3C's paper: `a3c_jax.torsos.Atari` with XLA's convolutions, and without chunks."""

    hidden_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        batch, frames = x.shape[:-3], x.shape[-3:]
        x = x.reshape(-1, *frames)
        x = (x - background(x)[:, None, None, None]) / 255
        x = jnp.moveaxis(x, 1, -1)
        x = nn.relu(nn.Conv(16, (8, 8), (4, 4), padding="VALID")(x))
        x = nn.relu(nn.Conv(32, (4, 4), (2, 2), padding="VALID")(x))
        x = x.reshape(*batch, -1)
        for size in self.hidden_sizes:
            x = nn.relu(nn.Dense(size)(x))
        return x


class PlainActorCritic(ActorCritic):
    """The built-in network for images, with XLA's convolutions."""

    def make_trunk(self) -> Trunk:
        torso = MinAtar if self.torso == "conv" else Atari
        return Trunk(torso(self.hidden_sizes), self.core, self.core_size, self.forget_bias)


def _mlp(*sizes: int, **options: Any) -> Callable[[], nn.Module]:
    return functools.partial(MLP, sizes, **options)


TORSOS: dict[str, Callable[[], nn.Module]] = {
    "16": _mlp(16),
    "256": _mlp(256),
    "32, 32, relu": _mlp(32, 32, activation=nn.relu),
    "64, 64": _mlp(64, 64),
    "128, 128": _mlp(128, 128),
    "256, 256": _mlp(256, 256),
    "six of 64": _mlp(*[64] * 6),
    "six of 64, relu": _mlp(*[64] * 6, activation=nn.relu),
    "three of 64, LayerNorm": _mlp(64, 64, 64, normalized=True),
    "attention": Attention,
    "convolution": Convolution,
    "residual": Residual,
    "fourier": Fourier,
}
