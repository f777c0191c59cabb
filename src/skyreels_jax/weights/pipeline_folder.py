"""What a folder in diffusers' format says of itself beside its components' own files."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from skyreels_jax.models.clip_vision import ClipVisionConfig
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.weights.components.clip import clip_class
from skyreels_jax.weights.layout import COMPONENTS_IN, MODEL_INDEX, ComponentName, Layout
from skyreels_jax.weights.writer import write_config

# The library and class of each component; an image encoder without projection has another.
_CLASSES: Final[Mapping[str, tuple[str, str]]] = {
    "transformer": ("diffusers", "SkyReelsV2Transformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
    "scheduler": ("diffusers", "UniPCMultistepScheduler"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "T5TokenizerFast"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "image_processor": ("transformers", "CLIPImageProcessor"),
}


_CARD: Final = """\
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


def needed_components(config: TransformerConfig) -> tuple[ComponentName, ...]:
    """The components that a pipeline takes from files of the original format."""
    text: tuple[ComponentName, ...] = ("vae", "text_encoder", "tokenizer")
    return (*text, "image_encoder") if config.image_dim is not None else text


def require_components(layout: Layout, config: TransformerConfig) -> None:
    """Raise WeightsError for a component of the pipeline that the folder lacks."""
    for name in needed_components(config):
        layout.component(name)


def write_card(folder: Path, config: TransformerConfig, about: About) -> Path:
    """Write ``README.md``, the model card."""
    task = "text-to-video" if config.image_dim is None else "image-to-video"
    file = folder / "README.md"
    card = _CARD.format(task=task, name=about.name, pipeline=about.pipeline)
    file.write_text(card, encoding="utf-8")
    return file


def write_pipeline_files(
    folder: Path,
    pipeline: str,
    components: Collection[ComponentName],
    flow_shift: float,
    image_encoder: ClipVisionConfig | None = None,
    components_in: str | None = None,
) -> list[Path]:
    """Write ``model_index.json`` and the scheduler.

    Args:
        folder: of the checkpoint.
        pipeline: diffusers' class for it.
        components: what it has besides transformer and scheduler; where there are none, there is
            no index.
        flow_shift: of the scheduler: UniPC of order 2 on flow sigmas, shifted.
        image_encoder: its configuration, if it is one of ``components``.
        components_in: name of the folder beside it that has those components which it lacks.

    Returns:
        The files.
    """
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir(exist_ok=True)
    settings = {
        "_class_name": _CLASSES["scheduler"][1],
        "flow_shift": flow_shift,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "bh2",
        "use_flow_sigmas": True,
    }
    write_config(scheduler, settings)
    if not components:
        return [scheduler]
    classes: dict[str, list[str]] = {
        name: list(_CLASSES[name]) for name in ("transformer", *components, "scheduler")
    }
    if image_encoder is not None:
        classes["image_encoder"][1] = clip_class(image_encoder)
    shared = {} if components_in is None else {COMPONENTS_IN: components_in}
    write_config(folder / MODEL_INDEX, {"_class_name": pipeline} | shared | classes)
    return [scheduler, folder / MODEL_INDEX]
