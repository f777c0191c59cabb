"""The parts of the VAE, each a function of a chunk of frames and what it kept of those before.

``None`` in place of what was kept means that the chunk begins the video. It is then one frame, and
resampling in time leaves it alone. Frames are ``[B, T, height, width, C]``. Norms, SiLU, softmax
and sums are computed in float32; operands of convolutions and what passes between layers are in the
compute dtype.
"""

from collections.abc import Sequence
from typing import Final

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from skyreels_jax.models.transformer_config import Numerics
from skyreels_jax.models.vae_config import Resample, Residual
from skyreels_jax.ops.attention import attention
from skyreels_jax.ops.causal_conv import causal_conv, conv2d
from skyreels_jax.ops.linear import linear

ChunkFrames = Float[Array, "B T height width C"]
LayerFrames = Float[Array, "B U new_height new_width O"]
# What a layer keeps for the next chunk: a nest of tuples of frames. None before the first chunk.
Cache = PyTree[Array]

_UNIFORM: Final = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")
# Of the original's channel norm, against division by zero.
_SMALLEST_NORM: Final = 1e-12


class _Affine(nnx.Module):
    """A kernel ``[*size, in, out]`` and a bias: the parameters of every convolution here."""

    def __init__(self, *shape: int, numerics: Numerics, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_UNIFORM(rngs.params(), shape, numerics.params))
        self.bias = nnx.Param(jnp.zeros(shape[-1:], numerics.params))
        self.dtype = numerics.compute


class Pointwise(_Affine):
    """A convolution of kernel size 1: the same matrix at each position."""

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """Along the last axis of ``x``."""
        return linear(x, self.kernel[...], self.bias[...], dtype=self.dtype)


class CausalConv(_Affine):
    """A convolution that looks backwards in time; keeps the last frames it was given."""

    def __call__(
        self, x: ChunkFrames, cache: Cache, *, stride: int = 1
    ) -> tuple[Float[Array, "B U height width O"], Cache]:
        """``stride`` is that in time."""
        kernel, bias = self.kernel[...], self.bias[...]
        return causal_conv(x, kernel, bias, cache, stride=stride, dtype=self.dtype)


class FrameConv(_Affine):
    """A convolution in space, frame by frame."""

    def __call__(
        self, x: ChunkFrames, *, stride: int = 1, padding: tuple[int, int] = (1, 1)
    ) -> LayerFrames:
        """``padding`` is before and after, along both sides."""
        flat = x.reshape(-1, *x.shape[2:]).astype(self.dtype)
        kernel = self.kernel[...].astype(self.dtype)
        out = conv2d(flat, kernel, stride=stride, padding=padding)
        out = out + self.bias[...].astype(jnp.float32)[None, None, None]
        return out.astype(self.dtype).reshape(*x.shape[:2], *out.shape[1:])


class _ChannelNorm(nnx.Module):
    """Each position's channels scaled to root mean square 1, then by a learned factor; float32."""

    def __init__(self, dim: int, *, numerics: Numerics):
        self.scale = nnx.Param(jnp.ones((dim,), numerics.params))

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        """Over the last axis of ``x``."""
        x = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
        factor = x.shape[-1] ** 0.5 * self.scale[...].astype(jnp.float32)
        factor = factor.reshape((1,) * (x.ndim - 1) + factor.shape)
        return x / jnp.maximum(length, _SMALLEST_NORM) * factor


class ResidualBlock(nnx.Module):
    """Norm, SiLU and convolution, twice, beside a shortcut."""

    def __init__(self, place: Residual, *, numerics: Numerics, rngs: nnx.Rngs):
        before, dim = place.in_dim, place.out_dim
        self.norm1 = _ChannelNorm(before, numerics=numerics)
        self.conv1 = CausalConv(3, 3, 3, before, dim, numerics=numerics, rngs=rngs)
        self.norm2 = _ChannelNorm(dim, numerics=numerics)
        self.conv2 = CausalConv(3, 3, 3, dim, dim, numerics=numerics, rngs=rngs)
        self.shortcut = (
            None if before == dim else Pointwise(before, dim, numerics=numerics, rngs=rngs)
        )

    @jax.named_scope("residual")
    def __call__(self, x: ChunkFrames, cache: Cache) -> tuple[LayerFrames, Cache]:
        """Keeps the inputs of both convolutions."""
        first, second = (None, None) if cache is None else cache
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x, first = self.conv1(jax.nn.silu(self.norm1(x)), first)
        x, second = self.conv2(jax.nn.silu(self.norm2(x)), second)
        return shortcut + x, (first, second)


