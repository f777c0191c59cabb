"""Single files of tensors: their bytes tell what they are, not their names."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.open_file import open_tensors
from skyreels_jax.weights.safetensors_file import TensorSource

F = np.float32


def values(number: float) -> dict[str, np.ndarray]:
    return {"blocks.0.a": np.full((2, 3), number, F), "head": np.full(4, -number, F)}


def torch_values(number: float) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in values(number).items()}


def check(source: TensorSource, number: float) -> None:
    assert set(source.tensors()) == {"blocks.0.a", "head"}
    for name, value in values(number).items():
        np.testing.assert_array_equal(source.read(name), value)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.bin", "a", "a.pt"])
def test_the_content_tells_the_format_and_not_the_name(tmp_path: Path, name: str):
    save_file(values(1), tmp_path / name)
    check(open_tensors(tmp_path / name), 1)
    torch.save(torch_values(2), tmp_path / name)
    check(open_tensors(tmp_path / name), 2)


def test_the_average_goes_before_the_last_values_and_that_is_said(tmp_path: Path):
    nested = {"generator": torch_values(1), "generator_ema": torch_values(2), "step": 7}
    torch.save(nested, tmp_path / "a.pt")
    source = open_tensors(tmp_path / "a.pt")
    check(source, 2)
    notes = getattr(source, "notes", ())
    assert notes == ("took generator_ema of the file, and left generator, step",)
    check(open_tensors(tmp_path / "a.pt", key="generator"), 1)
    with pytest.raises(WeightsError, match="it has generator, generator_ema"):
        open_tensors(tmp_path / "a.pt", key="model")


@pytest.mark.parametrize("name", ["generator_ema", "generator", "model", "state_dict", "any"])
def test_the_only_mapping_of_a_file_is_taken(tmp_path: Path, name: str):
    torch.save({name: torch_values(3)}, tmp_path / "a.pt")
    source = open_tensors(tmp_path / "a.pt")
    check(source, 3)
    assert getattr(source, "notes", ()) == ()


def test_of_mappings_that_tell_nothing_the_key_must_be_said(tmp_path: Path):
    torch.save({"left": torch_values(1), "right": torch_values(2)}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"several mappings \(left, right\).*weights_key"):
        open_tensors(tmp_path / "a.pt")
    check(open_tensors(tmp_path / "a.pt", key="right"), 2)


def test_a_key_of_a_flat_file_is_a_prefix(tmp_path: Path):
    flat = {f"{key}.{name}": v for key in ("a", "b") for name, v in values(ord(key)).items()}
    save_file(flat, tmp_path / "a.safetensors")
    check(open_tensors(tmp_path / "a.safetensors", key="b"), ord("b"))
    with pytest.raises(WeightsError, match="nothing under the key c; its names begin with a, b"):
        open_tensors(tmp_path / "a.safetensors", key="c")


def test_one_of_a_series_opens_all_of_it(tmp_path: Path):
    names = [f"model-{k:05d}-of-00002.safetensors" for k in (1, 2)]
    for file, (name, value) in zip(names, values(1).items(), strict=True):
        save_file({name: value}, tmp_path / file)
    check(open_tensors(tmp_path / names[1]), 1)
    (tmp_path / names[0]).unlink()
    with pytest.raises(WeightsError, match="one of 2 files, of which 1 are missing: model-00001"):
        open_tensors(tmp_path / names[1])


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "HTML": (lambda p: p.write_text("\n<!DOCTYPE html><html>login</html>"), "is a web page"),
    "text": (lambda p: p.write_text("hello, these are no weights"), "no file of tensors"),
    "LFS": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "FIFO": (os.mkfifo, "a pipe"),
    "folder": (os.mkdir, "folder"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_of_tensors_is_named(tmp_path: Path, kind: str):
    make, says = ODD[kind]
    make(tmp_path / "weights.dat")
    with pytest.raises(WeightsError, match=says):
        open_tensors(tmp_path / "weights.dat")
