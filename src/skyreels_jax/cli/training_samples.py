"""Videos that a transformer in training makes, by the pipeline that users run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from skyreels_jax.media import contact_sheet, write_image
from skyreels_jax.moving_shapes.captions import plain_caption
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.training.dataset import ClipSource
from skyreels_jax.training.transformer_recipe import ClipsData
from skyreels_jax.training.transformer_task import SampleWriter

# Scenes of combinations that training never sees.
_SCENES: Final = 4
_SETTINGS: Final[Mapping[str, Any]] = {
    "fps": 16,
    "steps": 20,
    "guidance_scale": 4.0,
    "shift": 4.0,
}


def write_samples_of(data: ClipsData, model_type: str) -> SampleWriter:
    """What a run with this data shows: MP4 and caption of each scene, and a contact sheet."""

    def write(model: Path, folder: Path) -> None:
        pipeline = Pipeline.from_pretrained(model, dtype="float32", keep=True)
        source = ClipSource(0, data.frames, data.size, held=True)
        rows = []
        for number in range(_SCENES):
            scene = source.scene(number)[0]
            prompt = plain_caption(scene)
            image = source.render(scene, 1, 16)[0] if model_type == "i2v" else None
            sizes = {"height": data.size, "width": data.size, "num_frames": data.frames}
            video = pipeline(prompt, image=image, seed=number, **sizes, **_SETTINGS)
            video.save(folder / f"{number}.mp4")
            (folder / f"{number}.txt").write_text(prompt + "\n", encoding="utf-8")
            rows.append(contact_sheet(video.frames, count=6, columns=6))
        write_image(folder / "sheet.png", np.concatenate(rows))

    return write
