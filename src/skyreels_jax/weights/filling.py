"""From a file's bytes to parameters at the speed of memory: rounded, rearranged, proved finite.

A tensor is read in the order it lies in the file, in strips that stay in a core's cache; there each
is rounded and checked, and leaves it once, to where it belongs. Several threads do so side by side:
NumPy lets go of the interpreter while it copies.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
from jax.typing import DTypeLike

from skyreels_jax.errors import WeightsError

# Exponent bits of 16-bit floats; all set in infinities and NaN.
_EXPONENTS: Final[Mapping[str, int]] = {"bfloat16": 0x7F80, "float16": 0x7C00}
# Rows of a strip, and its bytes. More rows make longer runs where the tensor is transposed; a strip
# of a megabyte is at home in the second cache of a core of today.
_STRIP_ROWS: Final = 128
_STRIP_BYTES: Final = 1 << 20
# Added to a strip's rows: where they lie powers of two apart, a transposed read finds them all in
# the same few lines of the cache.
_PADDING_BYTES: Final = 48
# What one thread takes of a large tensor at a time.
_PIECE_BYTES: Final = 1 << 25
# More threads than this wait for memory.
_MAX_THREADS: Final = 8
# XLA takes arrays that begin at such an address as they are, without a copy.
_ALIGNMENT: Final = 64


def usable_cores() -> int:
    """How many cores this process may use; where the system does not tell, all that there are."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def pool() -> ThreadPoolExecutor:
    """Threads to read and fill with, as many as this process may use cores, up to eight."""
    return ThreadPoolExecutor(min(_MAX_THREADS, usable_cores()), "weights")


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array of which the values are not set, at an address that XLA takes without a copy."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def fill(out: np.ndarray, values: np.ndarray, where: str) -> None:
    """``out[...] = values``, rounded to nearest with ties to even.

    Args:
        out: to fill; any layout.
        values: floats of any dtype and layout, of the shape of ``out``.
        where: names the file and tensor in errors.

    Raises:
        WeightsError: if a value is NaN or infinite, or becomes so in the dtype of ``out``.
    """
    order = _order(values)
    _fill_strips(out.transpose(order), values.transpose(order), where)


def pieces(out: np.ndarray, values: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Cut a pair of arrays into pairs for several threads, along what ``values`` is stored by."""
    order = _order(values)
    out, values = out.transpose(order), values.transpose(order)
    if not values.ndim or values.nbytes <= _PIECE_BYTES:
        yield out, values
        return
    rows = max(1, _PIECE_BYTES // max(1, values[:1].nbytes))
    for start in range(0, len(values), rows):
        yield out[start : start + rows], values[start : start + rows]


def _order(values: np.ndarray) -> list[int]:
    """The axes in the order in which the values lie in memory, largest strides first."""
    return sorted(range(values.ndim), key=lambda axis: -abs(values.strides[axis]))


def _fill_strips(out: np.ndarray, values: np.ndarray, where: str) -> None:
    if values.ndim < 2 or not values.size:
        out[...] = rounded(values, out.dtype, where)
        return
    if values.ndim > 2:
        _fill_convolution(out, values, where)
        return
    itemsize = out.dtype.itemsize
    columns = min(values.shape[1], max(1, _STRIP_BYTES // (_STRIP_ROWS * itemsize)))
    padded = np.empty((_STRIP_ROWS, columns + _PADDING_BYTES // itemsize), out.dtype)
    for row in range(0, values.shape[0], _STRIP_ROWS):
        for column in range(0, values.shape[1], columns):
            here = (slice(row, row + _STRIP_ROWS), slice(column, column + columns))
            found = values[here]
            strip = padded[: found.shape[0], : found.shape[1]]
            _fill_strip(out[here], found, strip, values, where)


def _fill_convolution(out: np.ndarray, values: np.ndarray, where: str) -> None:
    """Fill by strips of whole output channels: a loop over its taps would never end."""
    channels = max(1, _STRIP_BYTES // max(1, values[:1].size * out.dtype.itemsize))
    for start in range(0, len(values), channels):
        found = values[start : start + channels]
        strip = np.empty(found.shape, out.dtype)
        _fill_strip(out[start : start + channels], found, strip, values, where)


def _fill_strip(
    out: np.ndarray, found: np.ndarray, strip: np.ndarray, whole: np.ndarray, where: str
) -> None:
    """Fill by way of ``strip``, which stays in the cache; what is wrong is said of the whole."""
    # An overflow to infinity is reported below, by name.
    with np.errstate(over="ignore"):
        strip[...] = found
    if not all_finite(strip):
        rounded(whole, out.dtype, where)
    out[...] = strip


def rounded(values: np.ndarray, dtype: DTypeLike | None, where: str) -> np.ndarray:
    """``values`` in ``dtype`` (None keeps theirs), to nearest with ties to even.

    Args:
        values: floats of any dtype and layout.
        dtype: to round to.
        where: names the file and tensor in errors.

    Raises:
        WeightsError: if a value is NaN or infinite, or becomes so in ``dtype``.
    """
    # An overflow to infinity is reported below, by name.
    with np.errstate(over="ignore"):
        result = values if dtype is None else values.astype(dtype, copy=False)
    if all_finite(result):
        return result
    count = int(values.size - np.isfinite(values).sum())
    if count:
        raise WeightsError(
            f"{where} has {count} values that are NaN or infinite: the file is damaged or was "
            "saved by a run that diverged"
        )
    raise WeightsError(
        f"{where} has values beyond the range of {result.dtype.name}: use float32 or bfloat16"
    )


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; 16-bit floats by their bits, six times as fast."""
    exponent = _EXPONENTS.get(values.dtype.name)
    if exponent is None:
        return bool(np.isfinite(values).all())
    return bool(((values.view(np.uint16) & np.uint16(exponent)) != exponent).all())


def fill_in_pieces(
    threads: ThreadPoolExecutor, out: np.ndarray, values: np.ndarray, where: str
) -> None:
    """As :func:`fill`, side by side in pieces of a large tensor."""
    list(threads.map(lambda piece: fill(piece[0], piece[1], where), pieces(out, values)))


def fill_all(
    threads: ThreadPoolExecutor,
    outs: Iterable[tuple[np.ndarray, Callable[[], np.ndarray], str]],
) -> None:
    """Fill arrays side by side; no more tensors are in memory than there are threads.

    Args:
        threads: from :func:`pool`.
        outs: what to fill, how to read its values, and what names them in errors.

    Raises:
        WeightsError: a file refuses, or a value is not finite; the first in the order given.
    """
    list(threads.map(lambda one: fill(one[0], one[1](), one[2]), outs))
