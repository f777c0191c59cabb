"""Clips of moving shapes as the transformer sees them: encoded videos, captions, first frames.

A clip is encoded once and kept in a folder; its shards appear whole, so that an interrupted run
goes on where it was. Captions are drawn anew each time a clip is, from a few wordings.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from skyreels_jax.errors import RequestError, WeightsError
from skyreels_jax.files import whole_file
from skyreels_jax.models.clip_vision import PIXEL_MEAN, PIXEL_STD, ClipVision
from skyreels_jax.models.umt5 import Umt5Encoder
from skyreels_jax.models.vae import WanVae
from skyreels_jax.models.vae_layers import FRAME_STRIDE
from skyreels_jax.moving_shapes.captions import caption
from skyreels_jax.moving_shapes.scene import Scene
from skyreels_jax.ops.resize import bicubic_resize
from skyreels_jax.training.clip_source import ClipSource
from skyreels_jax.training.vae_objective import moments
from skyreels_jax.weights.components.clip import stored_image_encoder
from skyreels_jax.weights.components.umt5 import stored_text_encoder
from skyreels_jax.weights.layout import Layout
from skyreels_jax.weights.tokenizer_file import open_tokenizer

# Wordings of a clip's caption that are kept with it.
WORDINGS: Final = 6
# Clips in a file, and in one call of the encoder.
_SHARD: Final = 512
_CHUNK: Final = 16
# Raised when scenes, captions or their rendering change: what was encoded before is of no use then.
_DRAWING_VERSION: Final = 2

# Called with what is encoded, how many of it are done, and how many there are.
OnEncoded = Callable[[str, int, int], None]
_Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class EncodedClips:
    """Encoded clips; arrays have one row each.

    Attributes:
        latents: normalised.
        known: mask and latents of the video of which only the first frame is known, if asked for.
        first: that frame, uint8.
        fps: frames a second.
        captions: some wordings of each.
        learned_from: the first latent frame that they tell of.
    """

    latents: Float[np.ndarray, "N C F H W"]
    known: Float[np.ndarray, "N Y F H W"] | None
    first: UInt8[np.ndarray, "N height width 3"]
    fps: np.ndarray
    captions: Sequence[Sequence[str]]
    learned_from: np.ndarray

    def __len__(self) -> int:
        return len(self.latents)


def encode_clips(
    folder: Path,
    vae: WanVae,
    source: ClipSource,
    count: int,
    *,
    with_known: bool = False,
    on_encoded: OnEncoded = lambda what, done, total: None,
) -> EncodedClips:
    """``count`` clips, from ``folder`` where they are there, and written there where not.

    What another VAE encoded, or of other clips, is not taken: :func:`clips_fingerprint` names the
    folder within ``folder``.

    Raises:
        WeightsError: a file there is damaged, or none can be written.
    """
    folder = folder / clips_fingerprint(vae, source)
    encode, shards, size = _encoder(vae), [], min(_SHARD, count)
    makers = {"clips": _encode_chunk} | ({"known": _encode_known_chunk} if with_known else {})
    for start in range(0, count, size):
        shard: _Columns = {}
        for kind, make in makers.items():
            name = f"{kind}-{'held' if source.held else 'drawn'}-{start:07d}-{size}.npz"
            if not (folder / name).is_file():
                chunks = []
                for begin in range(start, start + size, _CHUNK):
                    rows = range(begin, min(begin + _CHUNK, start + size))
                    chunks.append(make(encode, source, rows))
                    on_encoded(kind, min(rows.stop, count), count)
                _write(folder / name, _joined(chunks))
            shard |= _read(folder / name)
        shards.append(shard)
    joined = {name: column[:count] for name, column in _joined(shards).items()}
    return EncodedClips(
        joined["latents"],
        joined.get("known"),
        joined["first"],
        joined["fps"],
        [json.loads(line) for line in joined["captions"]],
        joined.get("learned_from", np.zeros(count, int)),
    )


def clips_fingerprint(vae: WanVae, source: ClipSource) -> str:
    """A digest of the VAE's parameters and of which clips there are; the same for held-out ones."""
    digest = _digest_of(nnx.state(vae))
    statistics = (vae.config.latents_mean, vae.config.latents_std)
    clips = (source.seed, source.frames, source.size, _DRAWING_VERSION)
    if source.changes:
        clips = (*clips, source.changes)
    digest.update(repr((statistics, *clips)).encode())
    return digest.hexdigest()[:12]


