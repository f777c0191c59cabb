"""Encoders and VAE in JAX as a generation takes them, and images as they are given to them.

Sources for images: SkyReels-V2's image-to-video pipeline (``resizecrop``,
``VideoProcessor.preprocess``) and Wan 2.1's mask.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Final, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from PIL import Image

from skyreels_jax.components.clip_preprocessing import PREPROCESSING, ClipPreprocessing
from skyreels_jax.components.protocols import Autoencoder, ImageCondition
from skyreels_jax.errors import WeightsError
from skyreels_jax.geometry import FRAMES_PER_LATENT, PIXELS_PER_LATENT
from skyreels_jax.media import RgbImage, fit_image, stream_video
from skyreels_jax.memory import Direction, available_memory, vae_work
from skyreels_jax.models import vae
from skyreels_jax.models.clip_vision import ClipVision
from skyreels_jax.models.umt5 import Umt5Encoder
from skyreels_jax.models.vae import WanVae
from skyreels_jax.models.vae_runs import ON_ONE_DEVICE, WHOLE, FrameDevices, Tiling
from skyreels_jax.models.vae_tiling import Tiles
from skyreels_jax.prompts import TEXT_LEN, Tokenizer
from skyreels_jax.shapes import Context, Frames, HostLatents, Pixels

# Prompts are encoded at the least of these that holds them. A prompt's states do not depend on its
# padding, so this only saves time; that there are three bounds how often anything is compiled.
LENGTHS: Final = (128, 256, TEXT_LEN)
# Rows of states that are kept where those behind them, zeros, are computed as one.
_KEPT: Final = (64, 128, 256)
# Whether the VAE cuts frames into tiles: always, never, or where memory would not hold a whole one.
VaeTiling = Literal["auto", "on", "off"]
VAE_TILINGS: Final = get_args(VaeTiling)
# Of the memory that is free, so much is left for what nobody counted.
RESERVE: Final = 0.05
logger = logging.getLogger(__name__)
# Computes an encoder, given as graph and state, on inputs.
EncoderCall = Callable[..., Array]


@partial(jax.jit, static_argnums=0)
def encode_here(graph: nnx.GraphDef[nnx.Module], state: nnx.State, *inputs: Array) -> Array:
    """An encoder on the default device."""
    return nnx.merge(graph, state)(*inputs)  # pyright: ignore[reportCallIssue]


def padding_rows(texts: Sequence[Context | None], tokens: int) -> int:
    """How many rows of zeros at the end of all texts' states ``[B, S, D]`` are left to one of them.

    A few less than there are, so that a program for so many is there for the next prompt too; none
    for as many ``tokens`` as rows or more, of whose work they are a small part.
    """
    given = [text for text in texts if text is not None]
    rows = given[0].shape[1]
    if tokens >= rows:
        return 0  # Before anything comes from the device.
    is_used = np.any([np.any(np.asarray(text), axis=(0, 2)) for text in given], axis=0)
    used = int(is_used.nonzero()[0].max(initial=-1)) + 1
    return rows - min((kept for kept in _KEPT if used <= kept < rows), default=rows)


class Umt5TextEncoder:
    """Prompts to UMT5's states: a :class:`~skyreels_jax.components.protocols.TextEncoder`."""

    def __init__(self, model: Umt5Encoder, tokenizer: Tokenizer, apply: EncoderCall = encode_here):
        """Raises WeightsError where the tokenizer has ids that the model has no row for.

        ``apply`` computes the model, on the devices on which it is.
        """
        rows = model.config.vocab_size
        if tokenizer.vocab_size > rows:
            raise WeightsError(
                f"the tokenizer has {tokenizer.vocab_size} ids and the text encoder {rows} rows: "
                "they are not of the same checkpoint"
            )
        self._tokenizer, self._apply = tokenizer, apply
        self._graph, self._state = nnx.split(model)

    def encode(self, prompts: Sequence[str]) -> Float[np.ndarray, "B S text_dim"]:
        """Clean, tokenize and encode to 512 rows; rows past a prompt's end are exactly zero.

        One prompt at a time: a batch would pad the short ones to the longest, and no prompt's
        states may depend on its company.
        """
        batch = self._tokenizer.encode(prompts)
        encoded = []
        for ids, mask in zip(batch.ids, batch.mask, strict=True):
            length = next(n for n in LENGTHS if mask.sum() <= n)
            inputs = (jnp.asarray(row[None, :length]) for row in (ids, mask))
            states = np.asarray(self._apply(self._graph, self._state, *inputs))[0]
            encoded.append(np.pad(states, ((0, TEXT_LEN - length), (0, 0))))
        return np.stack(encoded)


class ClipImageEncoder:
    """An image to CLIP's features: a :class:`~skyreels_jax.components.protocols.ImageEncoder`."""

    def __init__(
        self,
        model: ClipVision,
        preprocessing: ClipPreprocessing = "original",
        apply: EncoderCall = encode_here,
    ):
        """``preprocessing`` chooses between the two ways of :mod:`.clip_preprocessing`.

        ``apply`` computes the model, on the devices on which it is.
        """
        self._apply = apply
        self._prepare = partial(PREPROCESSING[preprocessing], side=model.config.image_size)
        self._graph, self._state = nnx.split(model)

    def encode(self, image: ImageCondition) -> Float[np.ndarray, "S image_dim"]:
        """States of all 257 tokens after the last block but one, float32."""
        pixels = jnp.asarray(self._prepare(image))[None]
        return np.asarray(self._apply(self._graph, self._state, pixels))[0]


