"""Bicubic resampling against torch."""

import numpy as np
import pytest
import torch

from skyreels_jax.ops import resize
from skyreels_jax.ops.resize import bicubic_resize, cubic_taps

TOL = 2e-6  # measured 2.4e-7 to 9.6e-7, on noise, the worst of images
SIZES = [
    ((544, 960), (224, 224)),
    ((960, 544), (224, 224)),
    ((720, 1280), (224, 224)),
    ((333, 517), (224, 224)),
    ((50, 70), (224, 224)),
    ((224, 224), (224, 224)),
    ((1081, 1921), (224, 96)),
    ((7, 5), (11, 3)),
    ((1, 1), (4, 4)),
]


def difference(size: tuple[int, int], new: tuple[int, int], *, align_corners: bool = False):
    image = np.random.default_rng(size[0]).uniform(-1, 1, (3, *size)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(image)[None], size=new, mode="bicubic", align_corners=align_corners
    )
    return np.abs(bicubic_resize(image, *new) - theirs[0].numpy()).max()


@pytest.mark.parametrize(("size", "new"), SIZES, ids=str)
def test_equals_torch(size: tuple[int, int], new: tuple[int, int]):
    assert difference(size, new) <= TOL


def test_other_conventions_are_caught(monkeypatch: pytest.MonkeyPatch):
    assert difference((50, 70), (224, 224), align_corners=True) > 1e-2
    monkeypatch.setattr(resize, "SHARPNESS", -0.5)
    assert difference((544, 960), (224, 224)) > 1e-2


def test_positions_rounded_otherwise_are_caught(monkeypatch: pytest.MonkeyPatch):
    """Without PyTorch's float32 positions the result is off by fifty times the tolerance."""

    def exact(size: int, new_size: int) -> resize.Taps:
        taps = cubic_taps(size, new_size)
        shift = np.float32(6e-5)  # the last bit of a position near 600
        weights = taps[1] + shift * np.roll(taps[1], 1, axis=1) - shift * taps[1]
        return taps[0], weights

    monkeypatch.setattr(resize, "cubic_taps", exact)
    assert difference((544, 960), (224, 224)) > 10 * TOL


def test_weights_sum_to_one_and_a_flat_image_stays_flat():
    indices, weights = cubic_taps(100, 37)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=2e-7)
    assert indices.min() == 0 and indices.max() == 99
    flat = np.full((3, 10, 20), 0.25, np.float32)
    np.testing.assert_allclose(bicubic_resize(flat, 7, 31), 0.25, atol=1e-7)


def test_the_same_size_is_the_same_image():
    image = np.random.default_rng(0).uniform(-1, 1, (3, 9, 8)).astype(np.float32)
    np.testing.assert_array_equal(bicubic_resize(image, 9, 8), image)
