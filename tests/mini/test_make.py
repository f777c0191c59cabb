"""The folders that users load are put together from the runs: each part once."""

import json
import shutil
from pathlib import Path

import pytest

from skyreels_jax.built_in import BUILT_IN
from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.hub import ASSETS
from skyreels_jax.mini.make import assemble

# The run of each part, and the folder of the package that has it.
PARTS = {
    "text": {"tokenizer": "mini", "text_encoder": "mini"},
    "vae": {"vae": "mini"},
    "image": {"image_encoder": "mini-i2v", "image_processor": "mini-i2v"},
    "df-last": {"transformer": "mini"},
    "i2v": {"transformer": "mini-i2v"},
    "live": {"transformer": "mini-live"},
}
RUNS = (*PARTS, "vae-frames", "df-first", "df", "live-causal", "live-guidance")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs leave, made of the package's own folders."""
    folder = tmp_path_factory.mktemp("outputs")
    for run in RUNS:
        (folder / run).mkdir()
        (folder / run / "log.jsonl").write_text(json.dumps({"step": 2, "seconds": 36.0}) + "\n")
        for part, name in PARTS.get(run, {}).items():
            if name not in BUILT_IN:
                continue
            shutil.copytree(ASSETS / name / part, folder / run / "model" / part)
    return folder


@pytest.fixture(scope="module")
def assets(outputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    for name in BUILT_IN:
        assert assemble(outputs, folder, name) == folder / name
    return folder


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_is_assembled_is_what_the_package_has(name: str, assets: Path):
    made = {file.relative_to(assets) for file in (assets / name).rglob("*") if file.is_file()}
    there = {file.relative_to(ASSETS) for file in (ASSETS / name).rglob("*") if file.is_file()}
    # A card is written by people.
    assert there - made <= {Path(name, "README.md"), Path(name, "wrong.png")}
    assert made <= there
    for file in made - {Path(name, "training.json")}:
        assert (assets / file).read_bytes() == (ASSETS / file).read_bytes(), file
    Checkpoint.open(assets / name).verify()


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_run_that_a_part_comes_from_is_told_of(name: str, assets: Path):
    made, there = (json.loads((f / name / "training.json").read_text()) for f in (assets, ASSETS))
    assert made["runs"].keys() == there["runs"].keys()
    assert made["runs"]["text"]["hours"] == 0.01


def test_a_card_stays(outputs: Path, assets: Path):
    (assets / "mini" / "README.md").write_text("said by people")
    assemble(outputs, assets, "mini")
    assert (assets / "mini" / "README.md").read_text() == "said by people"
