"""What generation needs besides the transformer, as interfaces.

The all-JAX modules and the PyTorch ones of the hybrid pipeline both satisfy these, so there is one
generation code path; arrays cross as NumPy.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from skyreels_jax.shapes import HostLatents, Pixels


@dataclass(frozen=True)
class ImageCondition:
    """A conditioning image, before and after it was brought to the video's size.

    ``source`` is the image as given (RGB); ``pixels`` is at video resolution in [-1, 1].
    """

    source: UInt8[np.ndarray, "source_height source_width 3"]
    pixels: Float[np.ndarray, "3 height width"]


@runtime_checkable
class TextEncoder(Protocol):
    """Prompts to padded text states."""

    def encode(self, prompts: Sequence[str]) -> Float[np.ndarray, "B S text_dim"]:
        """Clean, tokenize to 512 and encode; rows past a prompt's end are exactly zero."""
        ...


@runtime_checkable
class ImageEncoder(Protocol):
    """An image to CLIP's penultimate features."""

    def encode(self, image: ImageCondition) -> Float[np.ndarray, "S image_dim"]:
        """Features of all tokens (class token first) of the last block but one."""
        ...


@runtime_checkable
class Autoencoder(Protocol):
    """Pixels to normalised latents and back: the VAE."""

    def encode(self, pixels: Pixels) -> HostLatents:
        """Posterior mean of ``4k + 1`` frames in [-1, 1], normalised: ``(mu - mean) / std``."""
        ...

    def decode_pieces(self, pieces: Iterable[HostLatents]) -> Iterator[Pixels]:
        """Frames in [-1, 1], in order, in chunks of any length; ``4F - 3`` frames in all.

        The pieces are one video's latents. The next is asked for only when all frames of those
        before it are taken, so that it may still have to be made.
        """
        ...


@dataclass(frozen=True)
class Components:
    """All components but the transformer; ``image_encoder`` only where the checkpoint has one."""

    text_encoder: TextEncoder
    vae: Autoencoder
    image_encoder: ImageEncoder | None = None
