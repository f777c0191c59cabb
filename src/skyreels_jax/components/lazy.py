"""Components that are loaded when they are first needed, and prompts that are encoded once.

A component is let go of after each use, so that memory holds one large model at a time, unless it
is kept for the next one. Encoded prompts are kept on disk, so that a prompt seen before never loads
the text encoder: an entry is named by a hash of the cleaned prompt and of what made it, the
encoder's files and its compute type. It is 512 x text_dim values, of which only the rows of real
tokens are stored.
"""

import gc
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar

import numpy as np
from jaxtyping import Float

from skyreels_jax import prompts as prompt_text
from skyreels_jax.components.protocols import (
    Autoencoder,
    ImageCondition,
    ImageEncoder,
    TextEncoder,
)
from skyreels_jax.errors import RequestError
from skyreels_jax.files import load_tensors, reason_of, save_tensors
from skyreels_jax.hub import fingerprint, warn_unwritable
from skyreels_jax.memory import available_memory
from skyreels_jax.shapes import HostLatents, Pixels

# Change when the meaning of an entry changes.
_ENTRY: Final = "prompt-embedding-2"
# Most values of an entry: of the original, 512 tokens of 4096.
_MAX_VALUES: Final = 2**26
_T = TypeVar("_T")
# Whether models stay in memory between calls; `auto` decides for each video by what is free.
Keep = Literal["auto"] | bool
# An estimate of work is a lower bound: so many times is made room for beside kept models.
_WORK_MARGIN: Final = 3
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptCache:
    """Encoded prompts in ``folder``, by an encoder whose :func:`fingerprint` is ``weights``."""

    folder: Path
    weights: str

    @classmethod
    def open(cls, folder: Path, made_by: Iterable[Path], settings: Iterable[str]) -> "PromptCache":
        """The entries in ``folder`` of an encoder as it is now.

        Args:
            folder: of the cache; made when the first entry is.
            made_by: files and folders that decide an encoding.
            settings: what else does.
        """
        files = [f for path in made_by for f in (path, *path.rglob("*")) if f.is_file()]
        return cls(folder, fingerprint(files, *settings))

    def encode(
        self, prompts: Sequence[str], load: Callable[[], TextEncoder]
    ) -> Float[np.ndarray, "B S text_dim"]:
        """States of all prompts; ``load`` is called if one is missing or cannot be read."""
        found = {prompt: _read_entry(self.path_of(prompt)) for prompt in prompts}
        states = {prompt: entry for prompt, entry in found.items() if entry is not None}
        if missing := [prompt for prompt in found if prompt not in states]:
            for prompt, made in zip(missing, load().encode(missing), strict=True):
                states[prompt] = made
                _write_entry(self.path_of(prompt), made)
        return np.stack([states[prompt] for prompt in prompts])

    def path_of(self, prompt: str) -> Path:
        """The entry's file."""
        key = hashlib.sha256(f"{_ENTRY}\0{self.weights}\0{prompt_text.clean(prompt)}".encode())
        return self.folder / f"{key.hexdigest()}.safetensors"


def _read_entry(path: Path) -> Float[np.ndarray, "S text_dim"] | None:
    """An entry with its zero rows restored, or ``None`` where there is none that is whole."""
    if not path.exists():
        return None
    try:
        entry, texts = load_tensors(path, "cached prompt")
        rows, (length, width) = entry["rows"], entry["shape"].tolist()
        whole = rows.ndim == 2 and rows.dtype == np.float32 and rows.shape[1] == width
        if texts.get("key") != path.stem or not (
            whole and len(rows) <= length and length * width <= _MAX_VALUES
        ):
            raise RequestError(f"cached prompt {path} is another's")
        states = np.zeros((length, width), np.float32)
        states[: len(rows)] = rows
    except (RequestError, KeyError, ValueError, MemoryError) as error:
        logger.warning("%s; the prompt is encoded anew", error)
        return None
    return states


def _write_entry(path: Path, states: Float[np.ndarray, "S text_dim"]) -> None:
    """Write the rows up to the last that is not zero; where that is refused, go on without."""
    used = np.flatnonzero(np.any(states != 0, axis=1))
    rows = states[: used[-1] + 1 if used.size else 0].astype(np.float32)
    entry = {"rows": rows, "shape": np.asarray(states.shape, np.int64)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, entry, {"key": path.stem})
    except OSError as error:
        warn_unwritable(path.parent, reason_of(error))


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
        of_all: Callable[[int | None], int | None] = lambda of_one: of_one,
    ):
        """Nothing is decided yet, unless ``keep`` does.

        Args:
            models: by name; ``transformer`` and ``vae`` among them.
            sizes: gives the bytes of each; called when they are first needed.
            keep: the user's choice.
            of_all: bytes free on all devices that the models are on, of those on one.
        """
        self._of_all = of_all
        self._models, self._measure, self._keep = models, sizes, keep
        for model in models.values():
            model.keep = keep is True

    @cached_property
    def _sizes(self) -> Mapping[str, int]:
        return self._measure()

    def free_memory(self) -> int | None:
        """Bytes for a video, with those of kept models that it uses or that can go.

        On a mesh they are those of all devices.
        """
        free = self._of_all(available_memory())
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
