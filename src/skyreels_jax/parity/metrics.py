"""How far two videos are apart: PSNR, SSIM and differences in 8-bit levels."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float64, Shaped

# Sizes are not bound, so that it is the functions that refuse two that differ. Values are 8-bit
# levels (uint8) or lie in [0, 1] (any float).
Video = Shaped[np.ndarray, "_T _height _width 3"]
Frame = Shaped[np.ndarray, "_height _width 3"]

# The window of Wang et al. 2004: a Gaussian cut off at 3.5 sigma, which makes 11 taps.
SIGMA: Final = 1.5
RADIUS: Final = 5
WINDOW: Final = 2 * RADIUS + 1
K1: Final = 0.01
K2: Final = 0.03
LEVELS: Final = 255


@dataclass(frozen=True)
class FrameDistance:
    """The distance of two videos.

    PSNR is in dB and infinite where frames are equal; the last three are of the absolute difference
    of single colour values, in 8-bit levels (0 to 255).
    """

    psnr: float
    ssim: float
    psnr_by_frame: tuple[float, ...]
    ssim_by_frame: tuple[float, ...]
    max_difference: float
    p95: float
    p99: float


def psnr(a: Video, b: Video) -> float:
    """Peak signal-to-noise ratio in dB over all frames together; infinite when they are equal.

    The peak is 255 for uint8 and 1.0 for floats. A NaN in the frames gives NaN.

    Raises:
        ValueError: shapes or dtypes differ, there is no frame, or the dtype is another.
    """
    return _decibels(np.mean(_errors_by_frame(a, b)), _peak(a))


def ssim(a: Frame, b: Frame) -> float:
    """Mean structural similarity of two frames, over pixels and colours; 1 when they are equal.

    Local means, variances and the covariance are weighted by a Gaussian of sigma 1.5 cut off at
    3.5 sigma (11 x 11 pixels) and are those of the population, not of a sample; K1 = 0.01,
    K2 = 0.03. Only windows that lie inside the frame count, so 5 pixels at each border are centres
    of none. That is ``skimage.metrics.structural_similarity`` with ``gaussian_weights=True,
    sigma=1.5, use_sample_covariance=False``, in float64 whatever is given.

    Source: Wang, Bovik, Sheikh and Simoncelli 2004, "Image quality assessment: from error
    visibility to structural similarity", equation 13.

    Raises:
        ValueError: shapes or dtypes differ, the dtype is neither uint8 nor a float, or the frame
            has fewer than 11 pixels in a direction.
    """
    _check_alike(a, b)
    if min(a.shape[:2]) < WINDOW:
        raise ValueError(
            f"frames of {a.shape[0]} x {a.shape[1]} pixels: SSIM takes windows of "
            f"{WINDOW} x {WINDOW}, so both directions must have {WINDOW} pixels or more"
        )
    c1, c2 = (K1 * _peak(a)) ** 2, (K2 * _peak(a)) ** 2
    # Colours first: the window then slides over rows that lie together in memory.
    x, y = (np.ascontiguousarray(f.transpose(2, 0, 1), dtype=np.float64) for f in (a, b))
    mean_x, mean_y = _weighted_mean(x), _weighted_mean(y)
    variances = _weighted_mean(x * x + y * y) - mean_x**2 - mean_y**2
    covariance = _weighted_mean(x * y) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (variances + c2)
    return float(similarity.mean())


def compare_frames(a: Video, b: Video) -> FrameDistance:
    """The distance of two videos, frame by frame and as a whole.

    The PSNR of the whole is that of the squared error over all frames, not the mean of the frames'
    PSNR; its SSIM is the mean of the frames'.

    Raises:
        ValueError: as for :func:`psnr` and :func:`ssim`.
    """
    errors = _errors_by_frame(a, b)
    ssim_by_frame = tuple(ssim(one, other) for one, other in zip(a, b, strict=True))
    # Without `abs`, which wraps around in 8 bits.
    difference = (np.maximum(a, b) - np.minimum(a, b)).reshape(-1)
    p95, p99 = np.percentile(difference, (95, 99))
    levels = LEVELS / _peak(a)
    return FrameDistance(
        psnr=_decibels(np.mean(errors), _peak(a)),
        ssim=float(np.mean(ssim_by_frame)),
        psnr_by_frame=tuple(_decibels(error, _peak(a)) for error in errors),
        ssim_by_frame=ssim_by_frame,
        max_difference=float(difference.max()) * levels,
        p95=float(p95) * levels,
        p99=float(p99) * levels,
    )


def _errors_by_frame(a: Video, b: Video) -> Float64[np.ndarray, " T"]:
    """Mean squared error of each frame, in squared units of the values."""
    _check_alike(a, b)
    if not a.size:
        raise ValueError(f"frames of {a.shape}: there is nothing to compare")
    # One frame at a time: float64 copies of whole videos take gigabytes.
    pairs = zip(a, b, strict=True)
    return np.array([np.mean((x.astype(np.float64) - y) ** 2) for x, y in pairs])


def _check_alike(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            f"frames of {a.shape} {a.dtype} against {b.shape} {b.dtype}: "
            "shapes and dtypes must be the same"
        )
    _peak(a)


def _peak(frames: np.ndarray) -> float:
    if frames.dtype == np.uint8:
        return float(LEVELS)
    if np.issubdtype(frames.dtype, np.floating):
        return 1.0
    raise ValueError(f"frames of {frames.dtype}: they must be uint8, or floats in [0, 1]")


def _decibels(error: float | np.floating, peak: float) -> float:
    return float("inf") if error == 0 else float(10 * np.log10(peak**2 / error))


def _window() -> Float64[np.ndarray, " taps"]:
    weights = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
    return weights / weights.sum()


def _weighted_mean(
    image: Float64[np.ndarray, "3 height width"],
) -> Float64[np.ndarray, "3 height-10 width-10"]:
    """The Gaussian mean around every pixel whose window lies inside the image."""
    _, height, width = image.shape
    rows, columns = height - 2 * RADIUS, width - 2 * RADIUS
    weights = _window()
    down = weights[0] * image[:, :rows]
    for tap in range(1, WINDOW):
        down += weights[tap] * image[:, tap : tap + rows]
    across = weights[0] * down[:, :, :columns]
    for tap in range(1, WINDOW):
        across += weights[tap] * down[:, :, tap : tap + columns]
    return across
