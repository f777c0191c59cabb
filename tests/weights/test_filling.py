import jax
import ml_dtypes
import numpy as np
import pytest

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights import filling
from skyreels_jax.weights.filling import (
    aligned_empty,
    all_finite,
    fill,
    fill_all,
    fill_in_pieces,
    pieces,
    pool,
    rounded,
)

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_sixteen_bit_pattern_and_the_extremes_are_told_apart(dtype):
    if np.dtype(dtype).itemsize == 2:
        values = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    else:
        limits = np.finfo(dtype)
        values = np.array([limits.max, limits.min, limits.smallest_subnormal, 0, -0.0], dtype)
        values = np.append(values, np.array([np.nan, np.inf, -np.inf], dtype))
    with np.errstate(invalid="ignore"):
        known = np.isfinite(values)
    for value, finite in zip(values, known, strict=True):
        assert all_finite(np.array([1, value], dtype)) == finite


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_do_not_matter(dtype):
    values = np.zeros((3, 4, 5), dtype)
    values[1, 2, 3] = np.nan
    assert not all_finite(values.T)
    assert all_finite(values.T[:, :, 2])


SHAPES = [(), (0,), (7,), (3, 64), (300, 200), (129, 4100), (2, 3, 65), (4, 0), (3, 1, 2, 9, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_filling_is_rounding_and_copying_whatever_the_layout(shape, dtype):
    values = np.asarray(np.random.default_rng(0).standard_normal(shape[::-1]), np.float32).T
    for stored in (values, values.copy("C"), values[::-1] if shape else values):
        out = np.full(shape, np.nan, dtype)
        fill(out, stored, "x")
        np.testing.assert_array_equal(out, stored.astype(dtype))


@pytest.mark.parametrize("place", [(0, 0), (128, 0), (299, 4099)])
def test_one_bad_value_is_found_wherever_it_is(place):
    values = np.zeros((300, 4100), np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        values[place] = bad
        with pytest.raises(WeightsError, match="file: w has 1 values that are NaN"):
            fill(np.empty(values.T.shape, np.float16), values.T, "file: w")
    values[place] = 1e6
    fill(np.empty(values.shape, np.float32), values, "file: w")
    with pytest.raises(WeightsError, match="beyond the range of float16"):
        fill(np.empty(values.shape, np.float16), values, "file: w")


def test_a_large_tensor_is_cut_for_the_threads_and_nothing_is_left_out(monkeypatch):
    monkeypatch.setattr(filling, "_PIECE_BYTES", 1000)
    values = np.arange(40 * 50, dtype=np.float32).reshape(50, 40).T
    out = np.full((40, 50), np.nan)
    parts = list(pieces(out, values))
    assert len(parts) == 9
    with pool() as threads:
        fill_in_pieces(threads, out, values, "x")
    np.testing.assert_array_equal(out, values)


def test_a_convolution_is_filled_in_few_strips(monkeypatch):
    """Taken tap by tap, the VAE of the released size took 140 s of a generation's 250."""
    strips = []

    def counted(values: np.ndarray) -> bool:
        strips.append(values.nbytes)
        return all_finite(values)

    monkeypatch.setattr(filling, "all_finite", counted)
    values = np.random.default_rng(0).standard_normal((128, 128, 3, 3, 3)).astype(np.float32)
    out = aligned_empty((3, 3, 3, 128, 128), np.float32)
    fill(out.transpose(4, 3, 0, 1, 2), values, "x")
    np.testing.assert_array_equal(out, values.transpose(2, 3, 4, 1, 0))
    assert sum(strips) == values.nbytes
    assert len(strips) == 2  # a mebibyte each; tap by tap they were 49,152


def test_of_several_tensors_the_first_that_is_bad_is_named():
    good, bad = np.ones((4, 4), np.float32), np.full((4, 4), np.nan, np.float32)
    outs = [
        (np.empty((4, 4)), lambda v=v: v, f"tensor {k}") for k, v in enumerate([good, bad, bad])
    ]
    with pool() as threads, pytest.raises(WeightsError, match="tensor 1 has 16 values"):
        fill_all(threads, outs)


@pytest.mark.parametrize("shape", [(), (3,), (5, 7)])
def test_a_parameter_is_taken_by_xla_without_a_copy(shape):
    value = aligned_empty(shape, ml_dtypes.bfloat16)
    value[...] = 1.5
    placed = jax.device_put(value)
    assert placed.unsafe_buffer_pointer() == value.ctypes.data
    shifted = np.frombuffer(bytearray(4 * 9), np.uint8)[1:33].view(np.float32)
    assert jax.device_put(shifted).unsafe_buffer_pointer() != shifted.ctypes.data


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
