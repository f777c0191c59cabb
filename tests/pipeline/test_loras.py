"""LoRAs of a pipeline: at load and on a loaded transformer, exact to unload, nothing compiled."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from tests.fabricate import Checkpoints
from tests.weights.lora.files import linears, low_rank, random, weights, write

from skyreels_jax import Pipeline
from skyreels_jax.errors import RequestError, WeightsError
from skyreels_jax.weights.lora.stack import as_loras

SETTINGS = {"height": 32, "width": 32, "num_frames": 5, "steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def folder(checkpoints: Checkpoints) -> Path:
    return checkpoints("t2v", "original")


@pytest.fixture(scope="module")
def lora(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = weights(folder)
    modules = {name.removesuffix(".weight"): shapes[name].shape for name in linears(folder)}
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    tensors = low_rank(modules, prefix="diffusion_model.", alpha=2.0)
    return write(file, tensors | {"diffusion_model.blocks.1.diff_m": random(1, 6, 32)})


def parameters(pipe: Pipeline) -> dict[str, np.ndarray]:
    model = pipe._denoiser.get().model
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.array(leaf.get_value()) for path, leaf in flat}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize(
    "how",
    [
        {"weights": "int8"},
        {},
        pytest.param({"dtype": "float32"}, marks=pytest.mark.slow),
        pytest.param({"weights": "fp8"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_loaded_at_the_start_or_later_and_taken_off_again(folder: Path, lora: Path, how: dict):
    pipe = Pipeline.from_pretrained(folder, **how, keep=True)
    before = parameters(pipe)
    pipe.load_lora(lora, 0.7)
    changed = parameters(pipe)
    assert any(changed[name].tobytes() != value.tobytes() for name, value in before.items())
    fresh = Pipeline.from_pretrained(folder, **how, keep=True, loras=[(lora, 0.7)])
    assert_same(changed, parameters(fresh))
    pipe.load_lora(lora, -0.2)
    both = Pipeline.from_pretrained(folder, **how, loras=[(lora, -0.2), (lora, 0.7)])
    if "dtype" in how:
        for name, value in parameters(both).items():  # measured 6e-8: the order of two sums
            np.testing.assert_allclose(parameters(pipe)[name], value, rtol=1e-5, atol=1e-6)
    pipe.unload_lora()
    assert_same(parameters(pipe), before)


@pytest.mark.slow
def test_a_video_changes_compiles_nothing_and_comes_back(folder: Path, lora: Path):
    pipe = Pipeline.from_pretrained(folder, dtype="float32", keep=True)
    first = pipe("a cat", **SETTINGS)
    compiled = dict(pipe._programs)
    pipe.load_lora(lora)
    other = pipe("a cat", **SETTINGS)
    assert pipe._programs == compiled
    assert other.settings["loras"] == [{"file": "style.safetensors", "scale": 1.0}]
    assert np.abs(other.latents - first.latents).max() > 1e-2  # measured 1.9
    at_load = Pipeline.from_pretrained(folder, dtype="float32", loras=[lora])("a cat", **SETTINGS)
    assert at_load.latents.tobytes() == other.latents.tobytes()
    pipe.unload_lora(lora)
    assert pipe("a cat", **SETTINGS).latents.tobytes() == first.latents.tobytes()
    assert "loras" not in first.settings


def test_a_lora_that_is_refused_leaves_the_transformer_as_it_was(
    folder: Path, lora: Path, tmp_path: Path
):
    pipe = Pipeline.from_pretrained(folder, dtype="float32", keep=True, loras=[lora])
    before = parameters(pipe)
    module = "diffusion_model.blocks.0.self_attn.q"
    bad = low_rank({module: (32, 32)})
    bad[f"{module}.lora_A.weight"][0, 0] = np.nan
    for name, tensors, says in (
        ("nan", bad, "NaN or infinite"),
        ("other", low_rank({"blocks.0.cross_attn.x": (32, 32)}), "this model lacks"),
    ):
        with pytest.raises(WeightsError, match=says):
            pipe.load_lora(write(tmp_path / f"{name}.safetensors", tensors))
        assert [one.path for one in pipe.loras] == [lora]
        assert_same(parameters(pipe), before)
    with pytest.raises(RequestError, match="no LoRA of"):
        pipe.unload_lora(tmp_path / "nan.safetensors")


def test_the_fingerprint_holds_content_and_scale_and_not_the_place(
    folder: Path, lora: Path, tmp_path: Path
):
    def fingerprint(*loras: object) -> str:
        return Pipeline.from_pretrained(folder, loras=loras).fingerprint()

    moved = tmp_path / "renamed.safetensors"
    moved.write_bytes(lora.read_bytes())
    assert fingerprint((lora, 0.5)) == fingerprint((moved, 0.5))
    seen = {fingerprint(), fingerprint(lora), fingerprint((lora, 0.5)), fingerprint(lora, lora)}
    edited = bytearray(lora.read_bytes())
    edited[-1] ^= 1
    moved.write_bytes(edited)
    assert len(seen | {fingerprint(moved)}) == 5


def test_a_lora_that_does_not_fit_is_refused_before_anything_is_encoded(
    folder: Path, tmp_path: Path
):
    wide = write(tmp_path / "x.safetensors", low_rank({"blocks.0.self_attn.q": (64, 64)}))
    pipe = Pipeline.from_pretrained(folder, loras=[wide])
    with pytest.raises(WeightsError, match=r"adapters that do not fit.*\n.*self_attn\.q"):
        pipe("a cat", **SETTINGS)
    for given in (1, ("a.safetensors", "much"), ("a", True), ("a", float("nan"))):
        with pytest.raises((RequestError, WeightsError), match="LoRA"):
            as_loras(["b.safetensors", given])


def test_nothing_of_the_old_weights_stays_in_memory(folder: Path, lora: Path):
    pipe = Pipeline.from_pretrained(folder, dtype="float32", keep=True)
    parameters(pipe)
    count = len(jax.live_arrays())
    pipe.load_lora(lora)
    pipe.unload_lora()
    assert len(jax.live_arrays()) <= count
