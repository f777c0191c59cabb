"""A request as JSON and back: what a job keeps of it, checked as a request is.

A record may be damaged or edited; nothing of it is used before its type and range are proved.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

from skyreels_jax.diffusion.cache_settings import CacheSettings
from skyreels_jax.diffusion.unipc import flow_sigmas
from skyreels_jax.generation.request.resolve import forcing_violations
from skyreels_jax.generation.request.resolved import Forcing, GivenVideo, ResolvedRequest
from skyreels_jax.generation.request.settings import (
    MAX_SEEDS,
    PlainSettings,
    current_names,
    declared,
    violation,
)
from skyreels_jax.geometry import latent_frames
from skyreels_jax.presets import Task

IMAGES: Final = ("image", "last_image")
# The fields of a request that jobs of earlier versions have under an old name.
_OLD_NAMES: Final = {"notices": "warnings"}
# Settings that a resolved request may leave open.
_OPEN: Final = ("attention", "causal_attention", "weights")
# What jobs of earlier versions do not have, and meant.
_LATER: Final = {"weights": None, "offload": False}
# More latent frames than any disk has room for: four hours.
_MAX_FRAMES: Final = 100_000


def to_json(request: ResolvedRequest) -> dict[str, Any]:
    """All fields of a request as JSON values; of images only that they are there."""
    values = {
        entry.name: getattr(request, entry.name)
        for entry in dataclasses.fields(request)
        if entry.name not in IMAGES
    }
    for name in IMAGES:
        values[name] = None if getattr(request, name) is None else f"{name}.png"
    values["fps"] = request.fps if isinstance(request.fps, int) else str(request.fps)
    values["cache"] = dataclasses.asdict(request.cache)
    values["forcing"] = None if request.forcing is None else dataclasses.asdict(request.forcing)
    if (video := request.video) is not None:
        values["video"] = {**dataclasses.asdict(video), "path": str(video.path.resolve())}
    values["sources"] = dict(request.sources)
    return values


def from_json(record: Mapping[str, Any], images: Mapping[str, Any]) -> ResolvedRequest:
    """The request that :func:`to_json` wrote.

    Args:
        record: its result.
        images: what was given, by the name of the field.

    Raises:
        ValueError: a value is of the wrong type or out of range, or does not go with another.
        KeyError, TypeError: fields are missing or unknown.
    """
    values = _LATER | {_OLD_NAMES.get(name, name): value for name, value in record.items()}
    for name in IMAGES:
        values.pop(name, None)
    prompts = tuple(checked("prompt", text) for text in _listed(values["prompts"], str))
    task = _typed(values["task"], str)
    if task not in get_args(Task):
        raise ValueError(f"task {task!r} is none")
    made: dict[str, Any] = {
        "model": _typed(values.pop("model"), str),
        "task": task,
        "prompts": prompts,
        "negative_prompt": checked("negative_prompt", values.pop("negative_prompt")),
        "video": _optional(values.pop("video"), _given_video),
        "forcing": _optional(values.pop("forcing"), _forcing),
        "cache": _cache(values.pop("cache")),
        "sources": {
            _typed(name, str): _typed(source, str)
            for name, source in _typed(values.pop("sources"), dict).items()
        },
        "warnings": tuple(_listed(values.pop("warnings"), str)),
        # Records of before have none.
        "length_warnings": tuple(_listed(values.pop("length_warnings", []), str)),
        "loras": tuple(map(_lora, _listed(values.pop("loras", [])))),
        **{name: images.get(name) for name in IMAGES},
    }
    for name in ("height", "width", "num_frames", "steps", "guidance_scale", "shift"):
        made[name] = checked(name, values.pop(name))
    for name in ("fps", "seed", "noise", *(f.name for f in dataclasses.fields(PlainSettings))):
        made[name] = checked(name, values.pop(name))
    for name in ("task", "prompts"):
        values.pop(name)
    if values:
        raise TypeError(f"unknown: {', '.join(sorted(values)[:5])}")
    request = ResolvedRequest(**made)
    _check_together(request)
    return request


def checked(name: str, value: object) -> Any:
    """A setting's value as its declaration takes it; raises ValueError for what it refuses."""
    if value is None and name in _OPEN:
        return None
    try:
        converted = declared()[name].kind.convert(value)
    except ValueError as error:
        raise ValueError(f"{name} {value!r:.80} {error}") from error
    if wrong := violation(name, converted):
        raise ValueError(wrong)
    return converted