def tiling_for(choice: VaeTiling, needed: int, free: int | None) -> Tiling:
    """How frames are cut.

    Args:
        choice: of the user.
        needed: bytes that work on whole frames takes (:func:`.memory.vae_work`).
        free: bytes that there are, with the VAE's weights in memory; ``None`` if nobody can tell.
    """
    if choice == "auto":
        choice = "off" if free is None or needed <= (1 - RESERVE) * free else "on"
    return Tiles() if choice == "on" else WHOLE


@dataclass(frozen=True, eq=False)
class WanAutoencoder:
    """Pixels to latents and back: a :class:`~skyreels_jax.components.protocols.Autoencoder`.

    Attributes:
        model: the VAE.
        tiling: whether frames are cut into tiles; ``auto`` decides by size and free memory, anew
            for each video, and warns where it cuts.
        devices: on which the model is, and rows of a frame are computed.
    """

    model: WanVae
    tiling: VaeTiling = "auto"
    devices: FrameDevices = ON_ONE_DEVICE

    def encode(self, pixels: Pixels) -> HostLatents:
        """Posterior mean of ``4k + 1`` frames in [-1, 1], normalised: ``(mu - mean) / std``."""
        tiling = self._tiling("encode", *pixels.shape[-2:])
        return vae.encode_pixels(self.model, pixels[None], tiling=tiling, devices=self.devices)[0]

    def decode_pieces(self, pieces: Iterable[HostLatents]) -> Iterator[Pixels]:
        """Frames in [-1, 1] as they are ready, in memory that does not grow with their number."""
        pieces = iter(pieces)
        first = next(pieces)
        height, width = (PIXELS_PER_LATENT * side for side in first.shape[-2:])
        tiling = self._tiling("decode", height, width)
        batches = (piece[None] for piece in chain([first], pieces))
        for chunk in vae.decode_pieces(self.model, batches, tiling=tiling, devices=self.devices):
            yield chunk[0]

    def _tiling(self, direction: Direction, height: int, width: int) -> Tiling:
        needed = vae_work(self.model.config, direction, height, width)
        free = self.devices.free(available_memory())
        tiling = tiling_for(self.tiling, needed, free)
        if self.tiling == "auto" and free is not None and tiling is not WHOLE:
            logger.warning(
                "the VAE %ss in tiles: a frame of %d x %d takes %.2f GiB and %.2f are free",
                *(direction, height, width, needed / 2**30, free / 2**30),
            )
        return tiling


def prepare_image(
    image: RgbImage,
    height: int,
    width: int,
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
    *,
    stretch: bool = False,
) -> ImageCondition:
    """Crop ``image`` around its centre to the video's aspect, or ``stretch`` it, and resize it.

    The resized image is rounded to 8 bits before it is scaled, as in both references. The original
    resizes by Lanczos for image-to-video and bicubically for diffusion forcing.
    """
    resized = fit_image(image, height, width, resampling, stretch=stretch)
    pixels = 2 * (resized.astype(np.float32) / 255) - 1
    return ImageCondition(image, np.ascontiguousarray(np.moveaxis(pixels, -1, 0)))


def condition_latents(
    vae: Autoencoder, first: ImageCondition, last: ImageCondition | None, num_frames: int
) -> Float[np.ndarray, "Y F H W"]:
    """Mask and latents of a video of which only the first frame (and the last) is known.

    Unknown frames are mid-grey. The four mask channels are the pixel frames of each latent, 1 where
    the frame is known; the first latent stands for its one frame four times.
    """
    video = np.zeros((3, num_frames, *first.pixels.shape[1:]), np.float32)
    known = np.zeros(num_frames, np.float32)
    video[:, 0], known[0] = first.pixels, 1
    if last is not None:
        video[:, -1], known[-1] = last.pixels, 1
    latents = vae.encode(video).astype(np.float32)
    by_latent = np.concatenate([np.repeat(known[:1], FRAMES_PER_LATENT), known[1:]])
    mask = by_latent.reshape(-1, FRAMES_PER_LATENT).T[:, :, None, None]
    return np.concatenate([np.broadcast_to(mask, (FRAMES_PER_LATENT, *latents.shape[1:])), latents])


def to_frames(pixels: Pixels) -> Frames:
    """Pixels in [-1, 1] as 8-bit frames, rounded to nearest; values outside are clipped.

    The original truncates, which darkens a video by half a level on average.
    """
    levels = np.rint((np.clip(pixels, -1, 1) / 2 + 0.5) * 255)
    return np.ascontiguousarray(np.moveaxis(levels.astype(np.uint8), 0, -1))


def encode_first_frame(vae: Autoencoder, image: ImageCondition) -> HostLatents:
    """The single latent frame of an image, as diffusion forcing continues it."""
    return vae.encode(image.pixels[:, None]).astype(np.float32)


def fitted_frames(
    video: Path, size: tuple[int, int], fps: int | Fraction | None
) -> Iterator[ImageCondition]:
    """The frames of a file to continue, at ``size``.

    They are taken at ``fps`` and cropped to the aspect of ``size``; with ``None`` each is taken
    once and stretched, as in the original.
    """
    for frame in stream_video(video, fps):
        yield _fitted(frame, size, fps)


def _fitted(frame: RgbImage, size: tuple[int, int], fps: int | Fraction | None) -> ImageCondition:
    return prepare_image(frame, *size, Image.Resampling.BICUBIC, stretch=fps is None)


def encode_last_frames(
    vae: Autoencoder, video: Path, count: int, size: tuple[int, int], fps: int | Fraction | None
) -> HostLatents:
    """Latents of the last ``count`` frames (``4k + 1``) of a file, as a video of their own.

    Frames are as in :func:`fitted_frames`.
    """
    # Only these are resized, however many frames there are before them.
    last = deque(stream_video(video, fps), maxlen=count)
    pixels = [_fitted(frame, size, fps).pixels for frame in last]
    return vae.encode(np.stack(pixels, axis=1)).astype(np.float32)
