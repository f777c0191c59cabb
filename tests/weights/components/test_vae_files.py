"""The VAE's weight table against diffusers' names and against the published list of shapes."""

import diffusers
import numpy as np
import pytest
import torch
from tests.weights.fakes import InMemory

from skyreels_jax.errors import UnsupportedError, WeightsError
from skyreels_jax.models.vae_layers import LATENTS_MEAN, LATENTS_STD, WAN_VAE, VaeConfig
from skyreels_jax.weights.components.vae import (
    vae_config_from_json,
    vae_config_from_tensors,
    vae_rules,
)
from skyreels_jax.weights.engine import rename
from skyreels_jax.weights.plan import FORMATS

CONFIGS = {
    "released": WAN_VAE,
    "tiny": VaeConfig(base_dim=3, z_dim=16, dim_mult=(1, 1, 1, 1), num_res_blocks=1),
    "three blocks": VaeConfig(base_dim=4, z_dim=16, dim_mult=(1, 2, 2, 3), num_res_blocks=3),
    "early": VaeConfig(
        base_dim=4,
        z_dim=16,
        dim_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        temporal_downsample=(True, True, False),
    ),
}


def of_diffusers(config: VaeConfig) -> diffusers.AutoencoderKLWan:
    with torch.device("meta"):
        return diffusers.AutoencoderKLWan(
            base_dim=config.base_dim,
            z_dim=config.z_dim,
            dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=list(config.temporal_downsample),
        )


def shapes_of(config: VaeConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in of_diffusers(config).state_dict().items()}


def random_tensors(config: VaeConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes_of(config).items()}


@pytest.mark.parametrize("case", CONFIGS)
def test_the_table_has_every_name_of_diffusers_once(case: str):
    rules = vae_rules(CONFIGS[case])
    names = [rule.diffusers.name for rule in rules if rule.diffusers]
    assert sorted(names) == sorted(shapes_of(CONFIGS[case]))
    for attribute in ("target", "original"):
        assert len({str(getattr(rule, attribute)) for rule in rules}) == len(rules)


def test_the_original_names_and_shapes_of_the_released_vae():
    zeros = {name: np.broadcast_to(np.float32(0), s) for name, s in shapes_of(WAN_VAE).items()}
    tensors = rename(vae_rules(WAN_VAE), InMemory(zeros), "diffusers", "original")
    shapes = {name: value.shape for name, value in tensors}
    assert len(shapes) == 194
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 126_892_531
    # One of each kind, as Wan's file has them.
    published = {
        "conv1.weight": (32, 32, 1, 1, 1),
        "conv2.bias": (16,),
        "encoder.conv1.weight": (96, 3, 3, 3, 3),
        "encoder.downsamples.0.residual.0.gamma": (96, 1, 1, 1),
        "encoder.downsamples.2.resample.1.weight": (96, 96, 3, 3),
        "encoder.downsamples.3.shortcut.weight": (192, 96, 1, 1, 1),
        "encoder.downsamples.5.time_conv.weight": (192, 192, 3, 1, 1),
        "encoder.downsamples.10.residual.6.bias": (384,),
        "encoder.middle.1.norm.gamma": (384, 1, 1),
        "encoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
        "encoder.middle.2.residual.2.weight": (384, 384, 3, 3, 3),
        "encoder.head.0.gamma": (384, 1, 1, 1),
        "encoder.head.2.weight": (32, 384, 3, 3, 3),
        "decoder.conv1.weight": (384, 16, 3, 3, 3),
        "decoder.middle.1.proj.weight": (384, 384, 1, 1),
        "decoder.upsamples.3.resample.1.weight": (192, 384, 3, 3),
        "decoder.upsamples.3.time_conv.weight": (768, 384, 3, 1, 1),
        "decoder.upsamples.4.residual.2.weight": (384, 192, 3, 3, 3),
        "decoder.upsamples.4.shortcut.weight": (384, 192, 1, 1, 1),
        "decoder.upsamples.7.time_conv.bias": (768,),
        "decoder.upsamples.8.residual.3.gamma": (192, 1, 1, 1),
        "decoder.upsamples.11.resample.1.weight": (96, 192, 3, 3),
        "decoder.upsamples.14.residual.6.weight": (96, 96, 3, 3, 3),
        "decoder.head.2.weight": (3, 96, 3, 3, 3),
    }
    assert {name: shapes.get(name) for name in published} == published
    assert "decoder.upsamples.11.time_conv.weight" not in shapes
    assert "decoder.upsamples.15.residual.2.weight" not in shapes


