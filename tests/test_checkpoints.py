import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.weights.tiny import CONFIGS, DF, I2V, T2V, edit_json, random_state, save

from skyreels_jax import hub
from skyreels_jax.checkpoints import Checkpoint, guess_preset, load_transformer
from skyreels_jax.errors import RequestError, WeightsError
from skyreels_jax.models.transformer_config import DF_14B, I2V_14B, T2V_1_3B, T2V_14B
from skyreels_jax.presets import PRESETS
from skyreels_jax.weights.engine import parameters
from skyreels_jax.weights.layout import Layout


def layout(tmp_path, name="model", *, model_index=None, config=None) -> Layout:
    folder = tmp_path / name
    folder.mkdir()
    return Layout(folder, "diffusers", folder, config or {}, model_index=model_index or {})


def test_the_table_has_the_eight_releases_and_the_first_last_frame_recipes():
    released = {n: p for n, p in PRESETS.items() if n.startswith("SkyReels-V2")}
    assert len(released) == 11
    others = set(PRESETS) - set(released)
    assert {name for name in others if not name.startswith("Wan2.1-")} == {"mini", "mini-i2v"}
    assert sum(p.repo is not None for p in released.values()) == 8
    assert {(p.task, p.config.dim, p.resolution[0]) for p in released.values() if p.repo} == {
        *(("t2v", 5120, 544), ("t2v", 5120, 720), ("df", 1536, 544), ("df", 5120, 544)),
        *(("df", 5120, 720), ("i2v", 1536, 544), ("i2v", 5120, 544), ("i2v", 5120, 720)),
    }
    for name, preset in released.items():
        assert preset.repo in (None, f"Skywork/{name}")
        assert (preset.num_frames - 1) % 4 == 0
        assert all(side % 16 == 0 for side in preset.resolution)
        assert (preset.config.model_type == "i2v") == (preset.task in ("i2v", "flf2v"))


@pytest.mark.parametrize("name", ["SkyReels-V2-DF-1.3B-540P", "SkyReels-V2-I2V-1.3B-540P"])
def test_an_unambiguous_configuration_decides_whatever_the_folder_is_called(tmp_path, name):
    config = PRESETS[name].config
    guess = guess_preset(layout(tmp_path, "SkyReels-V2-T2V-14B-720P"), config)
    assert guess.preset is PRESETS[name]
    assert guess.reason == "its configuration"


def test_an_unreleased_configuration_has_no_preset(tmp_path):
    guess = guess_preset(layout(tmp_path, "SkyReels-V2-T2V-14B-720P"), T2V_1_3B)
    assert guess.preset is None
    assert "width 1536" in guess.reason


@pytest.mark.parametrize(
    ("kwargs", "repo", "expected", "reason"),
    [
        ({}, "Skywork/SkyReels-V2-DF-14B-720P", "SkyReels-V2-DF-14B-720P", "Hugging Face id"),
        (
            {"model_index": {"_name_or_path": "Skywork/SkyReels-V2-T2V-14B-720P-Diffusers"}},
            None,
            "SkyReels-V2-T2V-14B-720P",
            "model_index",
        ),
        (
            {"config": {"_name_or_path": "skywork/skyreels-v2-df-14b-540p"}},
            None,
            "SkyReels-V2-DF-14B-540P",
            "config.json",
        ),
        ({"name": "SkyReels-V2-DF-14B-720P"}, None, "SkyReels-V2-DF-14B-720P", "folder's name"),
        (
            {"model_index": {"_class_name": "SkyReelsV2DiffusionForcingPipeline"}},
            None,
            "SkyReels-V2-DF-14B-540P",
            "assumed",
        ),
        ({"name": "my-720P-DF-finetune"}, None, "SkyReels-V2-T2V-14B-540P", "assumed"),
        ({"name": "SkyReels-V2-I2V-14B-720P"}, None, "SkyReels-V2-T2V-14B-540P", "assumed"),
    ],
)
def test_where_several_share_a_configuration_only_exact_names_decide(
    tmp_path, kwargs, repo, expected, reason
):
    guess = guess_preset(layout(tmp_path, **kwargs), DF_14B, repo=repo)
    assert guess.preset is PRESETS[expected]
    assert reason in guess.reason


def test_the_hugging_face_id_goes_before_the_folder_it_is_cached_in(tmp_path):
    found = layout(tmp_path, "SkyReels-V2-I2V-14B-540P")
    guess = guess_preset(found, I2V_14B, repo="Skywork/SkyReels-V2-I2V-14B-720P")
    assert guess.preset is PRESETS["SkyReels-V2-I2V-14B-720P"]


