"""The VAE in JAX, as generation takes it."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Final, Literal, get_args

from skyreels_jax.geometry import PIXELS_PER_LATENT
from skyreels_jax.memory import Direction, available_memory, vae_work
from skyreels_jax.models import vae
from skyreels_jax.models.vae import WanVae
from skyreels_jax.models.vae_tiling import WHOLE, Tiles, Tiling
from skyreels_jax.shapes import HostLatents, Pixels

# Whether the VAE cuts frames into tiles: always, never, or where memory would not hold a whole one.
VaeTiling = Literal["auto", "on", "off"]
VAE_TILINGS: Final = get_args(VaeTiling)
# Of the memory that is free, so much is left for what nobody counted.
RESERVE: Final = 0.05

logger = logging.getLogger(__name__)


def tiling_for(choice: VaeTiling, needed: int, free: int | None) -> Tiling:
    """How frames are cut.

    Args:
        choice: of the user.
        needed: bytes that work on whole frames takes (:func:`.memory.vae_work`).
        free: bytes that there are, with the VAE's weights in memory; ``None`` if nobody can tell.
    """
    if choice == "auto":
        choice = "off" if free is None or needed <= (1 - RESERVE) * free else "on"
    return Tiles() if choice == "on" else WHOLE


@dataclass(frozen=True, eq=False)
class WanAutoencoder:
    """Pixels to latents and back: a :class:`~skyreels_jax.components.protocols.Autoencoder`.

    Attributes:
        model: the VAE.
        tiling: whether frames are cut into tiles; ``auto`` decides by size and free memory, anew
            for each video, and warns where it cuts.
    """

    model: WanVae
    tiling: VaeTiling = "auto"

    def encode(self, pixels: Pixels) -> HostLatents:
        """Posterior mean of ``4k + 1`` frames in [-1, 1], normalised: ``(mu - mean) / std``."""
        tiling = self._tiling("encode", *pixels.shape[-2:])
        return vae.encode_pixels(self.model, pixels[None], tiling=tiling)[0]

    def decode_pieces(self, pieces: Iterable[HostLatents]) -> Iterator[Pixels]:
        """Frames in [-1, 1] as they are ready, in memory that does not grow with their number."""
        pieces = iter(pieces)
        first = next(pieces)
        height, width = (PIXELS_PER_LATENT * side for side in first.shape[-2:])
        tiling = self._tiling("decode", height, width)
        batches = (piece[None] for piece in chain([first], pieces))
        for chunk in vae.decode_pieces(self.model, batches, tiling=tiling):
            yield chunk[0]

    def _tiling(self, direction: Direction, height: int, width: int) -> Tiling:
        needed, free = vae_work(self.model.config, direction, height, width), available_memory()
        tiling = tiling_for(self.tiling, needed, free)
        if self.tiling == "auto" and free is not None and tiling is not WHOLE:
            logger.warning(
                "the VAE %ss in tiles: a frame of %d x %d takes %.2f GiB and %.2f are free",
                *(direction, height, width, needed / 2**30, free / 2**30),
            )
        return tiling
