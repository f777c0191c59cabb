"""Released shapes have the released numbers of parameters; what cannot be is refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from skyreels_jax.errors import UnsupportedError
from skyreels_jax.models import transformer_config as presets
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import Numerics, TransformerConfig

# Of the specification, counted there on PyTorch's modules.
PARAMETERS: dict[str, tuple[TransformerConfig, int]] = {
    "DF-1.3B": (presets.DF_1_3B, 1_435_525_696),
    "T2V-1.3B": (presets.T2V_1_3B, 1_418_996_800),
    "DF-14B": (presets.DF_14B, 14_288_491_584),
    "T2V-14B": (presets.T2V_14B, 14_288_491_584),
    "DF-14B with frame rates": (replace(presets.DF_14B, inject_sample_info=True), 14_472_038_464),
    "I2V-1.3B": (presets.I2V_1_3B, 1_564_428_608),
    "I2V-14B": (presets.I2V_14B, 16_394_878_784),
    # The image-to-video model and one position a token of two images.
    "FLF2V-1.3B": (presets.FLF2V_1_3B, 1_564_428_608 + 514 * 1280),
    "FLF2V-14B": (presets.FLF2V_14B, 16_394_878_784 + 514 * 1280),
}


def count(config: TransformerConfig) -> int:
    model = nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize("name", PARAMETERS)
def test_released_models_have_the_released_number_of_parameters(name):
    config, parameters = PARAMETERS[name]
    assert count(config) == parameters
    assert count(replace(config, num_layers=config.num_layers - 1)) < parameters
    assert config.head_dim == 128


REFUSED = {
    "dim = 1537": {"dim": 1537},
    "even width of at least 6": {"dim": 12 * 127},
    "num_layers = 0 must be positive": {"num_layers": 0},
    "freq_dim = 255": {"freq_dim": 255},
    "timesteps are per latent frame": {"patch_size": (2, 2, 2)},
    "image embedder": {"image_dim": 1280},
    "needs model_type 'i2v'": {"pos_embed_seq_len": 514},
    "i2v models add 20": {"model_type": "i2v", "image_dim": 1280, "in_dim": 16},
}


@pytest.mark.parametrize("message", REFUSED)
def test_shapes_that_cannot_be_are_refused(message):
    with pytest.raises(ValueError, match=message):
        replace(presets.T2V_1_3B, **REFUSED[message])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float64, jnp.int8])
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(UnsupportedError, match=f"dtype = {jnp.dtype(dtype).name}"):
        Numerics(dtype)


def test_the_image_condition_is_not_part_of_the_latents():
    assert (presets.T2V_14B.latent_dim, presets.T2V_14B.image_tokens) == (16, 0)
    assert (presets.I2V_14B.latent_dim, presets.I2V_14B.image_tokens) == (16, 257)
    assert presets.FLF2V_14B.image_tokens == 514
