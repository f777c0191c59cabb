"""What ``reference_exact`` refuses: requests that the original gets wrong, or no seed decides.

Sources: the diffusion-forcing pipeline of SkyReels-V2; docs/numerics.md lists what it does and what
is done here instead.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from skyreels_jax import geometry
from skyreels_jax.diffusion.unipc import flow_sigmas
from skyreels_jax.generation.request.resolved import Forcing
from skyreels_jax.geometry import latent_frames


def reference_violations(values: Mapping[str, Any]) -> list[str]:
    """A line for each setting with which the original would not give the video asked for."""
    found = []
    if values["noise"] != "torch":
        found.append(f"`noise` {values['noise']} is not the original's; leave it out")
    timesteps = flow_sigmas(values["steps"], values["shift"]).timesteps
    if len(np.unique(timesteps)) < len(timesteps):
        found.append(
            f"`steps` {values['steps']} with `shift` {values['shift']:g}: two steps have the same "
            "whole timestep, by which the original finds its place; 100 or fewer are safe"
        )
    if (cache := values["cache"].name) not in ("none", "teacache"):
        found.append(f"`cache` {cache}: the original has TeaCache only")
    forcing = values["forcing"]
    if forcing is not None:
        found.extend(_forcing_violations(forcing, values))
    return [f"`reference_exact`: {line}" for line in found]


def _forcing_violations(forcing: Forcing, values: Mapping[str, Any]) -> Iterator[str]:
    block = forcing.causal_block_size
    if values["video"] is not None:
        yield "`video`: the original stretches it to the size asked for, here it is cropped"
    if values["image"] is not None and block > 1:
        yield f"`image` with `causal_block_size` {block}: the original overwrites it with noise"
    if values["last_image"] is not None and (
        block > 1 or values["num_frames"] > forcing.base_num_frames or values["image"] is None
    ):
        yield (
            "`last_image`: the original needs `image`, blocks of 1 and a video made at once; "
            "otherwise it fails, leaves frames noise or delivers the end frame's latent"
        )
    if forcing.addnoise_condition:
        yield "`addnoise_condition`: the original's noise for it comes from an unseeded generator"
    if forcing.continuation != "pixels":
        yield f"`continuation` {forcing.continuation}: the original continues from pixels"
    if block > 1:
        yield from _indivisible(forcing, values)


def _indivisible(forcing: Forcing, values: Mapping[str, Any]) -> Iterator[str]:
    """Frames behind the last whole block of a window stay noise in the original."""
    block, total = forcing.causal_block_size, latent_frames(values["num_frames"])
    size, overlap = (latent_frames(n) for n in (forcing.base_num_frames, forcing.overlap_history))
    lengths = {"num_frames": total}
    if total > size:
        last = (total - overlap - 1) % (size - overlap) + 1 + overlap
        lengths = {"base_num_frames": size, "overlap_history": overlap, "num_frames": last}
    for name, length in lengths.items():
        if length % block:
            # Windows begin with a whole number of blocks, so the last one's rest is the video's.
            given = values[name] if name == "num_frames" else getattr(forcing, name)
            step = geometry.FRAMES_PER_LATENT
            near = [given + step * by for by in (-(length % block), block - length % block)]
            legal = " or ".join(str(frames) for frames in near if frames > 0)
            yield (
                f"`{name}` {given} makes {length} latent frames in a window, "
                f"which blocks of {block} do not divide; nearest: {legal}"
            )
