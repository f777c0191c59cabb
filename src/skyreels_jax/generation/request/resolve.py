"""From what was asked to what will be done: defaults filled in, everything checked.

Nothing here reads a weight. All that is wrong is reported at once, a line each, with the value, the
rule and legal values; a setting's name stands in backticks, and the command line shows its flag.
"""

import dataclasses
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from skyreels_jax import geometry
from skyreels_jax.checkpoints import Checkpoint, Default
from skyreels_jax.diffusion.unipc import flow_sigmas
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request.builder import GIVEN, LongVideo, RequestBuilder
from skyreels_jax.generation.request.notes import length_notes, notes
from skyreels_jax.generation.request.reference import (
    original_guidance,
    reference_violations,
    state_violations,
)
from skyreels_jax.generation.request.resolved import Forcing, ResolvedRequest, prompts_by_window
from skyreels_jax.generation.request.settings import (
    DRAW_SEED,
    MAX_SEEDS,
    PlainSettings,
    Request,
    violation,
)
from skyreels_jax.geometry import latent_frames, pixel_frames
from skyreels_jax.media import check_output
from skyreels_jax.memory import Estimate, available_memory, estimate
from skyreels_jax.prompts import NEGATIVE_PROMPT_EN, NEGATIVE_PROMPT_ZH
from skyreels_jax.weights.lora.binding import Lora

# As in the original's examples; of short windows less than half.
_OVERLAP: Final = 17
# From here on the original warns that joins become visible.
_MUCH_NOISE: Final = 60


def resolve(
    request: Request,
    checkpoint: Checkpoint,
    *,
    memory: int | None = None,
    loras: Sequence[Lora] = (),
) -> ResolvedRequest:
    """Complete ``request`` from the checkpoint's defaults and check all of it.

    Args:
        request: as asked for.
        checkpoint: decides the task and the defaults.
        memory: bytes the transformer may take; ``None`` for what is free on the device.
        loras: of the transformer; words that they were trained on are known.

    Raises:
        RequestError: with everything that is wrong, a line each.
    """
    builder = RequestBuilder(request, checkpoint)
    defaults = checkpoint.defaults
    image, last_image = builder.images()
    fps = builder.choose("fps", defaults.fps)
    video, still = builder.given_video(fps)
    height, width = builder.size(still if image is None else image)
    for what, shown in (("the image", image), ("the last image", last_image), ("the video", still)):
        as_original = request.reference_exact and shown is still
        builder.warn_of_cut(what, shown, (height, width), stretched=as_original)
    values: dict[str, Any] = {
        "model": checkpoint.repo or checkpoint.folder.resolve().name,
        "task": checkpoint.task,
        "prompts": (),
        "negative_prompt": builder.choose("negative_prompt", _negative_prompt(checkpoint)),
        "image": image,
        "last_image": last_image,
        "video": video,
        "forcing": None,
        "height": height,
        "width": width,
        "num_frames": builder.frames(fps),
        "steps": builder.choose("steps", defaults.steps),
        "guidance_scale": 0.0,
        "shift": builder.choose("shift", defaults.shift),
        "fps": fps,
        "noise": builder.choose(
            "noise",
            Default("torch", "the original's kind")
            if request.reference_exact
            else Default("jax", "the same on every backend"),
        ),
        "seed": _seed(builder),
        "cache": builder.cache(),
    }
    long = builder.long_video(values["num_frames"])
    guidance = defaults.guidance_scale if long is None else long.guidance_scale
    scale = builder.choose("guidance_scale", guidance)
    values["guidance_scale"] = (
        original_guidance(builder, scale) if request.reference_exact else scale
    )
    for entry in dataclasses.fields(PlainSettings):
        values[entry.name] = getattr(request, entry.name)
        if values[entry.name] != entry.default:
            builder.sources[entry.name] = GIVEN
    values["forcing"] = resolve_forcing(builder, values, long)
    problems = [*builder.problems, *_violations(request, values)]
    if request.reference_exact and not problems:
        problems = reference_violations(values)
    if not problems:
        negative = values["negative_prompt"]
        prompts, values["negative_prompt"] = builder.in_known_words(negative, loras)
        said = tuple(builder.warnings)
        resolved = ResolvedRequest(**values, sources=builder.sources, warnings=said)
        resolved = replace(resolved, prompts=prompts_by_window(prompts, resolved.windows))
        problems = [*state_violations(resolved), *_memory_violations(resolved, checkpoint, memory)]
        if not problems:
            of_length = (*builder.length_warnings, *length_notes(request, resolved, checkpoint))
            said = (*resolved.warnings, *notes(request, resolved, checkpoint), *of_length)
            return replace(resolved, warnings=said, length_warnings=of_length)
    raise RequestError("\n".join(problems))


