"""Where tensors are read from: one small interface, and the safetensors files behind it.

:mod:`~skyreels_jax.weights.torch_file` has ``.pth`` archives behind the same interface. Headers of
safetensors are checked in full, data memory-mapped one tensor at a time.

The format (huggingface/safetensors, README): 8 bytes of header length, little-endian; a JSON header
``{name: {"dtype", "shape", "data_offsets": [begin, end]}}`` that may end in spaces; then the data,
which the tensors cover exactly. Why the format's own library does not read them: docs/adr/0006.
"""

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from skyreels_jax.errors import WeightsError
from skyreels_jax.files import MAX_HEADER_BYTES, open_regular, parse_json

DTYPES: Final[Mapping[str, np.dtype]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_LFS_POINTER: Final = b"version https://git-lfs"
# As many bytes of a file as tell what it is.
FIRST_BYTES: Final = 64


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor is without its values. ``dtype`` may be one of ml_dtypes (bfloat16)."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the data as stored."""
        return self.size * self.dtype.itemsize


@dataclass(frozen=True)
class TensorInfo(TensorSpec):
    """What a file's header says of a tensor, and which file that is."""

    file: str


@runtime_checkable
class TensorSource(Protocol):
    """A read-only collection of named tensors whose data stay on disk until asked for."""

    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, from the headers alone."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The data of one tensor as a read-only, memory-mapped view where the file allows it."""
        ...


@dataclass
class Allowance:
    """Bytes of Python objects that may still be made while ``file`` is being read.

    Descriptions are small beside the tensors they describe. A hostile file can be nothing but
    description, one byte of it making an object of a hundred; this is where that ends.
    """

    file: str
    left: int

    def spend(self, nbytes: int) -> None:
        """Take ``nbytes`` off.

        Raises:
            WeightsError: if fewer are left.
        """
        self.left -= nbytes
        if self.left < 0:
            raise WeightsError(
                f"{self.file} is corrupt or hostile: describing its tensors takes several times "
                "the memory of the file itself"
            )


@dataclass(frozen=True)
class _Location:
    """A tensor's place: its description and the byte of the file its data begin at."""

    info: TensorInfo
    offset: int


class SafetensorsSource:
    """The tensors of one or several safetensors files (shards), by name.

    Args:
        files: the shards, in any order.

    Attributes:
        metadata: the texts of the headers' ``__metadata__`` by key, those of all shards.

    Raises:
        WeightsError: if a file is not sound safetensors, or two files hold the same tensor.
    """

    def __init__(self, files: Iterable[Path]):
        self._places: dict[str, _Location] = {}
        self.metadata: dict[str, tuple[str, ...]] = {}
        for file in files:
            places, metadata = _read_header(file)
            for key, text in metadata.items():
                self.metadata[key] = (*self.metadata.get(key, ()), text)
            for name, place in places.items():
                other = self._places.setdefault(name, place)
                if other is not place:
                    raise WeightsError(
                        f"{name} is in both {other.info.file} and {file}: a folder holds each "
                        "tensor once; remove the files that do not belong together"
                    )

    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, from the headers alone."""
        return {name: place.info for name, place in self._places.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, read-only and memory-mapped; unmapped when the array is let go."""
        place = self._places[name]
        info = place.info
        if info.size == 0:
            return np.empty(info.shape, info.dtype)
        raw = np.memmap(info.file, np.uint8, "r", offset=place.offset, shape=(info.nbytes,))
        return np.asarray(raw).view(info.dtype).reshape(info.shape)


def refuse_lfs_pointer(file: Path, start: bytes) -> None:
    """Refuse what Git LFS puts in a large file's place, by its :data:`FIRST_BYTES`.

    Raises:
        WeightsError: it is such a pointer; says how to get the file.
    """
    if start.startswith(_LFS_POINTER):
        raise WeightsError(f"{file} is a Git LFS pointer: fetch the file (git lfs pull)")


def _read_header(file: Path) -> tuple[dict[str, _Location], dict[str, str]]:
    """Read and check one file's header: where the tensors are, and the texts of its metadata.

    Raises:
        WeightsError: naming the file, if it cannot be read, is truncated or is not sound.
    """
    try:
        with open_regular(file, error=WeightsError) as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            start = stream.read(FIRST_BYTES)
            refuse_lfs_pointer(file, start)
            if size < 8:
                raise WeightsError(f"{file} is truncated: {size} bytes hold no header")
            (length,) = struct.unpack("<Q", start[:8])
            if length > MAX_HEADER_BYTES or length + 8 > size:
                raise WeightsError(
                    f"{file} is truncated or not a safetensors file: it announces a header of "
                    f"{length} bytes (at most {MAX_HEADER_BYTES} are read) and has {size} in all"
                )
            stream.seek(8)
            raw = stream.read(length)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror or error}") from error
    header = _parsed(file, raw)
    metadata = header.pop("__metadata__", None)
    texts = metadata.items() if isinstance(metadata, dict) else ()
    places = _locations(file, header, 8 + length, size - 8 - length)
    return places, {key: text for key, text in texts if isinstance(text, str)}


def _parsed(file: Path, raw: bytes) -> dict[str, object]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise WeightsError(f"{file} is not a safetensors file: its header is no text") from error
    header = parse_json(text, f"{file} is not a safetensors file: its header", error=WeightsError)
    if not isinstance(header, dict):
        raise WeightsError(f"{file} is not a safetensors file: its header is no JSON object")
    return header


def _locations(
    file: Path, header: Mapping[str, object], start: int, data_size: int
) -> dict[str, _Location]:
    """Check that the tensors cover the data exactly and say where each one is."""
    places = {name: _location(file, name, entry, start) for name, entry in header.items()}
    end = start
    for name, place in sorted(places.items(), key=lambda p: (p[1].offset, p[1].info.nbytes)):
        if place.offset != end:
            what = "overlap" if place.offset < end else "leave a hole"
            raise WeightsError(f"{file} is corrupt: its tensors {what} before {name}")
        end += place.info.nbytes
    if end != start + data_size:
        state = "truncated" if end > start + data_size else "corrupt"
        raise WeightsError(
            f"{file} is {state}: its header announces {end - start} bytes of data, the file has "
            f"{data_size}"
        )
    return places


def _location(file: Path, name: str, entry: object, start: int) -> _Location:
    where = f"{file} is corrupt: the header's entry of {name}"
    if not isinstance(entry, dict):
        raise WeightsError(f"{where} is no JSON object")
    shape, offsets = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    code = entry.get("dtype")
    if shape is None or offsets is None or len(offsets) != 2:
        raise WeightsError(
            f"{where} has shape {entry.get('shape')!r:.80} and offsets "
            f"{entry.get('data_offsets')!r:.80}"
        )
    if not isinstance(code, str) or code not in DTYPES:
        raise WeightsError(f"{where} has dtype {code!r:.80}; known are {', '.join(DTYPES)}")
    begin, end = offsets
    # Python integers: a hostile shape cannot overflow.
    nbytes = math.prod(shape) * DTYPES[code].itemsize
    if end - begin != nbytes:
        raise WeightsError(
            f"{where} gives {end - begin} bytes to {code} {list(shape)}, which takes {nbytes}"
        )
    return _Location(TensorInfo(shape, DTYPES[code], str(file)), start + begin)


def _sizes(value: object) -> tuple[int, ...] | None:
    if isinstance(value, list) and all(type(x) is int and x >= 0 for x in value):
        return tuple(value)
    return None
