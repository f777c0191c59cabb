"""What is learned is what the sampler integrates: a clip learned by heart comes out of noise."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from skyreels_jax.diffusion.guidance import NoGuidance
from skyreels_jax.diffusion.unipc import flow_sigmas
from skyreels_jax.mini.recipe import read_recipe
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.sampling.denoiser import Denoiser, Sampling
from skyreels_jax.training.objective import Batch, add_noise, velocity_loss
from skyreels_jax.training.optimizer import make_optimizer
from skyreels_jax.training.step import init_state, make_step
from skyreels_jax.training.task import Template
from skyreels_jax.training.transformer_recipe import Objective

# The shipped recipe's optimiser; its rate rises over more steps than a test has. The levels are the
# trainer's defaults: the recipe's are shifted to where there is little but noise, and what is left
# of the loss there is noise that nobody can foretell (0.36 of it in 60 steps, measured).
RECIPE = read_recipe(Path(__file__).parents[2] / "configs" / "mini" / "df.toml")
OBJECTIVE = Objective(frames=0.5)
CONFIG = TransformerConfig(
    model_type="t2v",
    dim=96,
    ffn_dim=192,
    num_heads=4,
    num_layers=2,
    in_dim=16,
    text_dim=16,
    text_len=8,
)
SHAPE = (1, 16, 3, 4, 4)
STEPS = 60


@pytest.fixture(scope="module")
def clip() -> jax.Array:
    """A colour for each of four quarters of the frame, which stands still."""
    quarters = jax.random.normal(jax.random.key(3), (1, 16, 1, 2, 2))
    return jnp.broadcast_to(jnp.repeat(jnp.repeat(quarters, 2, 3), 2, 4), SHAPE)


def trained(
    clip: jax.Array, *, steps: int = STEPS, backwards: bool = False
) -> tuple[WanModel, list[float]]:
    """The shipped optimiser on one clip; backwards, the velocity's sign is turned."""
    exact = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    template, params = Template.of(WanModel(CONFIG, rngs=nnx.Rngs(0), **exact))
    levels = OBJECTIVE.distribution()
    context = jax.random.normal(jax.random.key(4), (8, 8, 16))
    clips = jnp.repeat(clip, 8, axis=0)

    def loss(params, batch, key):
        noise_key, level_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, clips.shape)
        sigma = levels.sample(level_key, 8, SHAPE[2])
        model = template.model(params)
        if backwards:
            x = add_noise(clips, noise, sigma)
            told = jnp.broadcast_to(1000 * sigma, (8, SHAPE[2]))
            return jnp.mean(jnp.square(model(x, told, context) + (noise - clips))), {}
        return velocity_loss(model, batch, noise, sigma), {}

    shorter = replace(RECIPE.optimizer, learning_rate=1e-2, warmup=10)
    optimizer = make_optimizer(shorter, steps, params)
    step = make_step(loss, optimizer, draw=lambda batch, key: key)
    state = init_state(params, optimizer, 0.0)
    losses = []
    for number in range(steps):
        state, report = step(state, Batch(clips, context), jax.random.key(number))
        losses.append(float(report.metrics["loss"]))
    return template.model(state.params), losses


def sampled(model: WanModel) -> jax.Array:
    denoiser, guidance = Denoiser(model), NoGuidance()
    told = denoiser.condition(guidance, jax.random.normal(jax.random.key(4), (8, 8, 16))[:1], None)
    noise = jax.random.normal(jax.random.key(9), SHAPE)
    return denoiser.run(noise, told, Sampling(flow_sigmas(20, 1.0), guidance)).latents


def error(found: jax.Array, clip: jax.Array) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(found - clip)) / jnp.mean(jnp.square(clip))))


@pytest.mark.slow
def test_one_clip_is_learned_in_sixty_steps(clip):
    _, losses = trained(clip)
    # Measured: 2.10 to 0.51.
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])


@pytest.mark.slow
def test_what_was_learned_comes_out_of_noise(clip):
    model, _ = trained(clip, steps=300)
    # Measured: 0.088 of the clip's size.
    assert error(sampled(model), clip) < 0.15


@pytest.mark.slow
def test_a_turned_sign_is_caught(clip):
    model, _ = trained(clip, steps=100, backwards=True)
    # Measured: 2.7 after 150 steps.
    assert error(sampled(model), clip) > 1
