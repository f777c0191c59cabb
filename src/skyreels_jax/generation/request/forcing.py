"""The settings of diffusion forcing: defaults filled in, everything checked."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from skyreels_jax import geometry
from skyreels_jax.checkpoints import Default
from skyreels_jax.generation.request.builder import RequestBuilder
from skyreels_jax.generation.request.resolved import Forcing
from skyreels_jax.geometry import latent_frames

# As in the original's examples; of short windows less than half.
_OVERLAP: Final = 17
# From here on the original warns that joins become visible.
_MUCH_NOISE: Final = 60


def resolve_forcing(builder: RequestBuilder, values: Mapping[str, Any]) -> Forcing | None:
    """The settings for a diffusion-forcing checkpoint, ``None`` for others.

    Problems and warnings are added to the ``builder``; ``values`` are those resolved before.
    """
    request, choose = builder.request, builder.choose
    if builder.checkpoint.task != "df":
        return None
    before = len(builder.problems)
    at_once = builder.checkpoint.defaults.num_frames
    overlapping = request.video is not None or values["num_frames"] > (
        request.base_num_frames or at_once.value
    )
    forcing = Forcing(
        base_num_frames=choose("base_num_frames", at_once),
        # A short video has no windows to overlap; one latent frame is the least that is legal.
        overlap_history=choose(
            "overlap_history",
            Default(usual_overlap(request.base_num_frames or at_once.value), "the original's usage")
            if overlapping
            else Default(1, "one window"),
        ),
        ar_step=choose("ar_step", builder.checkpoint.defaults.ar_step),
        causal_block_size=choose("causal_block_size", Default(1, "frame by frame")),
        addnoise_condition=choose("addnoise_condition", Default(0, "given frames stay clean")),
        addnoise_once=choose("addnoise_once", Default(False, "fresh in every step")),
        continuation=choose(
            "continuation",
            Default("pixels", "the original's way")
            if request.reference_exact
            else Default("latents", "no VAE between windows"),
        ),
        causal_attention=choose(
            "causal_attention", Default(builder.checkpoint.block_length, "the checkpoint's config")
        ),
    )
    if len(builder.problems) == before:
        builder.problems.extend(_violations(forcing, values))
    if len(builder.problems) == before:
        builder.warnings.extend(_warnings(forcing, values, overlapping, request.overlap_history))
    return forcing


def usual_overlap(at_once: int) -> int:
    """The overlap of windows of ``at_once`` frames, if none is asked for."""
    half = at_once // 2
    step = geometry.FRAMES_PER_LATENT
    return min(_OVERLAP, max(1, (half - 1) // step * step + 1))


def _violations(forcing: Forcing, values: Mapping[str, Any]) -> Iterator[str]:
    """A line for each setting that does not go with another; each by itself is legal."""
    overlap, at_once = forcing.overlap_history, forcing.base_num_frames
    given, frames = values["video"], values["num_frames"]
    if overlap >= at_once and (given is not None or frames > at_once):
        yield (
            f"`overlap_history` {overlap} must be less than `base_num_frames` {at_once}: a window "
            "would have no new frame; "
            + (f"at most {at_once - 4}" if at_once > 4 else "give windows of at least 5")
        )
    if given is not None and given.frames < overlap:
        legal = geometry.FRAMES_PER_LATENT * (latent_frames(given.frames) - 1) + 1
        yield (
            f"`video` {given.path} has {given.frames} frames, fewer than `overlap_history` "
            f"{overlap}; give at most {legal}"
        )
    held = overlap if given is not None else int(values["image"] is not None)
    if held and frames <= held:
        what = f"the {held} frames taken from `video`" if given is not None else "`image`"
        yield (
            f"`num_frames` {frames} leaves nothing to make besides {what}; at least "
            f"{held + geometry.FRAMES_PER_LATENT}"
        )
    if forcing.addnoise_once and not forcing.addnoise_condition:
        yield "`addnoise_once` without `addnoise_condition`: there is no noise to keep"
    if forcing.causal_attention is not None and values["last_image"] is not None:
        yield (
            "`last_image` with block-causal attention: earlier frames would never see it; use a "
            "checkpoint with full attention or leave the image out"
        )


def _warnings(
    forcing: Forcing, values: Mapping[str, Any], overlapping: bool, asked_overlap: int | None
) -> Iterator[str]:
    if overlapping and asked_overlap is None and values["video"] is None:
        yield (
            f"{values['num_frames']} frames are made in windows of {forcing.base_num_frames} that "
            f"overlap by {forcing.overlap_history}; `base_num_frames` {values['num_frames']} makes "
            "them at once"
        )
    if forcing.addnoise_condition > _MUCH_NOISE:
        yield (
            f"`addnoise_condition` {forcing.addnoise_condition} is much: above {_MUCH_NOISE} joins "
            "become visible"
        )
    given = values["video"]
    if given is not None:
        total = given.frames + values["num_frames"] - forcing.overlap_history
        yield (
            f"{given.path.name} gives {given.frames} frames; {values['num_frames']} less the "
            f"{forcing.overlap_history} taken over follow, {total} in all"
        )
        if abs(given.fps - values["fps"]) > 0.01:
            yield (
                f"{given.path.name} has {given.fps:.6g} frames a second and is written at "
                f"{float(values['fps']):.6g}, with frames left out or repeated where that is "
                "nearest in time; `fps` changes that"
            )
