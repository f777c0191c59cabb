from pathlib import Path

import numpy as np
import pytest
from tests.fabricate import Checkpoints

from skyreels_jax.errors import RequestError
from skyreels_jax.testing.random_checkpoint import KINDS, Kind, make_checkpoint
from skyreels_jax.weights.components.transformer import stored_transformer
from skyreels_jax.weights.folder_files import safetensors_of
from skyreels_jax.weights.layout import read_layout
from skyreels_jax.weights.plan import FORMATS, Format


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dialect", FORMATS)
def test_a_folder_has_every_part_of_its_layout(
    checkpoints: Checkpoints, kind: Kind, dialect: Format
):
    layout = read_layout(checkpoints(kind, dialect))
    parts = {"vae", "text_encoder", "tokenizer"}
    parts |= {"image_encoder"} if kind == "i2v" else set()
    if dialect == "diffusers":
        parts |= {"scheduler"} | ({"image_processor"} if kind == "i2v" else set())
    assert layout.format == dialect
    assert layout.components.keys() == parts
    stored = stored_transformer(layout)
    config = stored.config
    assert (config.model_type == "i2v") == (kind == "i2v")
    assert config.inject_sample_info == (kind == "df")
    stored.verify()


def test_every_parameter_is_random_and_of_moderate_size(checkpoints: Checkpoints):
    layout = read_layout(checkpoints("i2v", "diffusers"))
    folders = [layout.transformer, *(layout.component(p) for p in ("vae", "text_encoder"))]
    for folder in [*folders, layout.component("image_encoder")]:
        source = safetensors_of(folder)
        for name in source.tensors():
            value = source.read(name)
            assert 0 < np.abs(value).max() < 6, name
            assert value.size == 1 or value.std() > 0.01, name


def test_the_seed_decides_the_weights(tmp_path: Path, checkpoints: Checkpoints):
    same = make_checkpoint(tmp_path / "same", "t2v", seed=0)
    other = make_checkpoint(tmp_path / "other", "t2v", seed=1)
    file = "transformer/diffusion_pytorch_model.safetensors"
    expected = (checkpoints("t2v", "diffusers") / file).read_bytes()
    assert (same / file).read_bytes() == expected
    assert (other / file).read_bytes() != expected


def test_a_folder_that_holds_files_is_left_alone(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(RequestError, match="there already"):
        make_checkpoint(tmp_path, "t2v")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