def test_a_given_preset_overrides_and_must_fit(tmp_path):
    found = layout(tmp_path, "SkyReels-V2-T2V-14B-540P")
    guess = guess_preset(found, T2V_14B, preset="SkyReels-V2-DF-14B-720P")
    assert (guess.preset, guess.reason) == (PRESETS["SkyReels-V2-DF-14B-720P"], "given")
    with pytest.raises(RequestError, match="is another model"):
        guess_preset(found, T2V_14B, preset="SkyReels-V2-DF-1.3B-540P")
    with pytest.raises(RequestError, match="unknown; there are SkyReels-V2-T2V-14B-540P"):
        guess_preset(found, T2V_14B, preset="SkyReels-V2-5B")


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_transformers_own_folder_opens_and_loads(tmp_path, kind, layout):
    config = CONFIGS[kind]
    checkpoint = Checkpoint.open(save(tmp_path / "m", config, layout))
    assert checkpoint.config == config
    assert checkpoint.task == kind
    assert checkpoint.layout.format == layout
    model = load_transformer(checkpoint, dtype=jnp.float32)
    expected = parameters(random_state(config))
    loaded = parameters(model)
    assert loaded.keys() == expected.keys()
    for path, value in loaded.items():
        np.testing.assert_array_equal(value.get_value(), expected[path].get_value(), path)


def test_storage_and_computing_dtypes_are_separate(tmp_path):
    checkpoint = Checkpoint.open(save(tmp_path / "m", T2V))
    model = load_transformer(checkpoint, dtype=jnp.float32, param_dtype=jnp.bfloat16)
    assert {p.get_value().dtype for p in parameters(model).values()} == {jnp.dtype(jnp.bfloat16)}
    assert model.numerics.compute == jnp.float32


def test_a_loaded_model_computes(tmp_path):
    checkpoint = Checkpoint.open(save(tmp_path / "m", dataclasses.replace(T2V, num_layers=1)))
    model = load_transformer(checkpoint, dtype=jnp.float32)
    run = nnx.jit(lambda model, x, t, c: model(x, t, c))
    out = run(model, jnp.ones((1, 16, 1, 4, 4)), jnp.array([5]), jnp.ones((1, 512, 20)))
    assert out.shape == (1, 16, 1, 4, 4)


def test_defaults_say_where_they_come_from(tmp_path):
    defaults = Checkpoint.open(save(tmp_path / "a", I2V)).defaults
    assert (defaults.shift.value, defaults.guidance_scale.value) == (5.0, 5.0)
    assert defaults.resolution.value == (544, 960)
    assert defaults.shift.source == "SkyReels-V2 i2v models"
    defaults = Checkpoint.open(save(tmp_path / "b", DF)).defaults
    assert (defaults.shift.value, defaults.guidance_scale.value) == (8.0, 6.0)


def diffusers_folder(tmp_path, *, flow_shift=None, pipeline="SkyReelsV2Pipeline"):
    save(tmp_path / "transformer", T2V, "diffusers")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    (tmp_path / "scheduler").mkdir()
    config = {} if flow_shift is None else {"flow_shift": flow_shift}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("stored", "value", "source"),
    [
        (None, 8.0, "SkyReels-V2 t2v models"),
        (1.0, 8.0, "SkyReels-V2 t2v models"),
        (3, 3.0, "scheduler/scheduler_config.json"),
    ],
)
def test_a_stored_shift_counts_unless_it_is_the_converters_leftover(
    tmp_path, stored, value, source
):
    shift = Checkpoint.open(diffusers_folder(tmp_path, flow_shift=stored)).defaults.shift
    assert (shift.value, shift.source) == (value, source)


def test_an_illegal_stored_shift_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"scheduler_config\.json: flow_shift = 'high'"):
        Checkpoint.open(diffusers_folder(tmp_path, flow_shift="high"))


def test_the_pipelines_class_tells_diffusion_forcing(tmp_path):
    folder = diffusers_folder(tmp_path, pipeline="SkyReelsV2DiffusionForcingPipeline")
    assert Checkpoint.open(folder).task == "df"


def test_block_causal_attention_is_read_from_the_config(tmp_path):
    folder = save(tmp_path / "m", T2V, "diffusers")
    assert Checkpoint.open(folder).block_length is None
    edit_json(folder / "config.json", num_frame_per_block=5)
    assert Checkpoint.open(folder).block_length == 5
    edit_json(folder / "config.json", num_frame_per_block=-5)
    with pytest.raises(WeightsError, match="num_frame_per_block = -5"):
        Checkpoint.open(folder).block_length  # noqa: B018


def test_parts_are_paths_or_errors_that_name_the_path(tmp_path):
    folder = save(tmp_path / "m", I2V)
    (folder / "Wan2.1_VAE.pth").write_bytes(b"x")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.folder == folder
    assert checkpoint.vae == folder / "Wan2.1_VAE.pth"
    with pytest.raises(WeightsError, match=r"models_t5_umt5-xxl-enc-bf16\.pth is missing"):
        checkpoint.text_encoder  # noqa: B018
    with pytest.raises(WeightsError, match=r"google/umt5-xxl is missing"):
        checkpoint.tokenizer  # noqa: B018
    with pytest.raises(WeightsError, match="has no scheduler"):
        checkpoint.layout.component("scheduler")


def test_an_id_is_remembered(tmp_path, monkeypatch):
    folder = save(tmp_path / "snapshots" / "0123abc", T2V)
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    checkpoint = Checkpoint.open("someone/tiny-model", revision="0123abc")
    assert (checkpoint.repo, checkpoint.folder) == ("someone/tiny-model", folder)
