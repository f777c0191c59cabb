"""Quantises kernels to 8 bits with one scale per output channel, symmetric about zero.

``kernel ≈ values · scale``: the scale of a channel is its largest magnitude over the largest value
of the format (127 for int8, 448 for float8_e4m3fn), so that no value is cut off.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.filling import rounded

# The formats that weights are kept in, by dtype, and the largest value of each.
LARGEST_VALUES: Final[Mapping[np.dtype, float]] = {
    np.dtype(np.int8): 127.0,
    np.dtype(ml_dtypes.float8_e4m3fn): 448.0,
}

# What is quantised at a time, in float32.
_STRIP_BYTES: Final = 1 << 22


def quantize(kernel: np.ndarray, dtype: DTypeLike) -> tuple[np.ndarray, np.ndarray]:
    """Quantise a kernel ``[..., in, out]``, or a stack of them, per output channel.

    Args:
        kernel: floats ``[..., in, out]``.
        dtype: ``int8`` or ``float8_e4m3fn``.

    Returns:
        The values ``[..., in, out]`` in ``dtype``, rounded to nearest with ties to even, and the
        scales ``[..., out]`` in float32; the scale of a channel of zeros is one.

    Raises:
        WeightsError: a value is NaN or infinite.
    """
    magnitude = np.abs(kernel).max(axis=-2, initial=0.0).astype(np.float32)
    scale = scale_of(magnitude, dtype)
    return quantize_with(kernel, scale[..., None, :], dtype), scale


def scale_of(magnitude: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """The scales (float32, any shape) by which values up to ``magnitude`` fit into ``dtype``.

    Raises:
        WeightsError: a magnitude is NaN or infinite.
    """
    if not np.isfinite(magnitude).all():
        raise WeightsError("weights with values that are NaN or infinite cannot be quantised")
    scale = magnitude.astype(np.float32) / np.float32(LARGEST_VALUES[np.dtype(dtype)])
    return np.where(scale > 0, scale, np.float32(1))


def quantize_with(kernel: np.ndarray, scale: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """``kernel / scale`` (which broadcast) in ``dtype``, to nearest with ties to even."""
    largest = np.float32(LARGEST_VALUES[np.dtype(dtype)])
    values = kernel.astype(np.float32) / scale
    # The quotient of the largest magnitude may be a rounding above it.
    np.clip(values, -largest, largest, out=values)
    if np.dtype(dtype).kind == "i":
        np.rint(values, out=values)
    return values.astype(dtype)


def quantize_all(
    threads: ThreadPoolExecutor,
    outs: Iterable[tuple[np.ndarray, Callable[[], np.ndarray], str]],
    scale: np.ndarray,
) -> None:
    """Fill the layers of a quantised kernel, and its scales, several side by side.

    Args:
        threads: from :func:`~skyreels_jax.weights.filling.pool`.
        outs: each layer ``[in, out]`` in order, how to read its floats, and what names them.
        scale: of all layers ``[layers, out]``, or of the one there is.

    Raises:
        WeightsError: a file refuses, or a value is not finite; the first in the order given.
    """
    layers = list(outs)
    scales = scale.reshape(len(layers), -1)

    def one(number: int) -> None:
        out, read, where = layers[number]
        _quantize_into(out, scales[number], read(), where)

    list(threads.map(one, range(len(layers))))


def _quantize_into(out: np.ndarray, scale: np.ndarray, values: np.ndarray, where: str) -> None:
    """Quantise ``values`` [in, out] in strips of channels, which are whole rows of a file."""
    channels = max(1, _STRIP_BYTES // (4 * max(1, len(values))))
    for start in range(0, values.shape[1], channels):
        strip = slice(start, start + channels)
        floats = rounded(values[:, strip], np.float32, where)
        out[:, strip], scale[strip] = quantize(floats, out.dtype)
