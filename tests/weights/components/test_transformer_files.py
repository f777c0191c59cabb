import dataclasses
import json

import diffusers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.weights.tiny import CONFIGS, DF, FLF2V, I2V, T2V, edit_json, random_state, save

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.components.transformer import TRANSFORMER, stored_transformer
from skyreels_jax.weights.folder_files import safetensors_of
from skyreels_jax.weights.layout import read_layout
from skyreels_jax.weights.plan import FORMATS, natural


def tensors(folder):
    source = safetensors_of(folder)
    return {name: source.read(name) for name in source.tensors()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def through_jax(source, target, *, format, dtype):
    stored = stored_transformer(read_layout(source))
    TRANSFORMER.save(target, stored.load_state(dtype), stored.config, format=format)
    return target


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("kind", ["df", "flf2v"])
def test_from_a_layout_through_jax_to_both_and_back_is_bit_exact(tmp_path, kind, first, dtype):
    """A -> JAX -> A, and A -> JAX -> B -> JAX -> A; df and flf2v hold every parameter there is."""
    second = "diffusers" if first == "original" else "original"
    a = save(tmp_path / "a", CONFIGS[kind], first, dtype=dtype, max_shard_bytes=20_000)
    same = through_jax(a, tmp_path / "same", format=first, dtype=dtype)
    b = through_jax(a, tmp_path / "b", format=second, dtype=dtype)
    back = through_jax(b, tmp_path / "back", format=first, dtype=dtype)
    assert_same_bits(tensors(a), tensors(same))
    assert_same_bits(tensors(a), tensors(back))
    assert tensors(b).keys() != tensors(a).keys()
    for other in (same, back):
        assert (other / "config.json").read_text() == (a / "config.json").read_text()


@pytest.mark.parametrize("kind", CONFIGS)
def test_translating_files_equals_going_through_jax(tmp_path, kind):
    a = save(tmp_path / "a", CONFIGS[kind])
    b = through_jax(a, tmp_path / "b", format="diffusers", dtype=np.float32)
    stored_transformer(read_layout(a)).write(tmp_path / "c", "diffusers")
    assert_same_bits(tensors(b), tensors(tmp_path / "c"))
    assert (b / "config.json").read_text() == (tmp_path / "c" / "config.json").read_text()


def test_translating_rounds_when_asked(tmp_path):
    a = save(tmp_path / "a", T2V)
    stored_transformer(read_layout(a)).write(tmp_path / "b", "original", dtype=jnp.bfloat16)
    expected = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors(a).items()}
    assert_same_bits(tensors(tmp_path / "b"), expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_diffusers_loads_what_is_written_and_nothing_is_missing_or_left(tmp_path, kind):
    config = CONFIGS[kind]
    folder = save(tmp_path / "m", config, "diffusers", max_shard_bytes=30_000)
    model, report = diffusers.SkyReelsV2Transformer3DModel.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    written = tensors(folder)
    state = model.state_dict()
    assert state.keys() == written.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(value.numpy(), written[name], name)
    assert model.config.pos_embed_seq_len == config.pos_embed_seq_len
    assert model.config.inject_sample_info == config.inject_sample_info


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_diffusers_writes_is_read(tmp_path, kind):
    folder = save(tmp_path / "m", CONFIGS[kind], "diffusers")
    model = diffusers.SkyReelsV2Transformer3DModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    stored = stored_transformer(read_layout(tmp_path / "again"))
    assert stored.config == CONFIGS[kind]
    stored.verify()
    assert_same_bits(tensors(folder), tensors(tmp_path / "again"))


def test_the_norm_that_diffusers_ignores_is_ignored(tmp_path):
    folder = save(tmp_path / "m", I2V, "diffusers")
    file = folder / "diffusion_pytorch_model.safetensors"
    from safetensors.numpy import save_file

    extra = {f"blocks.{i}.attn2.norm_added_q.weight": np.ones(24, np.float32) for i in range(3)}
    save_file(load_file(file) | extra, file)
    stored_transformer(read_layout(folder)).verify()
    save_file(load_file(file) | {"blocks.0.attn2.norm_added_x.weight": np.ones(1)}, file)
    with pytest.raises(WeightsError, match="norm_added_x"):
        stored_transformer(read_layout(folder)).verify()


@pytest.mark.parametrize(
    "removed",
    [
        ["model_type", "inject_sample_info"],
        ["dim", "ffn_dim", "num_layers", "in_dim", "out_dim", "freq_dim"],
        ["eps", "text_len"],
    ],
)
@pytest.mark.parametrize("config", [DF, FLF2V], ids=["df", "flf2v"])
def test_what_the_original_config_leaves_out_is_derived(tmp_path, config, removed):
    folder = save(tmp_path / "m", config)
    edit_json(folder / "config.json", **dict.fromkeys(removed))
    assert stored_transformer(read_layout(folder)).config == config


@pytest.mark.parametrize(
    "removed",
    [
        ["in_channels", "out_channels", "image_dim", "pos_embed_seq_len", "inject_sample_info"],
        ["ffn_dim", "num_layers", "freq_dim", "text_dim", "patch_size", "_class_name"],
    ],
)
@pytest.mark.parametrize("config", [DF, FLF2V], ids=["df", "flf2v"])
def test_what_the_diffusers_config_leaves_out_is_derived(tmp_path, config, removed):
    folder = save(tmp_path / "m", config, "diffusers")
    edit_json(folder / "config.json", **dict.fromkeys(removed))
    assert stored_transformer(read_layout(folder)).config == config


def test_heads_are_128_wide_unless_the_config_says_otherwise(tmp_path):
    config = dataclasses.replace(T2V, dim=256, num_layers=1)
    folder = save(tmp_path / "m", config)
    edit_json(folder / "config.json", num_heads=None)
    assert stored_transformer(read_layout(folder)).config.num_heads == 2


def test_the_configs_have_the_keys_of_their_own_writers(tmp_path):
    original = json.loads((save(tmp_path / "a", I2V) / "config.json").read_text())
    assert original.keys() == {
        *("_class_name", "dim", "eps", "ffn_dim", "freq_dim", "in_dim", "inject_sample_info"),
        *("model_type", "num_heads", "num_layers", "out_dim", "text_len"),
    }
    theirs = json.loads((save(tmp_path / "b", I2V, "diffusers") / "config.json").read_text())
    model = diffusers.SkyReelsV2Transformer3DModel(num_layers=1, ffn_dim=8)
    assert set(theirs) <= {*model.config, "_class_name"}


def test_any_sharding_is_read_with_and_without_its_index(tmp_path):
    folder = save(tmp_path / "m", DF, max_shard_bytes=20_000)
    shards = sorted((p.name for p in folder.glob("*.safetensors")), key=natural)
    assert len(shards) > 3
    with_index = tensors(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert_same_bits(with_index, tensors(folder))
    for k, name in enumerate(shards):
        (folder / name).rename(folder / f"part{k}.safetensors")
    assert_same_bits(with_index, tensors(folder))


def test_a_loaded_state_does_not_depend_on_the_file(tmp_path):
    folder = save(tmp_path / "m", T2V)
    state = stored_transformer(read_layout(folder)).load_state(np.float32)
    file = folder / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    expected = jax.tree.leaves(random_state(T2V))
    for value, original in zip(jax.tree.leaves(state), expected, strict=True):
        np.testing.assert_array_equal(value, original)