def _check_together(request: ResolvedRequest) -> None:
    """Raise ValueError for values that are legal by themselves and not with one another."""
    if request.seed > MAX_SEEDS[request.noise] or request.seed < 0:
        raise ValueError(f"seed {request.seed} is out of range")
    flow_sigmas(request.steps, request.shift)
    if latent_frames(request.num_frames) > _MAX_FRAMES:
        raise ValueError(f"num_frames {request.num_frames} are too many")
    if request.task in ("i2v", "flf2v") and request.image is None:
        raise ValueError(f"task {request.task} without an image")
    forcing = request.forcing
    if (forcing is None) != (request.task != "df"):
        raise ValueError(f"task {request.task} and its settings do not go together")
    if forcing is not None:
        about = {
            name: getattr(request, name) for name in ("video", "num_frames", "image", "last_image")
        }
        if problems := list(forcing_violations(forcing, about)):
            raise ValueError("; ".join(problems))
    elif request.video is not None:
        raise ValueError(f"task {request.task} continues no video")
    if len(request.prompts) != len(request.windows):
        raise ValueError(f"{len(request.prompts)} prompts for {len(request.windows)} windows")


def _forcing(values: object) -> Forcing:
    given = current_names(_typed(values, dict))
    _exactly(given, Forcing)
    return Forcing(**{name: checked(name, value) for name, value in given.items()})


def _given_video(values: object) -> GivenVideo:
    given = _typed(values, dict)
    path, frames, fps = given["path"], given["frames"], given["fps"]
    if _typed(frames, int) < 1 or not 0 < _number(fps) < math.inf:
        raise ValueError(f"a video of {frames} frames at {fps} a second")
    return GivenVideo(
        Path(_typed(path, str)), frames, float(fps), _optional(given.get("sound"), _text)
    )


def _lora(value: object) -> tuple[str, float]:
    name, scale = _listed(value)
    return _typed(name, str), _number(scale)


def _cache(values: object) -> CacheSettings:
    given = _typed(values, dict)
    coefficients = _optional(given["coefficients"], lambda c: tuple(map(_number, _listed(c))))
    if coefficients is not None and len(coefficients) > 16:
        raise ValueError(f"{len(coefficients)} coefficients of a cache")
    return CacheSettings(
        checked("cache", given["name"]),
        checked("cache_threshold", given["threshold"]),
        _typed(given["use_ret_steps"], bool),
        coefficients,
        _typed(given["original_counter"], bool),
    )


def _optional(value: object, convert: Callable[[Any], Any]) -> Any:
    return None if value is None else convert(value)


def _typed(value: Any, kind: type) -> Any:
    """A value of a type exactly: True is no 1."""
    if type(value) is not kind:
        raise TypeError(f"{value!r:.80} is no {kind.__name__}")
    return value


def _text(value: object) -> str:
    return _typed(value, str)


def _number(value: object) -> float:
    if type(value) not in (int, float) or not abs(float(value)) < math.inf:  # pyright: ignore[reportArgumentType]
        raise TypeError(f"{value!r:.80} is no number")
    return float(value)  # pyright: ignore[reportArgumentType]


def _listed(value: object, kind: type | None = None) -> Sequence[Any]:
    return [one if kind is None else _typed(one, kind) for one in _typed(value, list)]


def _exactly(values: Mapping[str, Any], kind: type) -> None:
    names = {entry.name for entry in dataclasses.fields(kind)}
    if wrong := names ^ values.keys():
        raise KeyError(", ".join(sorted(wrong)))
