import ml_dtypes
import numpy as np
import pytest

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.quantize import quantize

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((3, 16, 5)).astype(np.float32)


def test_int8_is_the_nearest_integer_with_ties_to_even():
    values, scale = quantize(KERNEL, np.int8)
    expected = np.abs(KERNEL).max(axis=1) / np.float32(127)
    np.testing.assert_array_equal(scale, expected)
    np.testing.assert_array_equal(values, np.round(KERNEL / expected[:, None, :]))
    assert values.dtype == np.int8 and scale.dtype == np.float32
    assert np.abs(values).max(axis=1).min() == 127
    tied, _ = quantize(np.array([[127.0], [0.5], [1.5], [-2.5]], np.float32), np.int8)
    assert tied[:, 0].tolist() == [127, 0, 2, -2]


def test_fp8_is_within_half_a_step_and_uses_the_whole_range():
    values, scale = quantize(KERNEL.astype(ml_dtypes.bfloat16), ml_dtypes.float8_e4m3fn)
    back = values.astype(np.float32) * scale[:, None, :]
    exact = KERNEL.astype(ml_dtypes.bfloat16).astype(np.float32)
    # Three bits of mantissa: half a step is 1/16 of the value; below 2^-6 steps are 2^-9.
    limit = np.maximum(np.abs(exact) / 16, scale[:, None, :] * 2**-10) * (1 + 1e-5)
    assert (np.abs(back - exact) <= limit).all()
    assert (np.abs(values.astype(np.float32)).max(axis=1) == 448).all()


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn])
def test_zeros_and_values_too_small_for_a_scale_are_zeros(dtype):
    kernel = np.zeros((4, 2), np.float32)
    kernel[0, 1] = 1e-45
    values, scale = quantize(kernel, dtype)
    assert scale.tolist() == [1, 1]
    assert not values.astype(np.float32).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad):
    kernel = KERNEL.copy()
    kernel[1, 2, 3] = bad
    with pytest.raises(WeightsError, match="NaN or infinite"):
        quantize(kernel, np.int8)
