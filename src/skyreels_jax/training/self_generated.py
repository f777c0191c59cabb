"""A student's own videos, block by block as it will make them: what DMD trains on.

``x0 = x - sigma v``, then new noise at the next sigma; after a block's last step one more pass at
timestep 0 writes its keys and values. Source: Self-Forcing (arXiv 2506.08009), algorithm 1.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int, PyTree

from skyreels_jax.diffusion.unipc import NUM_TRAIN_TIMESTEPS
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_attention import CrossContext, FrameKeyValues, PastFrames
from skyreels_jax.shapes import Latents
from skyreels_jax.training.distillation import VelocityFunction, denoised
from skyreels_jax.training.objective import add_noise
from skyreels_jax.training.sigma_distributions import Sigmas


class OwnVideo(NamedTuple):
    """A video, and what each of its blocks was made of in the last pass.

    Attributes:
        video: of finished blocks.
        noisy: what the last pass of each block was given.
        sigma: its share of noise, ``[B, 1]``.
    """

    video: Latents
    noisy: Latents
    sigma: Sigmas


def generate_own(
    model: WanModel,
    noise: Float[Array, "steps B C F H W"],
    sigmas: Sequence[float],
    last: Int[Array, ""],
    context: CrossContext,
    blocks: Sequence[int],
    *,
    fps: Int[Array, " B"] | None = None,
    attention: str | None = None,
) -> OwnVideo:
    """Make a video block by block; nothing of it passes a gradient.

    Args:
        model: makes it; its parameters are given so that they pass no gradient.
        noise: of a whole video for each step.
        sigmas: of the steps, the noisiest first.
        last: the step in which each block ends, counted from 0.
        context: prepared text states.
        blocks: frames of each block.
        fps: 0 for 16 frames a second, else 1.
        attention: name of an attention path.
    """
    levels = jnp.asarray(sigmas, jnp.float32)
    batch, patches = noise.shape[1], model.config.patches(*noise.shape[4:])
    shape = (model.config.num_layers, batch, sum(blocks), patches)
    heads = (model.config.num_heads, model.config.head_dim)
    past = FrameKeyValues(*(jnp.zeros((*shape, *heads), model.numerics.compute) for _ in range(2)))
    videos, given, first = [], [], 0
    at_last = jnp.broadcast_to(levels[last], (batch, 1))
    for length in blocks:
        of_block = noise[:, :, :, first : first + length]
        before = PastFrames(*past, jnp.asarray(first, jnp.int32)) if first else None
        options = {"fps": fps, "attention": attention, "past": before}
        velocity = partial(_velocity, model, context, options)
        x = _last_input(velocity, of_block, levels, last)
        finished = denoised(velocity, x, at_last)
        videos.append(finished)
        given.append(x)
        staged = model.staged(finished, jnp.zeros((batch, length)), context, **options)
        past = _written(past, FrameKeyValues(*staged.key_values()), first)
        first += length
    made = OwnVideo(jnp.concatenate(videos, 2), jnp.concatenate(given, 2), at_last)
    return stop_gradient(made)


def _last_input(
    velocity: VelocityFunction,
    noise: Float[Array, "steps B C F H W"],
    levels: Float[Array, " steps"],
    last: Int[Array, ""],
) -> Latents:
    """What the last pass of a block is given, after the steps before it."""
    rows = (noise.shape[1], 1)

    def step(number: Int[Array, ""], x: Latents) -> Latents:
        data = denoised(velocity, x, jnp.broadcast_to(levels[number], rows))
        below = jnp.broadcast_to(levels[number + 1], rows)
        return add_noise(data, noise[number + 1], below)

    start = add_noise(jnp.zeros_like(noise[0]), noise[0], jnp.broadcast_to(levels[0], rows))
    return jax.lax.fori_loop(0, last, step, start)


def _velocity(
    model: WanModel, context: CrossContext, options: Mapping[str, PyTree], x: Latents, sigma: Sigmas
) -> Latents:
    t = jnp.broadcast_to(NUM_TRAIN_TIMESTEPS * sigma, (x.shape[0], x.shape[2]))
    staged = model.staged(x, t, context, **options)
    return staged.head(staged.blocks(staged.tokens))


def _written(past: FrameKeyValues, block: FrameKeyValues, first: int) -> FrameKeyValues:
    """``past`` with the states of a block from frame ``first`` on."""
    here = slice(first, first + block.key.shape[2])
    pairs = zip(past, block, strict=True)
    return FrameKeyValues(*(old.at[:, :, here].set(new) for old, new in pairs))
