"""A video batch in parts is the batch at once: noise, sigmas and given frames are drawn for all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.training.objective import Batch, velocity_loss
from skyreels_jax.training.optimizer import OptimizerConfig, make_optimizer
from skyreels_jax.training.sigma_distributions import draw_sigmas
from skyreels_jax.training.step import init_state, make_step
from skyreels_jax.training.task import Template
from skyreels_jax.training.transformer_recipe import Objective

CONFIG = TransformerConfig(
    model_type="t2v", dim=24, ffn_dim=32, num_heads=2, num_layers=1, in_dim=16, text_dim=8
)
DISTRIBUTION = Objective(frames=0.3, continued=0.7).distribution()
# Largest difference of a parameter after a step of plain descent, of values around 0.1.
TOLERANCE = 1e-6


def draw(batch, key):
    noise_key, sigma_key = jax.random.split(key)
    shape = batch.latents.shape
    drawn = draw_sigmas(DISTRIBUTION, sigma_key, shape[0], shape[2])
    return jax.random.normal(noise_key, shape), *drawn


@functools.cache
def stepping(accumulate: int):
    """A step and what it starts from."""
    model = WanModel(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    template, params = Template.of(model)

    def loss(params, batch, noise):
        noise, sigma, known = noise
        return velocity_loss(template.model(params), batch, noise, sigma, known=known), {}

    config = OptimizerConfig(name="sgd", learning_rate=0.1, warmup=0, beta1=0.0, weight_decay=0.0)
    optimizer = make_optimizer(config, 10, params)
    step = make_step(loss, optimizer, draw=draw, accumulate=accumulate)
    # A step takes the memory of the state that it is given.
    return step, lambda: init_state(jax.tree.map(jnp.copy, params), optimizer, 0.0)


def after_a_step(accumulate: int, seed: int = 0) -> np.ndarray:
    step, start = stepping(accumulate)
    latents = jax.random.normal(jax.random.key(1), (4, 16, 3, 4, 4))
    context = jax.random.normal(jax.random.key(2), (4, 512, 8))
    state, _ = step(start(), Batch(latents, context), jax.random.key(seed))
    return np.concatenate([np.ravel(value) for _, value in sorted(state.params.items())])


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_video_batch_are_the_batch(parts: int):
    whole = after_a_step(1)
    assert np.max(np.abs(after_a_step(parts) - whole)) < TOLERANCE
    # Other noise is another step.
    assert np.max(np.abs(after_a_step(1, seed=1) - whole)) > 100 * TOLERANCE
