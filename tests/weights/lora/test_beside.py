"""LoRAs beside kernels of 8 bits: what they add is not quantised."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.fabricate import Checkpoints
from tests.weights.lora.files import linears, low_rank, random, stored, weights, write

from skyreels_jax.checkpoints import Checkpoint, load_transformer
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.weights.lora import source
from skyreels_jax.weights.lora.binding import Lora
from skyreels_jax.weights.lora.source import with_loras


@pytest.fixture(scope="module")
def folder(checkpoints: Checkpoints) -> Path:
    return checkpoints("t2v", "original")


def of_linears(folder: Path, **how: int) -> dict[str, np.ndarray]:
    shapes = weights(folder)
    modules = {name.removesuffix(".weight"): shapes[name].shape for name in linears(folder)}
    return low_rank(modules, prefix="diffusion_model.", **how)


def loaded(folder: Path, kernels: object = None, loras: tuple[Lora, ...] = ()) -> WanModel:
    checkpoint = Checkpoint.open(folder)
    return load_transformer(checkpoint, dtype=jnp.float32, kernel_dtype=kernels, loras=loras)


def widened(folder: Path, model: WanModel) -> WanModel:
    """A model of plain float32 kernels with the values that the quantised ones stand for."""
    plain = nnx.to_flat_state(nnx.state(model))
    values = {".".join(map(str, path)): variable for path, variable in plain}
    result = []
    for name, variable in values.items():
        if name.endswith(("_scale", "lora_down", "lora_up")):
            continue
        value = np.asarray(variable.get_value(), np.float32)
        if f"{name}_scale" in values:
            value = value * np.asarray(values[f"{name}_scale"].get_value())[..., None, :]
        if (stem := name.removesuffix(".kernel")) + ".lora_down" in values:
            pair = (values[f"{stem}.lora_{side}"].get_value() for side in ("down", "up"))
            value = value + np.matmul(*(np.asarray(side, np.float64) for side in pair))
        path = tuple(int(p) if p.isdigit() else p for p in name.split("."))
        result.append((path, variable.replace(jnp.asarray(value, jnp.float32))))
    graph, _ = nnx.split(stored(folder).abstract(jnp.float32))
    return nnx.merge(graph, nnx.from_flat_state(result))


def output(model: WanModel) -> np.ndarray:
    x = jnp.asarray(random(1, 16, 2, 4, 4))
    text = jnp.asarray(random(1, model.config.text_len, model.config.text_dim))
    return np.asarray(model(x, jnp.full((1, 2), 500.0), text))


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize(
    "kernels", [jnp.int8, pytest.param(jnp.float8_e4m3fn, marks=pytest.mark.slow)]
)
def test_what_stands_beside_is_added_exactly(folder: Path, tmp_path: Path, kernels: object):
    one = Lora(write(tmp_path / "one.safetensors", of_linears(folder, alpha=2)), 0.7)
    first_block = {k: v for k, v in of_linears(folder, rank=7).items() if ".blocks.0." in k}
    two = Lora(write(tmp_path / "two.safetensors", first_block), -0.3)
    model = loaded(folder, kernels, (one, two))
    assert model.blocks.self_attn.q.lora_down[...].shape[-1] == 4 + 7
    assert model.blocks.self_attn.q.kernel[...].dtype == kernels
    found = output(model)
    assert difference(found, output(widened(folder, model))) < 1e-5  # measured 3e-7
    # The kernels themselves are those without a LoRA, and what is beside them is the whole change.
    bare = loaded(folder, kernels)
    np.testing.assert_array_equal(model.blocks.ffn.fc1.kernel[...], bare.blocks.ffn.fc1.kernel[...])
    pair = (np.asarray(side[...], np.float64) for side in of_fc1(model))
    merged = with_loras(stored(folder), [one, two]).source
    for layer, change in enumerate(np.matmul(*pair)):
        name = f"blocks.{layer}.ffn.0.weight"
        expected = (merged.read(name).astype(np.float64) - weights(folder)[name]).T
        assert np.abs(change - expected).max() < 1e-5 * np.abs(expected).max()  # measured 2e-7
    assert difference(output(bare), found) > 0.05


def of_fc1(model: WanModel) -> tuple[nnx.Param, nnx.Param]:
    linear = model.blocks.ffn.fc1
    assert linear.lora_down is not None and linear.lora_up is not None
    return linear.lora_down, linear.lora_up


@pytest.mark.slow
def test_a_faint_lora_is_not_lost_to_eight_bits(folder: Path, tmp_path: Path):
    file = write(tmp_path / "x.safetensors", of_linears(folder))
    faint, exact = Lora(file, 1e-3), loaded(folder, None, (Lora(file, 1e-3),))
    base, eight = output(loaded(folder)), output(loaded(folder, jnp.int8))
    change = output(exact) - base
    beside = output(loaded(folder, jnp.int8, (faint,))) - eight
    assert difference(beside, change) < 0.05  # measured 0.0075: the base's own rounding
    merged = with_loras(stored(folder), [faint]).load(jnp.float32, kernel_dtype=jnp.int8)
    # The negative twin: added before the kernels are quantised.
    assert difference(output(merged) - eight, change) > 0.5  # measured 1.28


def test_what_is_no_product_is_added_before_and_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    source._warn_once.cache_clear()
    module = "diffusion_model.blocks.0.self_attn.q"
    tensors = low_rank({module: (32, 32)}) | {f"{module}.dora_scale": random(32, 1) + 2}
    lora = Lora(write(tmp_path / "x.safetensors", tensors))
    model, bare = loaded(folder, jnp.int8, (lora,)), loaded(folder, jnp.int8)
    assert model.blocks.self_attn.q.lora_down is None
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "LoRA x.safetensors: 1 DoRA cannot stand beside 8-bit weights and are added before these "
        "are quantised"
    ]
    assert np.any(model.blocks.self_attn.q.kernel[...] != bare.blocks.self_attn.q.kernel[...])
