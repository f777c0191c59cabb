"""The Wan VAE: pixels to latents and back, a chunk of frames at a time.

The first chunk of a video is one frame, and one latent frame; every other is four, and one. All
that a chunk needs of the frames before it is what the causal convolutions kept, so the time and
memory of a chunk do not depend on the length of the video, and no frame depends on a later one.
"""

from collections.abc import Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from skyreels_jax.errors import RequestError
from skyreels_jax.models.transformer_config import Numerics
from skyreels_jax.models.vae_layers import (
    FRAME_STRIDE,
    PIXEL_STRIDE,
    AttentionBlock,
    Cache,
    CausalConv,
    ChunkFrames,
    Downsample,
    LayerFrames,
    Pointwise,
    Resample,
    Residual,
    ResidualBlock,
    Upsample,
    VaeConfig,
    VaeHead,
)
from skyreels_jax.models.vae_runs import (
    ON_ONE_DEVICE,
    WHOLE,
    Chunk,
    ChunkStep,
    FrameDevices,
    Tiling,
    run_by_frame,
    run_layers,
)

_Pixels = Float[np.ndarray | Array, "B 3 T height width"]
_Latents = Float[np.ndarray | Array, "B C F H W"]


class Encoder(nnx.Module):
    """Frames of pixels to moments of latents."""

    def __init__(self, config: VaeConfig, *, numerics: Numerics, rngs: nnx.Rngs):
        kinds = {"numerics": numerics, "rngs": rngs}
        places = tuple(config.encoder_layers())
        self.conv_in = CausalConv(3, 3, 3, 3, config.base_dim, **kinds)
        self.downsamples = nnx.List(
            ResidualBlock(place, **kinds)
            if isinstance(place, Residual)
            else Downsample(place, **kinds)
            for place in places
        )
        self.middle = _middle(config.top_dim, **kinds)
        self.head = VaeHead(config.top_dim, 2 * config.z_dim, **kinds)
        # Layers up to here see as many frames as there are pixels of; from here on, fewer.
        self.large = [_is_temporal(place) for place in places].index(True)

    def __call__(
        self, x: ChunkFrames, cache: Cache, *, at_once: bool = False
    ) -> tuple[LayerFrames, Cache]:
        """A chunk of 1 or ``4k`` frames to 1 or ``k``: means, then log variances.

        ``at_once`` holds all frames of the large layers together: faster, for so many times the
        memory.
        """
        large, small = (None, None) if cache is None else cache
        run_large = run_layers if at_once else run_by_frame
        x, large = run_large((self.conv_in, *self.downsamples[: self.large]), x, large)
        x, small = run_layers((*self.downsamples[self.large :], *self.middle, self.head), x, small)
        return x, (large, small)


class Decoder(nnx.Module):
    """_Latents, on their own scale, to frames of pixels."""

    def __init__(self, config: VaeConfig, *, numerics: Numerics, rngs: nnx.Rngs):
        kinds = {"numerics": numerics, "rngs": rngs}
        places = tuple(config.decoder_layers())
        self.conv_in = CausalConv(3, 3, 3, config.z_dim, config.top_dim, **kinds)
        self.middle = _middle(config.top_dim, **kinds)
        self.upsamples = nnx.List(
            ResidualBlock(place, **kinds)
            if isinstance(place, Residual)
            else Upsample(place, **kinds)
            for place in places
        )
        self.head = VaeHead(places[-1].out_dim, 3, **kinds)
        # From here on layers see as many frames as there will be pixels of.
        self.large = len(places) - [_is_temporal(place) for place in places[::-1]].index(True)

    def __call__(
        self, x: ChunkFrames, cache: Cache, *, at_once: bool = False
    ) -> tuple[LayerFrames, Cache]:
        """One latent frame to 1 frame (the video's first), or ``k`` to ``4k``; see Encoder."""
        small, large = (None, None) if cache is None else cache
        x, small = run_layers((self.conv_in, *self.middle, *self.upsamples[: self.large]), x, small)
        run_large = run_layers if at_once else run_by_frame
        x, large = run_large((*self.upsamples[self.large :], self.head), x, large)
        return x, (small, large)