def _digest_of(state: nnx.State) -> "hashlib._Hash":
    digest = hashlib.sha256()
    for path, leaf in nnx.to_flat_state(state):
        digest.update(repr(path).encode())
        digest.update(np.asarray(leaf.get_value()).tobytes())
    return digest


def pixels_of(frames: UInt8[np.ndarray, "B *T height width 3"]) -> Float[np.ndarray, "..."]:
    """Frames in [-1, 1], channels behind the batch."""
    return np.moveaxis(frames, -1, 1) / np.float32(127.5) - np.float32(1)


def _write(file: Path, columns: _Columns) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as temporary:
            np.savez(temporary, allow_pickle=False, **columns)
    except OSError as error:
        raise WeightsError(f"{file} cannot be written: {error}") from error


def _read(file: Path) -> _Columns:
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise WeightsError(f"{file} is damaged; remove it: {error}") from error


def _joined(parts: Sequence[_Columns]) -> _Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


_Encode = Callable[[np.ndarray], np.ndarray]


def _encoder(vae: WanVae) -> _Encode:
    graph, state = nnx.split(vae)
    mean = np.asarray(vae.config.latents_mean, np.float32)
    std = np.asarray(vae.config.latents_std, np.float32)

    @jax.jit
    def means(state: nnx.State, pixels: Array) -> Array:
        found = moments(nnx.merge(graph, state), pixels).mean
        return jnp.moveaxis((found - mean) / std, -1, 1)

    return lambda pixels: np.asarray(means(state, pixels))


def _scenes(source: ClipSource, rows: range) -> Iterator[tuple[Scene, int, np.random.Generator]]:
    return (source.scene(index) for index in rows)


def _encode_chunk(encode: _Encode, source: ClipSource, rows: range) -> _Columns:
    frames, rates, captions, learned_from = [], [], [], []
    old: dict[int, np.ndarray] = {}
    for row, index in enumerate(rows):
        scene, fps, rng = source.scene(index)
        change = source.change(index, scene, fps)
        frames.append(source.video(scene, fps, change))
        if change is not None and change.at is None:
            old[row] = source.render(change.before, 1, fps)
        rates.append(fps)
        captions.append(json.dumps([caption(scene, rng) for _ in range(WORDINGS)]))
        learned_from.append(0 if change is None else change.first_learned)
    videos = np.stack(frames)
    latents = encode(pixels_of(videos))
    if old:  # A computed array is not written to.
        latents = latents.copy()
    for row, frame in old.items():
        # The encoder is causal: a first latent frame is of the first frame alone.
        latents[row, :, :1] = encode(pixels_of(frame[None]))[0]
    columns = {
        "latents": latents,
        "first": videos[:, 0],
        "fps": np.array(rates),
        "captions": np.array(captions),
    }
    return columns | ({"learned_from": np.array(learned_from)} if source.changes else {})


def _encode_known_chunk(encode: _Encode, source: ClipSource, rows: range) -> _Columns:
    """Mask and latents; as generation has it, frames that are not known are mid-grey."""
    first = np.stack([source.render(scene, 1, 1)[0] for scene, _, _ in _scenes(source, rows)])
    pixels = np.zeros((len(rows), 3, source.frames, source.size, source.size), np.float32)
    pixels[:, :, 0] = pixels_of(first)
    latents = encode(pixels)
    # The first latent frame is known, the others are not.
    mask = np.zeros((len(rows), FRAME_STRIDE, *latents.shape[2:]), latents.dtype)
    mask[:, :, 0] = 1
    return {"known": np.concatenate([mask, latents], axis=1)}


