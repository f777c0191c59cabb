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
FORMAT: Final = "prompt-embedding-1"
SAMPLES: Final = 4096
SAMPLE_BYTES: Final = 256


def fingerprint(files: Iterable[Path], *settings: str) -> str:
    """A hash that changes when the weights change, without reading all of them.

    It covers every file's name, size and time of change, its first mebibyte (the names and shapes)
    and 4096 samples of 256 bytes spread over the rest: 2 MB read of the 11 GB of UMT5-XXL.
    """
    digest = hashlib.sha256(FORMAT.encode())
    for setting in settings:
        digest.update(b"\0" + setting.encode())
    for path in sorted(files):
        stat = path.stat()
        digest.update(f"\0{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            for offset in np.linspace(0, stat.st_size, SAMPLES, endpoint=False, dtype=np.int64):
                file.seek(int(offset))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


@dataclass(frozen=True)
class CachedTextEncoder:
    """A :class:`TextEncoder` that looks into ``folder`` first, and loads the real one if it must.

    ``load`` makes the encoder; ``weights`` is the :func:`fingerprint` of what it would load.
    """

    load: Callable[[], TextEncoder]
    folder: Path
    weights: str

    def encode(self, prompts: Sequence[str]) -> Float[np.ndarray, "B S text_dim"]:
        """As the real encoder; entries that cannot be read are made anew."""
        found = [read_entry(self.path_of(prompt)) for prompt in prompts]
        missing = [p for p, entry in zip(prompts, found, strict=True) if entry is None]
        made: dict[str, np.ndarray] = {}
        if missing:
            unique = list(dict.fromkeys(missing))
            made = dict(zip(unique, self.load().encode(unique), strict=True))
            for prompt, states in made.items():
                write_entry(self.path_of(prompt), states)
        rows = [
            made[prompt] if entry is None else entry
            for prompt, entry in zip(prompts, found, strict=True)
        ]
        return np.stack(rows)

    def path_of(self, prompt: str) -> Path:
        """The entry's file."""
        key = hashlib.sha256(f"{self.weights}\0{prompt_text.clean(prompt)}".encode())
        return self.folder / f"{key.hexdigest()}.safetensors"


def read_entry(path: Path) -> Float[np.ndarray, "S text_dim"] | None:
    """An entry with its zero rows restored, or ``None`` where there is none that can be read."""
    try:
        entry = load_file(path)
        states = np.zeros(tuple(entry["shape"]), np.float32)
        states[: entry["rows"].shape[0]] = entry["rows"]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return states


def write_entry(path: Path, states: Float[np.ndarray, "S text_dim"]) -> None:
    """Write the rows up to the last that is not zero, under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    used = np.flatnonzero(np.any(states != 0, axis=1))
    rows = states[: used[-1] + 1 if used.size else 0].astype(np.float32)
    with whole_file(path) as temporary:
        save_file({"rows": rows, "shape": np.asarray(states.shape, np.int64)}, temporary)
