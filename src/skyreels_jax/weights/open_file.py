"""Opens one file of tensors, whatever its name: its first bytes tell which format it is in."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from skyreels_jax.errors import WeightsError
from skyreels_jax.files import open_regular
from skyreels_jax.weights.gguf_file import GgufSource
from skyreels_jax.weights.low_precision import dequantized
from skyreels_jax.weights.plan import natural
from skyreels_jax.weights.safetensors_file import (
    FIRST_BYTES,
    SafetensorsSource,
    TensorInfo,
    TensorSource,
    refuse_lfs_pointer,
)
from skyreels_jax.weights.torch_file import PthSource

# Endings of files that may hold tensors.
WEIGHT_SUFFIXES: Final = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".gguf")
SHARD: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


class _NamedUnder:
    """The tensors of a source whose names begin with a key and a dot, without these."""

    def __init__(self, source: TensorSource, key: str):
        self._source, self._start = source, f"{key}."
        self.notes = (*getattr(source, "notes", ()), f"only what is under {key} is read")

    def tensors(self) -> Mapping[str, TensorInfo]:
        found, start = self._source.tensors().items(), self._start
        return {name.removeprefix(start): info for name, info in found if name.startswith(start)}

    def read(self, name: str) -> np.ndarray:
        return self._source.read(self._start + name)


def open_tensors(path: Path, *, key: str | None = None) -> TensorSource:
    """Open a file of tensors for reading; of its contents only the description is read.

    Weights in 8 or 4 bits are floats when they are read (:mod:`~skyreels_jax.weights.low_precision`
    and :mod:`~skyreels_jax.weights.gguf_file`).

    Of a file that is one of a numbered series (``…-00001-of-00003.safetensors``) all of the series
    is opened.

    Args:
        path: in the format of safetensors, GGUF or PyTorch's zip format.
        key: which mapping of a PyTorch file with several (``generator_ema``), or what all wanted
            names begin with, before a dot, in a format without nesting; None takes what is plain.

    Raises:
        WeightsError: it is no regular file, is damaged, is of another kind, which is named, its
            scales do not fit its weights, or it lacks ``key``, with the keys that it has.
    """
    start = first_bytes(path)
    if is_archive(start):
        return dequantized(PthSource(path, key=key))
    source = dequantized(_flat(path, start))
    if key is None:
        return source
    if not any(name.startswith(f"{key}.") for name in source.tensors()):
        tops = {name.partition(".")[0] for name in source.tensors()}
        listed = ", ".join(sorted(tops, key=natural)[:12])
        raise WeightsError(f"{path} has nothing under the key {key}; its names begin with {listed}")
    return _NamedUnder(source, key)


def is_archive(start: bytes) -> bool:
    """Whether a file that begins so is one of PyTorch's."""
    # The length of a safetensors header may begin with any byte.
    return start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[8:9] != b"{")


def _flat(path: Path, start: bytes) -> TensorSource:
    """A file of a format without nested mappings."""
    if start.startswith(b"GGUF"):
        return GgufSource(path)
    if path.suffix.casefold() == ".safetensors" or start[8:9] == b"{":
        return SafetensorsSource(series_of(path))
    if path.suffix.casefold() in (".pth", ".pt", ".ckpt"):
        return PthSource(path)
    raise WeightsError(
        f"{path} is no file of tensors: it begins with {start[:16]!r}; expected safetensors, GGUF "
        "or PyTorch's format (.pth, .pt, .ckpt)"
    )


def first_bytes(path: Path) -> bytes:
    """What a file begins with; a WeightsError where that is a page of text, or there is none."""
    try:
        with open_regular(path, error=WeightsError) as stream:
            start = stream.read(FIRST_BYTES)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    if not start:
        raise WeightsError(f"{path} is empty: its download or copy failed")
    refuse_lfs_pointer(path, start)
    if start[8:9] != b"{" and start.lstrip()[:1] == b"<":
        raise WeightsError(
            f"{path} is a web page and not a file of tensors: its download gave a page that asks "
            "for a login or reports an error"
        )
    return start


def series_names(stem: str, count: str) -> list[str]:
    """All names of a numbered series, by what :data:`SHARD` finds in one of them."""
    return [f"{stem}-{k:05d}-of-{count}.safetensors" for k in range(1, int(count) + 1)]


def series_of(path: Path) -> list[Path]:
    """All files of the numbered series that ``path`` is one of; itself alone if of none."""
    match = SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    names = series_names(match[1], match[3])
    there = {other.name for other in path.parent.iterdir()}
    if missing := [name for name in names if name not in there]:
        raise WeightsError(
            f"{path} is one of {len(names)} files, of which {len(missing)} are missing: "
            f"{missing[0]}"
        )
    return [path.with_name(name) for name in names]
