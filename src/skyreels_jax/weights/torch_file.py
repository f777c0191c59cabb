"""Reads PyTorch's zip ``.pth`` files without PyTorch: tensors only, memory-mapped, nothing run.

Such a file (``torch.save`` since PyTorch 1.6) is a zip archive of uncompressed members under one
folder: ``data.pkl`` describes views of storages, ``data/<key>`` are the storages, ``byteorder``
says how their numbers are written. :mod:`~skyreels_jax.weights.stored_zip` reads the first layer,
:mod:`~skyreels_jax.weights.tensor_pickle` the second, and this module checks one against the other.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from skyreels_jax.errors import WeightsError
from skyreels_jax.files import open_regular
from skyreels_jax.weights.pickle_values import PickledTensor, Storage
from skyreels_jax.weights.safetensors_file import (
    FIRST_BYTES,
    Allowance,
    TensorInfo,
    refuse_lfs_pointer,
)
from skyreels_jax.weights.stored_zip import Member, check_crc, read_directory
from skyreels_jax.weights.tensor_pickle import read_pickle

# Opening takes at most four times the file's size (measured on hostile files; a part of that is not
# counted), or this many bytes where the file is small.
ALLOWANCE_FACTOR: Final = 3.5
ALLOWANCE_FLOOR: Final = 4 << 20
# Measured: what was pickled of a tensor, a TensorInfo and a view, with places in dictionaries.
_TENSOR_COST: Final = 550
# The mapping of a LoRA of a generator that was trained with one, beside that of its critic.
LORA_MAPPING: Final = "generator_lora"
# Of several mappings in a file, the first of these is the model: the average over training before
# the last values, a generator before what judged it.
_PLAIN_KEYS: Final = (
    *("generator_ema", "model_ema", "ema", "generator", "model", "state_dict"),
    LORA_MAPPING,
)
# Shapes of empty tensors are bounded by nothing else; NumPy counts bytes in 63 bits.
_MAX_EMPTY: Final = 1 << 48


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor and the member of the archive that it is a part of; counts in elements."""

    info: TensorInfo
    member: Member
    offset: int
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Elements from the first to the last one, both included; at least one element."""
        steps = zip(self.info.shape, self.strides, strict=True)
        return 1 + sum((length - 1) * stride for length, stride in steps)

    @property
    def contiguous(self) -> bool:
        """Whether the elements follow one another in C order."""
        expected = 1
        for length, stride in zip(self.info.shape[::-1], self.strides[::-1], strict=True):
            if length != 1 and stride != expected:
                return False
            expected *= length
        return True


class PthSource:
    """The tensors of a ``.pth`` file, by name.

    The file holds a mapping of names to tensors, as ``torch.save(module.state_dict(), file)``
    writes it, or mappings of which one is taken (``{"generator": {...}, "generator_ema": {...}}``).
    Views may share storages and need not be contiguous.

    Args:
        file: in PyTorch's zip format.
        key: which mapping to take of several; None takes the one that is plain.

    Attributes:
        notes: which mapping was taken, if there are several, and what was left.
        mapping: the key of the mapping that was taken; None where the tensors are in none.

    Raises:
        WeightsError: naming the file, if it is of another kind, damaged, contains anything
            besides tensors, or lacks ``key``, with the keys that it has.
    """

    def __init__(self, file: Path, *, key: str | None = None):
        data = _mapped(file)
        self._file = file
        allowance = Allowance(str(file), int(max(ALLOWANCE_FLOOR, ALLOWANCE_FACTOR * len(data))))
        self._members = read_directory(str(file), data, allowance)
        # Writers that leave checksums out leave them all out.
        self._has_checksums = any(member.crc for member in self._members.values())
        # Members whose checksum was found right; storages that tensors share are summed once.
        self._checked: set[Member] = set()
        top = _top(file, self._members)
        if f"{top}/byteorder" in self._members:
            order = bytes(self._record(f"{top}/byteorder", data)[:80])
            if order != b"little":
                raise WeightsError(f"{file} has byte order {order!r}; only b'little' is read")
        # What the pickle's memo holds is let go before the views are made.
        pickled = read_pickle(str(file), self._record(f"{top}/data.pkl", data), replace(allowance))
        self._views: dict[str, _View] = {}
        state, self.mapping, self.notes = _state_dict(file, pickled, key)
        for name, tensor in state.items():
            allowance.spend(_TENSOR_COST)
            self._views[name] = self._view(name, tensor, top, len(data))

    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, from the description alone."""
        return {name: view.info for name, view in self._views.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, read-only; memory-mapped if it is contiguous, else a contiguous copy.

        Raises:
            WeightsError: if the checksum of its storage is wrong, or the file has changed.
        """
        view = self._views[name]
        info = view.info
        if info.size == 0:
            return np.empty(info.shape, info.dtype)
        member = view.member
        try:
            raw = np.memmap(self._file, np.uint8, "r", offset=member.offset, shape=(member.size,))
        except (OSError, ValueError) as error:
            raise WeightsError(f"{self._file} cannot be read any more: {error}") from error
        self._check(name, member, raw.data)
        start, size = view.offset * info.dtype.itemsize, view.extent * info.dtype.itemsize
        elements = np.asarray(raw)[start : start + size].view(info.dtype)
        if view.contiguous:
            return elements.reshape(info.shape)
        strides = tuple(stride * info.dtype.itemsize for stride in view.strides)
        spread = np.lib.stride_tricks.as_strided(elements, info.shape, strides, writeable=False)
        copy = np.ascontiguousarray(spread)
        copy.flags.writeable = False
        return copy

    def _record(self, name: str, data: memoryview) -> memoryview:
        member = self._members[name]
        content = data[member.offset : member.offset + member.size]
        self._check(name, member, content)
        return content

    def _check(self, name: str, member: Member, content: memoryview) -> None:
        if self._has_checksums and member not in self._checked:
            check_crc(str(self._file), name, member, content)
            self._checked.add(member)

    def _view(self, name: str, tensor: PickledTensor, top: str, file_size: int) -> _View:
        """Where a tensor is, after checking it against its storage and that against the archive."""
        where = f"{self._file} is corrupt: {name[:200]}"
        storage, itemsize = tensor.storage, tensor.dtype.itemsize
        member = self._members.get(f"{top}/data/{storage.key}")
        if member is None:
            raise WeightsError(
                f"{where} lies in storage {storage.key[:80]!r}, which the archive lacks"
            )
        size = member.size
        if size != _nbytes(storage):
            raise WeightsError(
                f"{where} lies in a storage of {_nbytes(storage)} bytes that has {size}"
            )
        info = TensorInfo(tensor.shape, tensor.dtype, str(self._file))
        view = _View(info, member, tensor.offset, tensor.strides)
        if 0 in tensor.shape:
            if math.prod(length for length in tensor.shape if length) > _MAX_EMPTY:
                raise WeightsError(f"{where} has shape {list(tensor.shape)}")
        elif (view.offset + view.extent) * itemsize > size:
            raise WeightsError(f"{where} reaches beyond its storage of {size} bytes")
        elif math.prod(tensor.shape) * itemsize > file_size:
            # Strides of zero repeat elements: reading would take more memory than the file.
            raise WeightsError(f"{where} repeats its elements to shape {list(tensor.shape)}")
        return view


def _nbytes(storage: Storage) -> int:
    dtype = storage.type.dtype
    return storage.count * (1 if dtype is None else dtype.itemsize)


def _mapped(file: Path) -> memoryview:
    """The whole file, after a look at its first bytes."""
    try:
        with open_regular(file, error=WeightsError) as stream:
            start = stream.read(FIRST_BYTES)
        refuse_lfs_pointer(file, start)
        if start[:1] == b"\x80":
            raise WeightsError(
                f"{file} is a bare pickle, as PyTorch wrote before version 1.6: load it with torch "
                "in an environment you can afford to lose, and save its tensors again"
            )
        if start[:4] != b"PK\x03\x04":
            raise WeightsError(f"{file} is no PyTorch file: it does not begin like a zip archive")
        return np.memmap(file, np.uint8, "r").data
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror or error}") from error


def _top(file: Path, members: Mapping[str, Member]) -> str:
    """The one folder of the archive, which has no fixed name."""
    tops = {name.partition("/")[0] for name in members}
    top = min(tops, default="")
    if len(tops) != 1 or f"{top}/data.pkl" not in members:
        raise WeightsError(f"{file} is no PyTorch file: a zip archive without FOLDER/data.pkl")
    if any(name == f"{top}/constants.pkl" or name.startswith(f"{top}/code/") for name in members):
        raise WeightsError(
            f"{file} is a TorchScript archive: it holds a program; save the module's state_dict()"
        )
    return top


def _state_dict(
    file: Path, pickled: object, key: str | None
) -> tuple[Mapping[str, PickledTensor], str | None, tuple[str, ...]]:
    """The mapping of tensors, possibly one level down, its key, and a note of what was left."""
    notes: tuple[str, ...] = ()
    chosen = None
    if isinstance(pickled, dict):
        inner = {name: value for name, value in pickled.items() if isinstance(value, dict)}
        chosen = _chosen(file, pickled, inner, key)
        if chosen is not None:
            left = [name for name in pickled if name != chosen]
            pickled = inner[chosen]
            if left:
                # What it is besides models, such as a number of steps, is no matter.
                notes = (f"took {chosen} of the file, and left {', '.join(left)[:200]}",)
    if not isinstance(pickled, dict):
        raise WeightsError(
            f"{file} holds a {type(pickled).__name__}; expected a mapping of names to tensors"
        )
    for name, value in pickled.items():
        if not isinstance(value, PickledTensor):
            raise WeightsError(
                f"{file} is no plain state dict: {name[:200]!r} is a {type(value).__name__}, not a "
                "tensor; save only the tensors, by name"
            )
    return pickled, chosen, notes


def _chosen(
    file: Path, pickled: Mapping[str, object], inner: Mapping[str, object], key: str | None
) -> str | None:
    """The key of the mapping to take; None where the tensors are not in one of several."""
    if key is not None:
        if key in inner:
            return key
        listed = ", ".join(inner) or "no mappings, but tensors by name"
        raise WeightsError(f"{file} has no mapping {key[:80]!r}: it has {listed:.300}")
    if not inner or any(isinstance(value, PickledTensor) for value in pickled.values()):
        return None
    if len(inner) == 1:
        return next(iter(inner))
    if plain := next((name for name in _PLAIN_KEYS if name in inner), None):
        return plain
    raise WeightsError(
        f"{file} holds several mappings ({', '.join(inner):.300}): say which by `weights_key`"
    )
