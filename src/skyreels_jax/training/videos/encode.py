"""What the encoders make of clips and captions, kept in files that are named by all they depend on.

A file's name is a digest of its content's source, of how it was cut and sized, and of the encoders'
weights, so that whatever changes is encoded anew and nothing else is. Files appear whole, with a
checksum; whoever is stopped at any moment goes on with what is missing, and several processes may
each take a share.
"""

import hashlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image

from skyreels_jax.errors import RequestError, WeightsError
from skyreels_jax.files import TEMPORARY_PREFIX, load_tensors, reason_of, save_tensors
from skyreels_jax.hub import fingerprint
from skyreels_jax.media import RgbImage, fit_image
from skyreels_jax.memory import total_memory, vae_work
from skyreels_jax.models.vae import WanVae, encode_pixels
from skyreels_jax.models.vae_layers import FRAME_STRIDE
from skyreels_jax.models.vae_runs import WHOLE, Tiling
from skyreels_jax.models.vae_tiling import Tiles
from skyreels_jax.outputs import path_of
from skyreels_jax.prompts import TEXT_LEN, clean
from skyreels_jax.shapes import Frames
from skyreels_jax.training.dataset import (
    CaptionEncoder,
    FirstFrameEncoder,
    OnEncoded,
    pixels_of,
)
from skyreels_jax.training.sources import TrainingSources
from skyreels_jax.training.videos.plan import DataPlan, PlannedClip
from skyreels_jax.training.videos.recipe import FolderData
from skyreels_jax.training.videos.survey import frames_of
from skyreels_jax.weights.components.vae import stored_vae
from skyreels_jax.weights.layout import ComponentName, Layout

# Raised when the same source is encoded otherwise.
_FORMAT: Final = 1
# Frames are resized as those of a video that diffusion forcing continues.
_RESAMPLING: Final = Image.Resampling.BICUBIC
# A caption is padded to the least of these that holds it: few shapes, and the same for ever.
_LENGTHS: Final = (32, 64, 128, 256, TEXT_LEN)
# Of the memory that there is in all, what work on whole frames may take.
_WHOLE_SHARE: Final = 0.5
# Seconds after which a temporary file is taken to be left over.
_STALE: Final = 3600.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedFiles:
    """Where everything is kept.

    Attributes:
        folder: of all.
        sources: the encoders.
        text_dtype: in which text is encoded.
        vae_tiling: as in :class:`.FolderData`.
    """

    folder: Path
    sources: TrainingSources
    text_dtype: str
    vae_tiling: str = "auto"

    @classmethod
    def of(cls, data: FolderData, sources: TrainingSources) -> "EncodedFiles":
        """Those of a recipe's data."""
        folder = path_of(data.encoded, "data.encoded")
        return cls(folder, sources, data.text_dtype, data.vae_tiling)

    @cached_property
    def _most_pixels(self) -> float:
        """The most that a frame that is encoded whole has.

        Never by what is free just now: a run that goes on must find what it encoded before.
        """
        if self.vae_tiling != "auto" or (memory := total_memory()) is None:
            return 0.0 if self.vae_tiling == "on" else math.inf
        of_a_pixel = vae_work(stored_vae(self.sources.vae).config, "encode", 1, 1)
        return _WHOLE_SHARE * memory / of_a_pixel

    def tiling(self, clip: PlannedClip) -> Tiling:
        """How a clip's frames are cut to be encoded, as generation cuts them."""
        pixels = clip.bucket.height * clip.bucket.width
        return Tiles() if pixels > self._most_pixels else WHOLE

    def _how(self, clip: PlannedClip) -> tuple[str, ...]:
        return () if self.tiling(clip) is WHOLE else ("tiles",)

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """Digests of the encoders, by name; no file is read whole."""
        sources = self.sources
        found = {
            "vae": _digest_of_files(sources.vae, "vae"),
            "text": _digest_of_files(sources.text, "text_encoder", "tokenizer"),
        }
        if sources.image is not None:
            found["image"] = _digest_of_files(sources.image, "image_encoder")
        return found

    def clip(self, clip: PlannedClip) -> Path:
        """Latents of a clip, and its first frame."""
        return self._path("clips", clip.identity, self.digests["vae"], *self._how(clip))

    def first(self, clip: PlannedClip) -> Path:
        """What an i2v model is given of a clip's first frame."""
        digests = self.digests["vae"], self.digests["image"]
        return self._path("first", clip.identity, *digests, *self._how(clip))

    def text(self, caption: str) -> Path:
        """States of a caption."""
        return self._path("texts", clean(caption), self.digests["text"], self.text_dtype)

    def _path(self, kind: str, *decisive: str) -> Path:
        key = hashlib.sha256("\0".join((kind, str(_FORMAT), *decisive)).encode()).hexdigest()[:40]
        return self.folder / kind / f"{key}.safetensors"

    def needed(self, clip: PlannedClip) -> list[Path]:
        """Files of a clip."""
        with_image = self.sources.config.model_type == "i2v"
        return [self.clip(clip), *([self.first(clip)] if with_image else [])]


