import json
import signal
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from skyreels_jax.errors import RequestError, WeightsError
from skyreels_jax.weights.engine import TensorStream
from skyreels_jax.weights.folder_files import safetensors_of
from skyreels_jax.weights.safetensors_file import DTYPES, SafetensorsSource, TensorSpec
from skyreels_jax.weights.writer import new_folder, write_tensors

RNG = np.random.default_rng(0)
TENSORS = {
    "half": RNG.standard_normal((3,)).astype(np.float16),
    "brain": RNG.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
    "single": RNG.standard_normal((2, 3, 4)).astype(np.float32).transpose(2, 0, 1),
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "double": RNG.standard_normal((7,)),
}


def specs(tensors):
    return {n: TensorSpec(a.shape, a.dtype) for n, a in tensors.items()}


def write(folder, tensors=TENSORS, **kwargs):
    stream = TensorStream(specs(tensors), iter(tensors.items()))
    return write_tensors(folder, "model", stream, **kwargs)


def test_what_is_written_is_what_the_formats_own_library_reads(tmp_path):
    (file,) = write(tmp_path)
    read = load_file(file)
    assert read.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value)
    with safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "pt"}  # transformers refuses files without it


def test_what_is_written_is_what_we_read_aligned_and_read_only(tmp_path):
    source = SafetensorsSource(write(tmp_path))
    for name, value in TENSORS.items():
        read = source.read(name)
        np.testing.assert_array_equal(read, value)
        assert read.flags.aligned
        assert not read.size or not read.flags.writeable


def test_shards_are_cut_at_the_limit_and_indexed(tmp_path):
    tensors = {f"t{k}": np.full((10,), k, np.float32) for k in range(5)}
    files = write(tmp_path, tensors, max_shard_bytes=80)
    names = [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert [f.name for f in files] == [*names, "model.safetensors.index.json"]
    index = json.loads(files[-1].read_text())
    assert index["metadata"] == {"total_size": 200}
    assert [index["weight_map"][f"t{k}"] for k in range(5)] == [names[k // 2] for k in range(5)]
    source = safetensors_of(tmp_path)
    for name, value in tensors.items():
        np.testing.assert_array_equal(source.read(name), value)


def test_a_tensor_larger_than_a_shard_stands_alone(tmp_path):
    tensors = {"a": np.zeros(1, np.float32), "b": np.zeros(99, np.float32)}
    assert len(write(tmp_path, tensors, max_shard_bytes=8)) == 3


@pytest.mark.parametrize(
    "values",
    [
        [("a", np.zeros(2, np.float32))],
        [("b", np.zeros(2, np.float32)), ("a", np.zeros(2, np.float32))],
        [("a", np.zeros(3, np.float32)), ("b", np.zeros(2, np.float32))],
        [("a", np.zeros(2, np.float16)), ("b", np.zeros(2, np.float32))],
        [(n, np.zeros(2, np.float32)) for n in "abc"],
    ],
    ids=["short", "order", "shape", "dtype", "long"],
)
def test_values_that_were_not_announced_are_refused(tmp_path, values):
    announced = {n: TensorSpec((2,), np.dtype(np.float32)) for n in "ab"}
    with pytest.raises(WeightsError, match="announced"):
        write_tensors(tmp_path, "model", TensorStream(announced, iter(values)))


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "out"
    with pytest.raises(ZeroDivisionError), new_folder(target) as partial:
        (partial / "half").write_text("x")
        raise ZeroDivisionError
    assert list(target.parent.iterdir()) == []
    with new_folder(target) as partial:
        (partial / "file").write_text("x")
        assert not target.exists()
    assert [p.name for p in target.parent.iterdir()] == ["out"]
    assert (target / "file").read_text() == "x"


def test_a_folder_with_files_is_replaced_only_on_request_and_only_when_complete(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("precious")
    with pytest.raises(RequestError, match="overwrit"), new_folder(target):
        raise AssertionError("not reached")
    with pytest.raises(ZeroDivisionError), new_folder(target, overwrite=True):
        raise ZeroDivisionError
    assert (target / "mine").read_text() == "precious"
    with new_folder(target, overwrite=True) as partial:
        (partial / "new").write_text("x")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "new"]


@pytest.mark.parametrize("marked", [False, True])
def test_what_comes_while_a_folder_is_made_stays(tmp_path, marked):
    target = tmp_path / "out"
    with (
        pytest.raises(RequestError, match=f"what was made is in {tmp_path / 'out-1'}"),
        new_folder(target, overwrite=marked, marked=marked) as partial,
    ):
        (partial / "new").write_text("x")
        target.mkdir()
        (target / "mine").write_text("precious")
    assert (target / "mine").read_text() == "precious"
    assert (tmp_path / "out-1" / "new").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-1"]


def test_an_interruption_leaves_the_old_folder_or_the_new_one(tmp_path, monkeypatch):
    """A signal between the two renames waits; a refusal there brings the old one back."""
    target, true = tmp_path / "out", Path.rename
    with new_folder(target, marked=True) as partial:
        (partial / "file").write_text("old")

    def interrupted(self: Path, to: Path):
        if to != target:  # the old one makes room
            signal.raise_signal(signal.SIGINT)
        return true(self, to)

    def refused(self: Path, to: Path):
        if to == target and (self / "file").read_text() == "new":
            raise OSError(28, "No space left on device")
        return true(self, to)

    def replace() -> None:
        with new_folder(target, overwrite=True, marked=True) as partial:
            (partial / "file").write_text("new")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(WeightsError, match="No space"):
        replace()
    assert (target / "file").read_text() == "old"
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace()
    assert (target / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(RequestError, match="is a file"), new_folder(tmp_path / "out"):
        raise AssertionError("not reached")


def test_a_refused_write_is_one_error_and_leaves_nothing(tmp_path):
    with pytest.raises(WeightsError, match="cannot be written"), new_folder(tmp_path / "x") as part:
        (part / "no" / "such").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_the_dtype_codes_are_those_of_the_format(tmp_path):
    for code, dtype in DTYPES.items():
        if code.startswith("F8"):
            continue  # the library's NumPy side does not write these
        (file,) = write(tmp_path, {"x": np.zeros(3, dtype)})
        with safe_open(file, "np") as opened:
            assert opened.get_slice("x").get_dtype() == code
