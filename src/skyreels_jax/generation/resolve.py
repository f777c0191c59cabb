"""From what was asked to what will be done: defaults filled in, everything checked.

Nothing here reads a weight. All that is wrong is reported at once, a line each, with the value, the
rule and legal values.
"""

import math
import secrets
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from skyreels_jax.checkpoints import Checkpoint, Default
from skyreels_jax.diffusion.schedule import TRAIN_LEVELS, flow_sigmas
from skyreels_jax.errors import RequestError
from skyreels_jax.generation import sizes
from skyreels_jax.generation.memory import available_memory, estimate
from skyreels_jax.generation.request import Request, ResolvedRequest
from skyreels_jax.media import ImageInput, RgbImage, check_output, read_image
from skyreels_jax.ops.attention import PATHS
from skyreels_jax.prompts import NEGATIVE_PROMPT_EN, NEGATIVE_PROMPT_ZH

DTYPES: Final = ("bfloat16", "float32")
MAX_SEED: Final = 2**32 - 1
MAX_FPS: Final = 240
GIVEN: Final = "given"

T = TypeVar("T")


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
    draft = _Draft(request, checkpoint)
    defaults = checkpoint.defaults
    image, last_image = draft.images()
    fps = draft.choose("fps", defaults.fps)
    height, width = draft.size(image)
    chinese = checkpoint.task == "df"
    values: dict[str, Any] = {
        "model": checkpoint.repo or checkpoint.folder.resolve().name,
        "task": checkpoint.task,
        "prompt": request.prompt,
        "negative_prompt": draft.choose(
            "negative_prompt",
            Default(
                NEGATIVE_PROMPT_ZH if chinese else NEGATIVE_PROMPT_EN,
                f"the original's for {checkpoint.task.upper()} checkpoints",
            ),
        ),
        "image": image,
        "last_image": last_image,
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
        "batched_guidance": request.batched_guidance,
    }
    problems = [*draft.problems, *_violations(request, values)]
    resolved = ResolvedRequest(**values, sources=draft.sources, notices=tuple(draft.notices))
    if not problems:
        problems = _memory_violations(resolved, checkpoint, memory)
    if problems:
        raise RequestError("\n".join(problems))
    return resolved


