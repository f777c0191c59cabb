"""The VAE's shape, and its parts: functions of a chunk of frames and what was kept of those before.

``None`` in place of what was kept means that the chunk begins the video. It is then one frame, and
resampling in time leaves it alone. Frames are ``[B, T, height, width, C]``. Norms, SiLU, softmax
and sums are computed in float32; operands of convolutions and what passes between layers are in the
compute dtype.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from skyreels_jax.models.transformer_config import Numerics
from skyreels_jax.ops.attention import attention
from skyreels_jax.ops.linear import causal_conv, conv2d, linear
from skyreels_jax.ops.target import whole_height

# Of the released VAE, by channel; a file without config.json does not say.
LATENTS_MEAN: Final = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENTS_STD: Final = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

# Pixel frames of one latent frame (but the first, which is one), and pixels of its sides.
FRAME_STRIDE: Final = 4
PIXEL_STRIDE: Final = 8
# Each resampling halves or doubles height and width.
LEVELS: Final = 4
ChunkFrames = Float[Array, "B T height width C"]
LayerFrames = Float[Array, "B U new_height new_width O"]
# What a layer keeps for the next chunk: a nest of tuples of frames. None before the first chunk.
Cache = PyTree[Array]
_UNIFORM: Final = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")
# Of the original's channel norm, against division by zero.
_SMALLEST_NORM: Final = 1e-12


@dataclass(frozen=True)
class Residual:
    """Where a residual block stands: channels in and out."""

    in_dim: int
    out_dim: int


@dataclass(frozen=True)
class Resample:
    """Where a resampling stands: channels in and out, and whether time is resampled too."""

    in_dim: int
    out_dim: int
    temporal: bool


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """The shape of one Wan VAE; :data:`WAN_VAE` is the one of all SkyReels-V2 checkpoints.

    Attributes:
        base_dim: channels at full resolution.
        z_dim: channels of a latent.
        dim_mult: channels of each of the four resolutions, in units of ``base_dim``.
        num_res_blocks: residual blocks of each resolution in the encoder; the decoder has one more.
        temporal_downsample: which of the encoder's three resamplings halve the time too (two of
            them, so that four frames make one); the decoder mirrors it.
        latents_mean: by channel, of the encoder's output.
        latents_std: by channel; ``(z - mean) / std`` is what the transformer sees.
    """

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = LATENTS_MEAN
    latents_std: tuple[float, ...] = LATENTS_STD

    def __post_init__(self) -> None:
        if min(self.base_dim, self.z_dim, self.num_res_blocks, *self.dim_mult) < 1:
            raise ValueError(f"every width and count of {self} must be positive")
        if len(self.dim_mult) != LEVELS or len(self.temporal_downsample) != LEVELS - 1:
            raise ValueError(
                f"{self.dim_mult=} and {self.temporal_downsample=} should have {LEVELS} and "
                f"{LEVELS - 1} entries: one latent pixel is {PIXEL_STRIDE} pixels wide"
            )
        if 2 ** sum(self.temporal_downsample) != FRAME_STRIDE:
            raise ValueError(
                f"{self.temporal_downsample=} should have two True: one latent frame is "
                f"{FRAME_STRIDE} frames"
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ValueError(f"{name} has {len(getattr(self, name))} values, {self.z_dim=}")
        if min(self.latents_std) <= 0:
            raise ValueError(f"{self.latents_std=} should be positive")

    @property
    def top_dim(self) -> int:
        """Channels at latent resolution, where the middle blocks are."""
        return self.base_dim * self.dim_mult[-1]

    def encoder_layers(self) -> Iterator[Residual | Resample]:
        """The encoder between its first convolution and the middle, in the order of the names."""
        dims = [self.base_dim * m for m in (1, *self.dim_mult)]
        resamples = (*self.temporal_downsample, None)
        for (before, dim), temporal in zip(pairwise(dims), resamples, strict=True):
            yield Residual(before, dim)
            yield from [Residual(dim, dim)] * (self.num_res_blocks - 1)
            if temporal is not None:
                yield Resample(dim, dim, temporal)

    def decoder_layers(self) -> Iterator[Residual | Resample]:
        """The decoder from the middle to its head; each resampling halves the channels."""
        before = self.top_dim
        resamples = (*self.temporal_downsample[::-1], None)
        for mult, temporal in zip(self.dim_mult[::-1], resamples, strict=True):
            dim = self.base_dim * mult
            yield Residual(before, dim)
            yield from [Residual(dim, dim)] * self.num_res_blocks
            if temporal is not None:
                yield Resample(dim, dim // 2, temporal)
            before = dim // 2


WAN_VAE: Final = VaeConfig(base_dim=96, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2)


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
        by_row = (batch * frames, height, width, dim)
        key, value = (
            whole_height(part.reshape(by_row)).reshape(batch * frames, -1, 1, dim)
            for part in (key, value)
        )
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
