"""A LoRA out of two models: the best product of a rank for each difference of two matrices."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from skyreels_jax.errors import RequestError, WeightsError
from skyreels_jax.weights.lora.source import StoredTransformer
from skyreels_jax.weights.lora.writing import LoraWriter
from skyreels_jax.weights.plan import Slot
from skyreels_jax.weights.safetensors_file import TensorSpec

# Up to so many rows or columns the decomposition is exact; above, it is of a random subspace.
_EXACT: Final = 1024
# Halko, Martinsson and Tropp (arXiv 0909.4061): directions beyond the rank, and rounds of powers.
_MORE_DIRECTIONS: Final = 16
_ROUNDS: Final = 3
_FLOAT32: Final = np.dtype(np.float32)


@dataclass(frozen=True)
class Extracted:
    """What became of one tensor.

    Attributes:
        name: of the tensor, as the original has it.
        norm: of the difference.
        error: of what is written, relative to ``norm``; 0 where the difference is written whole.
    """

    name: str
    norm: float
    error: float


def extract(
    tuned: StoredTransformer, base: StoredTransformer, rank: int
) -> tuple[LoraWriter, list[Extracted]]:
    """A LoRA in ComfyUI's form that turns ``base`` nearly into ``tuned``.

    Matrices become products of ``rank``; vectors and modulations, which are small, their whole
    difference. What does not differ is left out.

    Args:
        tuned: the model after training.
        base: the model before.
        rank: of the products.

    Returns:
        The file to write, and what became of each tensor.

    Raises:
        RequestError: the rank is below 1.
        WeightsError: the models have other shapes, or do not differ.
    """
    if rank < 1:
        raise RequestError(f"a rank of {rank}: it must be at least 1")
    written, report = LoraWriter(), list[Extracted]()
    for name, difference in _differences(tuned, base):
        norm = float(np.linalg.norm(difference))
        if norm == 0:
            continue
        module = f"diffusion_model.{name.removesuffix('.weight').removesuffix('.bias')}"
        if name.endswith(".weight") and difference.ndim > 1 and rank < _rank_of(difference):
            down, up = factors(difference.reshape(len(difference), -1), rank)
            rest = difference.reshape(len(difference), -1) - up @ down
            report.append(Extracted(name, norm, float(np.linalg.norm(rest)) / norm))
            kernel = difference.shape[1:]
            _add(written, f"{module}.lora_down.weight", down.reshape(rank, *kernel))
            ones = (1,) * (difference.ndim - 2)
            _add(written, f"{module}.lora_up.weight", up.reshape(len(up), rank, *ones))
            written.add_number(f"{module}.alpha", float(rank))
        else:
            report.append(Extracted(name, norm, 0.0))
            _add(written, f"{module}.{'diff_b' if name.endswith('.bias') else 'diff'}", difference)
    if not report:
        raise WeightsError("the two models do not differ: there is nothing to extract")
    return written, report


def factors(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """``down [rank, in]`` and ``up [out, rank]`` whose product is nearest to ``matrix``, float32.

    The singular values are shared evenly, so that both have entries of one size.
    """
    if min(matrix.shape) > _EXACT:
        matrix, basis = _subspace(matrix, rank + _MORE_DIRECTIONS)
    else:
        basis = None
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:rank])
    up = u[:, :rank] * root
    if basis is not None:
        up = basis @ up
    return (root[:, None] * vt[:rank]).astype(np.float32), up.astype(np.float32)


def _subspace(matrix: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The matrix within the subspace of its largest directions, and a basis of it ``[out, k]``."""
    rng = np.random.default_rng(0)
    basis = matrix @ rng.standard_normal((matrix.shape[1], size), np.float32)
    for _ in range(_ROUNDS):
        basis = np.linalg.qr(basis)[0]
        basis = matrix @ (matrix.T @ basis)
    basis = np.linalg.qr(basis)[0]
    return basis.T @ matrix, basis.astype(np.float64)


def total_error(report: list[Extracted]) -> float:
    """The error of all tensors together, relative to the whole difference."""
    squares = math.fsum((one.norm * one.error) ** 2 for one in report)
    return math.sqrt(squares / math.fsum(one.norm**2 for one in report))


def _differences(
    tuned: StoredTransformer, base: StoredTransformer
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by its original name, and ``tuned - base`` of it in float32."""
    there, before = _tensors(tuned), _tensors(base)
    if missing := there.keys() ^ before.keys():
        names = ", ".join(sorted(f"{slot.target}" for slot in missing)[:3])
        raise WeightsError(f"the two models have other tensors: {names}, and {len(missing)} in all")
    originals = base.plan("original")
    for slot, name in before.items():
        old = np.asarray(base.source.read(name))
        new = np.asarray(tuned.source.read(there[slot]))
        if old.shape != new.shape:
            raise WeightsError(
                f"{originals[slot].name} is {list(new.shape)} in the tuned model and "
                f"{list(old.shape)} in the base: these are different models"
            )
        difference = new.astype(np.float32) - old.astype(np.float32)
        if not np.isfinite(difference).all():
            raise WeightsError(f"{originals[slot].name} has values that are NaN or infinite")
        yield originals[slot].name, difference


def _tensors(stored: StoredTransformer) -> Mapping[Slot, str]:
    return {slot: source.name for slot, source in stored.plan().items()}


def _rank_of(difference: np.ndarray) -> int:
    """The most that a product can have; one of this rank is no smaller than the difference."""
    rows, columns = len(difference), difference.size // len(difference)
    return math.ceil(rows * columns / (rows + columns))


def _add(written: LoraWriter, name: str, values: np.ndarray) -> None:
    values = np.ascontiguousarray(values)
    written.add(name, TensorSpec(values.shape, _FLOAT32), lambda: values)
