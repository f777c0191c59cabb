"""What shape a Wan VAE has, and the statistics of its latents."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

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
