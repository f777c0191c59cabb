"""What the pickles of PyTorch files may name, and what they describe, as values of our own."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

import ml_dtypes
import numpy as np


class Constructor(Enum):
    """The functions and classes that a file may apply; applying them is interpreted here."""

    ORDERED_DICT = "collections.OrderedDict"
    SIZE = "torch.Size"
    TENSOR = "torch._utils._rebuild_tensor_v2"
    TENSOR_OF_BYTES = "torch._utils._rebuild_tensor_v3"
    PARAMETER = "torch._utils._rebuild_parameter"


@dataclass(frozen=True, slots=True)
class StorageType:
    """A storage class; ``dtype`` is ``None`` for storages that are counted in bytes."""

    dtype: np.dtype | None


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of ``count`` elements (bytes where the type has no dtype) under ``key``."""

    type: StorageType
    key: str
    count: int


class PickledTensor(NamedTuple):
    """A view of a storage; offset and strides count elements of ``dtype``."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class OrderedMapping(dict[str, object]):
    """What a file makes with OrderedDict: unlike a plain dict it may be given ``_metadata``."""

    __slots__ = ()


_BY_STORAGE: Final[Mapping[str, np.dtype]] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
# Without a storage class of their own, so named beside a storage of bytes.
_BY_DTYPE: Final[Mapping[str, np.dtype]] = {
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
}
GLOBALS: Final[Mapping[str, Constructor | StorageType | np.dtype]] = {
    **{constructor.value: constructor for constructor in Constructor},
    **{f"torch.{name}": StorageType(dtype) for name, dtype in _BY_STORAGE.items()},
    "torch.storage.UntypedStorage": StorageType(None),
    **{f"torch.{name}": dtype for name, dtype in _BY_DTYPE.items()},
}
