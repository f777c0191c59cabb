"""Encoded clips of moving shapes, kept in a folder: what the transformer learns from.

A clip is encoded once; its shards appear whole, so that an interrupted run goes on where it was.
Captions are drawn anew each time a clip is, from a few wordings.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from skyreels_jax.files import whole_file
from skyreels_jax.models.vae import WanVae
from skyreels_jax.models.vae_config import FRAME_STRIDE
from skyreels_jax.moving_shapes.captions import caption
from skyreels_jax.moving_shapes.render import render
from skyreels_jax.moving_shapes.scene import HELD_OUT, Scene, draw_held_out, draw_scene
from skyreels_jax.training.vae import moments

# Clips of a shard, and of one call of the encoder.
SHARD: Final = 512
CHUNK: Final = 16
WORDINGS: Final = 6
RATES: Final = (16, 24)
# Raised when scenes, captions or their rendering change: what was encoded before is of no use then.
DRAWING: Final = 2


@dataclass(frozen=True)
class Clips:
    """Encoded clips; arrays have one row each.

    Attributes:
        latents: normalised.
        known: mask and latents of the video of which only the first frame is known, if asked for.
        first: that frame, uint8.
        fps: frames a second.
        captions: some wordings of each.
    """

    latents: Float[np.ndarray, "N C F H W"]
    known: Float[np.ndarray, "N Y F H W"] | None
    first: UInt8[np.ndarray, "N height width 3"]
    fps: np.ndarray
    captions: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True)
class Source:
    """Which clips: the training distribution or, ``held``, the combinations held out from it."""

    seed: int
    frames: int
    size: int
    held: bool = False

    def scene(self, index: int) -> tuple[Scene, int, np.random.Generator]:
        """A clip's scene, frames a second, and what draws its wordings."""
        rng = np.random.default_rng([self.seed, int(self.held), index])
        fps = RATES[rng.integers(len(RATES))]
        seconds = self.frames / fps
        if not self.held:
            return draw_scene(rng, seconds), fps, rng
        combinations = sorted(HELD_OUT, key=str)
        return draw_held_out(rng, combinations[index % len(combinations)], seconds), fps, rng


def encoded_clips(
    folder: Path,
    vae: WanVae,
    source: Source,
    count: int,
    *,
    with_known: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Clips:
    """``count`` clips, from ``folder`` where they are there, and written there where not.

    What another VAE encoded, or of other clips, is not taken: :func:`fingerprint` names the folder
    within ``folder``.
    """
    folder = folder / fingerprint(vae, source)
    folder.mkdir(parents=True, exist_ok=True)
    encode, parts = _encoder(vae), []
    shard = min(SHARD, count)
    for start in range(0, count, shard):
        part: dict[str, np.ndarray] = {}
        for kind, make in (("clips", _encode), ("known", _encode_known)):
            if kind == "known" and not with_known:
                continue
            file = folder / f"{kind}-{'held' if source.held else 'drawn'}-{start:07d}-{shard}.npz"
            if not file.is_file():
                say(f"encoding {kind} {start} to {start + shard} of {count}")
                with whole_file(file) as temporary:
                    columns = make(encode, source, range(start, start + shard))
                    np.savez(temporary, allow_pickle=False, **columns)
            with np.load(file, allow_pickle=False) as stored:
                part |= {name: stored[name] for name in stored.files}
        parts.append(part)
    joined = {name: np.concatenate([p[name] for p in parts])[:count] for name in parts[0]}
    return Clips(
        joined["latents"],
        joined.get("known"),
        joined["first"],
        joined["fps"],
        [json.loads(line) for line in joined["captions"]],
    )


def fingerprint(vae: WanVae, source: Source) -> str:
    """Of the VAE's parameters and of which clips there are; the same for held-out ones."""
    digest = hashlib.sha256()
    for path, leaf in nnx.to_flat_state(nnx.state(vae)):
        digest.update(repr(path).encode())
        digest.update(np.asarray(leaf.get_value()).tobytes())
    statistics = (vae.config.latents_mean, vae.config.latents_std)
    digest.update(repr((statistics, source.seed, source.frames, source.size, DRAWING)).encode())
    return digest.hexdigest()[:12]


Encode = Callable[[np.ndarray], np.ndarray]


def _encoder(vae: WanVae) -> Encode:
    graph, state = nnx.split(vae)
    mean = np.asarray(vae.config.latents_mean, np.float32)
    std = np.asarray(vae.config.latents_std, np.float32)

    @jax.jit
    def means(state: nnx.State, pixels: jax.Array) -> jax.Array:
        found = moments(nnx.merge(graph, state), pixels).mean
        return jnp.moveaxis((found - mean) / std, -1, 1)

    return lambda pixels: np.asarray(means(state, pixels))


def _encode(encode: Encode, source: Source, indices: range) -> dict[str, Any]:
    """Arrays of one shard."""
    names = ("latents", "first", "fps", "captions")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for start in range(indices.start, indices.stop, CHUNK):
        videos = []
        for index in range(start, min(start + CHUNK, indices.stop)):
            scene, fps, rng = source.scene(index)
            size = (source.size, source.size)
            videos.append(render(scene, frames=source.frames, fps=float(fps), size=size))
            columns["fps"].append(fps)
            columns["captions"].append(json.dumps([caption(scene, rng) for _ in range(WORDINGS)]))
        frames = np.stack(videos)
        pixels = np.moveaxis(frames, -1, 1) / np.float32(127.5) - np.float32(1)
        columns["latents"].append(encode(pixels))
        columns["first"].append(frames[:, 0])
    whole = ("latents", "first")
    return {n: np.concatenate(v) if n in whole else np.array(v) for n, v in columns.items()}


def _encode_known(encode: Encode, source: Source, indices: range) -> dict[str, np.ndarray]:
    """Of one shard; as generation has it, frames that are not known are mid-grey."""
    parts, size = [], (source.size, source.size)
    for start in range(indices.start, indices.stop, CHUNK):
        chunk = range(start, min(start + CHUNK, indices.stop))
        pixels = np.zeros((len(chunk), 3, source.frames, *size), np.float32)
        for row, index in enumerate(chunk):
            frame = render(source.scene(index)[0], frames=1, fps=1.0, size=size)[0]
            pixels[row, :, 0] = np.moveaxis(frame, -1, 0) / np.float32(127.5) - np.float32(1)
        parts.append(_with_mask(encode(pixels)))
    return {"known": np.concatenate(parts)}


def _with_mask(latents: np.ndarray) -> np.ndarray:
    """Behind four channels of mask: the first latent frame is known, the others are not."""
    count, _, *rest = latents.shape
    mask = np.zeros((count, FRAME_STRIDE, *rest), latents.dtype)
    mask[:, :, 0] = 1
    return np.concatenate([mask, latents], axis=1)
