"""The header of a GGUF file: read from its start to its end, every count and offset checked.

The format (ggml-org/ggml, docs/gguf.md): magic, version, counts; keys with typed values; for each
tensor its name, its sizes with the fastest first, its type and the offset of its data; then the
data. Little-endian, versions 2 and 3.
"""

import mmap
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Final

import ml_dtypes
import numpy as np

from skyreels_jax.errors import WeightsError

# Of the values of keys, by the number that GGUF gives them.
_SCALARS: Final[Mapping[int, str]] = dict(
    zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
)
_STRING, _ARRAY = 8, 9
# Types of tensors that are stored as they are; all others are blocks.
PLAIN_TYPES: Final[Mapping[str, np.dtype]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# More than any file has; what is kept of each is a few hundred bytes.
_MOST_ENTRIES: Final = 65_536
_MOST_TEXTS: Final = 1_000_000
_LONGEST_NAME: Final = 1024
_MOST_SIZES: Final = 8
_ALIGNMENT: Final = 32
_SHAPE_KEY: Final = "comfy.gguf.orig_shape."


@dataclass(frozen=True)
class StoredBlocks:
    """Where a tensor's data are, and how they are packed.

    Attributes:
        kind: the name of the type.
        offset: of the data in the file.
        nbytes: of the data.
        block: elements of a block.
    """

    kind: str
    offset: int
    nbytes: int
    block: int


@dataclass
class GgufHeader:
    """What stands before the data, read from the start to its end.

    Attributes:
        path: of the file, for messages.
        content: of the file.
        size: of the file in bytes.
        at: where the next value begins.
        architecture: what the file says that it holds.
        shapes: of tensors whose stored sizes are others than their own.
        tensors: by name: shape, and where the data are.
        wanted: keys whose lists are to be kept; all others are only gone past.
        lists: of those keys.
    """

    path: Path
    content: mmap.mmap
    size: int
    at: int = 0
    architecture: str | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tensors: dict[str, tuple[tuple[int, ...], StoredBlocks]] = field(default_factory=dict)
    wanted: Collection[str] = ()
    lists: dict[str, Sequence[str] | np.ndarray] = field(default_factory=dict)
    _texts: int = 0

    def read(self) -> "GgufHeader":
        """Read and check everything.

        Raises:
            WeightsError: naming the file and what is wrong with it.
        """
        if self.content[:4] != b"GGUF":
            raise WeightsError(f"{self.path} is no GGUF file: it begins with {self.content[:4]!r}")
        self.at = 4
        version = self._number("I")
        if version not in (2, 3):
            big = version and not version & 0xFFFF
            kind = "for machines of the other byte order" if big else f"of version {version}"
            raise WeightsError(f"{self.path} is a GGUF file {kind}; versions 2 and 3 are read")
        count, keys = self._number("Q"), self._number("Q")
        if max(count, keys) > _MOST_ENTRIES:
            raise self._corrupt(
                f"it announces {count} tensors and {keys} keys; at most {_MOST_ENTRIES} are read"
            )
        alignment = _ALIGNMENT
        for _ in range(keys):
            key, kind = self._text(), self._number("I")
            begins = self.at
            value = self._value(kind)
            if key in self.wanted and kind == _ARRAY:
                self.lists[key] = self._list_at(begins)
            if key == "general.architecture" and isinstance(value, str):
                self.architecture = value
            elif key == "general.alignment":
                alignment = value if isinstance(value, int) else 0
            elif key.startswith(_SHAPE_KEY) and isinstance(value, tuple):
                self.shapes[key.removeprefix(_SHAPE_KEY)] = value
        if not 1 <= alignment <= 1 << 20:
            raise self._corrupt(f"its alignment is {alignment}")
        self._read_tensors(count, alignment)
        return self

    def _read_tensors(self, count: int, alignment: int) -> None:
        known = _types()
        for _ in range(count):
            name = self._text(_LONGEST_NAME)
            rank = self._number("I")
            if rank > _MOST_SIZES:
                raise self._corrupt(f"{name} has {rank} dimensions")
            shape = tuple(self._number("Q") for _ in range(rank))[::-1]
            code, offset = self._number("I"), self._number("Q")
            if name in self.tensors:
                raise self._corrupt(f"it holds {name} twice")
            if code not in known:
                read = ", ".join(name for name, _, _ in known.values())
                raise WeightsError(f"{self.path}: {name} is of type {code}; read are {read}")
            kind, block, nbytes = known[code]
            if not 0 < prod(shape) < 1 << 62 or (shape[-1] if shape else 1) % block:
                raise self._corrupt(f"{name} in {kind} has the shape {list(shape)}")
            if offset % alignment:
                raise self._corrupt(f"the data of {name} begin at {offset}, not at a {alignment}th")
            nbytes = prod(shape) // block * nbytes
            self.tensors[name] = shape, StoredBlocks(kind, offset, nbytes, block)
        self._place(-(-self.at // alignment) * alignment)
        for name, shape in self.shapes.items():
            stored = list(self.tensors[name][0]) if name in self.tensors else list(shape)
            if prod(shape) != prod(stored) or min(shape, default=1) < 1:
                raise self._corrupt(f"{name} is stored as {stored} and said to be {list(shape)}")

    def _place(self, start: int) -> None:
        """Prove that no two tensors share data and that all are in the file."""
        end = start
        for name, (shape, blocks) in sorted(self.tensors.items(), key=lambda t: t[1][1].offset):
            offset = start + blocks.offset
            if offset < end:
                raise self._corrupt(f"the data of {name} overlap those of another tensor")
            end = offset + blocks.nbytes
            if end > self.size:
                raise WeightsError(
                    f"{self.path} is truncated: {name} ends at byte {end} of {self.size}"
                )
            placed = StoredBlocks(blocks.kind, offset, blocks.nbytes, blocks.block)
            self.tensors[name] = shape, placed

    def _number(self, code: str) -> int:
        """The next unsigned number."""
        return int(self._unpacked(code, 1)[0])

    def _unpacked(self, code: str, count: int) -> tuple[int | float | bool, ...]:
        layout = struct.Struct(f"<{count}{code}")
        self._need(layout.size)
        self.at += layout.size
        return layout.unpack_from(self.content, self.at - layout.size)

    def _text(self, longest: int = 65_536) -> str:
        length = self._number("Q")
        if length > longest:
            raise self._corrupt(f"a text at byte {self.at} is {length} bytes long")
        self._need(length)
        self.at += length
        try:
            return self.content[self.at - length : self.at].decode()
        except UnicodeDecodeError as error:
            raise self._corrupt(f"what ends at byte {self.at} is no text") from error

    def _value(self, kind: int) -> object:
        """A key's value; of a list of texts, and of long ones, ``None``."""
        if kind == _STRING:
            # Chat templates are long; only the architecture's name is of interest.
            length = self._number("Q")
            self._need(length)
            self.at += length
            text = self.content[self.at - length : self.at] if length <= 256 else b""
            return text.decode(errors="replace")
        if kind in _SCALARS:
            return self._unpacked(_SCALARS[kind], 1)[0]
        if kind != _ARRAY:
            raise self._corrupt(f"a value at byte {self.at} is of the unknown type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner == _STRING:
            self._skip_texts(count)
            return None
        if inner not in _SCALARS:
            raise self._corrupt(f"a list at byte {self.at} is of the type {inner}")
        if count <= _MOST_SIZES:
            return tuple(int(x) for x in self._finite(self._unpacked(_SCALARS[inner], count)))
        self._need(count * struct.calcsize(f"<{_SCALARS[inner]}"))
        self.at += count * struct.calcsize(f"<{_SCALARS[inner]}")
        return None

    def _list_at(self, begins: int) -> Sequence[str] | np.ndarray:
        """A list that was gone past, and so is known to lie within the file."""
        kind, count = struct.unpack_from("<IQ", self.content, begins)
        at = begins + 12
        if kind != _STRING:
            dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
            return np.frombuffer(self.content[at : at + count * dtype.itemsize], dtype)
        texts: list[str] = []
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", self.content, at)
            texts.append(self.content[at + 8 : at + 8 + length].decode(errors="replace"))
            at += 8 + length
        return texts

    def _finite(self, values: tuple[int | float | bool, ...]) -> tuple[int | float | bool, ...]:
        return tuple(x if abs(x) < 1 << 62 else -1 for x in values)

    def _skip_texts(self, count: int) -> None:
        """Go past a list of texts, a tokenizer's words say."""
        self._texts += count
        if self._texts > _MOST_TEXTS:
            raise self._corrupt(f"its lists hold {self._texts} texts; {_MOST_TEXTS} are read")
        length, at, content = struct.Struct("<Q").unpack_from, self.at, self.content
        for _ in range(count):
            if at + 8 > self.size:
                raise self._truncated()
            at += 8 + length(content, at)[0]
        self._need(at - self.at)
        self.at = at

    def _need(self, nbytes: int) -> None:
        if nbytes > self.size - self.at:
            raise self._truncated()

    def _truncated(self) -> WeightsError:
        return WeightsError(
            f"{self.path} is truncated or corrupt: its header does not end within its "
            f"{self.size} bytes"
        )

    def _corrupt(self, why: str) -> WeightsError:
        return WeightsError(f"{self.path} is corrupt: {why:.400}")


@cache
def _types() -> dict[int, tuple[str, int, int]]:
    """The types of tensors that are read: by number the name, elements and bytes of a block.

    Raises:
        WeightsError: the package that knows them is not installed.
    """
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise WeightsError(
            "GGUF files are read by the package gguf: pip install gguf (it is part of a complete "
            "installation of skyreels-jax)"
        ) from error
    found: dict[int, tuple[str, int, int]] = {}
    for kind in GGMLQuantizationType:
        block, nbytes = GGML_QUANT_SIZES[kind]
        if kind.name in PLAIN_TYPES:
            found[int(kind)] = kind.name, block, nbytes
            continue
        try:
            dequantize(np.zeros((1, nbytes), np.uint8), kind)
        except (NotImplementedError, ValueError):
            continue
        found[int(kind)] = kind.name, block, nbytes
    return found
