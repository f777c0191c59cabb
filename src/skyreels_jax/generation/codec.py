"""The VAE in JAX, as generation takes it."""

from collections.abc import Iterator
from dataclasses import dataclass

from skyreels_jax.models import vae
from skyreels_jax.models.vae import WanVae
from skyreels_jax.models.vae_tiling import WHOLE, Tiling
from skyreels_jax.shapes import HostLatents, Pixels


@dataclass(frozen=True, eq=False)
class WanVideoCodec:
    """Pixels to latents and back: a :class:`~skyreels_jax.generation.components.VideoCodec`.

    Attributes:
        model: the VAE.
        tiling: how frames are cut where memory would not hold a whole one.
    """

    model: WanVae
    tiling: Tiling = WHOLE

    def encode(self, pixels: Pixels) -> HostLatents:
        """Posterior mean of ``4k + 1`` frames in [-1, 1], normalised: ``(mu - mean) / std``."""
        return vae.encode(self.model, pixels[None], tiling=self.tiling)[0]

    def decode_chunks(self, latents: HostLatents) -> Iterator[Pixels]:
        """Frames in [-1, 1] as they are ready, in memory that does not grow with their number."""
        for chunk in vae.decode_chunks(self.model, latents[None], tiling=self.tiling):
            yield chunk[0]
