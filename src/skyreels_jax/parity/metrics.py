"""How far two videos are apart: PSNR, SSIM and differences in 8-bit levels."""

from dataclasses import dataclass
from typing import Final, cast

import numpy as np
from jaxtyping import Float64, Shaped

# Sizes are not bound, so that it is the functions that refuse two that differ. Values are 8-bit
# levels (uint8) or lie in [0, 1] (any float).
_Video = Shaped[np.ndarray, "_T _height _width 3"]
_Frame = Shaped[np.ndarray, "_height _width 3"]

# The window of Wang et al. 2004: a Gaussian cut off at 3.5 sigma, which makes 11 taps.
_SIGMA: Final = 1.5
_WINDOW: Final = 11
_LEVELS: Final = 255


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


def psnr(a: _Video, b: _Video) -> float:
    """Return the peak signal-to-noise ratio in dB over all frames; infinite when they are equal.

    The peak is 255 for uint8 and 1.0 for floats. A NaN in the frames gives NaN.

    Raises:
        ValueError: shapes or dtypes differ, there is no frame, or the dtype is another.
    """
    return _decibels(np.mean(_errors_by_frame(a, b)), _peak(a))


def ssim(a: _Frame, b: _Frame) -> float:
    """Return the mean structural similarity of two frames over pixels and colours; 1 when equal.

    As Wang, Bovik, Sheikh and Simoncelli 2004, "Image quality assessment: from error visibility to
    structural similarity", equation 13: Gaussian window of sigma 1.5 cut off at 3.5 sigma (11 x 11
    pixels, so 5 pixels at each border are centres of none), population covariances, K1 = 0.01 and
    K2 = 0.03. In float64 whatever is given. It needs scikit-image (the extra ``validation``).

    Raises:
        ValueError: shapes or dtypes differ, the dtype is neither uint8 nor a float, or the frame
            has fewer than 11 pixels in a direction.
    """
    from skimage.metrics import structural_similarity

    _check_alike(a, b)
    if min(a.shape[:2]) < _WINDOW:
        raise ValueError(
            f"frames of {a.shape[0]} x {a.shape[1]} pixels: SSIM takes windows of "
            f"{_WINDOW} x {_WINDOW}, so both directions must have {_WINDOW} pixels or more"
        )
    similarity = structural_similarity(
        a.astype(np.float64),
        b.astype(np.float64),
        gaussian_weights=True,
        sigma=_SIGMA,
        use_sample_covariance=False,
        data_range=_peak(a),
        channel_axis=-1,
    )
    return float(cast(float, similarity))


def compare_frames(a: _Video, b: _Video) -> FrameDistance:
    """Return the distance of two videos, frame by frame and as a whole.

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
    levels = _LEVELS / _peak(a)
    return FrameDistance(
        psnr=_decibels(np.mean(errors), _peak(a)),
        ssim=float(np.mean(ssim_by_frame)),
        psnr_by_frame=tuple(_decibels(error, _peak(a)) for error in errors),
        ssim_by_frame=ssim_by_frame,
        max_difference=float(difference.max()) * levels,
        p95=float(p95) * levels,
        p99=float(p99) * levels,
    )


def _errors_by_frame(a: _Video, b: _Video) -> Float64[np.ndarray, " T"]:
    """Return the mean squared error of each frame, in squared units of the values."""
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
        return float(_LEVELS)
    if np.issubdtype(frames.dtype, np.floating):
        return 1.0
    raise ValueError(f"frames of {frames.dtype}: they must be uint8, or floats in [0, 1]")


def _decibels(error: float | np.floating, peak: float) -> float:
    return float("inf") if error == 0 else float(10 * np.log10(peak**2 / error))
