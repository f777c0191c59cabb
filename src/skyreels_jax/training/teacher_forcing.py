"""Predictions of a video's blocks as if each were made after the clean ones before it.

A model that makes a video block by block sees the keys and values of finished frames, at timestep
0, and its own noisy block. Teacher forcing computes that for all blocks of a video that is known at
once: the clean frames and the noisy ones pass through the model together, under
:class:`~skyreels_jax.ops.masks.CleanAndNoisy` (no array of tokens by tokens is made). Source: the
teacher forcing of Self-Forcing (arXiv 2506.08009) and Causal-Forcing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from skyreels_jax.diffusion.frame_schedule import plan_blocks
from skyreels_jax.diffusion.unipc import NUM_TRAIN_TIMESTEPS
from skyreels_jax.models.parallelism import LayerFunction, LayerInputs, SharedInputs, SingleDevice
from skyreels_jax.models.transformer import WanModel, unpatchify
from skyreels_jax.models.transformer_attention import (
    CrossContext,
    FrameKeyValues,
)
from skyreels_jax.models.transformer_layers import FrameTokens
from skyreels_jax.ops.attention import attention
from skyreels_jax.ops.masks import CleanAndNoisy
from skyreels_jax.ops.positions import RopeTable
from skyreels_jax.shapes import Latents
from skyreels_jax.training.sigma_distributions import Sigmas


def block_lengths(frames: int, block: int, first_block: int | None = None) -> tuple[int, ...]:
    """Latent frames of each block of a video; the first may have its own, the last be short."""
    first = min(first_block or 0, frames)
    if first == frames:
        return (first,)
    return (*[first][: first > 0], *plan_blocks(frames - first, block).lengths)


class SeenFrames(NamedTuple):
    """A whole video's frames as later blocks see them: clean, or noised to a timestep of 1000."""

    latents: Latents
    timestep: float = 0.0


def teacher_forced_velocity(
    model: WanModel,
    seen: SeenFrames,
    noisy: Latents,
    sigma: Sigmas,
    context: CrossContext,
    blocks: Sequence[int],
    *,
    fps: Int[Array, " B"] | None = None,
    detached: bool = False,
) -> Latents:
    """Velocity of ``noisy``, each of its blocks after the clean ones before it; float32.

    Args:
        model: predicts; of text to video.
        seen: what blocks see of those before them; latents ``[B, C, F, H, W]``.
        noisy: as many, noised.
        sigma: shares of noise in ``noisy``, ``[B, 1]`` or ``[B, F]``.
        context: prepared text states.
        blocks: frames of each block.
        fps: 0 for 16 frames a second, else 1.
        detached: whether keys and values of clean frames pass no gradient, as where they were kept.
    """
    frames = noisy.shape[2]
    t = jnp.broadcast_to(NUM_TRAIN_TIMESTEPS * sigma, (sigma.shape[0], frames))
    if len(blocks) == 1:  # Nothing comes before it.
        return model(noisy, t, context, fps=fps)
    before = jnp.full_like(t, seen.timestep)
    e, e0 = model.embed_time(jnp.concatenate([before, t], axis=1), fps)
    tokens, grid = model.embed_patches(jnp.concatenate([seen.latents, noisy], axis=2), None)
    rope = model.positions((frames, *grid[1:]))
    rope = RopeTable(*(jnp.concatenate([table, table]) for table in rope))
    mask = CleanAndNoisy(tokens.shape[2], tuple(blocks))
    if detached:
        model.parallelism = _DetachedContext(mask.half)
    shared = SharedInputs(e0, rope, None)
    tokens = model.run_blocks(tokens, context, shared, mask, None)[0]
    patches = model.head(tokens[:, frames:], e[:, frames:])
    return unpatchify(patches, grid[1:], model.config.patch_size)


@dataclass(frozen=True)
class _DetachedContext(SingleDevice):
    """One device, on which the keys and values of the first ``tokens`` pass no gradient."""

    tokens: int

    def run_layers(
        self, layer: LayerFunction, tokens: FrameTokens, layers: LayerInputs, shared: SharedInputs
    ) -> tuple[FrameTokens, FrameKeyValues | None]:
        """One after the other, with :meth:`_attend` for self-attention."""

        def attending(
            tokens: FrameTokens, given: LayerInputs, shared: SharedInputs
        ) -> tuple[FrameTokens, FrameKeyValues | None]:
            return layer(tokens, given, shared, self._attend)

        return super().run_layers(attending, tokens, layers, shared)

    def _attend(self, query: Array, key: Array, value: Array, **options) -> Float[Array, "B L N K"]:
        def detach(states: Array) -> Array:
            kept = jax.lax.stop_gradient(states[:, : self.tokens])
            return jnp.concatenate([kept, states[:, self.tokens :]], axis=1)

        return attention(query, detach(key), detach(value), **options)
