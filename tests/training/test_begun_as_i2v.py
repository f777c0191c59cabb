"""An i2v model that begins with a t2v one's parameters predicts what that predicts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import CONDITION_CHANNELS, TransformerConfig
from skyreels_jax.training.task import Template
from skyreels_jax.training.transformer_task import widen_to_i2v

T2V = TransformerConfig(
    model_type="t2v",
    dim=24,
    ffn_dim=16,
    num_heads=2,
    num_layers=1,
    text_dim=8,
    text_len=6,
    in_dim=16,
    freq_dim=16,
)


def made(config: TransformerConfig, seed: int) -> WanModel:
    return WanModel(config, rngs=nnx.Rngs(seed), dtype=jnp.float32, param_dtype=jnp.float32)


@pytest.mark.slow
def test_a_text_model_begins_an_image_model_that_predicts_the_same():
    text_model = made(T2V, 0)
    # The head begins at zero: give it something to say.
    text_model.head.linear.kernel[...] = jax.random.normal(
        jax.random.key(1), text_model.head.linear.kernel.shape
    )
    config = replace(T2V, model_type="i2v", in_dim=16 + CONDITION_CHANNELS, image_dim=12)
    image_model = made(config, 2)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    x, context, timestep = draw(1, 16, 2, 4, 4), draw(1, 6, 8), jnp.full((1, 2), 500.0)
    given = {"clip_fea": draw(1, config.image_tokens, 12), "y": draw(1, 20, 2, 4, 4)}
    call = nnx.jit(lambda model, **given: model(x, timestep, context, **given))
    wanted = np.asarray(call(text_model))
    before = np.asarray(call(image_model, **given))
    widen_to_i2v(image_model, Template.of(text_model)[1])
    # Measured: no difference.
    np.testing.assert_allclose(call(image_model, **given), wanted, atol=1e-6 * np.abs(wanted).max())
    assert np.abs(before - wanted).max() > 0.1 * np.abs(wanted).max()
    # What is new has gradients to learn from: the channels, and the image's values.

    def loss(model: WanModel):
        return jnp.sum(jnp.square(model(x, timestep, context, **given)))

    grads = dict(nnx.to_flat_state(nnx.jit(nnx.grad(loss))(image_model)))
    for path, leaf in grads.items():
        if path[0] == "patch_embedding" and path[-1] == "kernel":
            assert jnp.abs(leaf[...][..., 16:, :]).max() > 0
        if "v_img" in path and path[-1] == "kernel":
            assert jnp.abs(leaf[...]).max() > 0
