"""Writes what stands beside the transformer in a pipeline folder of diffusers' layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.weights import diffusers_json
from skyreels_jax.weights.convert import rename, renamed
from skyreels_jax.weights.layout import CONFIG, MODEL_INDEX, Layout, Part
from skyreels_jax.weights.parts import (
    StoredPart,
    stored_image_encoder,
    stored_text_encoder,
    stored_vae,
)
from skyreels_jax.weights.rounding import RoundedSource
from skyreels_jax.weights.writer import (
    MAX_SHARD_BYTES,
    TRANSFORMER_STEM,
    write_json,
    write_tensors,
)

# transformers' stem, where diffusers' own models have TRANSFORMER_STEM.
ENCODER_STEM: Final = "model"
TEXT_TO_VIDEO: Final[tuple[Part, ...]] = ("vae", "text_encoder", "tokenizer")

CARD: Final = """\
---
library_name: diffusers
pipeline_tag: {task}
tags:
- video
- SkyReels-V2
---

# {name}

The weights of {name} in the layout of 🤗 diffusers, written by skyreels-jax. They are under the
licence of the checkpoint that they were converted from.

```python
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("path/to/this/folder")
```

or, in JAX and without PyTorch,

```python
from skyreels_jax import Pipeline

pipe = Pipeline.from_pretrained("path/to/this/folder")
```
"""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a pipeline folder says of itself besides its weights.

    Attributes:
        name: of the checkpoint.
        pipeline: diffusers' class for it.
        flow_shift: of the scheduler.
    """

    name: str
    pipeline: str
    flow_shift: float


def needed_parts(config: TransformerConfig) -> tuple[Part, ...]:
    """The parts that a pipeline takes from files of the original layout."""
    return (*TEXT_TO_VIDEO, "image_encoder") if config.image_dim is not None else TEXT_TO_VIDEO


def require_parts(layout: Layout, config: TransformerConfig) -> None:
    """Raises WeightsError for a part of the pipeline that the folder lacks."""
    for part in needed_parts(config):
        layout.part(part)


def write_card(folder: Path, config: TransformerConfig, about: About) -> Path:
    """Write ``README.md``, the model card."""
    task = "text-to-video" if config.image_dim is None else "image-to-video"
    file = folder / "README.md"
    card = CARD.format(task=task, name=about.name, pipeline=about.pipeline)
    file.write_text(card, encoding="utf-8")
    return file


def write_parts(
    folder: Path,
    source: Layout,
    config: TransformerConfig,
    about: About,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Translate the parts of a folder in the original layout, one tensor in memory at a time.

    All but the transformer and the tokenizer's files, which are the same in both layouts. Tensors
    keep their dtype. ``model_index.json`` is written where every part of the pipeline is there.

    Args:
        folder: the pipeline's, one that :func:`skyreels_jax.weights.writer.new_folder` keeps out of
            sight.
        source: in the original layout.
        config: of its transformer.
        about: what the folder says of itself.
        max_shard_bytes: size at which a new shard is begun.

    Returns:
        The files.

    Raises:
        WeightsError: a part is unsound or incomplete, or a value is not finite.
        UnsupportedError: a part is a variant that SkyReels-V2 does not use.
    """
    needed = needed_parts(config)
    files: list[Path] = []

    def put_json(name: str, value: Mapping[str, Any]) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, value)
        files.append(folder / name)

    def put(part: Part, stem: str, stored: StoredPart, value: Mapping[str, Any]) -> None:
        put_json(f"{part}/{CONFIG}", value)
        files.extend(_write_tensors(folder / part, stem, stored, max_shard_bytes))

    put_json("scheduler/scheduler_config.json", diffusers_json.scheduler_json(about.flow_shift))
    if "vae" in source.parts:
        vae = stored_vae(source)
        put("vae", TRANSFORMER_STEM["diffusers"], vae, diffusers_json.vae_json(vae.config))
    if "text_encoder" in source.parts:
        text = stored_text_encoder(source)
        put("text_encoder", ENCODER_STEM, text, diffusers_json.text_encoder_json(text.config))
    tower = None
    if "image_encoder" in needed and "image_encoder" in source.parts:
        image = stored_image_encoder(source)
        tower = image.config
        put("image_encoder", ENCODER_STEM, image, diffusers_json.image_encoder_json(tower))
        processor = diffusers_json.image_processor_json(tower)
        put_json("image_processor/preprocessor_config.json", processor)
    if source.parts.keys() >= set(needed):
        processors: tuple[Part, ...] = ("image_processor",) if tower else ()
        parts = (*needed, *processors, "scheduler")
        put_json(MODEL_INDEX, diffusers_json.model_index(about.pipeline, parts, tower))
    return files


def _write_tensors(folder: Path, stem: str, stored: StoredPart, max_shard_bytes: int) -> list[Path]:
    stored.verify()
    source = RoundedSource(stored.source, None)
    arguments = (stored.rules, source, stored.dialect, "diffusers")
    return write_tensors(
        folder,
        stem,
        renamed(*arguments, ignored=stored.ignored),
        rename(*arguments, ignored=stored.ignored),
        max_shard_bytes=max_shard_bytes,
    )
