"""The tables of UMT5 and CLIP: names, shapes, round trips, configurations from either layout."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flax import nnx
from tests.models.encoder_oracles import (
    CLIP,
    UMT5,
    clip_oracle,
    tensors_of,
    umt5_oracle,
)
from tests.weights.fakes import InMemory
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5EncoderModel

from skyreels_jax.errors import UnsupportedError, WeightsError
from skyreels_jax.models.clip_vision import CLIP_VIT_H, ClipVision, ClipVisionConfig
from skyreels_jax.models.umt5 import UMT5_XXL, Umt5Encoder
from skyreels_jax.weights.components import clip as clip_files
from skyreels_jax.weights.components import umt5 as umt5_files
from skyreels_jax.weights.engine import export, load_into, parameters, rename
from skyreels_jax.weights.plan import FORMATS, Source

# One tower with heads of 80, which is what a file without configuration is taken to have.
HEADS_OF_80 = replace(CLIP, dim=160, num_heads=2)


def abstract_umt5(config=UMT5):
    return nnx.eval_shape(lambda: Umt5Encoder(config, rngs=nnx.Rngs(0)))


def abstract_clip(config=CLIP):
    return nnx.eval_shape(lambda: ClipVision(config, rngs=nnx.Rngs(0)))


def original_umt5(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Wan's file from transformers' tensors, written out by hand."""
    made = {
        "token_embedding.weight": tensors["shared.weight"],
        "norm.weight": tensors["encoder.final_layer_norm.weight"],
    }
    for i in range(UMT5.num_layers):
        theirs = f"encoder.block.{i}.layer."
        pairs = {
            "norm1": "0.layer_norm",
            "attn.q": "0.SelfAttention.q",
            "attn.k": "0.SelfAttention.k",
            "attn.v": "0.SelfAttention.v",
            "attn.o": "0.SelfAttention.o",
            "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias",
            "norm2": "1.layer_norm",
            "ffn.gate.0": "1.DenseReluDense.wi_0",
            "ffn.fc1": "1.DenseReluDense.wi_1",
            "ffn.fc2": "1.DenseReluDense.wo",
        }
        for ours, name in pairs.items():
            made[f"blocks.{i}.{ours}.weight"] = tensors[f"{theirs}{name}.weight"]
    return made