def _negative_prompt(checkpoint: Checkpoint) -> Default[str]:
    preset = checkpoint.guess.preset
    if preset is not None and preset.negative_prompt is not None:
        return Default(preset.negative_prompt, f"preset {preset.name}")
    if checkpoint.guess.family == "Wan2.1":
        return Default(NEGATIVE_PROMPT_ZH, "Wan 2.1's")
    text = NEGATIVE_PROMPT_ZH if checkpoint.task == "df" else NEGATIVE_PROMPT_EN
    return Default(text, f"the original's for {checkpoint.task.upper()} checkpoints")


def _seed(builder: RequestBuilder) -> int:
    drawn = Default(secrets.randbits(32), "drawn at random")
    seed = builder.choose("seed", drawn)
    if seed == DRAW_SEED:
        builder.sources["seed"] = drawn.source
        return drawn.value
    return seed


def _violations(request: Request, values: dict[str, Any]) -> list[str]:
    """One line for each setting that is illegal by itself, those aside that are chosen."""
    plain = {"prompt": request.prompt} | {
        entry.name: values[entry.name] for entry in dataclasses.fields(PlainSettings)
    }
    found = [
        wrong
        for name, value in plain.items()
        if value is not None and (wrong := violation(name, value))
    ]
    most = MAX_SEEDS.get(values["noise"])
    if most is not None and values["seed"] > most and values["seed"] <= max(MAX_SEEDS.values()):
        found.append(
            f"`seed` {values['seed']} must be between 0 and {most}; more takes `noise` torch"
        )
    if not (violation("shift", values["shift"]) or violation("steps", values["steps"])):
        try:
            flow_sigmas(values["steps"], values["shift"])
        except ValueError as error:
            found.append(f"`shift` {values['shift']} with {values['steps']} steps: {error}")
    if request.output is not None:
        try:
            check_output(request.output)
        except RequestError as error:
            found.append(str(error))
    return found


def _memory_violations(
    resolved: ResolvedRequest, checkpoint: Checkpoint, memory: int | None
) -> list[str]:
    free = available_memory() if memory is None else memory
    needed = needed_memory(resolved, checkpoint)
    if free is None or needed.total <= free:
        return []
    frames = pixel_frames(resolved.window_shape[0])
    return [
        f"not enough memory: {frames} frames of {resolved.height} x {resolved.width} "
        f"in {resolved.dtype} take at least {needed.total / 2**30:.1f} GiB (weights "
        f"{needed.weights / 2**30:.1f}, work {(needed.total - needed.weights) / 2**30:.1f}) and "
        f"{free / 2**30:.1f} GiB are free; use fewer frames, a smaller size"
        + (", `dtype` bfloat16" if resolved.dtype == "float32" else "")
        + (", `weights` int8" if resolved.weights in (None, "bf16") else "")
        + " or a smaller checkpoint"
    ]


def needed_memory(resolved: ResolvedRequest, checkpoint: Checkpoint) -> Estimate:
    """What denoising a video takes at least, on the device."""
    return estimate(
        checkpoint.config,
        resolved.window_shape,
        dtype=resolved.dtype,
        weights=resolved.weights,
        offload=resolved.offload,
        copies=resolved.rows,
    )


