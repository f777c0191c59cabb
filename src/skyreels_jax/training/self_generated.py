"""A student's own videos, block by block as it will make them: what DMD trains on.

``x0 = x - sigma v``, then new noise at the next sigma; after a block's last step one more pass at
timestep 0 writes its keys and values. Source: Self-Forcing (arXiv 2506.08009), algorithm 1.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from skyreels_jax.diffusion.few_steps import moved
from skyreels_jax.diffusion.guidance import NoGuidance
from skyreels_jax.diffusion.step_cache import NoCache
from skyreels_jax.diffusion.unipc import NUM_TRAIN_TIMESTEPS
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_attention import CrossContext
from skyreels_jax.sampling.causal_step import BlockPlace, CausalStep
from skyreels_jax.sampling.kv_cache import KVCache, allocate, write_frames
from skyreels_jax.sampling.step import Conditioning, DenoisingStep
from skyreels_jax.shapes import Latents
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
    graph, parameters = nnx.split(model)
    conditioning = Conditioning((context,), None, fps)
    step = DenoisingStep(
        graph, parameters, conditioning, NoGuidance(), NoCache(), attention=attention
    )
    sampled = CausalStep(step, "renoise")
    videos, given, first = [], [], 0
    cache: KVCache = ()
    for length in blocks:
        frames = np.arange(first, first + length, dtype=np.int32)
        # Every frame has its slot: the window is the whole video.
        here = np.array(first, np.int32)
        place = BlockPlace(here, here, frames, None)
        past = cache

        def velocity(x: Latents, level: Array, past=past, place=place) -> Latents:
            timestep = jnp.broadcast_to(NUM_TRAIN_TIMESTEPS * level, x.shape[2])
            return sampled.velocity(past, place, x, timestep)

        x = _last_input(velocity, noise[:, :, :, first : first + length], levels, last)
        finished = x - levels[last] * velocity(x, levels[last])
        videos.append(finished)
        given.append(x)
        new = sampled.key_values(cache, place, finished)
        cache = cache or allocate(new, sum(blocks))
        cache = write_frames(cache, new, frames)
        first += length
    at_last = jnp.broadcast_to(levels[last], (noise.shape[1], 1))
    made = OwnVideo(jnp.concatenate(videos, 2), jnp.concatenate(given, 2), at_last)
    return stop_gradient(made)


def _last_input(
    velocity: Callable[[Latents, Array], Latents],
    noise: Float[Array, "steps B C F H W"],
    levels: Float[Array, " steps"],
    last: Int[Array, ""],
) -> Latents:
    """What the last pass of a block is given, after the steps before it."""

    def step(number: Int[Array, ""], x: Latents) -> Latents:
        sigma, following = levels[number], levels[number + 1]
        return moved(x, velocity(x, sigma), sigma, following, noise[number + 1])

    return jax.lax.fori_loop(0, last, step, levels[0] * noise[0])