def original_clip(tensors: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """The ``visual.`` part of Wan's file from transformers' tensors, written out by hand."""
    theirs = {k.removeprefix("vision_model."): v for k, v in tensors.items()}
    made = {
        "cls_embedding": theirs["embeddings.class_embedding"][None, None],
        "pos_embedding": theirs["embeddings.position_embedding.weight"][None],
        "patch_embedding.weight": theirs["embeddings.patch_embedding.weight"],
        "head": theirs["visual_projection.weight"].T,
    }
    for kind in ("weight", "bias"):
        made[f"pre_norm.{kind}"] = theirs[f"pre_layrnorm.{kind}"]
        made[f"post_norm.{kind}"] = theirs[f"post_layernorm.{kind}"]
        for i in range(layers):
            layer = f"encoder.layers.{i}."
            qkv = [theirs[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            made[f"transformer.{i}.attn.to_qkv.{kind}"] = np.concatenate(qkv)
            pairs = {
                "norm1": "layer_norm1",
                "attn.proj": "self_attn.out_proj",
                "norm2": "layer_norm2",
                "mlp.0": "mlp.fc1",
                "mlp.2": "mlp.fc2",
            }
            for ours, name in pairs.items():
                made[f"transformer.{i}.{ours}.{kind}"] = theirs[f"{layer}{name}.{kind}"]
    return {f"visual.{name}": value for name, value in made.items()}


def umt5_case():
    tensors = tensors_of(umt5_oracle(UMT5))
    del tensors["encoder.embed_tokens.weight"]
    return (
        abstract_umt5(),
        umt5_files.UMT5.rules(UMT5),
        umt5_files.UMT5.ignored,
        original_umt5(tensors),
        tensors,
    )


def clip_case(config=CLIP):
    tensors = tensors_of(clip_oracle(config))
    rules = clip_files.clip_rules(config)
    original = original_clip(tensors, config.num_layers)
    return abstract_clip(config), rules, clip_files.CLIP.ignored, original, tensors


CASES = {"umt5": umt5_case, "clip": clip_case}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest):
    return CASES[request.param]()


def load(model, rules, ignored, tensors, format):
    return load_into(model, rules, InMemory(tensors), format, dtype=np.float32, ignored=ignored)


def values(state) -> dict[str, np.ndarray]:
    return {path: np.asarray(v.get_value()) for path, v in parameters(state).items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes() for name in a
    )


def test_both_layouts_give_the_same_parameters(case):
    model, rules, ignored, original, diffusers = case
    ours = values(load(model, rules, ignored, original, "original"))
    assert same(ours, values(load(model, rules, ignored, diffusers, "diffusers")))


def test_round_trips_are_bit_exact(case):
    model, rules, ignored, original, diffusers = case
    state = load(model, rules, ignored, original, "original")
    assert same(dict(export(state, rules, "original")), original)
    there = dict(export(state, rules, "diffusers"))
    assert same(there, diffusers)
    back = load(model, rules, ignored, there, "diffusers")
    assert same(dict(export(back, rules, "original")), original)


def test_renaming_gives_the_other_layout(case):
    _, rules, ignored, original, diffusers = case
    renamed = rename(rules, InMemory(original), "original", "diffusers", ignored=ignored)
    assert same(dict(renamed), diffusers)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_missing_or_foreign_tensor_is_named(name: str, format: str):
    model, rules, ignored, original, diffusers = CASES[name]()
    tensors = original if format == "original" else diffusers
    for gone in tensors:
        rest = {k: v for k, v in tensors.items() if k != gone}
        with pytest.raises(WeightsError, match=gone):
            load(model, rules, ignored, rest, format)
    foreign = next(iter(tensors)) + "_ema"
    with pytest.raises(WeightsError, match=foreign):
        load(model, rules, ignored, tensors | {foreign: np.zeros(1, np.float32)}, format)


def test_swapped_parts_of_a_fused_tensor_are_caught():
    """Queries and keys have the same shape: only the values can tell."""
    model, rules, ignored, original, diffusers = clip_case()

    def swapped(rule):
        cut = rule.original.slice
        if cut[1] == 1 or cut[0] == 2:
            return rule
        other = Source(rule.original.name, rule.original.transform, (1 - cut[0], 3))
        return replace(rule, original=other)

    wrong = load(model, [swapped(rule) for rule in rules], ignored, original, "original")
    assert not same(values(wrong), values(load(model, rules, ignored, diffusers, "diffusers")))


def test_what_video_never_uses_is_ignored_by_name():
    model, rules, ignored, original, diffusers = clip_case()
    extra = {
        "log_scale": np.zeros((), np.float32),
        "textual.blocks.0.attn.q.weight": np.zeros((2, 2), np.float32),
        "textual.head.0.weight": np.zeros((2, 2), np.float32),
    }
    load(model, rules, ignored, original | extra, "original")
    indices = {"vision_model.embeddings.position_ids": np.arange(17)[None]}
    load(model, rules, ignored, diffusers | indices, "diffusers")
    with pytest.raises(WeightsError, match="log_scale_2"):
        load(model, rules, ignored, original | {"log_scale_2": extra["log_scale"]}, "original")


def test_the_second_name_of_the_embedding_is_ignored():
    model, rules, ignored, _, tensors = umt5_case()
    tied = tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]}
    assert "encoder.embed_tokens.weight" in tensors_of(umt5_oracle(UMT5))
    load(model, rules, ignored, tied, "diffusers")


def test_the_released_files_have_their_published_tensors():
    umt5 = export(abstract_umt5(UMT5_XXL), umt5_files.UMT5.rules(UMT5), "original").specs
    assert (len(umt5), sum(s.size for s in umt5.values())) == (242, 5_680_910_336)
    assert umt5["blocks.23.ffn.gate.0.weight"].shape == (10_240, 4096)
    clip = export(abstract_clip(CLIP_VIT_H), clip_files.clip_rules(CLIP_VIT_H), "original").specs
    assert (len(clip), sum(s.size for s in clip.values())) == (392, 632_076_800)
    assert clip["visual.transformer.31.attn.to_qkv.weight"].shape == (3840, 1280)
    assert clip["visual.head"].shape == (1280, 1024)
    for specs, from_tensors, config in (
        (umt5, umt5_files.umt5_config_from_tensors, UMT5_XXL),
        (clip, clip_files.clip_config_from_tensors, CLIP_VIT_H),
    ):
        assert from_tensors({n: s.shape for n, s in specs.items()}, "original") == config