def resolve_forcing(
    builder: RequestBuilder, values: Mapping[str, Any], long: LongVideo | None = None
) -> Forcing | None:
    """The settings for a diffusion-forcing checkpoint, ``None`` for others.

    Problems and warnings are added to the ``builder``; ``values`` are those resolved before, and
    ``long`` has other defaults for a video of several windows.
    """
    request, choose = builder.request, builder.choose
    if builder.checkpoint.task != "df":
        return None
    before = len(builder.problems)
    at_once = builder.checkpoint.defaults.num_frames
    overlapping = request.video is not None or values["num_frames"] > (
        request.base_num_frames or at_once.value
    )
    overlap, noise = Default(1, "one window"), Default(0, "given frames stay clean")
    lag = builder.checkpoint.defaults.ar_step
    if long is not None:
        overlap, noise, lag = long.overlap_history, long.addnoise_condition, long.ar_step
    elif overlapping:
        usual = usual_overlap(request.base_num_frames or at_once.value)
        overlap = Default(usual, "the original's usage")
    forcing = Forcing(
        base_num_frames=choose("base_num_frames", at_once),
        # A short video has no windows to overlap; one latent frame is the least that is legal.
        overlap_history=choose("overlap_history", overlap),
        ar_step=choose("ar_step", lag),
        causal_block_size=choose("causal_block_size", Default(1, "frame by frame")),
        addnoise_condition=choose("addnoise_condition", noise),
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
        builder.problems.extend(forcing_violations(forcing, values))
    if len(builder.problems) == before:
        builder.length_warnings.extend(_length_warnings(forcing, values, overlapping, request))
        builder.warnings.extend(_forcing_warnings(forcing, values, request))
    return forcing


def usual_overlap(at_once: int) -> int:
    """The overlap of windows of ``at_once`` frames, if none is asked for."""
    half = at_once // 2
    step = geometry.FRAMES_PER_LATENT
    return min(_OVERLAP, max(1, (half - 1) // step * step + 1))


def forcing_violations(forcing: Forcing, values: Mapping[str, Any]) -> Iterator[str]:
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


def _length_warnings(
    forcing: Forcing, values: Mapping[str, Any], overlapping: bool, request: Request
) -> Iterator[str]:
    if overlapping and request.overlap_history is None and values["video"] is None:
        yield (
            f"{values['num_frames']} frames are made in windows of {forcing.base_num_frames} that "
            f"overlap by {forcing.overlap_history}; `base_num_frames` {values['num_frames']} makes "
            "them at once"
        )
    windows = values["num_frames"] > forcing.base_num_frames
    if windows and not (forcing.addnoise_condition or request.reference_exact):
        yield (
            "`addnoise_condition` 0: windows follow each other without noise over what they take "
            "over, so that faults grow from one to the next; 20 is usual for long videos"
        )
    given = values["video"]
    if given is not None:
        total = given.frames + values["num_frames"] - forcing.overlap_history
        yield (
            f"{given.path.name} gives {given.frames} frames; {values['num_frames']} less the "
            f"{forcing.overlap_history} taken over follow, {total} in all"
        )


def _forcing_warnings(
    forcing: Forcing, values: Mapping[str, Any], request: Request
) -> Iterator[str]:
    if (request.addnoise_condition or 0) > _MUCH_NOISE:
        yield (
            f"`addnoise_condition` {forcing.addnoise_condition} is much: above {_MUCH_NOISE} joins "
            "become visible"
        )
    given = values["video"]
    if given is not None and abs(given.fps - values["fps"]) > 0.01:
        frames = (
            "each frame once, as the original does"
            if values["reference_exact"]
            else "frames left out or repeated where that is nearest in time"
        )
        yield (
            f"{given.path.name} has {given.fps:.6g} frames a second and is written at "
            f"{float(values['fps']):.6g}, with {frames}; `fps` changes that"
        )