def _middle(dim: int, *, numerics: Numerics, rngs: nnx.Rngs) -> nnx.List:
    kinds = {"numerics": numerics, "rngs": rngs}
    return nnx.List(
        [
            ResidualBlock(Residual(dim, dim), **kinds),
            AttentionBlock(dim, **kinds),
            ResidualBlock(Residual(dim, dim), **kinds),
        ]
    )


def _is_temporal(place: Residual | Resample) -> bool:
    return isinstance(place, Resample) and place.temporal


class WanVae(nnx.Module):
    """Encoder and decoder with the projections between them and the latents.

    Args:
        config: its shape.
        rngs: of the initial parameters.
        dtype: of convolutions and of what passes between layers: float32, or bfloat16 at a cost in
            quality that ``docs/performance.md`` states.
        param_dtype: of the stored parameters.
    """

    def __init__(
        self,
        config: VaeConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        numerics = Numerics(dtype, param_dtype)
        kinds = {"numerics": numerics, "rngs": rngs}
        self.config = config
        self.encoder = Encoder(config, **kinds)
        self.quant = Pointwise(2 * config.z_dim, 2 * config.z_dim, **kinds)
        self.post_quant = Pointwise(config.z_dim, config.z_dim, **kinds)
        self.decoder = Decoder(config, **kinds)

    def encode_chunk(
        self, pixels: Float[Array, "B 3 T height width"], cache: Cache
    ) -> tuple[Float[Array, "B C 1 H W"], Cache]:
        """1 frame where ``cache`` is None, else the next 4, to a normalised latent frame."""
        moments, cache = self.encoder(jnp.moveaxis(pixels, 1, -1), cache)
        mean, _ = jnp.split(self.quant(moments).astype(jnp.float32), 2, axis=-1)
        centre, spread = self._statistics()
        return jnp.moveaxis((mean - centre) / spread, -1, 1), cache

    def decode_chunk(
        self, latents: Float[Array, "B C 1 H W"], cache: Cache
    ) -> tuple[Float[Array, "B 3 T height width"], Cache]:
        """A normalised latent frame to 1 frame where ``cache`` is None, else to the next 4."""
        centre, spread = self._statistics()
        z = jnp.moveaxis(latents.astype(jnp.float32), 1, -1) * spread + centre
        frames, cache = self.decoder(self.post_quant(z), cache)
        return jnp.moveaxis(jnp.clip(frames.astype(jnp.float32), -1, 1), -1, 1), cache

    def _statistics(self) -> tuple[Float[Array, "1 1 1 1 C"], Float[Array, "1 1 1 1 C"]]:
        mean, std = (
            jnp.asarray(values, jnp.float32)[None, None, None, None]
            for values in (self.config.latents_mean, self.config.latents_std)
        )
        return mean, std


def encode_pixels(
    vae: WanVae,
    pixels: _Pixels,
    *,
    tiling: Tiling = WHOLE,
    devices: FrameDevices = ON_ONE_DEVICE,
) -> Float[np.ndarray, "B C F H W"]:
    """Normalised means of the latents' distribution: ``(mean - latents_mean) / latents_std``.

    Args:
        vae: the model.
        pixels: ``4k + 1`` frames in [-1, 1], sides a multiple of 8.
        tiling: how frames are cut where memory would not hold a whole one.
        devices: on which the model is, and rows of a frame are computed.

    Returns:
        ``k + 1`` latent frames, float32, an eighth as high and wide.

    Raises:
        RequestError: another number of frames, or other sides.
    """
    _check_pixels(pixels)
    starts = (0, *range(1, pixels.shape[2], FRAME_STRIDE), pixels.shape[2])
    chunks = (pixels[:, :, a:b] for a, b in zip(starts, starts[1:], strict=False))
    units = (1, PIXEL_STRIDE)
    latents = _stream(_encode_step, vae, chunks, tiling, units=units, devices=devices)
    return np.concatenate(list(latents), axis=2)


def decode_chunks(
    vae: WanVae, latents: _Latents, *, tiling: Tiling = WHOLE
) -> Iterator[Float[np.ndarray, "B 3 T height width"]]:
    """Frames in [-1, 1] as they are ready: one, then four at a time, float32.

    Memory does not depend on the number of frames. Concatenated, the chunks are bit for bit what
    :func:`decode_to_pixels` returns; and those of the first latents do not depend on the rest.

    Args:
        vae: the model.
        latents: normalised.
        tiling: how frames are cut where memory would not hold a whole one.

    Raises:
        RequestError: latents of another number of channels.
    """
    return decode_pieces(vae, [latents], tiling=tiling)


def decode_pieces(
    vae: WanVae,
    pieces: Iterable[_Latents],
    *,
    tiling: Tiling = WHOLE,
    devices: FrameDevices = ON_ONE_DEVICE,
) -> Iterator[Float[np.ndarray, "B 3 T height width"]]:
    """As :func:`decode_chunks`, of latents that are given piece by piece.

    A piece is asked for when the frames of those before it are taken; its frames continue theirs.
    """

    def chunks() -> Iterator[_Latents]:
        for latents in pieces:
            if latents.shape[1] != vae.config.z_dim:
                raise RequestError(
                    f"latents of {latents.shape[1]} channels; this VAE's have {vae.config.z_dim}"
                )
            yield from (latents[:, :, i : i + 1] for i in range(latents.shape[2]))

    units = (PIXEL_STRIDE, 1)
    return _stream(_decode_step, vae, chunks(), tiling, units=units, devices=devices)


def decode_to_pixels(
    vae: WanVae, latents: _Latents, *, tiling: Tiling = WHOLE
) -> Float[np.ndarray, "B 3 T height width"]:
    """All ``4F - 3`` frames in host memory; see :func:`decode_chunks`."""
    batch, _, count, height, width = latents.shape
    size = (FRAME_STRIDE * (count - 1) + 1, PIXEL_STRIDE * height, PIXEL_STRIDE * width)
    video = np.empty((batch, 3, *size), np.float32)
    done = 0
    for chunk in decode_chunks(vae, latents, tiling=tiling):
        video[:, :, done : done + chunk.shape[2]] = chunk
        done += chunk.shape[2]
    return video


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _encode_step(
    graph: nnx.GraphDef[WanVae], parameters: nnx.State, pixels: Array, cache: Cache
) -> tuple[Array, Cache]:
    return nnx.merge(graph, parameters).encode_chunk(pixels, cache)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _decode_step(
    graph: nnx.GraphDef[WanVae], parameters: nnx.State, latents: Array, cache: Cache
) -> tuple[Array, Cache]:
    return nnx.merge(graph, parameters).decode_chunk(latents, cache)


def _stream(
    step: ChunkStep,
    vae: WanVae,
    chunks: Iterable[Chunk],
    tiling: Tiling,
    *,
    units: tuple[int, int],
    devices: FrameDevices = ON_ONE_DEVICE,
) -> Iterator[np.ndarray]:
    """``step`` over chunks and their tiles; ``units`` are the pixels of one input and output."""
    graph, parameters = nnx.split(vae)
    caches: dict[tuple[int, int], Cache] = {}
    for chunk in chunks:
        rows: list[list[np.ndarray]] = []
        for i, row in enumerate(tiling.cut(chunk, units[0])):
            rows.append([])
            for j, tile in enumerate(row):
                before = caches.pop((i, j), None)
                out, kept = devices.run(step, graph, parameters, tile, before, units[0])
                rows[i].append(np.asarray(out))
                caches[i, j] = tiling.park(kept)
        yield tiling.join(rows, units[1])


def _check_pixels(pixels: _Pixels) -> None:
    _, _, frames, height, width = pixels.shape
    if frames % FRAME_STRIDE != 1:
        below = (frames - 1) // FRAME_STRIDE * FRAME_STRIDE + 1
        nearest = [n for n in (below, below + FRAME_STRIDE) if n > 0]
        raise RequestError(
            f"{frames} frames cannot be encoded: the number must be 4k + 1; nearest are "
            f"{' and '.join(map(str, nearest))}"
        )
    if height % PIXEL_STRIDE or width % PIXEL_STRIDE:
        raise RequestError(
            f"frames of {height} x {width} cannot be encoded: sides must be multiples of "
            f"{PIXEL_STRIDE}"
        )