def _digest_of_files(layout: Layout, *names: ComponentName) -> str:
    found: list[Path] = []
    for name in names:
        path = layout.component(name)
        inside = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        found += [file for file in inside if not file.name.startswith(".")]
    return fingerprint(found, *names, times=False)


def read_encoded(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a file.

    Raises:
        WeightsError: it is missing or damaged.
    """
    try:
        return load_tensors(file, "encoded file")[0]
    except RequestError as error:
        raise WeightsError(f"{error}; `skyreels-jax data encode` makes it anew") from error


def encode_videos(
    plan: DataPlan,
    files: EncodedFiles,
    share: tuple[int, int] = (0, 1),
    *,
    verify: bool = False,
    on_encoded: OnEncoded = lambda what, done, total: None,
) -> tuple[int, int]:
    """Encode what is missing of a plan's clips and captions; encoders load only if something is.

    Args:
        plan: what there is.
        files: where it is kept.
        share: which of how many shares is taken, from 0.
        verify: look whether files that are there are whole, and make them anew where not.
        on_encoded: called as clips and captions are encoded.

    Returns:
        how many clips and captions were encoded.

    Raises:
        RequestError: a file changed since it was looked through.
        WeightsError: an encoder cannot be loaded, or nothing can be written.
    """
    index, count = share
    _remove_stale(files.folder)

    def is_missing(file: Path) -> bool:
        if not file.exists():
            return True
        if verify:
            try:
                load_tensors(file, "encoded file")
            except RequestError as error:
                _logger.warning("%s; it is encoded anew", error)
                file.unlink(missing_ok=True)
                return True
        return False

    groups: dict[str, list[PlannedClip]] = {}
    for clip in plan.clips:
        groups.setdefault(clip.content, []).append(clip)
    taken: dict[Path, PlannedClip] = {}
    missing: set[Path] = set()
    for content in sorted(groups)[index::count]:
        for clip in groups[content]:
            if lacks := {file for file in files.needed(clip) if is_missing(file)}:
                taken[files.clip(clip)] = clip
                missing |= lacks
    texts = [t for t in ["", *plan.captions][index::count] if is_missing(files.text(t))]
    _encode_clips(list(taken.values()), missing, files, on_encoded)
    _encode_texts(texts, files, on_encoded)
    return len(taken), len(texts)


def _encode_clips(
    clips: list[PlannedClip], missing: set[Path], files: EncodedFiles, on_encoded: OnEncoded
) -> None:
    if not clips:
        return
    vae = stored_vae(files.sources.vae).load(jnp.float32)
    is_i2v = files.sources.config.model_type == "i2v"
    image = files.sources.image
    encoder = FirstFrameEncoder(image) if is_i2v and image is not None else None
    # Together: what is cut from one file at one rate and size is read once.
    streams: dict[tuple[object, ...], list[PlannedClip]] = {}
    for clip in clips:
        size = (clip.bucket.height, clip.bucket.width)
        streams.setdefault((clip.file.path, clip.fps, clip.source_fps, size), []).append(clip)
    done = 0
    for together in streams.values():
        for clip, frames in cut_frames(together):
            if files.clip(clip) in missing:
                latents = _latents(vae, frames, files.tiling(clip))
                _write(files.clip(clip), {"latents": latents, "first": frames[0]})
            if encoder is not None and files.first(clip) in missing:
                known = _known(vae, frames, files.tiling(clip))
                _write(files.first(clip), {"known": known, "image": encoder(frames[:1])[0]})
            done += 1
            on_encoded("clips", done, len(clips))


def cut_frames(clips: Sequence[PlannedClip]) -> Iterator[tuple[PlannedClip, Frames]]:
    """Clips of one file, rate and size with their frames, as they are complete."""
    path, bucket = clips[0].file.path, clips[0].bucket
    waiting = sorted(clips, key=lambda clip: (clip.start + clip.bucket.frames, clip.start))
    open_frames: dict[int, RgbImage] = {}
    number = -1
    with closing(frames_of(path, clips[0].fps, clips[0].source_fps)) as frames:
        for number, rgb in enumerate(frames):
            begun = min(clip.start for clip in waiting)
            if number >= begun:
                open_frames[number] = fit_image(rgb, bucket.height, bucket.width, _RESAMPLING)
            for old in [n for n in open_frames if n < begun]:
                del open_frames[old]
            while waiting and waiting[0].start + waiting[0].bucket.frames == number + 1:
                clip = waiting.pop(0)
                chosen = range(clip.start, clip.start + clip.bucket.frames)
                yield clip, np.stack([open_frames[n] for n in chosen])
            if not waiting:
                return
    raise RequestError(
        f"{path} gives {number + 1} frames and had more when it was looked through; "
        "was it changed meanwhile?"
    )


def _latents(vae: WanVae, frames: Frames, tiling: Tiling) -> Float[np.ndarray, "C F H W"]:
    """Normalised latents, four frames at a time, as a video to be continued is encoded."""
    return encode_pixels(vae, pixels_of(frames[None]), tiling=tiling)[0]


def _known(vae: WanVae, frames: Frames, tiling: Tiling) -> Float[np.ndarray, "Y F H W"]:
    """Mask and latents of the video of which only the first frame is known, others mid-grey."""
    pixels = np.zeros((1, 3, *frames.shape[:3]), np.float32)
    pixels[:, :, 0] = pixels_of(frames[:1])
    latents = encode_pixels(vae, pixels, tiling=tiling)[0]
    mask = np.zeros((FRAME_STRIDE, *latents.shape[1:]), latents.dtype)
    mask[:, 0] = 1
    return np.concatenate([mask, latents])


def _encode_texts(texts: list[str], files: EncodedFiles, on_encoded: OnEncoded) -> None:
    if not texts:
        return
    encoder = CaptionEncoder(files.sources.text, TEXT_LEN, dtype=jnp.dtype(files.text_dtype))
    for number, text in enumerate(texts, 1):
        _write(files.text(text), {"rows": encoder.encode_alone(text, _LENGTHS)})
        on_encoded("captions", number, len(texts))


def _write(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(file, {name: np.ascontiguousarray(value) for name, value in arrays.items()})
    except OSError as error:
        raise WeightsError(f"{file} cannot be written: {reason_of(error)}") from error


def _remove_stale(folder: Path) -> None:
    """Remove what an interruption left; not what another process writes just now."""
    now = time.time()
    for left in folder.glob(f"*/{TEMPORARY_PREFIX}*"):
        with suppress(OSError):
            if now - left.stat().st_mtime > _STALE:
                left.unlink()
