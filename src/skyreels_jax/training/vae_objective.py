"""What a VAE is trained to do: give back the frames, with latents of a known distribution."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from skyreels_jax.models.vae import WanVae

PixelClip = Float[Array, "B 3 T height width"]
# Bounds of the logarithm of the variance, against infinities at the start of training.
_LOG_VARIANCE = (-30.0, 20.0)


@dataclass(frozen=True)
class VaeLoss:
    """Weights of the terms of the loss.

    Attributes:
        absolute: of the mean absolute error of a colour value, which are in [-1, 1].
        squared: of the mean squared error.
        kl: of the divergence from the standard normal, in nats, mean over the latents' values.
        temporal: of the absolute error of the change from frame to frame, summed over the changes
            and divided by the number of values.
    """

    absolute: float = 1.0
    squared: float = 0.0
    kl: float = 1e-5
    temporal: float = 0.0

    def __post_init__(self):
        for name in ("absolute", "squared", "kl", "temporal"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: no weight may be negative")
        if self.absolute + self.squared <= 0:
            raise ValueError(
                "absolute = 0 and squared = 0: nothing compares frames; nearest: absolute = 1"
            )


class Moments(NamedTuple):
    """The latents' distribution: means and logarithms of variances, not normalised."""

    mean: Float[Array, "B F H W C"]
    log_variance: Float[Array, "B F H W C"]


def moments(vae: WanVae, pixels: PixelClip) -> Moments:
    """The moments of ``4k + 1`` frames in [-1, 1]: the first by itself, the others at once.

    What is generated chunk by chunk is learned in two: the same function, with larger convolutions.
    """
    x = jnp.moveaxis(pixels, 1, -1)
    out, cache = vae.encoder(x[:, :1], None)
    if x.shape[1] > 1:
        rest, _ = vae.encoder(x[:, 1:], cache, at_once=True)
        out = jnp.concatenate([out, rest], axis=1)
    mean, log_variance = jnp.split(vae.quant(out).astype(jnp.float32), 2, axis=-1)
    return Moments(mean, jnp.clip(log_variance, *_LOG_VARIANCE))


def frames(vae: WanVae, z: Float[Array, "B F H W C"]) -> PixelClip:
    """Frames of latents that are not normalised, not cut to [-1, 1]: the inverse of the above."""
    z = vae.post_quant(z)
    out, cache = vae.decoder(z[:, :1], None)
    if z.shape[1] > 1:
        rest, _ = vae.decoder(z[:, 1:], cache, at_once=True)
        out = jnp.concatenate([out, rest], axis=1)
    return jnp.moveaxis(out.astype(jnp.float32), -1, 1)


def vae_loss(
    vae: WanVae, pixels: PixelClip, noise: Float[Array, "B F H W C"], weights: VaeLoss
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum, and its terms by name, with the squared error as ``mse``.

    Args:
        vae: trains.
        pixels: ``4k + 1`` frames in [-1, 1].
        noise: standard normal, of the latents' shape.
        weights: of the terms.
    """
    found = moments(vae, pixels)
    z = found.mean + jnp.exp(0.5 * found.log_variance) * noise
    error = frames(vae, z) - pixels
    terms = {
        "absolute": jnp.mean(jnp.abs(error)),
        "squared": jnp.mean(jnp.square(error)),
        "kl": jnp.mean(divergence(found)),
        # Zero for a single frame, which has no change.
        "temporal": jnp.sum(jnp.abs(jnp.diff(error, axis=2))) / error.size,
    }
    parts = [getattr(weights, name) * value for name, value in terms.items()]
    return jnp.sum(jnp.stack(parts)), {**terms, "mse": terms["squared"]}


def divergence(found: Moments) -> Float[Array, "B F H W C"]:
    """Kullback-Leibler divergence of each latent value from the standard normal, in nats.

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes" (arXiv 1312.6114), appendix B.
    """
    mean, log_variance = found
    return 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
