"""From what was asked to what will be done: defaults filled in, everything checked.

Nothing here reads a weight. All that is wrong is reported at once, a line each, with the value, the
rule and legal values.
"""

import math
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from skyreels_jax import geometry
from skyreels_jax.checkpoints import Checkpoint, Default
from skyreels_jax.diffusion.sigmas import NUM_TRAIN_TIMESTEPS, flow_sigmas
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.draft import Draft
from skyreels_jax.generation.request import Request, ResolvedRequest
from skyreels_jax.generation.resolve_forcing import listed, resolve_forcing
from skyreels_jax.generation.resolve_reference import reference_violations
from skyreels_jax.generation.windows import prompts_by_window
from skyreels_jax.geometry import pixel_frames
from skyreels_jax.media import check_output
from skyreels_jax.memory import available_memory, estimate
from skyreels_jax.ops.attention import ATTENTION_PATHS
from skyreels_jax.prompts import NEGATIVE_PROMPT_EN, NEGATIVE_PROMPT_ZH
from skyreels_jax.sampling.noise import NOISES

DTYPES: Final = ("bfloat16", "float32")
MAX_SEED: Final = 2**32 - 1


def resolve(
    request: Request, checkpoint: Checkpoint, *, memory: int | None = None
) -> ResolvedRequest:
    """Complete ``request`` from the checkpoint's defaults and check all of it.

    Args:
        request: as asked for.
        checkpoint: decides the task and the defaults.
        memory: bytes the transformer may take; ``None`` for what is free on the device.

    Raises:
        RequestError: with everything that is wrong, a line each.
    """
    draft = Draft(request, checkpoint)
    defaults = checkpoint.defaults
    image, last_image = draft.images()
    fps = draft.fps()
    video, still = draft.given_video(fps)
    height, width = draft.size(still if image is None else image)
    draft.say_what_is_cut("the image", image, (height, width))
    draft.say_what_is_cut("the last image", last_image, (height, width))
    draft.say_what_is_cut("the video", still, (height, width))
    values: dict[str, Any] = {
        "model": checkpoint.repo or checkpoint.folder.resolve().name,
        "task": checkpoint.task,
        "prompts": (),
        "negative_prompt": draft.choose(
            "negative_prompt",
            _negative_prompt(checkpoint),
        ),
        "image": image,
        "last_image": last_image,
        "video": video,
        "forcing": None,
        "height": height,
        "width": width,
        "num_frames": draft.frames(fps),
        "steps": draft.choose("steps", defaults.steps),
        "guidance_scale": float(draft.choose("guidance_scale", defaults.guidance_scale)),
        "shift": float(draft.choose("shift", defaults.shift)),
        "fps": fps,
        "seed": draft.choose("seed", Default(secrets.randbits(32), "drawn at random")),
        "dtype": request.dtype,
        "attention": request.attention,
        "noise": draft.choose(
            "noise",
            Default("torch", "the original's kind")
            if request.reference_exact
            else Default("jax", "the same on every backend"),
        ),
        "reference_exact": request.reference_exact,
        "batched_guidance": request.batched_guidance,
        "cache": draft.cache(),
    }
    values["forcing"] = resolve_forcing(draft, values)
    problems = [*draft.problems, *_violations(request, values)]
    if request.reference_exact and not problems:
        problems = reference_violations(values)
    if not problems:
        resolved = ResolvedRequest(**values, sources=draft.sources, notices=tuple(draft.notices))
        resolved = replace(
            resolved, prompts=prompts_by_window(listed(request.prompt), resolved.windows)
        )
        problems = _memory_violations(resolved, checkpoint, memory)
        if not problems:
            return resolved
    raise RequestError("\n".join(problems))


def _negative_prompt(checkpoint: Checkpoint) -> Default[str]:
    preset = checkpoint.guess.preset
    if preset is not None and preset.negative_prompt is not None:
        return Default(preset.negative_prompt, f"preset {preset.name}")
    text = NEGATIVE_PROMPT_ZH if checkpoint.task == "df" else NEGATIVE_PROMPT_EN
    return Default(text, f"the original's for {checkpoint.task.upper()} checkpoints")


def _violations(request: Request, values: Mapping[str, Any]) -> list[str]:
    """One line for each setting that is illegal by itself."""
    found = []
    prompts = listed(request.prompt)
    texts = prompts.values() if isinstance(prompts, Mapping) else prompts
    if not texts or not all(text.strip() for text in texts):
        found.append("--prompt is empty; say what the video should show")
    for name in ("height", "width"):
        if values[name] < 1 or values[name] % geometry.SIZE_MULTIPLE:
            near = _either(geometry.nearest_multiples(values[name]))
            found.append(f"--{name} {values[name]} must be a multiple of 16; nearest: {near}")
    frames = values["num_frames"]
    if frames < 1 or frames % geometry.FRAMES_PER_LATENT != 1:
        near = _either(geometry.nearest_multiples(frames, geometry.FRAMES_PER_LATENT, 1))
        found.append(f"--num-frames {frames} must be 4 k + 1; nearest: {near}")
    for name, least, most in (
        ("steps", 1, NUM_TRAIN_TIMESTEPS),
        ("seed", 0, MAX_SEED),
    ):
        if not least <= values[name] <= most:
            found.append(f"--{name} {values[name]} must be between {least} and {most}")
    if not (math.isfinite(values["guidance_scale"]) and values["guidance_scale"] >= 0):
        found.append(
            f"--guidance-scale {values['guidance_scale']} must be a number of at least 0; "
            "5 and 6 are usual, 1 turns it off"
        )
    found.extend(_shift_violations(values["shift"], values["steps"]))
    found.extend(_choice_violations(request))
    return found


def _shift_violations(shift: float, steps: int) -> list[str]:
    if not (math.isfinite(shift) and shift > 0):
        return [f"--shift {shift} must be a number above 0; 3 to 8 are usual"]
    if not 1 <= steps <= NUM_TRAIN_TIMESTEPS:
        return []
    try:
        flow_sigmas(steps, shift)
    except ValueError as error:
        return [f"--shift {shift} with {steps} steps: {error}"]
    return []


def _choice_violations(request: Request) -> list[str]:
    found = []
    for name, value, choices in (
        ("dtype", request.dtype, DTYPES),
        ("attention", request.attention, tuple(ATTENTION_PATHS)),
        ("noise", request.noise, NOISES),
    ):
        if value is not None and value not in choices:
            found.append(f"--{name} {value!r} does not exist; there are {', '.join(choices)}")
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
    copies = 2 if resolved.batched_guidance and resolved.guidance_scale != 1 else 1
    needed = estimate(checkpoint.config, resolved.window_shape, dtype=resolved.dtype, copies=copies)
    if free is None or needed.total <= free:
        return []
    frames = pixel_frames(resolved.window_shape[0])
    return [
        f"not enough memory: {frames} frames of {resolved.height} x {resolved.width} "
        f"in {resolved.dtype} take at least {needed.total / 2**30:.1f} GiB (weights "
        f"{needed.weights / 2**30:.1f}, work {(needed.total - needed.weights) / 2**30:.1f}) and "
        f"{free / 2**30:.1f} GiB are free; use fewer frames, a smaller size"
        + (", --dtype bfloat16" if resolved.dtype == "float32" else "")
        + " or a smaller checkpoint"
    ]


def _either(values: list[int]) -> str:
    return " or ".join(map(str, values))
