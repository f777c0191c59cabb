"""`convert --weights`: what is written is read back as what was meant, and the rest stays."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from tests.fabricate import Checkpoints
from tests.weights.test_convert_folder import run
from tests.weights.tiny import DF, save

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.errors import RequestError
from skyreels_jax.weights.layout import read_layout
from skyreels_jax.weights.safetensors_file import SafetensorsSource

F = np.float32
LARGEST = {"int8": F(127), "fp8": F(448), "comfy-fp8": F(448)}


@pytest.mark.parametrize("weights", LARGEST)
def test_the_transformer_is_stored_in_8_bits_and_read_back(tmp_path: Path, weights: str):
    folder, target = save(tmp_path / "m", DF), tmp_path / "low"
    assert not run("convert", folder, target, "--format", "original", "--weights", weights)
    (file,) = target.glob("*.safetensors")
    stored, source = SafetensorsSource([file]), SafetensorsSource([folder / "model.safetensors"])
    prefix = "model.diffusion_model." if weights == "comfy-fp8" else ""
    back = Checkpoint.open(target).layout.tensors()
    assert back.tensors().keys() == source.tensors().keys()
    low = 0
    for name, info in source.tensors().items():
        value, found = source.read(name), stored.read(prefix + name)
        if not (name.startswith("blocks.") and len(info.shape) == 2):
            np.testing.assert_array_equal(found, value)
            continue
        low += 1
        axis = None if weights == "comfy-fp8" else 1
        scale = np.abs(value).max(axis) / LARGEST[weights]
        np.testing.assert_array_equal(stored.read(f"{prefix}{name}_scale"), scale)
        quotient = value / (scale if axis is None else scale[:, None])
        dtype = np.int8 if weights == "int8" else ml_dtypes.float8_e4m3fn
        expected = (np.rint(quotient) if weights == "int8" else quotient).astype(dtype)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.astype(F), expected.astype(F))
        again = expected.astype(F) * (scale if axis is None else scale[:, None])
        np.testing.assert_array_equal(back.read(name), again)
    assert low == 30
    with safe_open(file, "np") as opened:
        assert ("_quantization_metadata" in opened.metadata()) == (weights == "comfy-fp8")


def test_comfyui_takes_the_names_of_the_original(tmp_path: Path):
    folder = save(tmp_path / "m", DF)
    with pytest.raises(RequestError, match="--format original"):
        run("convert", folder, tmp_path / "x", "--format", "diffusers", "--weights", "comfy-fp8")


def test_the_text_encoder_is_stored_in_8_bits_too(checkpoints: Checkpoints, tmp_path: Path):
    target = tmp_path / "low"
    folder = checkpoints("t2v", "original")
    assert not run("convert", folder, target, "--format", "diffusers", "--weights", "int8")
    stored = SafetensorsSource([target / "text_encoder" / "model.safetensors"]).tensors()
    low = [name for name, info in stored.items() if info.dtype == np.int8]
    assert low and all("encoder.block." in name for name in low)
    assert not any("relative_attention_bias" in name for name in low)
    Checkpoint.open(target).verify()
    assert read_layout(target).components.keys() >= {"text_encoder", "vae"}
