"""Reads GGUF files: the container by our own reader, the blocks by the package ``gguf``.

The package's own reader trusts what a header says, so only its formulas are used; they are the
definition of each type (docs/adr/0009).
"""

import mmap
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from math import prod
from pathlib import Path
from typing import Final

import numpy as np

from skyreels_jax.errors import WeightsError
from skyreels_jax.files import open_regular
from skyreels_jax.weights.gguf_header import PLAIN_TYPES, GgufHeader, StoredBlocks
from skyreels_jax.weights.repackaged import transformers_name
from skyreels_jax.weights.safetensors_file import TensorInfo

# Elements that are dequantised at a time; what that takes stays in cache.
_AT_ONCE: Final = 1 << 16


class GgufSource:
    """The tensors of one GGUF file as floats, each read and dequantised when it is asked for.

    Args:
        path: the file.

    Attributes:
        notes: which types the tensors are stored in.

    Raises:
        WeightsError: it is no sound GGUF file, is of another architecture than Wan's transformer or
            a T5 encoder, or holds a type of tensor that is not read.
    """

    def __init__(self, path: Path):
        self._path = path
        header = read_header(path)
        rename = _name_of(path, header.architecture)
        self._infos: dict[str, TensorInfo] = {}
        self._blocks: dict[str, StoredBlocks] = {}
        for name, (shape, blocks) in header.tensors.items():
            dtype = PLAIN_TYPES.get(blocks.kind, np.dtype(np.float32))
            own = rename(name)
            if own in self._infos:
                raise WeightsError(f"{path} is corrupt: it holds {name} twice")
            self._infos[own] = TensorInfo(header.shapes.get(name, shape), dtype, str(path))
            self._blocks[own] = blocks
        counts = Counter(blocks.kind for blocks in self._blocks.values())
        listed = ", ".join(f"{counts[kind]} in {kind}" for kind in sorted(counts))
        self.notes = (f"GGUF: {listed or 'no tensors'}",)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, with the dtypes that they are read in."""
        return self._infos

    def read(self, name: str) -> np.ndarray:
        """One tensor: as it is stored where that is a float, else dequantised to float32."""
        info, blocks = self._infos[name], self._blocks[name]
        raw = np.memmap(self._path, np.uint8, "r", offset=blocks.offset, shape=(blocks.nbytes,))
        if blocks.kind in PLAIN_TYPES:
            return np.asarray(raw).view(info.dtype).reshape(info.shape)
        return _dequantized(np.asarray(raw), info.shape, blocks)


def read_header(path: Path, *, wanted: Collection[str] = ()) -> GgufHeader:
    """What stands before a file's data, with the lists of the keys that are wanted.

    Raises:
        WeightsError: it is no sound GGUF file.
    """
    try:
        with open_regular(path, error=WeightsError) as stream:
            size = stream.seek(0, 2)
            if size < 24:
                raise WeightsError(f"{path} is truncated: {size} bytes hold no GGUF header")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return GgufHeader(path, content, size, wanted=wanted).read()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error


def _dequantized(raw: np.ndarray, shape: tuple[int, ...], blocks: StoredBlocks) -> np.ndarray:
    """All blocks of a tensor as float32, a few at a time."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[blocks.kind]
    values = np.empty(prod(shape), np.float32)
    packed = raw.reshape(values.size // blocks.block, -1)
    step = max(1, _AT_ONCE // blocks.block)
    # A damaged scale may be anything; what is not finite is refused where it is used.
    with np.errstate(all="ignore"):
        for start in range(0, packed.shape[0], step):
            some = packed[start : start + step]
            first = start * blocks.block
            out = values[first : first + some.shape[0] * blocks.block]
            out[:] = dequantize(some.reshape(1, -1), kind)[0]
    return values.reshape(shape)


def _name_of(path: Path, architecture: str | None) -> Callable[[str], str]:
    """How the file's names become a model's.

    Raises:
        WeightsError: the architecture is not read.
    """
    if architecture is None or architecture == "wan":
        return str
    if architecture in ("t5", "t5encoder"):
        return transformers_name
    raise WeightsError(
        f"{path} is a GGUF file of the architecture {architecture!r:.80}; wan (the transformer) "
        "and t5encoder (the text encoder) are read"
    )
