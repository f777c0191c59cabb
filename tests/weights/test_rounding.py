import ml_dtypes
import numpy as np
import pytest

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.rounding import all_finite, copy_into, rounded

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_sixteen_bit_pattern_and_the_extremes_are_told_apart(dtype):
    if np.dtype(dtype).itemsize == 2:
        values = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    else:
        limits = np.finfo(dtype)
        values = np.array([limits.max, limits.min, limits.smallest_subnormal, 0, -0.0], dtype)
        values = np.append(values, np.array([np.nan, np.inf, -np.inf], dtype))
    for value, finite in zip(values, np.isfinite(values), strict=True):
        assert all_finite(np.array([1, value], dtype)) == finite


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_do_not_matter(dtype):
    values = np.zeros((3, 4, 5), dtype)
    values[1, 2, 3] = np.nan
    assert not all_finite(values.T)
    assert all_finite(values.T[:, :, 2])


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 64), (5, 200), (2, 3, 65), (4, 0)])
def test_copying_in_strips_is_copying(shape):
    values = np.random.default_rng(0).standard_normal(shape[::-1]).T
    out = np.full(shape, np.nan)
    copy_into(out, values)
    np.testing.assert_array_equal(out, values)


def test_none_keeps_the_dtype_and_the_values():
    values = np.array([1.5, -0.0], np.float32)
    assert rounded(values, None, "x") is values
    with pytest.raises(WeightsError, match="x has 1 values that are NaN or infinite"):
        rounded(np.array([np.nan, 1.0]), None, "x")


def test_the_largest_value_fits_and_the_next_does_not():
    largest = np.float32(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    assert rounded(np.array([largest]), ml_dtypes.bfloat16, "x")[0] == largest
    with pytest.raises(WeightsError, match="beyond the range of bfloat16"):
        rounded(np.array([np.finfo(np.float32).max]), ml_dtypes.bfloat16, "x")
