"""Videos that a transformer in training makes, by the pipeline that users run."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from skyreels_jax.cli.sample_prompts import SAMPLE_DEFAULTS
from skyreels_jax.generation.request.keywords import StreamSettings, VideoSettings
from skyreels_jax.generation.request.live import MAX_LIVE_STEPS, LiveRequest
from skyreels_jax.geometry import latent_frames
from skyreels_jax.media import VideoWriter, contact_sheet, write_image
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.shapes import Frames
from skyreels_jax.training.batches import Example
from skyreels_jax.training.distillation_recipe import Distillation
from skyreels_jax.training.transformer_task import SampleWriter

_logger = logging.getLogger(__name__)
# Makes the video of a prompt, writes it into a file and returns its frames.
Maker = Callable[[Pipeline, str, VideoSettings, Path], Frames]
# Steps of a student of consistency, which learns to take any number.
_FEW: Final = 4
# What a stream takes of the settings of a video.
_OF_BOTH: Final = ("height", "width", "fps", "seed")


def samples_of(examples: Sequence[Example]) -> list[tuple[str, VideoSettings]]:
    """What the data itself gives to show: prompts with the settings of their videos."""
    found = []
    for number, example in enumerate(examples):
        settings: VideoSettings = {
            **SAMPLE_DEFAULTS,
            "image": example.image,
            "num_frames": example.frames,
            "seed": number,
            "height": example.height,
            "width": example.width,
            "fps": example.fps,
        }
        found.append((example.prompt, settings))
    return found


def made_at_once(pipeline: Pipeline, prompt: str, settings: VideoSettings, file: Path) -> Frames:
    """A video of the pipeline's own steps."""
    video = pipeline(prompt, **settings)
    # Settings would name the temporary folder: the same run makes the same file.
    video.save(file, metadata=False)
    return video.frames


def streamed(distill: Distillation) -> Maker:
    """Makes videos as streams of the student that a recipe trains."""

    def make(pipeline: Pipeline, prompt: str, settings: VideoSettings, file: Path) -> Frames:
        wishes = {"prompt": prompt, **stream_settings(distill, settings)}
        # A request, as a call would warn each time that the model has not learned it yet.
        with pipeline.stream_request(LiveRequest.of(wishes, dtype=pipeline.dtype)) as stream:
            frames = np.concatenate(list(stream))
        with VideoWriter(file, fps=stream.request.fps, size=stream.request.size) as writer:
            writer.append(frames)
        return frames

    return make


def stream_settings(distill: Distillation, settings: VideoSettings) -> StreamSettings:
    """How a student in training is streamed: in the blocks and steps that it learns.

    A window holds the whole video, as in training. Students of the velocity (``guidance``,
    ``teacher-forcing``) follow it by Euler's rule, in as many steps as a stream has where they
    learn at all timesteps; the others take new noise at each step, those of consistency, which
    learn any number of them, at four. What learns from data alone is guided, as videos are.

    Args:
        distill: the recipe's table.
        settings: of the sample, as of a video that is made at once.
    """
    frames, fps = settings.get("num_frames"), settings.get("fps")
    assert isinstance(frames, int) and fps
    of_velocity = distill.stage in ("guidance", "teacher-forcing")
    of_data = distill.stage == "teacher-forcing"
    own: StreamSettings = {
        "seconds": frames / float(fps),
        "causal_block_size": distill.block,
        "first_block": distill.first_block,
        "window": latent_frames(frames) + distill.block + (distill.first_block or 0),
        "positions": "absolute",
        "rule": "euler" if of_velocity else "renoise",
        "guidance_scale": SAMPLE_DEFAULTS["guidance_scale"] if of_data else 1.0,  # pyright: ignore[reportTypedDictNotRequiredAccess]
    }
    if distill.timesteps:
        # Of more than a stream has, evenly as many as it can have.
        own["timesteps"] = distill.timesteps[:: -(-len(distill.timesteps) // MAX_LIVE_STEPS)]
    else:
        own["steps"] = MAX_LIVE_STEPS if of_velocity else _FEW
        own["shift"] = SAMPLE_DEFAULTS.get("shift") if of_velocity else distill.shift
    return {**{name: settings.get(name) for name in _OF_BOTH}, **own}  # pyright: ignore[reportReturnType]


def write_samples_of(
    shown: Sequence[tuple[str, VideoSettings]], make: Maker = made_at_once
) -> SampleWriter:
    """What a run shows: MP4 and caption of each prompt, and a contact sheet.

    A video that cannot be made is logged and left out; the writer raises what the last of them
    raised if none can.
    """

    def write(model: Path, folder: Path, loras: Sequence[Path] = ()) -> None:
        pipeline = Pipeline.from_pretrained(model, dtype="float32", keep=True, loras=loras)
        rows: list[np.ndarray] = []
        for number, (prompt, settings) in enumerate(shown):
            try:
                frames = make(pipeline, prompt, settings, folder / f"{number}.mp4")
                (folder / f"{number}.txt").write_text(prompt + "\n", encoding="utf-8")
                rows.append(contact_sheet(frames, count=6, columns=6))
            except Exception as error:
                if number == len(shown) - 1 and not rows:
                    raise
                reason = str(error).partition("\n")[0] or type(error).__name__
                _logger.warning("sample %d (%.60s) was not made: %s", number, prompt, reason)
        # Examples may differ in size and length: what is narrower is black at the right.
        wide = max(row.shape[1] for row in rows)
        padded = [np.pad(row, ((0, 0), (0, wide - row.shape[1]), (0, 0))) for row in rows]
        write_image(folder / "sheet.png", np.concatenate(padded))

    return write
