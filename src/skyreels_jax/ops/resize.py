"""Bicubic resampling as PyTorch defines it."""

from typing import Final

import numpy as np
from jaxtyping import Float, Int

# The free parameter of Keys' cubic convolution: -0.75 in PyTorch and OpenCV, -0.5 in Pillow.
SHARPNESS: Final = -0.75
# Weighted samples of one axis: which of the input, and how much of each.
Taps = tuple[Int[np.ndarray, "out 4"], Float[np.ndarray, "out 4"]]


def bicubic_resize(
    image: Float[np.ndarray, "C height width"], height: int, width: int
) -> Float[np.ndarray, "C new_height new_width"]:
    """Resample to ``height x width`` in float32; edges are repeated, nothing is blurred first.

    Equal to ``torch.nn.functional.interpolate(mode="bicubic", align_corners=False)``: each pixel is
    made of the 4 x 4 nearest to its centre, so reducing skips pixels (Keys 1981).
    """
    image = image.astype(np.float32)
    rows, row_weights = cubic_taps(image.shape[1], height)
    columns, column_weights = cubic_taps(image.shape[2], width)
    image = np.einsum("chwk,wk->chw", image[:, :, columns], column_weights)
    return np.einsum("chkw,hk->chw", image[:, rows], row_weights)


def cubic_taps(size: int, new_size: int) -> Taps:
    """The four samples that each of ``new_size`` pixels takes of ``size``, and their weights.

    Scale and positions are each rounded to float32 once, as PyTorch's fused multiply-add does: at
    1000 pixels the last bit of a position moves a result by 7e-5, more than everything else.
    """
    scale = np.float32(size / new_size).astype(np.float64)
    centre = (scale * (np.arange(new_size) + 0.5) - 0.5).astype(np.float32)
    left = np.floor(centre)
    t = (centre - left).astype(np.float64)
    a = SHARPNESS

    def near(x: Float[np.ndarray, " out"]) -> Float[np.ndarray, " out"]:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Float[np.ndarray, " out"]) -> Float[np.ndarray, " out"]:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = np.stack([far(t + 1), near(t), near(1 - t), far(2 - t)], axis=1)
    indices = left.astype(np.int64)[:, None] + np.arange(-1, 3)
    return np.clip(indices, 0, size - 1), weights.astype(np.float32)
