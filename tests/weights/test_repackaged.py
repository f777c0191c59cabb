"""Checkpoints as other tools pack them: the same weights under other names of files or tensors."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.cli.commands import linked
from tests.fabricate import Checkpoints
from tests.weights.tiny import DF, I2V, T2V, edit_json, random_state, save

from skyreels_jax.checkpoints import Checkpoint, load_transformer
from skyreels_jax.errors import WeightsError
from skyreels_jax.models.transformer_config import DF_14B
from skyreels_jax.recognition import guess_preset
from skyreels_jax.weights.components.vae import stored_vae
from skyreels_jax.weights.engine import parameters
from skyreels_jax.weights.layout import Layout
from skyreels_jax.weights.torch_file import PthSource

WEIGHTS = "model.safetensors"
VAE = "Wan2.1_VAE.pth"
TEXT = "models_t5_umt5-xxl-enc-bf16.pth"
F = np.float32


def renamed(folder: Path, name_of: Callable[[str], str], **more: np.ndarray) -> Path:
    values = {name_of(name): value for name, value in load_file(folder / WEIGHTS).items()}
    save_file(values | more, folder / WEIGHTS)
    return folder


def fsdp(name: str) -> str:
    head, dot, tail = name.rpartition(".")
    inner = f"{head}._checkpoint_wrapped_module.{tail}" if dot else name
    return f"_fsdp_wrapped_module.{inner}"


NAMES: dict[str, Callable[[str], str]] = {
    "as they are": str,
    "ComfyUI": "model.diffusion_model.{}".format,
    "ComfyUI, short": "diffusion_model.{}".format,
    "DDP": "module.{}".format,
    "compiled": "_orig_mod.{}".format,
    "compiled DDP": "module._orig_mod.{}".format,
    "compiled for ComfyUI": "model.diffusion_model._orig_mod.{}".format,
    "of a wrapper": "model.{}".format,
    "FSDP": fsdp,
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(("config", "format"), [(T2V, "original"), (I2V, "diffusers")])
def test_prefixes_of_other_tools_are_taken_off(tmp_path: Path, kind: str, config, format):
    folder = save(tmp_path / "m", config, format)
    if format == "diffusers":
        (folder / "diffusion_pytorch_model.safetensors").rename(folder / WEIGHTS)
    marker = {"model_type.SkyReels-V2-T2V-14B-540P": np.zeros(1, F)}
    expected = load_file(folder / WEIGHTS)
    checkpoint = Checkpoint.open(renamed(folder, NAMES[kind], **marker))
    assert checkpoint.config == config
    found = checkpoint.layout.tensors()
    assert found.tensors().keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found.read(name), value)


def test_a_file_with_a_prefix_and_a_marker_loads(tmp_path: Path):
    """All the way: from its names to the parameters of the model."""
    marker = {"model_type.SkyReels-V2-DF-1.3B-540P": np.zeros(1, F)}
    folder = renamed(save(tmp_path / "m", DF), NAMES["ComfyUI"], **marker)
    loaded = parameters(load_transformer(Checkpoint.open(folder), dtype=F))
    for path, value in parameters(random_state(DF)).items():
        np.testing.assert_array_equal(value.get_value(), loaded[path].get_value(), path)


@pytest.mark.parametrize(
    ("name_of", "says"),
    [
        # Not all have the prefix: which model it is, nobody can tell.
        (lambda name: f"diffusion_model.{name}" if "blocks.1" in name else name, "no place for"),
        ("teacher.{}".format, "no place for"),
    ],
)
def test_prefixes_that_are_no_ones_or_not_common_stay(tmp_path: Path, name_of, says: str):
    folder = renamed(save(tmp_path / "m", T2V), name_of)
    with pytest.raises(WeightsError, match=says):
        load_transformer(Checkpoint.open(folder), dtype=F)


def test_two_models_in_one_file_are_refused(tmp_path: Path):
    folder = save(tmp_path / "m", DF)
    values = load_file(folder / WEIGHTS)
    save_file(values | {f"module.{name}": v for name, v in values.items()}, folder / WEIGHTS)
    with pytest.raises(WeightsError, match="holds two models"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["SkyReels-V2-DF-14B-720P", "skyreels-v2-df-14b-720p"])
def test_a_marker_names_the_preset(tmp_path: Path, name: str):
    layout = Layout(tmp_path, "original", tmp_path, {})
    guess = guess_preset(layout, DF_14B, marker=name)
    assert guess.preset is not None
    assert guess.preset.name == "SkyReels-V2-DF-14B-720P"
    assert "marker tensor" in guess.reason
    assert "assumed" in guess_preset(layout, DF_14B).reason


@pytest.mark.parametrize("kind", ["as they are", "ComfyUI", "FSDP"])
def test_a_single_file_tells_all_but_the_number_of_heads(tmp_path: Path, kind: str):
    wide = {"dim": 128, "num_heads": 1, "num_layers": 1}
    config = T2V.__class__(**(vars(T2V) | wide))
    folder = renamed(save(tmp_path / "m", config), NAMES[kind])
    (folder / "config.json").unlink()
    assert Checkpoint.open(folder).config == config
    narrow = renamed(save(tmp_path / "n", T2V), NAMES[kind])
    (narrow / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"config\.json is missing, and model\.safetensors does"):
        Checkpoint.open(narrow)


def test_components_as_safetensors_are_found_by_what_they_hold(
    checkpoints: Checkpoints, tmp_path: Path
):
    folder = linked(checkpoints("t2v", "original"), tmp_path / "m")
    for old, new in ((VAE, "wan_2.1_vae.safetensors"), (TEXT, "umt5_xxl.safetensors")):
        source = PthSource(folder / old)
        # The format's library knows no bfloat16 of NumPy's.
        values = {name: source.read(name).astype(F) for name in source.tensors()}
        save_file(values, folder / new)
        (folder / old).unlink()
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.vae.name == "wan_2.1_vae.safetensors"
    checkpoint.verify()
    found = stored_vae(checkpoint.layout).source
    expected = PthSource(checkpoints("t2v", "original") / VAE)
    for name in expected.tensors():
        np.testing.assert_array_equal(found.read(name), expected.read(name))


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_each_component_has_a_format_of_its_own(
    checkpoints: Checkpoints, tmp_path: Path, part: str
):
    """transformers' and diffusers' names in a folder of the original format."""
    folder = linked(checkpoints("t2v", "original"), tmp_path / "m")
    (folder / {"vae": VAE, "text_encoder": TEXT}[part]).unlink()
    (stored,) = (checkpoints("t2v", "diffusers") / part).glob("*.safetensors")
    (folder / "other.safetensors").write_bytes(stored.read_bytes())
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.layout.component(part).name == "other.safetensors"
    checkpoint.verify()


@pytest.mark.parametrize("keeps_config", [True, False])
def test_gguf_is_named(tmp_path: Path, keeps_config: bool):
    folder = save(tmp_path / "m", DF)
    (folder / WEIGHTS).rename(folder / "SkyReels-Q4_K_M.gguf")
    if not keeps_config:
        (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"SkyReels-Q4_K_M\.gguf: GGUF files are opened"):
        Checkpoint.open(folder)


def test_a_first_last_frame_model_may_call_itself_one(tmp_path: Path):
    folder = save(tmp_path / "m", I2V)
    edit_json(folder / "config.json", model_type="flf2v")
    assert Checkpoint.open(folder).config.model_type == "i2v"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "flf2v"
