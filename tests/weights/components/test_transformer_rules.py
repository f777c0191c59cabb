import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.weights.tiny import CONFIGS, I2V

from skyreels_jax.models import transformer_config as presets
from skyreels_jax.weights.components.transformer import TRANSFORMER, transformer_rules
from skyreels_jax.weights.engine import export, parameters
from skyreels_jax.weights.plan import FORMATS


# The original's names of one block and of the rest, as in its state_dict.
def both(*names: str) -> list[str]:
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


BLOCK = [
    "modulation",
    *both("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"),
    *("self_attn.norm_q.weight", "self_attn.norm_k.weight"),
    *both("norm3"),
    *both("cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o"),
    *("cross_attn.norm_q.weight", "cross_attn.norm_k.weight"),
    *both("ffn.0", "ffn.2"),
]
BLOCK_I2V = [*both("cross_attn.k_img", "cross_attn.v_img"), "cross_attn.norm_k_img.weight"]
GLOBAL = [
    *both("patch_embedding", "text_embedding.0", "text_embedding.2"),
    *both("time_embedding.0", "time_embedding.2", "time_projection.1"),
    *("head.modulation", "head.head.weight", "head.head.bias"),
]
FPS = ["fps_embedding.weight", *both("fps_projection.0", "fps_projection.2")]
IMAGE = both("img_emb.proj.0", "img_emb.proj.1", "img_emb.proj.3", "img_emb.proj.4")


def original_names(config) -> set[str]:
    image = config.image_dim is not None
    block = BLOCK + (BLOCK_I2V if image else [])
    return {
        *GLOBAL,
        *(FPS if config.inject_sample_info else []),
        *(IMAGE if image else []),
        *(["img_emb.emb_pos"] if config.pos_embed_seq_len else []),
        *(f"blocks.{i}.{name}" for i in range(config.num_layers) for name in block),
    }


def of_diffusers(config):
    return diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        image_dim=config.image_dim,
        added_kv_proj_dim=config.dim if config.image_dim else None,
        inject_sample_info=config.inject_sample_info,
        pos_embed_seq_len=config.pos_embed_seq_len,
    )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_original_side_has_the_originals_names(config):
    specs = export(TRANSFORMER.abstract(config), transformer_rules(config), "original").specs
    assert set(specs) == original_names(config)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_diffusers_side_has_the_names_and_shapes_of_diffusers(config):
    specs = export(TRANSFORMER.abstract(config), transformer_rules(config), "diffusers").specs
    state = of_diffusers(config).state_dict()
    assert {n: s.shape for n, s in specs.items()} == {n: tuple(t.shape) for n, t in state.items()}


@pytest.mark.parametrize(
    ("config", "tensors", "count"),
    [
        (presets.DF_1_3B, 830, 1_435_525_696),
        (presets.T2V_14B, 1095, 14_288_491_584),
        (presets.I2V_1_3B, 983, 1_564_428_608),
        (presets.I2V_14B, 1303, 16_394_878_784),
    ],
)
def test_released_sizes_have_the_published_tensors_and_parameters(config, tensors, count):
    model = TRANSFORMER.abstract(config)
    for format in FORMATS:
        specs = export(model, transformer_rules(config), format).specs
        assert len(specs) == tensors
        assert sum(spec.size for spec in specs.values()) == count


def test_shapes_are_the_callers_own_however_often_they_are_asked_for():
    first, second = (TRANSFORMER.abstract(I2V) for _ in range(2))
    before = jax.tree.leaves(nnx.state(second))
    nnx.update(first, jax.tree.map(lambda leaf: np.zeros(leaf.shape), nnx.state(first)))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(nnx.state(first)))
    for model in (second, TRANSFORMER.abstract(I2V)):
        assert jax.tree.leaves(nnx.state(model)) == before
    half = jax.tree.leaves(nnx.state(TRANSFORMER.abstract(I2V, jnp.bfloat16)))
    assert half != before and len(half) == len(before)


def test_linear_weights_are_out_by_in_and_the_patch_convolution_is_out_in_time_height_width():
    specs = export(TRANSFORMER.abstract(I2V), transformer_rules(I2V), "original").specs
    assert specs["blocks.2.ffn.0.weight"].shape == (40, 24)
    assert specs["patch_embedding.weight"].shape == (24, 36, 1, 2, 2)
    assert specs["blocks.0.modulation"].shape == (1, 6, 24)


def test_the_rules_are_those_of_the_model_and_no_others():
    for config in CONFIGS.values():
        targets = [rule.target for rule in transformer_rules(config)]
        assert sorted(targets) == sorted(parameters(TRANSFORMER.abstract(config)))


def test_only_the_unused_query_norm_is_ignored():
    (pattern,) = TRANSFORMER.ignored
    assert re.fullmatch(pattern, "blocks.11.attn2.norm_added_q.weight")
    for name in ("blocks.1.attn2.norm_added_k.weight", "xblocks.1.attn2.norm_added_q.weight"):
        assert not re.fullmatch(pattern, name)
