"""From what was asked to what will be done: defaults filled in, everything checked.

Nothing here reads a weight. All that is wrong is reported at once, a line each, with the value, the
rule and legal values; a setting's name stands in backticks, and the command line shows its flag.
"""

import dataclasses
import secrets
from dataclasses import replace
from typing import Any

from skyreels_jax.checkpoints import Checkpoint, Default
from skyreels_jax.diffusion.sigmas import flow_sigmas
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request.builder import GIVEN, RequestBuilder
from skyreels_jax.generation.request.forcing import resolve_forcing
from skyreels_jax.generation.request.reference import reference_violations
from skyreels_jax.generation.request.resolved import ResolvedRequest
from skyreels_jax.generation.request.settings import (
    DRAW_SEED,
    MAX_SEEDS,
    PlainSettings,
    Request,
    violation,
)
from skyreels_jax.generation.windows import prompts_by_window
from skyreels_jax.geometry import pixel_frames
from skyreels_jax.media import check_output
from skyreels_jax.memory import available_memory, estimate
from skyreels_jax.prompts import NEGATIVE_PROMPT_EN, NEGATIVE_PROMPT_ZH


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
    builder = RequestBuilder(request, checkpoint)
    defaults = checkpoint.defaults
    image, last_image = builder.images()
    fps = builder.choose("fps", defaults.fps)
    video, still = builder.given_video(fps)
    height, width = builder.size(still if image is None else image)
    for what, shown in (("the image", image), ("the last image", last_image), ("the video", still)):
        builder.warn_of_cut(what, shown, (height, width))
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
        "guidance_scale": builder.choose("guidance_scale", defaults.guidance_scale),
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
    for entry in dataclasses.fields(PlainSettings):
        values[entry.name] = getattr(request, entry.name)
        if values[entry.name] != entry.default:
            builder.sources[entry.name] = GIVEN
    values["forcing"] = resolve_forcing(builder, values)
    problems = [*builder.problems, *_violations(request, values)]
    if request.reference_exact and not problems:
        problems = reference_violations(values)
    if not problems:
        resolved = ResolvedRequest(
            **values, sources=builder.sources, warnings=tuple(builder.warnings)
        )
        prompt = request.prompt
        prompts = [prompt] if isinstance(prompt, str) else prompt
        resolved = replace(resolved, prompts=prompts_by_window(prompts, resolved.windows))
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
        + (", `dtype` bfloat16" if resolved.dtype == "float32" else "")
        + " or a smaller checkpoint"
    ]
