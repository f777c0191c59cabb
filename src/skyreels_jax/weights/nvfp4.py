"""Dequantises NVFP4: pairs of 4-bit floats, a scale for 16 of them, and one for the tensor.

``value = e2m1 · (block scale · tensor scale)``, in float32. Two conventions are in use (read in
comfy-kitchen's eager backend and in LightX2V's converter and kernels, November 2026):

=====================  ==========================  ===========================================
what                   ComfyUI                     LightX2V
=====================  ==========================  ===========================================
first of a pair        in the high four bits       in the low four bits
tensor scale           ``X.weight_scale_2``        ``X.alpha · X.input_global_scale``, or
                                                   ``1 / X.weight_global_scale``
known by               format ``nvfp4`` in the     those names
                       layer's description
=====================  ==========================  ===========================================

Both store the block scales in tiles of 128 rows and 4 columns, as the tensor cores read them.
"""

from typing import Final

import ml_dtypes
import numpy as np

# Elements that share a block scale, and the tile of block scales.
BLOCK: Final = 16
_TILE: Final = (128, 4)
_VALUES: Final = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
# The values of both halves of a byte, the high one first.
_PAIRS: Final = np.stack([np.repeat(_VALUES, 16), np.tile(_VALUES, 16)], axis=1)
# Rows that are dequantised at a time.
_ROWS: Final = 128


def scales_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """The shape of the stored block scales of a matrix, whole tiles."""
    rows, columns = shape[0], shape[1] // BLOCK
    return -(-rows // _TILE[0]) * _TILE[0], -(-columns // _TILE[1]) * _TILE[1]


def dequantize_nvfp4(
    packed: np.ndarray, block_scales: np.ndarray, tensor_scale: np.float32, *, high_first: bool
) -> np.ndarray:
    """The matrix ``[rows, columns]`` in float32.

    Args:
        packed: pairs as bytes, ``[rows, columns / 2]``.
        block_scales: float8_e4m3fn in tiles, of :func:`scales_shape`.
        tensor_scale: of the whole matrix.
        high_first: whether the high four bits of a byte come first.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    scales = _row_major(block_scales)[:rows, : columns // BLOCK].astype(np.float32) * tensor_scale
    pairs = _PAIRS if high_first else _PAIRS[:, ::-1]
    values = np.empty((rows, columns // BLOCK, BLOCK), np.float32)
    for start in range(0, rows, _ROWS):
        some = slice(start, start + _ROWS)
        found = np.take(pairs, packed[some], axis=0)
        np.multiply(found.reshape(values[some].shape), scales[some, :, None], out=values[some])
    return values.reshape(rows, columns)


def _row_major(tiles: np.ndarray) -> np.ndarray:
    """Block scales in rows and columns.

    In a tile the rows r, r + 32, r + 64 and r + 96 stand side by side, four columns each (NVIDIA,
    PTX ISA, scale factors of ``tcgen05.mma``).
    """
    rows, columns = tiles.shape
    split = tiles.reshape(rows // 128, columns // 4, 32, 4, 4)
    return split.transpose(0, 3, 2, 1, 4).reshape(rows, columns)
