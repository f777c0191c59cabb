"""Where tensors are read from: one small interface over safetensors files and ``.pth`` archives."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from skyreels_jax.errors import WeightsError


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
