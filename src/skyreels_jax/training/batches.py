"""Batches of encoded clips, as the transformer is trained on them: what data a recipe names.

:class:`ClipBatches` is what the transformer's task asks of its data, whatever that is;
:class:`MovingShapes` are clips that are drawn.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from skyreels_jax.errors import RequestError
from skyreels_jax.moving_shapes.captions import plain_caption
from skyreels_jax.outputs import path_of
from skyreels_jax.training.clip_source import ClipSource
from skyreels_jax.training.dataset import (
    WORDINGS,
    CaptionEncoder,
    EncodedClips,
    FirstFrameEncoder,
    OnEncoded,
    clips_fingerprint,
    encode_clips,
)
from skyreels_jax.training.objective import Batch
from skyreels_jax.training.sources import TrainingSources
from skyreels_jax.training.transformer_recipe import ClipsData
from skyreels_jax.weights.components.vae import stored_vae

# How often a caption says what, by the folder that it is of.
Tags = Mapping[str, Mapping[str, int]]
# A stream of random numbers that no other use shares.
TRAINING_STREAM: Final = 1
# Clips that the held-out loss is measured on.
HELD_CLIPS: Final = 64
# Held-out scenes that are shown while training.
_SHOWN: Final = 4


@dataclass(frozen=True, eq=False)
class Example:
    """What a model in training is asked to make, to be looked at.

    Attributes:
        prompt: its text.
        height, width, frames: its size.
        fps: frames a second.
        image: its first frame, for i2v.
    """

    prompt: str
    height: int
    width: int
    frames: int
    fps: int
    image: UInt8[np.ndarray, "height width 3"] | None = None


@runtime_checkable
class ClipBatches(Protocol):
    """Encoded clips with their conditions, in batches that follow from a number alone.

    Attributes:
        text_length: rows of text states in a batch.
    """

    text_length: int

    def batch(self, index: int) -> Batch:
        """The batch of a step; the same for the same index. Its shapes may differ from others'."""
        ...

    def held(self) -> Sequence[Batch]:
        """Clips that are never trained on, always the same; empty if there are none."""
        ...

    def fingerprint(self) -> Mapping[str, str]:
        """Digests of data and encoders, by what they are called in messages."""
        ...

    def examples(self) -> Sequence[Example]:
        """What is shown while training."""
        ...

    def tags(self) -> Tags:
        """How often captions that a person wrote say what; empty where nobody wrote any."""
        ...


class MovingShapes:
    """Clips of moving shapes: see :class:`ClipBatches`."""

    def __init__(
        self,
        data: ClipsData,
        sources: TrainingSources,
        seed: int,
        text_dropout: float,
        on_encoded: OnEncoded,
    ):
        """Load the encoders, and encode clips where that has not been done.

        Args:
            data: which clips.
            sources: the folders of the encoders; ``config`` says whether images are given.
            seed: of clips and order.
            text_dropout: share of clips without text.
            on_encoded: called as clips are encoded.

        Raises:
            RequestError: the clips cannot be had as asked for, or captions do not fit.
        """
        self._data, self._seed, self._text_dropout = data, seed, text_dropout
        self.text_length = data.text_length
        source = ClipSource(seed, data.frames, data.size, changes=data.changes)
        # What is refused is refused before clips are encoded.
        self._probabilities = (
            None if data.pairs is None else draw_probabilities(source, data.clips, data.pairs)
        )
        self._captions = CaptionEncoder(sources.text, data.text_length)
        self._first_frames = None if sources.image is None else FirstFrameEncoder(sources.image)
        vae = stored_vae(sources.vae).load(jnp.float32)
        self._clips, self._held = (
            encode_clips(
                path_of(data.encoded, "data.encoded"),
                vae,
                dataclasses.replace(source, held=held),
                count,
                with_known=sources.config.model_type == "i2v",
                on_encoded=on_encoded,
            )
            for held, count in ((False, data.clips), (True, HELD_CLIPS))
        )
        self._captions.check([text for clip in self._clips.captions for text in clip])
        self._digests = {
            "data.vae digest": clips_fingerprint(vae, source),
            "data.text digest": self._captions.digest(),
        }

    def fingerprint(self) -> Mapping[str, str]:
        """Digests of the encoders' parameters and of which clips there are."""
        return self._digests

    def batch(self, index: int) -> Batch:
        """Clips with one of their wordings each, or none."""
        rng = np.random.default_rng([self._seed, TRAINING_STREAM, index])
        rows = rng.choice(len(self._clips), size=self._data.batch, p=self._probabilities)
        texts = [self._clips.captions[row][int(rng.integers(WORDINGS))] for row in rows]
        empty = rng.random(len(rows)) < self._text_dropout
        # Nothing would say that it changes.
        empty &= self._clips.learned_from[rows] == 0
        said = [("" if none else str(text)) for none, text in zip(empty, texts, strict=True)]
        return self._batch(self._clips, rows, said)

    def held(self) -> Sequence[Batch]:
        """Combinations that are never drawn, in one batch."""
        texts = [captions[0] for captions in self._held.captions]
        return [self._batch(self._held, np.arange(HELD_CLIPS), texts)]

    def _batch(self, clips: EncodedClips, rows: np.ndarray, texts: list[str]) -> Batch:
        images = None if self._first_frames is None else self._first_frames(clips.first[rows])
        given = np.arange(clips.latents.shape[2]) < clips.learned_from[rows, None]
        return Batch(
            latents=jnp.asarray(clips.latents[rows]),
            context=jnp.asarray(self._captions(texts)),
            clip_fea=None if images is None else jnp.asarray(images),
            y=None if clips.known is None else jnp.asarray(clips.known[rows]),
            fps=jnp.asarray(clips.fps[rows] != 16, jnp.int32),
            given=None if not self._data.changes else jnp.asarray(given),
        )

    def examples(self) -> Sequence[Example]:
        """Scenes of combinations that are never drawn."""
        data, shown = self._data, []
        source = ClipSource(0, data.frames, data.size, held=True)
        for number in range(_SHOWN):
            scene = source.scene(number)[0]
            image = None if self._first_frames is None else source.render(scene, 1, 16)[0]
            size = (data.size, data.size, data.frames)
            shown.append(Example(plain_caption(scene), *size, 16, image))
        return shown

    def tags(self) -> Tags:
        """None: captions are drawn anew each time."""
        return {}


def draw_probabilities(source: ClipSource, count: int, pairs: float) -> Float[np.ndarray, " N"]:
    """With which the first ``count`` clips are drawn, so that a share ``pairs`` has two things.

    Raises:
        RequestError: none, or all, of them have two.
    """
    is_pair = np.array([len(source.scene(index)[0].things) == 2 for index in range(count)])
    of_each = np.array([np.sum(~is_pair), np.sum(is_pair)])
    wanted = np.array([1 - pairs, pairs])
    if np.any((of_each == 0) & (wanted > 0)):
        raise RequestError(
            f"data.pairs = {pairs} cannot be had from {count} clips; give more clips"
        )
    return np.where(is_pair, *(wanted / np.maximum(of_each, 1))[::-1])
