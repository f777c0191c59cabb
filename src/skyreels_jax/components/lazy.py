"""Components that are loaded when they are first needed, and prompts that are encoded once.

A component is let go of after each use, so that memory holds one large model at a time, unless it
is kept for the next one.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float

from skyreels_jax.components.prompt_cache import PromptCache
from skyreels_jax.components.protocols import (
    Autoencoder,
    ImageCondition,
    ImageEncoder,
    TextEncoder,
)
from skyreels_jax.shapes import HostLatents, Pixels

T = TypeVar("T")


@dataclass(eq=False)
class Lazy(Generic[T]):
    """A model that ``load`` makes when it is needed.

    Attributes:
        load: reads it.
        keep: whether it stays in memory afterwards.
        loaded: the model that was kept.
    """

    load: Callable[[], T]
    keep: bool = False
    loaded: T | None = None

    def get(self) -> T:
        """The model, loaded now unless it was kept.

        What nobody holds any more has left memory before: Flax flattens a model's state with a
        function that refers to itself, which leaves every parameter in a cycle, and without a
        collection a model of many gigabytes may stay for long.
        """
        if self.loaded is not None:
            return self.loaded
        gc.collect()
        model = self.load()
        if self.keep:
            self.loaded = model
        return model


@dataclass(eq=False)
class LazyTextEncoder(Lazy[TextEncoder]):
    """A text encoder that is loaded for prompts that ``cache``, where there is one, does not hold.

    ``cache`` is called at every use: an entry's name depends on the encoder's files as they are.
    """

    cache: Callable[[], PromptCache] | None = None

    def encode(self, prompts: Sequence[str]) -> Float[np.ndarray, "B S text_dim"]:
        """States as :class:`TextEncoder` has them."""
        if self.cache is None:
            return self.get().encode(prompts)
        return self.cache().encode(prompts, self.get)


@dataclass(eq=False)
class LazyImageEncoder(Lazy[ImageEncoder]):
    """An image encoder that is loaded when an image is encoded."""

    def encode(self, image: ImageCondition) -> Float[np.ndarray, "S image_dim"]:
        """Features as :class:`ImageEncoder` has them."""
        return self.get().encode(image)


@dataclass(eq=False)
class LazyAutoencoder(Lazy[Autoencoder]):
    """A VAE that is loaded when it encodes or decodes."""

    def encode(self, pixels: Pixels) -> HostLatents:
        """Latents as :class:`Autoencoder` has them."""
        return self.get().encode(pixels)

    def decode_pieces(self, pieces: Iterable[HostLatents]) -> Iterator[Pixels]:
        """Frames as :class:`Autoencoder` has them."""
        yield from self.get().decode_pieces(pieces)


def loaded_vae(vae: Autoencoder) -> Autoencoder:
    """The VAE in memory, for as long as the result is held: where it is used several times."""
    return vae.get() if isinstance(vae, LazyAutoencoder) else vae
