"""Components that are loaded when they are first needed, and prompts that are encoded once.

A component is let go of after each use, so that memory holds one large model at a time, unless it
is kept for the next one.
"""

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Generic, Literal, TypeVar

import numpy as np
from jaxtyping import Float

from skyreels_jax.components.prompt_cache import PromptCache
from skyreels_jax.components.protocols import (
    Autoencoder,
    ImageCondition,
    ImageEncoder,
    TextEncoder,
)
from skyreels_jax.memory import available_memory
from skyreels_jax.shapes import HostLatents, Pixels

_T = TypeVar("_T")
# Whether models stay in memory between calls; `auto` decides for each video by what is free.
Keep = Literal["auto"] | bool
# An estimate of work is a lower bound: so many times is made room for beside kept models.
_WORK_MARGIN: Final = 3

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Lazy(Generic[_T]):
    """A model that ``load`` makes when it is needed.

    Attributes:
        load: reads it.
        keep: whether it stays in memory afterwards.
        loaded: the model that was kept.
    """

    load: Callable[[], _T]
    keep: bool = False
    loaded: _T | None = None

    def get(self) -> _T:
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


class Residency:
    """Decides which models stay in memory between calls: all of them, or none."""

    def __init__(
        self,
        models: Mapping[str, Lazy[Any]],
        sizes: Callable[[], Mapping[str, int]],
        keep: Keep,
    ):
        """Nothing is decided yet, unless ``keep`` does.

        Args:
            models: by name; ``transformer`` and ``vae`` among them.
            sizes: gives the bytes of each; called when they are first needed.
            keep: the user's choice.
        """
        self._models, self._measure, self._keep = models, sizes, keep
        for model in models.values():
            model.keep = keep is True

    @cached_property
    def _sizes(self) -> Mapping[str, int]:
        return self._measure()

    def free_memory(self) -> int | None:
        """Bytes for a video, with those of kept models that it uses or that can go."""
        free = available_memory()
        usable = self._models if self._keep == "auto" else ("transformer",)
        kept = sum(self._sizes[name] for name in usable if self._models[name].loaded is not None)
        return None if free is None else free + kept

    def decide(self, work: int) -> None:
        """Keep all models where they and ``work`` bytes fit; let go of them if not; log changes."""
        if self._keep != "auto":
            return
        needed, free = sum(self._sizes.values()) + _WORK_MARGIN * work, self.free_memory()
        keep = free is not None and needed <= free
        if keep != self._models["vae"].keep:
            logger.info(
                "components %s between calls: with the work on this video they take %.2f GiB, "
                "and %s (keep=%s overrides this)",
                "stay in memory" if keep else "are loaded anew",
                needed / 2**30,
                "nobody can tell what is free" if free is None else f"{free / 2**30:.2f} are free",
                not keep,
            )
        for model in self._models.values():
            model.keep = keep
            model.loaded = model.loaded if keep else None
