"""What the transformer is told of a clip in training: its text, and its first frame."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from skyreels_jax.models.clip_vision import PIXEL_MEAN, PIXEL_STD, ClipVision
from skyreels_jax.models.umt5 import Umt5Encoder
from skyreels_jax.ops.resize import bicubic_resize
from skyreels_jax.prompts import Tokenizer
from skyreels_jax.weights.layout import parts_of
from skyreels_jax.weights.parts import stored_image_encoder, stored_text_encoder


def _applied(model: Umt5Encoder | ClipVision) -> Callable[..., np.ndarray]:
    graph, state = nnx.split(model)

    @jax.jit
    def apply(state: nnx.State, *inputs: Array) -> Array:
        return nnx.merge(graph, state)(*inputs)

    return lambda *inputs: np.asarray(apply(state, *map(jnp.asarray, inputs)))


class TextStates:
    """Captions to text states of a fixed length; those of a prompt do not depend on its padding."""

    def __init__(self, folder: Path, length: int):
        """``folder`` has ``tokenizer`` and ``text_encoder``; ``length`` holds the longest text."""
        layout = parts_of(folder)
        self._tokenizer = Tokenizer.from_folder(layout.part("tokenizer"))
        self._apply = _applied(stored_text_encoder(layout).load(jnp.float32))
        self.length = length

    def __call__(self, captions: Sequence[str]) -> Float[np.ndarray, "B S text_dim"]:
        """States, zero past a text's end.

        Raises:
            ValueError: a text has more tokens.
        """
        tokens = self._tokenizer.encode(captions)
        longest = max(tokens.lengths)
        if longest > self.length:
            raise ValueError(f"a caption has {longest} tokens; text_length = {self.length}")
        return self._apply(tokens.ids[:, : self.length], tokens.mask[:, : self.length])


class ImageStates:
    """First frames to CLIP's features, prepared as the original does."""

    def __init__(self, folder: Path):
        """``folder`` has ``image_encoder``."""
        model = stored_image_encoder(parts_of(folder)).load(jnp.float32)
        self._side = model.config.image_size
        self._apply = _applied(model)

    def __call__(self, frames: np.ndarray) -> Float[np.ndarray, "B I image_dim"]:
        """Of uint8 frames ``[B, height, width, 3]``."""
        return self._apply(clip_pixels(frames, self._side))


def clip_pixels(frames: np.ndarray, side: int) -> Float[np.ndarray, "B 3 side side"]:
    """Uint8 frames ``[B, height, width, 3]`` as CLIP takes them: resampled and normalised."""
    pixels = np.moveaxis(frames, -1, 1) / np.float32(255)
    if pixels.shape[2:] != (side, side):
        pixels = np.stack([bicubic_resize(frame, side, side) for frame in pixels])
    return (pixels - PIXEL_MEAN[None, :, None, None]) / PIXEL_STD[None, :, None, None]