class _Draft:
    """Collects sources, notices and problems while the settings are being decided."""

    def __init__(self, request: Request, checkpoint: Checkpoint):
        self.request = request
        self.checkpoint = checkpoint
        self.sources: dict[str, str] = {}
        self.notices: list[str] = []
        self.problems: list[str] = []

    def choose(self, name: str, default: Default[T]) -> T:
        """What was given under ``name``, else the default; its source is noted."""
        given = getattr(self.request, name)
        self.sources[name] = default.source if given is None else GIVEN
        return default.value if given is None else given

    def images(self) -> tuple[RgbImage | None, RgbImage | None]:
        """Both images, read; what the task needs and refuses is checked."""
        task = self.checkpoint.task
        found: list[RgbImage | None] = []
        for name, needed, taken in (
            ("image", task in ("i2v", "flf2v"), task != "t2v"),
            ("last_image", task == "flf2v", task == "flf2v"),
        ):
            given: ImageInput | None = getattr(self.request, name)
            what = f"{name.replace('_', ' ')} (--{name.replace('_', '-')})"
            if given is None and needed:
                self.problems.append(f"{what}: {task.upper()} checkpoints need one")
            if given is not None and not taken:
                self.problems.append(
                    f"{what}: {task.upper()} checkpoints take none; leave it out, or use "
                    f"{'an I2V or DF' if name == 'image' else 'an FLF2V'} checkpoint"
                )
            found.append(None if given is None else self._read(given))
        return found[0], found[1]

    def _read(self, image: ImageInput) -> RgbImage | None:
        try:
            return read_image(image)
        except RequestError as error:
            self.problems.append(str(error))
            return None

    def size(self, image: RgbImage | None) -> tuple[int, int]:
        """Height and width; a default or named size is turned to a portrait image."""
        request, default = self.request, self.checkpoint.defaults.resolution
        named = request.resolution is not None or request.aspect is not None
        if request.height is not None or request.width is not None:
            return self._given_size(named)
        source = GIVEN if request.resolution else default.source
        try:
            height, width = sizes.with_aspect(
                sizes.resolution(request.resolution) if request.resolution else default.value,
                request.aspect,
            )
        except RequestError as error:
            self.problems.append(str(error))
            return default.value
        if request.aspect is None and image is not None and image.shape[0] > image.shape[1]:
            height, width = max(height, width), min(height, width)
            self.notices.append(
                f"the image is upright, so the video is {height} high and {width} wide; "
                "give --height and --width, or --aspect, to have it otherwise"
            )
        self.sources["height"] = self.sources["width"] = source
        return height, width

    def _given_size(self, named: bool) -> tuple[int, int]:
        height, width = self.request.height, self.request.width
        self.sources["height"] = self.sources["width"] = GIVEN
        if named:
            self.problems.append(
                "height and width (--height, --width) exclude --resolution and --aspect"
            )
        if height is None or width is None:
            given, missing = ("height", "width") if width is None else ("width", "height")
            self.problems.append(f"--{given} was given without --{missing}: give both or neither")
            return self.checkpoint.defaults.resolution.value
        return height, width

    def frames(self, fps: int) -> int:
        """The number of frames, possibly from seconds."""
        request = self.request
        if request.seconds is None:
            return self.choose("num_frames", self.checkpoint.defaults.num_frames)
        if request.num_frames is not None:
            self.problems.append("--num-frames and --seconds exclude each other: give one")
        self.sources["num_frames"] = f"{request.seconds:g} seconds at {fps} frames a second"
        if not (math.isfinite(request.seconds) and request.seconds > 0):
            self.problems.append(f"--seconds {request.seconds} must be a number above 0")
            return 1
        return sizes.frames_in(request.seconds, fps)


def _violations(request: Request, values: Mapping[str, Any]) -> list[str]:
    """One line for each setting that is illegal by itself."""
    found = []
    if not request.prompt.strip():
        found.append("--prompt is empty; say what the video should show")
    for name in ("height", "width"):
        if values[name] < 1 or values[name] % sizes.SIZE_MULTIPLE:
            near = _either(sizes.nearest_multiples(values[name]))
            found.append(f"--{name} {values[name]} must be a multiple of 16; nearest: {near}")
    frames = values["num_frames"]
    if frames < 1 or frames % sizes.FRAMES_PER_LATENT != 1:
        near = _either(sizes.nearest_multiples(frames, sizes.FRAMES_PER_LATENT, 1))
        found.append(f"--num-frames {frames} must be 4 k + 1; nearest: {near}")
    for name, least, most in (
        ("steps", 1, TRAIN_LEVELS),
        ("fps", 1, MAX_FPS),
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
    if not 1 <= steps <= TRAIN_LEVELS:
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
        ("attention", request.attention, tuple(PATHS)),
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
    needed = estimate(checkpoint.config, resolved.latent_shape, dtype=resolved.dtype, copies=copies)
    if free is None or needed.total <= free:
        return []
    return [
        f"not enough memory: {resolved.num_frames} frames of {resolved.height} x {resolved.width} "
        f"in {resolved.dtype} take at least {needed.total / 2**30:.1f} GiB (weights "
        f"{needed.weights / 2**30:.1f}, work {(needed.total - needed.weights) / 2**30:.1f}) and "
        f"{free / 2**30:.1f} GiB are free; use fewer frames, a smaller size"
        + (", --dtype bfloat16" if resolved.dtype == "float32" else "")
        + " or a smaller checkpoint"
    ]


def _either(values: list[int]) -> str:
    return " or ".join(map(str, values))
