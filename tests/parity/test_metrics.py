"""PSNR against its formula, SSIM against scikit-image, and what is refused."""

import math

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from skyreels_jax.parity import metrics

SIZES = [(11, 11), (11, 64), (37, 13), (48, 64), (61, 93)]
KINDS = ["noise", "structure", "flat", "inverse"]


def pair(kind: str, height: int = 48, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Two 8-bit frames that differ in the manner of ``kind``."""
    random = np.random.default_rng(height * width)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 5), np.cos(y / 4), np.sin((x + y) / 7)]
    a = np.stack([127 + 100 * wave for wave in waves], axis=-1)
    a[: height // 3, : width // 3] = 230
    if kind == "noise":
        a, b = random.uniform(0, 255, a.shape), random.uniform(0, 255, a.shape)
    elif kind == "structure":
        b = np.roll(a, 1, axis=1) + random.normal(0, 6, a.shape)
    elif kind == "flat":
        a, b = np.full(a.shape, 90.0), np.full(a.shape, 93.0)
    else:
        b = 255 - a
    return np.clip(a, 0, 255).astype(np.uint8), np.clip(b, 0, 255).astype(np.uint8)


def theirs(a: np.ndarray, b: np.ndarray, **changed: object) -> float:
    settings: dict = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "data_range": 255 if a.dtype == np.uint8 else 1.0,
    }
    return float(structural_similarity(a, b, channel_axis=-1, **settings | changed))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_ssim_is_that_of_scikit_image(kind: str, size: tuple[int, int]):
    a, b = pair(kind, *size)
    assert metrics.ssim(a, b) == pytest.approx(theirs(a, b), abs=1e-6)  # measured 1e-15
    fa, fb = a / 255, b / 255
    assert metrics.ssim(fa, fb) == pytest.approx(theirs(fa, fb), abs=1e-6)
    # The same picture in other units.
    assert metrics.ssim(fa, fb) == pytest.approx(metrics.ssim(a, b), abs=1e-9)


def test_ssim_takes_smaller_floats_and_computes_in_float64():
    a, b = (frame.astype(np.float32) / np.float32(255) for frame in pair("structure"))
    exact = theirs(a.astype(np.float64), b.astype(np.float64))
    assert metrics.ssim(a, b) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize(
    "changed",
    [
        {"sigma": 1.0},
        {"sigma": 2.0},
        {"gaussian_weights": False},
        {"data_range": 128},
        {"K1": 0.05},
        {"K2": 0.05},
        {"use_sample_covariance": True, "gaussian_weights": False, "win_size": 11},
    ],
    ids=str,
)
def test_another_window_or_constant_is_another_number(changed: dict):
    a, b = pair("structure")
    assert abs(metrics.ssim(a, b) - theirs(a, b, **changed)) > 1e-4


def textbook(a: np.ndarray, b: np.ndarray, sigma: float = 1.5) -> float:
    """Wang et al. 2004, equation 13, over all windows of 11 x 11 inside 8-bit frames."""
    taps = np.exp(-0.5 * (np.arange(-5, 6) / sigma) ** 2)
    weights = np.outer(taps, taps) / taps.sum() ** 2

    def mean(image: np.ndarray) -> np.ndarray:
        windows = np.lib.stride_tricks.sliding_window_view(image, (11, 11), axis=(0, 1))
        return np.einsum("hwcij,ij->hwc", windows, weights)

    x, y = a.astype(float), b.astype(float)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    variances = mean(x * x + y * y) - mean(x) ** 2 - mean(y) ** 2
    covariance = mean(x * y) - mean(x) * mean(y)
    similarity = (2 * mean(x) * mean(y) + c1) * (2 * covariance + c2)
    return float((similarity / ((mean(x) ** 2 + mean(y) ** 2 + c1) * (variances + c2))).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_ssim_is_its_formula(kind: str):
    a, b = pair(kind)
    assert metrics.ssim(a, b) == pytest.approx(textbook(a, b), abs=1e-9)  # measured below 1e-12
    if kind == "structure":  # twin: another window
        assert abs(metrics.ssim(a, b) - textbook(a, b, sigma=1.6)) > 1e-4


def test_another_window_of_ours_is_caught(monkeypatch):
    a, b = pair("structure")
    monkeypatch.setattr(metrics, "_SIGMA", 1.6)
    assert abs(metrics.ssim(a, b) - theirs(a, b)) > 1e-4


def test_equal_frames_have_similarity_one():
    a, _ = pair("structure")
    assert metrics.ssim(a, a) == pytest.approx(1, abs=1e-12)


def video(frames: int = 5, spread: int = 6) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    a = random.integers(0, 256, (frames, 24, 31, 3))
    b = np.clip(a + random.integers(-spread, spread + 1, a.shape), 0, 255)
    return a.astype(np.uint8), b.astype(np.uint8)


def test_psnr_is_its_formula_for_levels_and_for_floats():
    a, b = video()
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    expected = 20 * math.log10(255) - 10 * math.log10(error)
    assert metrics.psnr(a, b) == pytest.approx(expected, abs=1e-9)
    assert metrics.psnr(a / 255, b / 255) == pytest.approx(expected, abs=1e-9)
    # Twin: 8-bit subtraction that wraps around.
    wrapped = 10 * math.log10(255**2 / np.mean((a - b).astype(float) ** 2))
    assert abs(metrics.psnr(a, b) - wrapped) > 1


def test_psnr_of_equal_frames_is_infinite_and_of_nan_is_nan():
    a, _ = video()
    assert metrics.psnr(a, a) == math.inf
    broken = a / 255
    broken[0, 0, 0, 0] = np.nan
    assert math.isnan(metrics.psnr(a / 255, broken))


def test_a_comparison_holds_every_frame_and_the_whole():
    a, b = video()
    b[2] = a[2]
    found = metrics.compare_frames(a, b)
    assert found.psnr == metrics.psnr(a, b)
    assert found.psnr_by_frame[2] == math.inf
    assert found.psnr_by_frame[1] == metrics.psnr(a[1:2], b[1:2])
    assert found.ssim_by_frame == tuple(metrics.ssim(x, y) for x, y in zip(a, b, strict=True))
    assert found.ssim == pytest.approx(sum(found.ssim_by_frame) / 5)
    # Twin: the mean of the frames' PSNR is infinite here.
    assert math.isfinite(found.psnr)


def test_differences_are_in_levels_and_do_not_wrap_around():
    a, b = video()
    a[0, 0, 0, 0], b[0, 0, 0, 0] = 0, 255
    difference = np.abs(a.astype(int) - b)
    for found in (metrics.compare_frames(a, b), metrics.compare_frames(a / 255, b / 255)):
        assert found.max_difference == pytest.approx(255)
        assert found.p95 == pytest.approx(np.percentile(difference, 95))
        assert found.p99 == pytest.approx(np.percentile(difference, 99))
    assert metrics.compare_frames(a, b) != metrics.compare_frames(a, a)


def test_equal_videos_are_at_no_distance():
    a, _ = video()
    found = metrics.compare_frames(a, a)
    assert (found.psnr, found.max_difference, found.p95, found.p99) == (math.inf, 0, 0, 0)


@pytest.mark.parametrize("function", [metrics.psnr, metrics.compare_frames])
def test_what_differs_in_shape_or_dtype_is_refused(function):
    a, b = video()
    with pytest.raises(ValueError, match=r"\(4, 24, 31, 3\) uint8 against \(5, 24, 31, 3\) uint8"):
        function(a[:4], b)
    with pytest.raises(ValueError, match=r"\(5, 24, 30, 3\)"):
        function(a[:, :, :30], b)
    with pytest.raises(ValueError, match="uint8 against .* float64"):
        function(a, b / 255)
    with pytest.raises(ValueError, match=r"int32: they must be uint8, or floats in \[0, 1\]"):
        function(a.astype(np.int32), b.astype(np.int32))
    with pytest.raises(ValueError, match="nothing to compare"):
        function(a[:0], b[:0])


def test_frames_smaller_than_the_window_are_refused_with_the_rule():
    a, b = pair("noise", 10, 40)
    with pytest.raises(ValueError, match="10 x 40 pixels.*11 x 11.*11 pixels or more"):
        metrics.ssim(a, b)
    with pytest.raises(ValueError, match="shapes and dtypes must be the same"):
        metrics.ssim(a, b[:, :20])
