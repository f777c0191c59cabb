"""Folders side by side of which one has components for the others; a converted copy is whole."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
from tests.weights.tiny import edit_json

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.cli.main import build_parser
from skyreels_jax.errors import WeightsError
from skyreels_jax.hub import ASSETS
from skyreels_jax.training.sources import layout_of
from skyreels_jax.weights.layout import COMPONENTS_IN, MODEL_INDEX
from skyreels_jax.weights.model_file import components_in

SHARED = ("vae", "text_encoder", "tokenizer")


def convert(*words: object) -> None:
    arguments = build_parser("convert").parse_args(["convert", *map(str, words)])
    assert importlib.import_module("skyreels_jax.cli.convert").run(arguments) == 0


@pytest.fixture
def sisters(tmp_path: Path) -> Path:
    for name in ("mini", "mini-i2v"):
        shutil.copytree(ASSETS / name, tmp_path / name)
    return tmp_path / "mini-i2v"


@pytest.mark.parametrize("name", SHARED)
def test_a_component_is_found_in_the_folder_beside(name: str):
    found = Checkpoint.open("mini-i2v").layout.component(name)  # pyright: ignore
    assert found == ASSETS.resolve() / "mini" / name
    for all_found in (components_in(ASSETS / "mini-i2v"), layout_of("data.vae", "mini-i2v")):
        there = all_found if isinstance(all_found, dict) else all_found.components
        assert there[name] == found  # pyright: ignore


def test_what_decides_a_video_is_of_both_folders():
    deciding = Checkpoint.open("mini-i2v").layout.deciding_files
    assert {file.relative_to(ASSETS).parts[:2] for file in deciding} >= {
        *(("mini", name) for name in SHARED),
        *(("mini-i2v", name) for name in ("transformer", "image_encoder", "scheduler")),
    }


@pytest.mark.parametrize("name", ["mini", "mini-i2v"])
def test_a_converted_copy_is_whole(name: str, tmp_path: Path):
    convert(name, tmp_path / "copy", "--format", "diffusers")
    copy = Checkpoint.open(tmp_path / "copy")
    copy.verify()
    assert COMPONENTS_IN not in json.loads((tmp_path / "copy" / MODEL_INDEX).read_text())
    assert copy.guess == Checkpoint.open(name).guess
    for part, path in copy.layout.components.items():
        assert path == tmp_path / "copy" / part
        for file in (other := Checkpoint.open(name).layout.component(part)).iterdir():
            assert (path / file.name).read_bytes() == file.read_bytes(), other


def test_a_folder_without_its_sister_says_what_to_do(sisters: Path):
    assert Checkpoint.open(sisters).vae == sisters.parent.resolve() / "mini" / "vae"
    shutil.rmtree(sisters.parent / "mini")
    with pytest.raises(WeightsError, match="takes its components from .*mini, .*convert"):
        Checkpoint.open(sisters)


def test_what_a_folder_has_itself_goes_before(sisters: Path):
    shutil.copytree(sisters.parent / "mini" / "vae", sisters / "vae")
    assert Checkpoint.open(sisters).vae == sisters / "vae"
    assert Checkpoint.open(sisters).text_encoder.parent.name == "mini"


@pytest.mark.parametrize("named", ["../mini", "a/b", "", "..", 3, ["mini"]], ids=repr)
def test_only_a_folder_beside_can_be_named(named: object, sisters: Path):
    edit_json(sisters / MODEL_INDEX, **{COMPONENTS_IN: named})
    with pytest.raises(WeightsError, match="expected the name of a folder beside this one"):
        Checkpoint.open(sisters)


def test_what_the_index_does_not_list_is_not_taken(sisters: Path):
    index = json.loads((sisters / MODEL_INDEX).read_text())
    del index["vae"]
    (sisters / MODEL_INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="vae is missing"):
        _ = Checkpoint.open(sisters).vae
