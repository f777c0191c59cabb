"""Videos that a transformer in training makes, by the pipeline that users run."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from skyreels_jax.cli.sample_prompts import SAMPLE_DEFAULTS
from skyreels_jax.generation.request.keywords import StreamSettings, VideoSettings
from skyreels_jax.generation.request.live import LiveRequest
from skyreels_jax.media import VideoWriter, contact_sheet, write_image
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.shapes import Frames
from skyreels_jax.training.batches import Example
from skyreels_jax.training.transformer_task import SampleWriter

_logger = logging.getLogger(__name__)
# Makes the video of a prompt, writes it into a file and returns its frames.
Maker = Callable[[Pipeline, str, VideoSettings, Path], Frames]
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


def streamed(pipeline: Pipeline, prompt: str, settings: VideoSettings, file: Path) -> Frames:
    """A stream of a causal student, in the blocks and steps that its folder says it learned."""
    wishes = {"prompt": prompt, **stream_settings(settings)}
    # A request, as a call would log its warnings for each sample again.
    with pipeline.stream_request(LiveRequest.of(wishes, dtype=pipeline.dtype)) as stream:
        frames = np.concatenate(list(stream))
    with VideoWriter(file, fps=stream.request.fps, size=stream.request.size) as writer:
        writer.append(frames)
    return frames


def stream_settings(settings: VideoSettings) -> StreamSettings:
    """What a stream takes of the settings of a video: what it shows, not how it is made."""
    frames, fps = settings.get("num_frames"), settings.get("fps")
    assert isinstance(frames, int) and fps
    kept = {name: settings.get(name) for name in _OF_BOTH}
    return {**kept, "seconds": frames / float(fps)}  # pyright: ignore[reportReturnType]


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
