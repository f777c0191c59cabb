"""What a run shows while it trains, from a file of prompts in musubi-tuner's one-line form.

``a red star moves --w 64 --h 64 --f 17 --d 42 --s 20 --l 4.0 --n blurry --i first.png``: a line is
a video; empty ones and those that begin with ``#`` are not.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from skyreels_jax.errors import RequestError, SkyReelsError
from skyreels_jax.files import read_text
from skyreels_jax.generation.request.keywords import VideoSettings
from skyreels_jax.generation.request.settings import MAX_SEEDS, Request, violation
from skyreels_jax.media import read_image
from skyreels_jax.outputs import path_of
from skyreels_jax.training.footprint import largest_clips
from skyreels_jax.training.transformer_recipe import ClipsData, VideoTraining
from skyreels_jax.training.videos.recipe import FolderData

# What follows two dashes in a line, and the setting of a video that it is.
_SETTINGS: Final[Mapping[str, str]] = {
    "w": "width",
    "h": "height",
    "f": "num_frames",
    "d": "seed",
    "s": "steps",
    "l": "guidance_scale",
    "g": "guidance_scale",
    "fs": "shift",
    "n": "negative_prompt",
    "i": "image",
    "ei": "last_image",
}
# How a setting stands in a refusal.
_QUOTED: Final = re.compile(r"`(\w+)`")
_PICTURES: Final = ("image", "last_image")
_OPTION: Final = re.compile(r"(?:^|\s)--(?=\w)")
# What the videos of a run are made with unless their line says otherwise.
SAMPLE_DEFAULTS: Final[VideoSettings] = {"steps": 20, "guidance_scale": 4.0, "shift": 4.0}
_MOST_LINES: Final = 100


def read_sample_prompts(file: Path, training: VideoTraining) -> list[tuple[str, VideoSettings]]:
    """Prompts with the settings of their videos; sizes that a line leaves out are the data's.

    Args:
        file: of lines; pictures in it are relative to its folder.
        training: whose model is to make them.

    Raises:
        RequestError: the first line that is wrong, by its number: what, and the nearest that goes.
    """
    found: list[tuple[str, VideoSettings]] = []
    refused: list[str] = []
    for number, line in enumerate(read_text(file, "file of prompts").splitlines(), 1):
        if not (text := line.strip()) or text.startswith("#"):
            continue
        try:
            found.append(_read_line(text, len(found), file.parent, training))
        except SkyReelsError as error:
            reason = _QUOTED.sub(_in_options, "; ".join(str(error).splitlines()))
            refused.append(f"{file}, line {number}: {reason}")
    if refused:
        others = f" (and {len(refused) - 1} more lines)" if refused[1:] else ""
        raise RequestError(refused[0] + others)
    if not 1 <= len(found) <= _MOST_LINES:
        raise RequestError(
            f"{file} has {len(found)} prompts; give from 1 to {_MOST_LINES}, each on its line"
        )
    return found


def _in_options(quoted: re.Match[str]) -> str:
    """A setting as a line calls it."""
    found = [key for key, name in _SETTINGS.items() if name == quoted[1]]
    return f"--{found[0]}" if found else quoted[0]


def _read_line(
    line: str, number: int, folder: Path, training: VideoTraining
) -> tuple[str, VideoSettings]:
    """One line; ``number`` is its seed unless it has one."""
    prompt, *options = _OPTION.split(line)
    if not (prompt := prompt.strip()):
        raise RequestError("there is no prompt before the options")
    given: dict[str, str | int | float | Path] = {}
    for option in options:
        key, _, value = option.partition(" ")
        name = _SETTINGS.get(key.lower())
        if name is None:
            near = difflib.get_close_matches(key, _SETTINGS, n=1, cutoff=0.5)
            hint = f"did you mean --{near[0]}?" if near else f"there are --{', --'.join(_SETTINGS)}"
            raise RequestError(f"--{key:.20} is unknown; {hint}")
        if name in given:
            raise RequestError(f"--{key} gives {name} a second time")
        if not (value := value.strip()) and name != "negative_prompt":
            raise RequestError(f"--{key} has no value")
        given[name] = folder / path_of(value, f"--{key}") if name in _PICTURES else value
    if ("width" in given) != ("height" in given):
        raise RequestError("--w and --h go together; one of them is missing")
    if training.model.model_type == "i2v" and "image" not in given:
        raise RequestError("the model is i2v and takes a first frame: --i FILE")
    return prompt, _checked(prompt, {**_defaults(number, training), **given})


def _defaults(number: int, training: VideoTraining) -> dict[str, str | int | float | Path]:
    clips, data = largest_clips(training), training.data
    if isinstance(data, FolderData):
        fps = max(dataset.fps or 16 for dataset in map(data.filled, data.datasets))
    else:
        assert isinstance(data, ClipsData)
        fps = 16
    sizes = {"width": clips.width, "height": clips.height, "num_frames": clips.frames}
    return {**sizes, "fps": fps, "seed": number}


def _checked(prompt: str, given: Mapping[str, str | int | float | Path]) -> VideoSettings:
    """The settings, each of its one type; the pictures can be read."""
    request = Request.of({"prompt": prompt, **given})
    values = {name: getattr(request, name) for name in given}
    wrong = [line for name, value in values.items() if (line := violation(name, value))]
    most = MAX_SEEDS["jax"]
    if not 0 <= values["seed"] <= most:
        nearest = 0 if values["seed"] < 0 else most
        wrong.append(f"`seed` {values['seed']} must be from 0 to {most}; nearest: {nearest}")
    if wrong:
        raise RequestError("; ".join(wrong))
    for name in _PICTURES:
        if name in values:
            read_image(values[name])
    return {**SAMPLE_DEFAULTS, **VideoSettings(**values)}  # pyright: ignore[reportArgumentType]
