"""Videos that a transformer in training makes, by the pipeline that users run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from skyreels_jax.media import contact_sheet, write_image
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.training.batches import Example
from skyreels_jax.training.transformer_task import SampleWriter

_SETTINGS: Final[Mapping[str, Any]] = {"steps": 20, "guidance_scale": 4.0, "shift": 4.0}


def write_samples_of(examples: Sequence[Example]) -> SampleWriter:
    """What a run shows: MP4 and caption of each example, and a contact sheet."""

    def write(model: Path, folder: Path, loras: Sequence[Path] = ()) -> None:
        pipeline = Pipeline.from_pretrained(model, dtype="float32", keep=True, loras=loras)
        rows = []
        for number, example in enumerate(examples):
            sizes = {name: getattr(example, name) for name in ("height", "width", "fps")}
            video = pipeline(
                example.prompt,
                image=example.image,
                num_frames=example.frames,
                seed=number,
                **sizes,
                **_SETTINGS,
            )
            video.save(folder / f"{number}.mp4")
            (folder / f"{number}.txt").write_text(example.prompt + "\n", encoding="utf-8")
            rows.append(contact_sheet(video.frames, count=6, columns=6))
        # Examples may differ in size and length: what is narrower is black at the right.
        wide = max(row.shape[1] for row in rows)
        padded = [np.pad(row, ((0, 0), (0, wide - row.shape[1]), (0, 0))) for row in rows]
        write_image(folder / "sheet.png", np.concatenate(padded))

    return write
