"""Videos that a transformer in training makes, by the pipeline that users run."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from skyreels_jax.cli.sample_prompts import SAMPLE_DEFAULTS
from skyreels_jax.generation.request.keywords import VideoSettings
from skyreels_jax.media import contact_sheet, write_image
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.training.batches import Example
from skyreels_jax.training.transformer_task import SampleWriter

_logger = logging.getLogger(__name__)


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


def write_samples_of(shown: Sequence[tuple[str, VideoSettings]]) -> SampleWriter:
    """What a run shows: MP4 and caption of each prompt, and a contact sheet.

    A video that cannot be made is logged and left out; the writer raises what the last of them
    raised if none can.
    """

    def write(model: Path, folder: Path, loras: Sequence[Path] = ()) -> None:
        pipeline = Pipeline.from_pretrained(model, dtype="float32", keep=True, loras=loras)
        rows: list[np.ndarray] = []
        for number, (prompt, settings) in enumerate(shown):
            try:
                video = pipeline(prompt, **settings)
                # Settings would name the temporary folder: the same run makes the same file.
                video.save(folder / f"{number}.mp4", metadata=False)
                (folder / f"{number}.txt").write_text(prompt + "\n", encoding="utf-8")
                rows.append(contact_sheet(video.frames, count=6, columns=6))
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
