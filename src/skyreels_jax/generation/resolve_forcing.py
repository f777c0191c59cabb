"""The settings of diffusion forcing: defaults filled in, everything checked."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from skyreels_jax import geometry
from skyreels_jax.checkpoints import Default
from skyreels_jax.diffusion.sigmas import NUM_TRAIN_TIMESTEPS
from skyreels_jax.generation.draft import Draft
from skyreels_jax.generation.request import HAND_OVERS, Forcing, Request
from skyreels_jax.geometry import latent_frames

# As in the original's examples; of short windows less than half.
OVERLAP: Final = 17
# From here on the original warns that joins become visible.
MUCH_NOISE: Final = 60
# Settings that only diffusion forcing has.
OWN: Final = (
    *("base_num_frames", "overlap_history", "ar_step", "causal_block_size"),
    *("addnoise_condition", "addnoise_once", "hand_over", "causal_attention"),
)


def resolve_forcing(draft: Draft, values: Mapping[str, Any]) -> Forcing | None:
    """The settings for a diffusion-forcing checkpoint, ``None`` for others.

    Problems and remarks are added to the ``draft``; ``values`` are the settings decided before.
    """
    request = draft.request
    if draft.checkpoint.task != "df":
        draft.problems.extend(
            f"{flag(name)}: only diffusion-forcing (DF) checkpoints take it"
            for name in OWN
            if getattr(request, name) is not None
        )
        return None
    at_once = draft.checkpoint.defaults.num_frames
    overlapping = request.video is not None or values["num_frames"] > (
        request.base_num_frames or at_once.value
    )
    forcing = Forcing(
        base_num_frames=draft.choose("base_num_frames", at_once),
        # A short video has no windows to overlap; one latent frame is the least that is legal.
        overlap_history=draft.choose(
            "overlap_history",
            Default(usual_overlap(request.base_num_frames or at_once.value), "the original's usage")
            if overlapping
            else Default(1, "one window"),
        ),
        ar_step=draft.choose("ar_step", draft.checkpoint.defaults.ar_step),
        causal_block_size=draft.choose("causal_block_size", Default(1, "frame by frame")),
        addnoise_condition=draft.choose(
            "addnoise_condition", Default(0, "given frames stay clean")
        ),
        addnoise_once=draft.choose("addnoise_once", Default(False, "fresh in every step")),
        hand_over=draft.choose(
            "hand_over",
            Default("pixels", "the original's way")
            if request.reference_exact
            else Default("latents", "no VAE between windows"),
        ),
        causal_attention=draft.choose(
            "causal_attention", Default(draft.checkpoint.block_length, "the checkpoint's config")
        ),
    )
    found = [*_length_violations(forcing, request, values), *_number_violations(forcing, values)]
    draft.problems.extend(found)
    if not found:
        draft.notices.extend(_remarks(forcing, values, overlapping, request.overlap_history))
    return forcing


def usual_overlap(at_once: int) -> int:
    """The overlap of windows of ``at_once`` frames, if none is asked for."""
    half = at_once // 2
    step = geometry.FRAMES_PER_LATENT
    return min(OVERLAP, max(1, (half - 1) // step * step + 1))


def _length_violations(
    forcing: Forcing, request: Request, values: Mapping[str, Any]
) -> Sequence[str]:
    found = []
    for name in ("base_num_frames", "overlap_history"):
        frames = getattr(forcing, name)
        if frames < 1 or frames % geometry.FRAMES_PER_LATENT != 1:
            near = " or ".join(
                map(str, geometry.nearest_multiples(frames, geometry.FRAMES_PER_LATENT, 1))
            )
            found.append(f"{flag(name)} {frames} must be 4 k + 1; nearest: {near}")
    if found:
        return found
    overlap, at_once = forcing.overlap_history, forcing.base_num_frames
    if overlap >= at_once and (request.video is not None or values["num_frames"] > at_once):
        found.append(
            f"--overlap-history {overlap} must be less than --base-num-frames {at_once}: a window "
            "would have no new frame; "
            + (f"at most {at_once - 4}" if at_once > 4 else "give windows of at least 5")
        )
    given = values["video"]
    if given is not None and given.frames < overlap:
        legal = geometry.FRAMES_PER_LATENT * (latent_frames(given.frames) - 1) + 1
        found.append(
            f"--video {given.path} has {given.frames} frames, fewer than --overlap-history "
            f"{overlap}; give at most {legal}"
        )
    held = overlap if given is not None else int(values["image"] is not None)
    if held and values["num_frames"] <= held:
        what = f"the {held} frames taken from --video" if given is not None else "--image"
        found.append(
            f"--num-frames {values['num_frames']} leaves nothing to make besides {what}; at least "
            f"{held + geometry.FRAMES_PER_LATENT}"
        )
    return found


def _number_violations(forcing: Forcing, values: Mapping[str, Any]) -> Sequence[str]:
    found = [
        f"{flag(name)} {getattr(forcing, name)} must be at least {least}"
        for name, least in (("ar_step", 0), ("causal_block_size", 1), ("causal_attention", 1))
        if getattr(forcing, name) is not None and getattr(forcing, name) < least
    ]
    if not 0 <= forcing.addnoise_condition < NUM_TRAIN_TIMESTEPS:
        found.append(
            f"--addnoise-condition {forcing.addnoise_condition} must be between 0 and "
            f"{NUM_TRAIN_TIMESTEPS - 1}; 20 is usual"
        )
    if forcing.addnoise_once and not forcing.addnoise_condition:
        found.append("--addnoise-once without --addnoise-condition: there is no noise to keep")
    if forcing.hand_over not in HAND_OVERS:
        found.append(
            f"--hand-over {forcing.hand_over!r} does not exist; there are {', '.join(HAND_OVERS)}"
        )
    if forcing.causal_attention is not None and values["last_image"] is not None:
        found.append(
            "--last-image with block-causal attention: earlier frames would never see it; use a "
            "checkpoint with full attention or leave the image out"
        )
    return found


def _remarks(
    forcing: Forcing, values: Mapping[str, Any], overlapping: bool, asked_overlap: int | None
) -> Sequence[str]:
    remarks = []
    if overlapping and asked_overlap is None and values["video"] is None:
        remarks.append(
            f"{values['num_frames']} frames are made in windows of {forcing.base_num_frames} that "
            f"overlap by {forcing.overlap_history}; --base-num-frames {values['num_frames']} makes "
            "them at once"
        )
    if forcing.addnoise_condition > MUCH_NOISE:
        remarks.append(
            f"--addnoise-condition {forcing.addnoise_condition} is much: above {MUCH_NOISE} joins "
            "become visible"
        )
    given = values["video"]
    if given is not None:
        total = given.frames + values["num_frames"] - forcing.overlap_history
        remarks.append(
            f"{given.path.name} gives {given.frames} frames; {values['num_frames']} less the "
            f"{forcing.overlap_history} taken over follow, {total} in all"
        )
        if abs(given.fps - values["fps"]) > 0.01:
            remarks.append(
                f"{given.path.name} has {given.fps:.6g} frames a second and is written at "
                f"{float(values['fps']):.6g}, with frames left out or repeated where that is "
                "nearest in time; --fps changes that"
            )
    return remarks


def listed(prompt: str | Sequence[str] | Mapping[int, str]) -> Sequence[str] | Mapping[int, str]:
    """One prompt as a list of one."""
    return [prompt] if isinstance(prompt, str) else prompt


def flag(name: str) -> str:
    """The command line's name of a setting."""
    return f"--{name.replace('_', '-')}"
