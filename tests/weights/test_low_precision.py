"""Files in 8 and 4 bits: each layout against its definition, and wrong pairs refused by name."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tests.fabricate import Checkpoints
from tests.weights import low_precision_files as files
from tests.weights.low_precision_files import LAYOUTS, Stored, save
from tests.weights.tiny import DF, random_state

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.components.transformer import TRANSFORMER
from skyreels_jax.weights.engine import export, load_into
from skyreels_jax.weights.low_precision import dequantized
from skyreels_jax.weights.open_file import open_tensors
from skyreels_jax.weights.safetensors_file import SafetensorsSource

RNG = np.random.default_rng(0)
F = np.float32
WEIGHT = RNG.standard_normal((160, 96)).astype(F)
BIAS = np.ones(160, F)


@pytest.mark.parametrize("in_header", [True, False])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_each_layout_is_read_as_its_definition_says(tmp_path: Path, kind: str, in_header: bool):
    stored = LAYOUTS[kind](WEIGHT)
    file = save(
        tmp_path / "m.safetensors", {"a.b": stored}, {"a.b.bias": BIAS}, in_header=in_header
    )
    source = open_tensors(file)
    assert source.tensors().keys() == {"a.b.weight", "a.b.bias"}
    info, value = source.tensors()["a.b.weight"], source.read("a.b.weight")
    assert (info.shape, info.dtype) == (value.shape, value.dtype) == (WEIGHT.shape, value.dtype)
    np.testing.assert_array_equal(value.astype(F), stored.value)
    assert value.dtype == (ml_dtypes.bfloat16 if kind.startswith("fp8") else F)
    np.testing.assert_array_equal(source.read("a.b.bias"), BIAS)
    # What is stored is what was meant: 4 bits are within a quarter of each block's largest.
    assert np.abs(stored.value - WEIGHT).max() < 0.7
    (note,) = source.notes
    assert note.startswith("1 tensor in ")


def test_the_order_of_pairs_and_the_tiles_matter():
    """Negative twin: of each of both, the other gives other values."""
    stored = files.comfy_nvfp4(WEIGHT)
    packed, scales = stored.tensors["weight"], stored.tensors["weight_scale"]
    swapped = files.lightx2v_nvfp4(WEIGHT).tensors["weight"]
    np.testing.assert_array_equal(packed, swapped >> 4 | swapped << 4)
    assert (packed != swapped).mean() > 0.8
    assert (scales[:160, :6].astype(F) != files._nvfp4(WEIGHT, True).scales.astype(F)).any()


def test_a_file_without_low_precision_is_left_as_it_is(tmp_path: Path):
    others = {"a.weight": WEIGHT, "a.alpha": np.array(2, F), "ids": np.arange(3)}
    source = SafetensorsSource([save(tmp_path / "m.safetensors", {}, others)])
    assert dequantized(source) is source


def test_a_marker_and_dummy_scales_are_left_out(tmp_path: Path):
    others = {
        "scaled_fp8": np.zeros(2, files.E4M3),
        "norm.weight": BIAS,
        "norm.scale_weight": np.ones(1, F),
        "a.scale_input": np.array(1, F),
    }
    file = save(tmp_path / "m.safetensors", {"a": files.kijai(WEIGHT)}, others)
    source = open_tensors(file)
    assert source.tensors().keys() == {"a.weight", "norm.weight"}
    np.testing.assert_array_equal(source.read("a.weight"), files.kijai(WEIGHT).value)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_a_description_may_leave_out_the_prefix(tmp_path: Path, prefix: str):
    stored = files.comfy_nvfp4(WEIGHT)
    others = {f"{prefix}a.{part}": value for part, value in stored.tensors.items()}
    file = tmp_path / "m.safetensors"
    metadata = json.dumps({"layers": {"a": {"format": "nvfp4"}}})
    files.save_file(others, file, {"_quantization_metadata": metadata})
    np.testing.assert_array_equal(open_tensors(file).read(f"{prefix}a.weight"), stored.value)


# What does not fit together


def without(kind: str, part: str, **more: np.ndarray) -> Stored:
    stored = LAYOUTS[kind](WEIGHT)
    stored.tensors = {k: v for k, v in stored.tensors.items() if k != part} | more
    return stored


def described(kind: str, description: object, **more: np.ndarray) -> Stored:
    stored = without(kind, "", **more)
    stored.description = description
    return stored


MARKER = {"scaled_fp8": np.zeros(0, files.E4M3)}
ONE = np.array(1, F)
BAD: dict[str, tuple[Callable[[], Stored], dict[str, np.ndarray], str]] = {
    "no scale, a marker": (lambda: files.fp8(WEIGHT), MARKER, "a.weight: its scale is missing"),
    "no scale, a description": (
        lambda: without("ComfyUI's fp8", "weight_scale"),
        {},
        "a.weight: its scale is missing",
    ),
    "no scale where others have one": (
        lambda: files.fp8(WEIGHT),
        {"b.weight": WEIGHT.astype(files.E4M3), "b.scale_weight": ONE},
        "a.weight: its scale is missing",
    ),
    "no scale of int8": (lambda: without("int8", "weight_scale"), {}, "its scale is missing"),
    "no weight": (lambda: without("Kijai's fp8", "weight"), {}, "a (scale_weight)"),
    "no weight of a description": (
        lambda: files.comfy_fp8(WEIGHT),
        {"c.comfy_quant": np.frombuffer(b'{"format": "nvfp4"}', np.uint8)},
        "c (comfy_quant)",
    ),
    "two scales": (lambda: without("Kijai's fp8", "", weight_scale=ONE), {}, "several scales"),
    "a scale of another length": (
        lambda: without("int8", "", weight_scale=np.ones(96, F)),
        {},
        "its scale is float32 [96]; expected a float, one or 160",
    ),
    "a scale of integers": (
        lambda: without("int8", "", weight_scale=np.ones(160, np.int32)),
        {},
        "its scale is int32 [160]",
    ),
    "a scale of a bfloat16 weight": (
        lambda: Stored({"weight": WEIGHT, "scale_weight": np.array(2, F)}, WEIGHT),
        {},
        "a.scale_weight beside float32",
    ),
    "an unknown format": (
        lambda: described("ComfyUI's fp8", {"format": "mxfp8"}),
        {},
        "a: 'mxfp8'",
    ),
    "rotated": (
        lambda: described("ComfyUI's int8", {"format": "int8_tensorwise", "convrot": True}),
        {},
        "'int8_tensorwise' with convrot",
    ),
    "another format than said": (
        lambda: described("ComfyUI's fp8", {"format": "nvfp4"}),
        {},
        "it is float8_e4m3fn and said to be nvfp4",
    ),
    "full precision, said to be fp8": (
        lambda: Stored({"weight": WEIGHT}, WEIGHT, {"format": "float8_e4m3fn"}),
        {},
        "a.weight is float32, said to be float8_e4m3fn",
    ),
    "pairs in no order": (
        lambda: described("ComfyUI's NVFP4", None),
        {},
        "nothing tells the order of its pairs",
    ),
    "pairs in both orders": (
        lambda: without("ComfyUI's NVFP4", "", alpha=ONE, input_global_scale=ONE),
        {},
        "the order of its pairs is not known",
    ),
    "no block scales": (
        lambda: without("ComfyUI's NVFP4", "weight_scale"),
        {},
        "its block scales are missing",
    ),
    "no scale of the tensor": (
        lambda: without("ComfyUI's NVFP4", "weight_scale_2"),
        {},
        "its weight_scale_2 is missing",
    ),
    "no scale of the input": (
        lambda: without("LightX2V's NVFP4", "input_global_scale"),
        {},
        "its input_global_scale is missing",
    ),
    "block scales in rows": (
        lambda: without("ComfyUI's NVFP4", "", weight_scale=np.ones((160, 6), files.E4M3)),
        {},
        "float8_e4m3fn [160, 6]; expected float8_e4m3fn [256, 8]",
    ),
    "pairs that end within a block": (
        lambda: without("ComfyUI's NVFP4", "", weight=np.zeros((160, 44), np.uint8)),
        {},
        "pairs of a matrix are expected, not [160, 44]",
    ),
    "no JSON": (
        lambda: files.comfy_fp8(WEIGHT),
        {"a.comfy_quant": np.frombuffer(b"{", np.uint8)},
        "a.comfy_quant",
    ),
    "a long description": (
        lambda: files.comfy_fp8(WEIGHT),
        {"a.comfy_quant": np.zeros(5000, np.uint8)},
        "descriptions that are no text",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_together_is_refused_by_name(tmp_path: Path, kind: str):
    stored, others, words = BAD[kind]
    file = save(tmp_path / "m.safetensors", {"a": stored()}, others)
    with pytest.raises(WeightsError) as caught:
        open_tensors(file)
    assert words in str(caught.value)


DAMAGED = {
    "scale": ("Kijai's fp8", "scale_weight", np.array(np.nan, F)),
    "scale of a channel": ("int8", "weight_scale", np.where(np.arange(160) == 7, np.inf, 1)),
    "scale of the tensor": ("ComfyUI's NVFP4", "weight_scale_2", np.array(np.nan, F)),
    "block scale": ("ComfyUI's NVFP4", "weight_scale", np.full((256, 8), np.nan)),
    "product": ("LightX2V's NVFP4", "alpha", np.array(3e38, F)),
    "inverse": ("LightX2V's NVFP4 before calibration", "weight_global_scale", np.array(0, F)),
    "contradiction": ("LightX2V's NVFP4", "weight_scale_2", np.array(1, F)),
}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("what", DAMAGED)
def test_scales_that_are_not_finite_are_refused_when_they_are_read(tmp_path: Path, what: str):
    kind, part, value = DAMAGED[what]
    stored = LAYOUTS[kind](WEIGHT)
    dtype = stored.tensors[part].dtype if part in stored.tensors else F
    stored.tensors[part] = value.astype(dtype)
    source = open_tensors(save(tmp_path / "m.safetensors", {"a": stored}))
    with pytest.raises(WeightsError, match=r"finite|infinite|contradicts") as caught:
        source.read("a.weight")
    assert "m.safetensors" in str(caught.value) and "a." in str(caught.value)


# Whole models

WIDE = dataclasses.replace(DF, dim=32, ffn_dim=48, text_dim=32)


@pytest.fixture(scope="module")
def transformer() -> dict[str, np.ndarray]:
    stream = export(random_state(WIDE), TRANSFORMER.rules(WIDE), "original")
    return {name: np.ascontiguousarray(value) for name, value in stream.values}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_transformer_has_the_values_of_the_definition(tmp_path: Path, transformer, kind: str):
    """Blocks' matrices in low precision, the rest as it is, under ComfyUI's prefix."""
    rules = TRANSFORMER.rules(WIDE)
    layers, others, expected = {}, {}, {}
    for name, value in transformer.items():
        if name.startswith("blocks.") and value.ndim == 2:
            stored = LAYOUTS[kind](value)
            layers[f"model.diffusion_model.{name.removesuffix('.weight')}"] = stored
            expected[name] = stored.value
        else:
            others[f"model.diffusion_model.{name}"] = expected[name] = value
    assert len(layers) == 30
    folder = tmp_path / "m"
    folder.mkdir()
    save(folder / "model.safetensors", layers, others)
    config_json = TRANSFORMER.config_json(WIDE, "original")
    (folder / "config.json").write_text(json.dumps(config_json))
    source = Checkpoint.open(folder).layout.tensors()
    state = load_into(TRANSFORMER.abstract(WIDE), rules, source, "original", dtype=jnp.float32)
    for name, value in export(state, rules, "original").values:
        np.testing.assert_array_equal(value, expected[name], name)


@pytest.mark.parametrize("component", ["text_encoder", "image_encoder", "vae"])
def test_components_in_scaled_fp8_are_read(
    checkpoints: Checkpoints, tmp_path: Path, component: str
):
    """As ComfyUI's umt5_xxl_fp8_e4m3fn_scaled: matrices scaled, with a marker."""
    file = next(Path(checkpoints("i2v", "diffusers"), component).glob("*.safetensors"))
    source = SafetensorsSource([file])
    layers, others, expected = {}, {"scaled_fp8": np.zeros(0, files.E4M3)}, {}
    for name, info in source.tensors().items():
        value = np.array(source.read(name))
        if len(info.shape) == 2 and name.endswith(".weight"):
            layers[name.removesuffix(".weight")] = files.kijai(value.astype(F))
            expected[name] = layers[name.removesuffix(".weight")].value
        else:
            others[name] = expected[name] = value
    found = open_tensors(save(tmp_path / "m.safetensors", layers, others))
    assert found.tensors().keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found.read(name), value)
