"""Networks as users write them, with plain Flax: what `experiments.measurements.networks` measures."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax


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
