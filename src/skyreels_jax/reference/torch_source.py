"""Tensors of ``.pth`` files as PyTorch itself reads them, and arrays on their way into PyTorch."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.source import TensorInfo

if TYPE_CHECKING:
    import torch


class TorchSource:
    """The tensors of a file of ``torch.save``: memory-mapped, and nothing but tensors unpickled.

    Args:
        file: in PyTorch's zip format.

    Raises:
        WeightsError: if PyTorch refuses the file or it is no flat mapping of names to tensors.
    """

    def __init__(self, file: Path):
        import torch

        try:
            values = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise WeightsError(f"{file} cannot be read by PyTorch: {first}") from error
        if not isinstance(values, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor)
            for name, value in values.items()
        ):
            raise WeightsError(f"{file} holds something else than tensors by name")
        self._file = str(file)
        self._values: dict[str, torch.Tensor] = values

    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name."""
        return {
            name: TensorInfo(tuple(value.shape), numpy_dtype(value.dtype), self._file)
            for name, value in self._values.items()
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor, as a view of the mapped file."""
        return to_numpy(self._values[name])


def numpy_dtype(dtype: "torch.dtype") -> np.dtype:
    """The same dtype in NumPy; bfloat16 is that of ml_dtypes."""
    return jnp.dtype(str(dtype).removeprefix("torch."))


def to_numpy(tensor: "torch.Tensor") -> np.ndarray:
    """A view of a tensor on the CPU (bfloat16 too, which PyTorch does not hand to NumPy)."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def to_torch(array: np.ndarray) -> "torch.Tensor":
    """A copy as a tensor on the CPU, of the same dtype."""
    import torch

    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
