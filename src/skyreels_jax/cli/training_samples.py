"""Videos that a transformer in training makes, by the pipeline that users run."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from skyreels_jax.checkpoints import PIPELINE_OF
from skyreels_jax.media import contact_sheet, write_image
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.moving_shapes.captions import plain_caption
from skyreels_jax.moving_shapes.render import render
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.training.encoded import Source
from skyreels_jax.training.transformer_task import Sampler, ShapesData
from skyreels_jax.weights.diffusers_json import model_index, scheduler_json
from skyreels_jax.weights.layout import MODEL_INDEX, Part, parts_of
from skyreels_jax.weights.parts import stored_image_encoder
from skyreels_jax.weights.transformer_folder import save_transformer
from skyreels_jax.weights.writer import write_json

# Scenes of combinations that training never sees.
SCENES: Final = 4
SETTINGS: Final[Mapping[str, Any]] = {"fps": 16, "steps": 20, "guidance_scale": 4.0, "shift": 4.0}


def sampler(data: ShapesData) -> Sampler:
    """What a run with this data shows: MP4 and caption of each scene, and a contact sheet."""

    def sample(model: WanModel, folder: Path) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            pipeline = _pipeline(Path(temporary), model, data)
            source = Source(0, data.frames, data.size, held=True)
            rows = []
            for number in range(SCENES):
                scene = source.scene(number)[0]
                prompt, size = plain_caption(scene), (data.size, data.size)
                image = render(scene, frames=1, fps=16.0, size=size)[0]
                given = image if model.config.model_type == "i2v" else None
                sizes = {"height": size[0], "width": size[1], "num_frames": data.frames}
                video = pipeline(prompt, image=given, seed=number, **sizes, **SETTINGS)
                video.save(folder / f"{number}.mp4")
                (folder / f"{number}.txt").write_text(prompt + "\n")
                rows.append(contact_sheet(video.frames, count=6, columns=6))
            write_image(folder / "sheet.png", np.concatenate(rows))

    return sample


def _pipeline(folder: Path, model: WanModel, data: ShapesData) -> Pipeline:
    """A checkpoint of the model and the parts it is trained with."""
    transformer = folder / "transformer"
    save_transformer(transformer, model, model.config, layout="diffusers", dtype=jnp.float32)
    homes: dict[Part, str] = {"vae": data.vae, "tokenizer": data.text, "text_encoder": data.text}
    if data.image is not None:
        homes |= {"image_encoder": data.image, "image_processor": data.image}
    for part, home in homes.items():
        (folder / part).symlink_to(parts_of(Path(home)).part(part).resolve())
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_json(flow_shift=1.0))
    tower = None if data.image is None else stored_image_encoder(parts_of(folder)).config
    task = "i2v" if model.config.model_type == "i2v" else "df"
    named: list[Part] = [*homes, "scheduler"]
    write_json(folder / MODEL_INDEX, model_index(PIPELINE_OF[task], named, tower))
    return Pipeline.from_pretrained(folder, dtype="float32", keep=True)
