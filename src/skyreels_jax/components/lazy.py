"""Components that are in memory only while they work."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float

from skyreels_jax.components.protocols import (
    ImageCondition,
    ImageEncoder,
    TextEncoder,
    VideoCodec,
)
from skyreels_jax.shapes import HostLatents, Pixels

T = TypeVar("T")


def making_room(load: Callable[[], T]) -> Callable[[], T]:
    """``load``, once all that nobody holds any more has really left memory.

    Flax flattens a model's state with a function that refers to itself, which leaves every
    parameter in a cycle: without a collection a model of many gigabytes may stay for long.
    """

    def collected() -> T:
        gc.collect()
        return load()

    return collected


@dataclass(frozen=True)
class TextOnDemand:
    """A text encoder that is in memory only while it encodes."""

    load: Callable[[], TextEncoder]

    def encode(self, prompts: Sequence[str]) -> Float[np.ndarray, "B S text_dim"]:
        """Load, encode, let go."""
        return self.load().encode(prompts)


@dataclass(frozen=True)
class ImageOnDemand:
    """An image encoder that is in memory only while it encodes."""

    load: Callable[[], ImageEncoder]

    def encode(self, image: ImageCondition) -> Float[np.ndarray, "S image_dim"]:
        """Load, encode, let go."""
        return self.load().encode(image)


@dataclass(frozen=True)
class CodecOnDemand:
    """A VAE that is in memory only while it encodes or decodes."""

    load: Callable[[], VideoCodec]

    def encode(self, pixels: Pixels) -> HostLatents:
        """Load, encode, let go."""
        return self.load().encode(pixels)

    def decode_pieces(self, pieces: Iterable[HostLatents]) -> Iterator[Pixels]:
        """Load, decode, let go."""
        yield from self.load().decode_pieces(pieces)