@pytest.mark.parametrize("format", FORMATS)
def test_configurations_from_shapes(format: str):
    for specs, from_tensors, config in (
        (
            export(abstract_umt5(), umt5_files.UMT5.rules(UMT5), format).specs,
            umt5_files.umt5_config_from_tensors,
            UMT5,
        ),
        (
            export(abstract_clip(HEADS_OF_80), clip_files.clip_rules(HEADS_OF_80), format).specs,
            clip_files.clip_config_from_tensors,
            HEADS_OF_80,
        ),
    ):
        shapes = {name: spec.shape for name, spec in specs.items()}
        assert from_tensors(shapes, format) == config
        with pytest.raises(WeightsError, match="not a"):
            from_tensors(dict(list(shapes.items())[10:]), format)


def test_configurations_from_json():
    assert umt5_files.umt5_config_from_json(umt5_oracle(UMT5).config.to_dict()) == UMT5
    assert clip_files.clip_config_from_json(clip_oracle(CLIP).config.to_dict()) == CLIP


def test_json_of_other_models_is_refused():
    umt5, clip = umt5_oracle(UMT5).config.to_dict(), clip_oracle(CLIP).config.to_dict()
    with pytest.raises(UnsupportedError, match="relu"):
        umt5_files.umt5_config_from_json(umt5 | {"feed_forward_proj": "relu"})
    with pytest.raises(UnsupportedError, match="64"):
        umt5_files.umt5_config_from_json(umt5 | {"relative_attention_num_buckets": 64})
    with pytest.raises(UnsupportedError, match="quick_gelu"):
        clip_files.clip_config_from_json(clip | {"hidden_act": "quick_gelu"})
    for from_json, config in (
        (umt5_files.umt5_config_from_json, umt5),
        (clip_files.clip_config_from_json, clip),
    ):
        with pytest.raises(WeightsError, match="num_.*layers"):
            from_json({k: v for k, v in config.items() if "layers" not in k})
        key = next(k for k in config if k.startswith("num_") and "layers" in k)
        for illegal in (None, "many", 0, [1]):
            with pytest.raises(WeightsError, match="unsound"):
                from_json(config | {key: illegal})


def test_shapes_of_other_models_are_refused():
    specs = export(abstract_umt5(), umt5_files.UMT5.rules(UMT5), "original").specs
    shapes = {name: spec.shape for name, spec in specs.items()}
    bias = "blocks.0.pos_embedding.embedding.weight"
    with pytest.raises(WeightsError, match="64 x 3"):
        umt5_files.umt5_config_from_tensors(shapes | {bias: (64, 3)}, "original")
    specs = export(abstract_clip(), clip_files.clip_rules(CLIP), "original").specs
    with pytest.raises(WeightsError, match="width 32"):
        clip_files.clip_config_from_tensors({n: s.shape for n, s in specs.items()}, "original")
    specs = export(abstract_clip(HEADS_OF_80), clip_files.clip_rules(HEADS_OF_80), "original").specs
    one_block = {n: s.shape for n, s in specs.items() if ".1." not in n and ".2." not in n}
    with pytest.raises(WeightsError, match="num_layers=1"):
        clip_files.clip_config_from_tensors(one_block, "original")


def test_a_tower_saved_without_prefix_or_projection_loads(tmp_path):
    """transformers 5 writes a plain CLIPVisionModel so."""
    config: ClipVisionConfig = replace(HEADS_OF_80, projection_dim=None)
    theirs = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act="gelu",
        )
    )
    theirs.save_pretrained(tmp_path)
    json = theirs.config.to_dict() | {"architectures": ["CLIPVisionModel"]}
    tensors = tensors_of(theirs)
    assert clip_files.clip_prefix(tensors) == ""
    assert clip_files.clip_config_from_json(json) == config
    shapes = {name: value.shape for name, value in tensors.items()}
    assert clip_files.clip_config_from_tensors(shapes, "diffusers") == config
    rules = clip_files.clip_rules(config, prefix="")
    state = load(abstract_clip(config), rules, clip_files.CLIP.ignored, tensors, "diffusers")
    assert same(dict(export(state, rules, "diffusers")), tensors)


def test_what_is_exported_loads_in_transformers():
    model, rules, ignored, original, _ = umt5_case()
    state = load(model, rules, ignored, original, "original")
    reloaded = UMT5EncoderModel(umt5_oracle(UMT5).config)
    made = {n: torch.from_numpy(v.copy()) for n, v in export(state, rules, "diffusers")}
    missing = reloaded.load_state_dict(made, strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys == ["encoder.embed_tokens.weight"]
