"""Prompt embeddings kept on disk, so that a prompt seen before never loads the text encoder.

An entry is named by a hash of the cleaned prompt and of what made it: the encoder's files and its
compute type. It is 512 x text_dim values, of which only the rows of real tokens are stored.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from skyreels_jax import prompts as prompt_text
from skyreels_jax.components.protocols import TextEncoder
from skyreels_jax.files import whole_file

# Change when the meaning of an entry changes.
_FORMAT: Final = "prompt-embedding-1"
_SAMPLES: Final = 4096
_SAMPLE_BYTES: Final = 256


def fingerprint(files: Iterable[Path], *settings: str) -> str:
    """A hash that changes when the weights change, without reading all of them.

    It covers every file's name, size and time of change, its first mebibyte (the names and shapes)
    and 4096 samples of 256 bytes spread over the rest: 2 MB read of the 11 GB of UMT5-XXL.
    """
    digest = hashlib.sha256(_FORMAT.encode())
    for setting in settings:
        digest.update(b"\0" + setting.encode())
    for path in sorted(files):
        stat = path.stat()
        digest.update(f"\0{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            for offset in np.linspace(0, stat.st_size, _SAMPLES, endpoint=False, dtype=np.int64):
                file.seek(int(offset))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


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
        key = hashlib.sha256(f"{self.weights}\0{prompt_text.clean(prompt)}".encode())
        return self.folder / f"{key.hexdigest()}.safetensors"


def _read_entry(path: Path) -> Float[np.ndarray, "S text_dim"] | None:
    """An entry with its zero rows restored, or ``None`` where there is none that can be read."""
    try:
        entry = load_file(path)
        states = np.zeros(tuple(entry["shape"]), np.float32)
        states[: entry["rows"].shape[0]] = entry["rows"]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return states


def _write_entry(path: Path, states: Float[np.ndarray, "S text_dim"]) -> None:
    """Write the rows up to the last that is not zero, under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    used = np.flatnonzero(np.any(states != 0, axis=1))
    rows = states[: used[-1] + 1 if used.size else 0].astype(np.float32)
    with whole_file(path) as temporary:
        save_file({"rows": rows, "shape": np.asarray(states.shape, np.int64)}, temporary)
