"""What training minimises: the error of the velocity ``noise - data`` at a share of noise, sigma.

Signs and times are those of inference: ``x = (1 - sigma) * data + sigma * noise``, and the model is
given the timestep ``1000 * sigma``. With one sigma a video this is flow matching, with one a frame
diffusion forcing; image-to-video differs in what the model is given besides.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from skyreels_jax.diffusion.unipc import NUM_TRAIN_TIMESTEPS
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_attention import CrossContext
from skyreels_jax.shapes import Context, Latents
from skyreels_jax.training.sigma_distributions import Sigmas

# The weight of an error by its sigma.
SigmaWeight = Callable[[Sigmas], Sigmas]


class Batch(NamedTuple):
    """Videos to learn from, encoded.

    Attributes:
        latents: clean, normalised.
        context: text states, padding zero.
        clip_fea: image states (i2v).
        y: mask and image latents (i2v).
        fps: 0 for 16 frames a second, else 1 (models with ``inject_sample_info``).
        given: frames that the text does not tell of, which are given and not learned.
    """

    latents: Latents
    context: Context | CrossContext
    clip_fea: Float[Array, "B I image_dim"] | None = None
    y: Float[Array, "B Y F H W"] | None = None
    fps: Int[Array, " B"] | None = None
    given: Bool[Array, "B F"] | None = None


def add_noise(latents: Latents, noise: Latents, sigma: Sigmas) -> Latents:
    """``(1 - sigma) * latents + sigma * noise``, by video or by frame."""
    share = beside_latents(sigma)
    return (1 - share) * latents + share * noise


def velocity_loss(
    model: WanModel,
    batch: Batch,
    noise: Latents,
    sigma: Sigmas,
    *,
    known: Bool[Array, "B F"] | None = None,
    weight: SigmaWeight | None = None,
    block_length: int | None = None,
    attention: str | None = None,
) -> Float[Array, ""]:
    """Mean squared error of the predicted velocity; float32.

    Args:
        model: predicts.
        batch: clean videos and their conditions.
        noise: standard normal, like the latents.
        sigma: shares of noise, ``[B, 1]`` or ``[B, F]``.
        known: frames that are given and not to be predicted: a video's error is the mean over its
            other frames.
        weight: of an error by its sigma; all alike unless given.
        block_length: frames a block of block-causal attention; ``None`` attends to all.
        attention: name of an attention path.
    """
    timesteps = sigma * NUM_TRAIN_TIMESTEPS
    prediction = model(
        add_noise(batch.latents, noise, sigma),
        timesteps[:, 0] if timesteps.shape[1] == 1 else timesteps,
        batch.context,
        batch.clip_fea,
        batch.y,
        batch.fps,
        block_length=block_length,
        attention=attention,
    )
    error = jnp.square(prediction - (noise - batch.latents))
    if weight is not None:
        error = error * beside_latents(weight(sigma))
    return mean_error(error, known)


def mean_error(error: Latents, known: Bool[Array, "B F"] | None) -> Float[Array, ""]:
    """The mean of errors; a video's is that over the frames that are not known."""
    if known is None:
        return jnp.mean(error)
    # By video, so that the parts of a batch have the mean of the whole.
    counts = jnp.logical_not(known).astype(error.dtype)
    by_frame = jnp.mean(error, axis=(1, 3, 4))
    return jnp.mean(jnp.sum(by_frame * counts, axis=1) / jnp.sum(counts, axis=1))


def cosmap(sigma: Sigmas) -> Sigmas:
    """Weights that the cosine noise schedule has in flow matching: most at the middle sigma.

    ``2 / (pi * (1 - 2 sigma + 2 sigma^2))``, of mean 1 over all sigmas (Esser et al., "Scaling
    Rectified Flow Transformers", 2024, section 3.1).
    """
    return 2 / (jnp.pi * (1 - 2 * sigma + 2 * jnp.square(sigma)))


def beside_latents(sigma: Sigmas) -> Float[Array, "B 1 steps 1 1"]:
    """Sigmas ``[B, steps]`` as they multiply latents."""
    return sigma[:, None, :, None, None]