def _compiled(model: Umt5Encoder | ClipVision) -> Callable[..., np.ndarray]:
    graph, state = nnx.split(model)

    @jax.jit
    def apply(state: nnx.State, *inputs: Array) -> Array:
        return nnx.merge(graph, state)(*inputs)

    return lambda *inputs: np.asarray(apply(state, *map(jnp.asarray, inputs)))


class CaptionEncoder:
    """Captions to text states of a fixed length; those of a prompt do not depend on its padding."""

    def __init__(self, layout: Layout, length: int, *, dtype: DTypeLike = jnp.float32):
        """Load tokenizer and text encoder of a folder; ``length`` holds the longest text."""
        self._tokenizer = open_tokenizer(layout.component("tokenizer"))
        self._model = stored_text_encoder(layout).load(dtype)
        self._apply = _compiled(self._model)
        self.length = length

    def digest(self) -> str:
        """A digest of the encoder's parameters and of how the tokenizer cuts a caption."""
        digest = _digest_of(nnx.state(self._model))
        ids = self._tokenizer.encode(["A red star moves slowly up, on a black background."]).ids
        digest.update(repr(ids.tolist()).encode())
        return digest.hexdigest()[:12]

    def check(self, captions: Sequence[str]) -> None:
        """Refuse captions that do not fit.

        Raises:
            RequestError: one has more tokens than ``length``.
        """
        for start in range(0, len(captions), 1024):
            self._check_lengths(max(self._tokenizer.encode(captions[start : start + 1024]).lengths))

    def _check_lengths(self, longest: int) -> None:
        if longest > self.length:
            raise RequestError(
                f"data.text_length = {self.length}: a caption has {longest} tokens of this "
                f"tokenizer; nearest: {longest}"
            )

    def encode_alone(self, caption: str, lengths: Sequence[int]) -> Float[np.ndarray, "S text_dim"]:
        """States of one text as they are whatever else is encoded: its own rows, to the bit.

        It is padded to the least of some lengths that holds it; raises as :meth:`check`.
        """
        tokens = self._tokenizer.encode([caption])
        self._check_lengths(own := tokens.lengths[0])
        padded = next(length for length in lengths if length >= own)
        states = self._apply(tokens.ids[:, :padded], tokens.mask[:, :padded])
        return states[0, :own].astype(np.float32)

    def __call__(self, captions: Sequence[str]) -> Float[np.ndarray, "B S text_dim"]:
        """States, zero past a text's end; raises as :meth:`check`."""
        tokens = self._tokenizer.encode(captions)
        self._check_lengths(max(tokens.lengths))
        states = self._apply(tokens.ids[:, : self.length], tokens.mask[:, : self.length])
        return states.astype(np.float32)


class FirstFrameEncoder:
    """First frames to CLIP's features, prepared as the original does."""

    def __init__(self, layout: Layout):
        """Load the image encoder of a folder."""
        model = stored_image_encoder(layout).load(jnp.float32)
        self._side = model.config.image_size
        self._apply = _compiled(model)

    def __call__(
        self, frames: UInt8[np.ndarray, "B height width 3"]
    ) -> Float[np.ndarray, "B I image_dim"]:
        """Features of the frames."""
        return self._apply(clip_pixels(frames, self._side))


def clip_pixels(
    frames: UInt8[np.ndarray, "B height width 3"], side: int
) -> Float[np.ndarray, "B 3 side side"]:
    """Frames as CLIP takes them: resampled and normalised."""
    pixels = np.moveaxis(frames, -1, 1) / np.float32(255)
    if pixels.shape[2:] != (side, side):
        pixels = np.stack([bicubic_resize(frame, side, side) for frame in pixels])
    return (pixels - PIXEL_MEAN[None, :, None, None]) / PIXEL_STD[None, :, None, None]
