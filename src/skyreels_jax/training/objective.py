"""What training minimises: the error of the velocity ``noise - data`` at a noise level.

Signs and times are those of inference: ``x = (1 - sigma) * data + sigma * noise``, and the model is
told ``1000 * sigma``. With one level a video this is flow matching, with one a frame diffusion
forcing; image-to-video differs in what the model is given besides.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from skyreels_jax.diffusion.sigmas import NUM_TRAIN_TIMESTEPS
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_layers import CrossContext
from skyreels_jax.shapes import Context, Latents
from skyreels_jax.training.sigma_distributions import Sigmas

# Of a level's error.
Weight = Callable[[Sigmas], Sigmas]


class Batch(NamedTuple):
    """Videos to learn from, encoded.

    Attributes:
        latents: clean, normalised.
        context: text states, padding zero.
        clip_fea: image states (i2v).
        y: mask and image latents (i2v).
        fps: 0 for 16 frames a second, else 1 (models with ``inject_sample_info``).
    """

    latents: Latents
    context: Context | CrossContext
    clip_fea: Float[Array, "B I image_dim"] | None = None
    y: Float[Array, "B Y F H W"] | None = None
    fps: Int[Array, " B"] | None = None


def noised(latents: Latents, noise: Latents, sigma: Sigmas) -> Latents:
    """``(1 - sigma) * latents + sigma * noise``, by video or by frame."""
    share = by_frame(sigma)
    return (1 - share) * latents + share * noise


def velocity_loss(
    model: WanModel,
    batch: Batch,
    noise: Latents,
    sigma: Sigmas,
    *,
    weight: Weight | None = None,
    block_length: int | None = None,
    attention: str | None = None,
) -> Float[Array, ""]:
    """Mean squared error of the predicted velocity; float32.

    Args:
        model: predicts.
        batch: clean videos and their conditions.
        noise: standard normal, like the latents.
        sigma: levels, ``[B, 1]`` or ``[B, F]``.
        weight: of a level's error; all alike unless given.
        block_length: frames a block of block-causal attention; ``None`` attends to all.
        attention: name of an attention path.
    """
    told = sigma * NUM_TRAIN_TIMESTEPS
    prediction = model(
        noised(batch.latents, noise, sigma),
        told[:, 0] if told.shape[1] == 1 else told,
        batch.context,
        batch.clip_fea,
        batch.y,
        batch.fps,
        block_length=block_length,
        attention=attention,
    )
    error = jnp.square(prediction - (noise - batch.latents))
    if weight is not None:
        error = error * by_frame(weight(sigma))
    return jnp.mean(error)


def cosmap(sigma: Sigmas) -> Sigmas:
    """Weights that the cosine noise schedule has in flow matching: most at the middle level.

    ``2 / (pi * (1 - 2 sigma + 2 sigma^2))``, of mean 1 over all levels (Esser et al., "Scaling
    Rectified Flow Transformers", 2024, section 3.1).
    """
    return 2 / (jnp.pi * (1 - 2 * sigma + 2 * jnp.square(sigma)))


def by_frame(sigma: Sigmas) -> Float[Array, "B 1 steps 1 1"]:
    """Levels beside latents."""
    return sigma[:, None, :, None, None]
