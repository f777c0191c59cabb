"""``reference_exact``: what it refuses, and what the original counts.

It refuses requests that the original gets wrong, or that no seed decides.

Sources: the diffusion-forcing pipeline of SkyReels-V2; docs/numerics.md lists what it does and what
is done here instead.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from skyreels_jax import geometry
from skyreels_jax.diffusion.cache_settings import CallCounter
from skyreels_jax.diffusion.unipc import flow_sigmas
from skyreels_jax.generation.request.builder import RequestBuilder
from skyreels_jax.generation.request.resolved import Forcing, ResolvedRequest, Window
from skyreels_jax.geometry import latent_frames


def original_guidance(builder: RequestBuilder, scale: float) -> float:
    """The scale of guidance that the original goes by: diffusion forcing has none up to 1."""
    if builder.checkpoint.task != "df" or scale >= 1:
        return scale
    builder.warnings.append(
        f"`guidance_scale` {scale:g} is no guidance: the original guides above 1 alone"
    )
    return 1.0


def call_counter(request: ResolvedRequest, window: Window) -> CallCounter | None:
    """The original's count of calls in a window, where its TeaCache is to be followed.

    Set by its scripts for windows of ``base_num_frames``, whatever their length, and anew by the
    pipeline for each window that continues something; a count goes on into the next window.
    """
    if not request.cache.original_counter:
        return None
    forcing, steps = request.forcing, request.steps
    if forcing is None:
        return CallCounter(0, steps, 2)
    block, lag = forcing.causal_block_size, forcing.ar_step

    def wrap(frames: int) -> int:
        return max(1, steps + (frames // block - 1) * lag) if lag else steps

    counter = CallCounter(0, 0, 2 if request.is_guided else 1)
    at_once, begin = latent_frames(forcing.base_num_frames), 0
    for each in request.windows[: window.number + 1]:
        continues = each.number or request.video is not None
        count = wrap(each.frames - each.prefix if continues else at_once)
        counter = replace(counter, start=begin, wrap=count)
        moving = each.columns // block - each.prefix // block
        begin = counter.after(steps + (moving - 1) * min(lag, steps))
    return counter


def takes_state(request: ResolvedRequest, window: Window) -> bool:
    """Whether TeaCache's first calls in a window may be answered by what the one before left."""
    counter = call_counter(request, window)
    if counter is None or window.number == 0:
        return False
    return max(counter.at(0), counter.at(1)) >= 2 * request.cache.first_steps


def state_violations(request: ResolvedRequest) -> list[str]:
    """A line where the original's TeaCache would compare windows of different lengths."""
    return [
        f"`reference_exact`: `cache` teacache goes on into window {window.number + 1} of "
        f"{window.frames} latent frames from one of {before.frames}, where the original fails; "
        f"`num_frames` {_whole_windows(request)} makes them alike"
        for before, window in pairwise(request.windows)
        if before.frames != window.frames and takes_state(request, window)
    ]


def _whole_windows(request: ResolvedRequest) -> int:
    """The next number of frames that needs no shorter window."""
    last, largest = request.windows[-1], request.windows[0].frames
    return request.num_frames + geometry.FRAMES_PER_LATENT * (largest - last.frames)


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
    if cache == "teacache" and values["batched_guidance"]:
        found.append("`batched_guidance`: the original's TeaCache decides on each of two calls")
    forcing = values["forcing"]
    if forcing is not None:
        found.extend(_forcing_violations(forcing, values))
    return [f"`reference_exact`: {line}" for line in found]


def _forcing_violations(forcing: Forcing, values: Mapping[str, Any]) -> Iterator[str]:
    block = forcing.causal_block_size
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
