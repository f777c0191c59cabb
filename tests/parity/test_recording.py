"""Archives of named arrays: what is refused, what stays, and calls of several steps."""

from pathlib import Path

import numpy as np
import pytest

from skyreels_jax.parity.recording import arrays, load_call, save_call, writing

ONE = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_any_numpy_reads_an_archive_with_its_dtypes(tmp_path: Path):
    values = {
        "frames": np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3),
        "turned": ONE.T,
        "flags": np.array([True, False]),
        "nothing": np.zeros((0, 3), np.float32),
    }
    with writing(tmp_path / "x.npz") as record:
        for name, value in values.items():
            record(name, value)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as read:
        for name, value in values.items():
            np.testing.assert_array_equal(read[name], value)
            assert (read[name].dtype, read[name].shape) == (value.dtype, value.shape)


def test_an_archive_is_read_one_array_at_a_time(tmp_path: Path):
    path = tmp_path / "x.npz"
    with writing(path) as record:
        record("good", ONE)
        record("bad", ONE + 100)
    content = path.read_bytes()
    number = (ONE + 100).tobytes()
    path.write_bytes(content.replace(number, b"\xff" * len(number)))
    read = arrays(path)
    np.testing.assert_array_equal(read["good"], ONE)
    with pytest.raises(Exception, match="CRC"):
        _ = read["bad"]


def test_no_pickle_is_written(tmp_path: Path):
    with pytest.raises(ValueError, match="allow_pickle"), writing(tmp_path / "x.npz") as record:
        record("objects", np.array([{}], dtype=object))
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_what_was_there_before(tmp_path: Path):
    path = tmp_path / "x.npz"
    with writing(path) as record:
        record("old", ONE)
    with pytest.raises(KeyboardInterrupt), writing(path) as record:
        record("new", ONE)
        raise KeyboardInterrupt
    assert list(arrays(path)) == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_calls_of_several_steps_do_not_mix(tmp_path: Path):
    first = {"timestep": np.array([999.0]), "enable_diffusion_forcing": False}
    tenth = {"timestep": np.array([10.0]), "fps": [1, 0]}
    with writing(tmp_path / "x.npz") as record:
        save_call(record, 1, first | {"return_dict": False})
        save_call(record, 10, tenth)
    results = arrays(tmp_path / "x.npz")
    assert not any("return_dict" in name for name in results)
    one, ten = load_call(results, 1), load_call(results, 10)
    assert one.pop("timestep") == 999
    assert one == {"enable_diffusion_forcing": False, "return_dict": False}
    assert ten.pop("timestep") == 10
    assert ten == {"fps": [1, 0], "return_dict": False}