class VaeHead(nnx.Module):
    """Norm, SiLU and the last convolution."""

    def __init__(self, in_dim: int, out_dim: int, *, numerics: Numerics, rngs: nnx.Rngs):
        self.norm = _ChannelNorm(in_dim, numerics=numerics)
        self.conv = CausalConv(3, 3, 3, in_dim, out_dim, numerics=numerics, rngs=rngs)

    @jax.named_scope("head")
    def __call__(self, x: ChunkFrames, cache: Cache) -> tuple[LayerFrames, Cache]:
        """Keeps the input of the convolution."""
        return self.conv(jax.nn.silu(self.norm(x)), cache)


class AttentionBlock(nnx.Module):
    """All positions of a frame attend to each other, with one head; keeps nothing."""

    def __init__(self, dim: int, *, numerics: Numerics, rngs: nnx.Rngs):
        self.norm = _ChannelNorm(dim, numerics=numerics)
        self.to_qkv = Pointwise(dim, 3 * dim, numerics=numerics, rngs=rngs)
        self.proj = Pointwise(dim, dim, numerics=numerics, rngs=rngs)

    @jax.named_scope("attention")
    def __call__(self, x: ChunkFrames, cache: Cache) -> tuple[LayerFrames, Cache]:
        """The residual is added."""
        del cache
        batch, frames, height, width, dim = x.shape
        tokens = self.norm(x).reshape(batch * frames, height * width, dim)
        query, key, value = jnp.split(self.to_qkv(tokens)[:, :, None], 3, axis=-1)
        out = self.proj(attention(query, key, value)[:, :, 0])
        return x + out.reshape(x.shape), ()


class Downsample(nnx.Module):
    """Half the height and width, and half the frames where ``place.temporal``."""

    def __init__(self, place: Resample, *, numerics: Numerics, rngs: nnx.Rngs):
        before, dim = place.in_dim, place.out_dim
        self.conv = FrameConv(3, 3, before, dim, numerics=numerics, rngs=rngs)
        self.time_conv = (
            CausalConv(3, 1, 1, dim, dim, numerics=numerics, rngs=rngs) if place.temporal else None
        )

    @jax.named_scope("downsample")
    def __call__(self, x: ChunkFrames, cache: Cache) -> tuple[LayerFrames, Cache]:
        """Keeps the last frame; the first of a video is not convolved in time."""
        x = self.conv(x, stride=2, padding=(0, 1))
        if self.time_conv is None:
            return x, ()
        return (x, x) if cache is None else self.time_conv(x, cache, stride=2)


class Upsample(nnx.Module):
    """Twice the height and width, and twice the frames where ``place.temporal``."""

    def __init__(self, place: Resample, *, numerics: Numerics, rngs: nnx.Rngs):
        before, dim = place.in_dim, place.out_dim
        self.time_conv = (
            CausalConv(3, 1, 1, before, 2 * before, numerics=numerics, rngs=rngs)
            if place.temporal
            else None
        )
        self.conv = FrameConv(3, 3, before, dim, numerics=numerics, rngs=rngs)

    @jax.named_scope("upsample")
    def __call__(self, x: ChunkFrames, cache: Cache) -> tuple[LayerFrames, Cache]:
        """The first frame of a video is not convolved in time, nor seen by those after it."""
        if self.time_conv is None:
            kept = ()
        elif cache is None:
            kept = jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)
        else:
            x, kept = self.time_conv(x, cache)
            x = interleaved(x)
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return self.conv(x), kept


def interleaved(
    x: Float[Array, "B T height width two_C"],
) -> Float[Array, "B two_T height width C"]:
    """Two frames of each: the first half of its channels, then the second."""
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames, height, width, 2, channels // 2)
    return jnp.moveaxis(x, 4, 2).reshape(batch, 2 * frames, height, width, channels // 2)


def run_layers(
    layers: Sequence[nnx.Module], x: ChunkFrames, cache: Cache
) -> tuple[LayerFrames, Cache]:
    """One layer after another, each with its part of the cache."""
    kept = []
    for layer, before in zip(layers, cache or (None,) * len(layers), strict=True):
        x, after = layer(x, before)  # pyright: ignore[reportCallIssue]
        kept.append(after)
    return x, tuple(kept)


def run_by_frame(
    layers: Sequence[nnx.Module], x: ChunkFrames, cache: Cache
) -> tuple[LayerFrames, Cache]:
    """The same, for layers that leave time alone, holding one frame at a time between them."""
    if cache is None:
        return run_layers(layers, x, cache)

    def one(cache: Cache, frame: Array) -> tuple[Cache, Array]:
        out, cache = run_layers(layers, frame[:, None], cache)
        return cache, out[:, 0]

    cache, out = jax.lax.scan(one, cache, jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(out, 0, 1), cache