@pytest.mark.parametrize("case", ["tiny", "three blocks", "early"])
def test_renaming_there_and_back_is_exact(case: str):
    config = CONFIGS[case]
    theirs, rules = random_tensors(config), vae_rules(config)
    original = dict(rename(rules, InMemory(theirs), "diffusers", "original"))
    back = dict(rename(rules, InMemory(original), "original", "diffusers"))
    assert back.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(back[name], value)
    assert original.keys() != theirs.keys()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", CONFIGS)
def test_the_shapes_in_a_file_tell_the_configuration(case: str, format: str):
    zeros = {n: np.broadcast_to(np.float32(0), s) for n, s in shapes_of(CONFIGS[case]).items()}
    tensors = rename(vae_rules(CONFIGS[case]), InMemory(zeros), "diffusers", format)
    shapes = {name: value.shape for name, value in tensors}
    assert vae_config_from_tensors(shapes, format) == CONFIGS[case]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"conv2.weight": None}, "conv2.weight is missing"),
        ({"conv2.weight": (8, 8, 1, 1, 1)}, "8 channels"),
        ({"encoder.downsamples.1.resample.1.weight": None}, "should have 4 and 3 entries"),
        ({"encoder.downsamples.3.time_conv.weight": None}, "two True"),
        ({"encoder.downsamples.0.residual.6.weight": (4, 3, 3, 3, 3)}, "blocks of"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(change, says: str):
    config = CONFIGS["tiny"]
    tensors = rename(vae_rules(config), InMemory(random_tensors(config)), "diffusers", "original")
    shapes = {name: value.shape for name, value in tensors} | change
    shapes = {name: shape for name, shape in shapes.items() if shape is not None}
    with pytest.raises(WeightsError, match=says):
        vae_config_from_tensors(shapes, "original")


def test_the_json_of_diffusers_gives_the_released_configuration():
    theirs = of_diffusers(WAN_VAE).config
    assert vae_config_from_json(theirs) == WAN_VAE
    assert vae_config_from_json({}) == WAN_VAE
    assert tuple(theirs["latents_mean"]) == LATENTS_MEAN
    assert tuple(theirs["latents_std"]) == LATENTS_STD


def test_the_json_may_override_the_statistics():
    config = vae_config_from_json({"z_dim": 2, "latents_mean": [0.5, 0.25], "latents_std": [2, 3]})
    assert (config.latents_mean, config.latents_std) == ((0.5, 0.25), (2.0, 3.0))


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"is_residual": True}, UnsupportedError, "is_residual"),
        ({"patch_size": 2}, UnsupportedError, "patch_size"),
        ({"attn_scales": [0.5]}, UnsupportedError, "attn_scales"),
        ({"decoder_base_dim": 256}, UnsupportedError, "decoder_base_dim"),
        ({"z_dim": 48}, WeightsError, "latents_mean has 16 values"),
        ({"dim_mult": [1, 2]}, WeightsError, "dim_mult"),
        ({"temperal_downsample": [True, True, True]}, WeightsError, "two True"),
        ({"latents_std": [0] * 16}, WeightsError, "positive"),
        ({"base_dim": "wide"}, WeightsError, "unsound"),
    ],
)
def test_another_kind_of_vae_is_refused(config, error, says: str):
    with pytest.raises(error, match=says):
        vae_config_from_json(config)
