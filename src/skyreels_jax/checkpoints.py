"""What a checkpoint folder is: its files, its transformer, and the settings it is made for."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Generic, TypedDict, TypeVar

import jax.numpy as jnp
from jax.typing import DTypeLike

from skyreels_jax.errors import WeightsError
from skyreels_jax.hub import COMPONENTS_VARIABLE, NEEDED_COMPONENTS, locate
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.outputs import path_of
from skyreels_jax.presets import PIPELINE_OF_TASK, PRESETS, WAN_PIPELINE_OF_TASK, Family, Task
from skyreels_jax.recognition import (
    Guess,
    guess_preset,
    guess_student,
    names_of,
    published_weights,
    task_of,
    with_heads,
)
from skyreels_jax.weights.components.clip import stored_image_encoder
from skyreels_jax.weights.components.transformer import stored_transformer
from skyreels_jax.weights.components.umt5 import stored_text_encoder
from skyreels_jax.weights.components.vae import stored_vae
from skyreels_jax.weights.engine import Placement, on_default_device
from skyreels_jax.weights.folder_files import read_object
from skyreels_jax.weights.layout import ComponentName, Layout, read_layout
from skyreels_jax.weights.lora.beside import put_beside
from skyreels_jax.weights.lora.binding import Lora
from skyreels_jax.weights.lora.source import with_loras
from skyreels_jax.weights.model_file import components_in, read_file, with_components
from skyreels_jax.weights.pipeline_folder import About, needed_components
from skyreels_jax.weights.relatives import refuse_names, refuse_shapes

_T = TypeVar("_T")
logger = logging.getLogger(__name__)

# Whose settings a checkpoint that is no released one gets, by family and kind of model.
_LIKE: Final[Mapping[tuple[Family, str], str]] = {
    ("SkyReels-V2", "t2v"): "SkyReels-V2-T2V-14B-540P",
    ("SkyReels-V2", "i2v"): "SkyReels-V2-I2V-1.3B-540P",
    ("Wan2.1", "t2v"): "Wan2.1-T2V-1.3B",
    ("Wan2.1", "i2v"): "Wan2.1-I2V-14B-480P",
}


class Opening(TypedDict, total=False):
    """The keywords of :meth:`Checkpoint.open`."""

    revision: str | None
    preset: str | None
    components: str | Path | None
    vae: str | Path | None
    text_encoder: str | Path | None
    image_encoder: str | Path | None
    weights_key: str | None


OPENING: Final = tuple(Opening.__annotations__)


@dataclass(frozen=True)
class Default(Generic[_T]):
    """A setting that nobody gave, and where it was taken from."""

    value: _T
    source: str


@dataclass(frozen=True)
class Defaults:
    """What to generate with when nothing else is asked for; ``resolution`` is height, width."""

    resolution: Default[tuple[int, int]]
    num_frames: Default[int]
    fps: Default[int]
    shift: Default[float]
    guidance_scale: Default[float]
    steps: Default[int]
    ar_step: Default[int]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, understood; nothing of its tensors but headers has been read.

    Attributes:
        layout: the folder taken apart.
        config: of the transformer, agreed on by ``config.json`` and the tensors.
        task: what the checkpoint was trained for.
        guess: which released checkpoint it is.
        defaults: settings to generate with, each with its source.
        repo: the Hugging Face id it came from; None for a local folder.
        notes: what was taken off the names of the transformer's tensors, what was left, and
            whether it is a causal student.
    """

    layout: Layout
    config: TransformerConfig
    task: Task
    guess: Guess
    defaults: Defaults
    repo: str | None = None
    notes: tuple[str, ...] = ()

    @staticmethod
    def open(
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        preset: str | None = None,
        components: str | Path | None = None,
        vae: str | Path | None = None,
        text_encoder: str | Path | None = None,
        image_encoder: str | Path | None = None,
        weights_key: str | None = None,
    ) -> "Checkpoint":
        """Understand a folder, a file, a Hugging Face id or ``owner/name/path`` of a file there.

        Args:
            path_or_id: a folder in either format, a transformer's own folder or file, or an id.
            revision: branch, tag or commit of an id.
            preset: name of the released checkpoint it is; overrides the guess.
            components: a folder or id whose VAE, encoders and tokenizer are taken in place of the
                checkpoint's. Those that it still lacks come from the environment's
                ``SKYREELS_JAX_COMPONENTS``, if that is set.
            vae: a file or folder of the VAE, before all others.
            text_encoder: as ``vae``; a tokenizer beside it is taken too.
            image_encoder: as ``vae``.
            weights_key: which mapping of a file with several is the transformer.

        Raises:
            RequestError: there is no such folder, id or preset, or the preset has another shape.
            WeightsError: the folder is incomplete or contradicts itself, or a component given is
                something else.
        """
        location = locate(path_or_id, revision, known=published_weights(preset))
        layout = with_heads(_read(location.folder, weights_key), preset)
        source = layout.tensors()
        if not layout.config:
            shapes = {name: info.shape for name, info in source.tensors().items()}
            refuse_shapes(layout.folder, shapes)
        if preset is None:
            files = [(f"the name of {file.name}", file.name) for file in layout.files()]
            names = names_of(layout, location.repo, source.marker)
            refuse_names(layout.folder, [*names, *files])
        given: dict[ComponentName, str | Path | None] = {
            "vae": vae,
            "text_encoder": text_encoder,
            "image_encoder": image_encoder,
        }
        config = stored_transformer(layout, source).config
        layout = _completed(layout, components, given, config)
        student = guess_student(layout, config, source, location.repo)
        named = {"repo": location.repo, "preset": preset, "marker": source.marker}
        guess = guess_preset(layout, config, **named, causal=student)
        notes = source.notes if guess.causal is None else (*source.notes, guess.causal.words())
        for note in notes:
            logger.info("%s: %s", layout.folder, note)
        return Checkpoint(
            layout=layout,
            config=config,
            task=guess.preset.task if guess.preset else task_of(layout, config),
            guess=guess,
            defaults=_defaults(layout, config, guess),
            repo=location.repo,
            notes=notes,
        )

    @property
    def folder(self) -> Path:
        """The checkpoint's folder, or its file."""
        return self.layout.folder

    @property
    def vae(self) -> Path:
        """The VAE's file or folder; a WeightsError if it is missing, as for those below."""
        return self.layout.component("vae")

    @property
    def text_encoder(self) -> Path:
        """The text encoder's file or folder."""
        return self.layout.component("text_encoder")

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's folder."""
        return self.layout.component("tokenizer")

    @property
    def image_encoder(self) -> Path:
        """The image encoder's file or folder."""
        return self.layout.component("image_encoder")

    def verify(self) -> None:
        """Prove that the transformer, the VAE and the encoders are complete and fit one another.

        Headers are enough for it. What this refuses would otherwise come up after minutes of
        encoding and denoising.

        Raises:
            WeightsError: a component is missing, unsound or incomplete, or gives what the
                transformer does not take.
            UnsupportedError: the VAE is a variant that SkyReels-V2 does not use.
        """
        stored_transformer(self.layout).verify()
        text = stored_text_encoder(self.layout)
        text.verify()
        self._check_width("text_encoder", text.config.dim, self.config.text_dim)
        if self.config.image_dim is not None:
            image = stored_image_encoder(self.layout)
            image.verify()
            self._check_width("image_encoder", image.config.dim, self.config.image_dim)
        stored_vae(self.layout).verify()

    def _check_width(self, name: ComponentName, given: int, taken: int) -> None:
        if given != taken:
            raise WeightsError(
                f"{self.layout.component(name)} gives {given} features and "
                f"{self.layout.config_file} takes {taken}: they belong to different checkpoints"
            )

    @property
    def about(self) -> About:
        """What a pipeline folder made of this one says of itself."""
        pipelines = PIPELINE_OF_TASK
        if self.guess.family == "Wan2.1":
            pipelines = {**pipelines, **WAN_PIPELINE_OF_TASK}
        return About(
            name=self.guess.preset.name if self.guess.preset else self.folder.resolve().name,
            pipeline=pipelines[self.task],
            flow_shift=self.defaults.shift.value,
        )

    @property
    def block_length(self) -> int | None:
        """Frames a block of block-causal attention, where the config asks for it.

        Raises:
            WeightsError: if the config's value is illegal.
        """
        value = self.layout.config.get("num_frame_per_block", 1)
        if type(value) is not int or value < 1:
            raise WeightsError(
                f"{self.layout.config_file}: num_frame_per_block = {value!r:.80} must be at least 1"
            )
        return value if value > 1 else None


def _read(path: Path, key: str | None) -> Layout:
    if not path.is_dir():
        return read_file(path, key=key)
    if key is not None:
        raise WeightsError(f"{path} is a folder: `weights_key` goes with a single file")
    return read_layout(path)


def _completed(
    layout: Layout,
    components: str | Path | None,
    given: Mapping[ComponentName, str | Path | None],
    config: TransformerConfig,
) -> Layout:
    """The layout with the components that were given, and a default's for what it lacks then."""
    paths: dict[ComponentName, Path] = {
        name: path_of(path, name) for name, path in given.items() if path is not None
    }
    if components is not None:
        found = components_in(locate(components, needed=NEEDED_COMPONENTS).folder)
        layout = with_components(layout, found)
    if paths or "tokenizer" not in layout.components:  # The text encoder's file may hold one.
        layout = with_components(layout, paths)
    default = os.environ.get(COMPONENTS_VARIABLE)
    if default and any(name not in layout.components for name in needed_components(config)):
        found = components_in(locate(default, needed=NEEDED_COMPONENTS).folder)
        lacking = {name: path for name, path in found.items() if name not in layout.components}
        layout = replace(layout, components={**lacking, **layout.components})
    return layout


def load_transformer(
    checkpoint: Checkpoint,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    param_dtype: DTypeLike | None = None,
    kernel_dtype: DTypeLike | None = None,
    placement: Placement = on_default_device,
    loras: Sequence[Lora] = (),
) -> WanModel:
    """Load a checkpoint's transformer; host memory holds each parameter once.

    Args:
        checkpoint: to load from.
        dtype: to compute in.
        param_dtype: to store in; None stores in ``dtype``.
        kernel_dtype: int8 or float8_e4m3fn, which the blocks' kernels are quantised to.
        placement: puts each finished parameter on its device or devices.
        loras: added in float32 before the values are rounded; beside quantised kernels.

    Raises:
        WeightsError: if the folder and the model do not cover each other, a LoRA does not fit, or a
            value is not finite.
    """
    stored = stored_transformer(checkpoint.layout)
    if loras:
        stored = with_loras(stored, loras, kernel_dtype=kernel_dtype)
    model = stored.load(dtype, placement, param_dtype=param_dtype, kernel_dtype=kernel_dtype)
    if loras:
        put_beside(model, stored, dtype, placement, kernel_dtype)
    return model


def _defaults(layout: Layout, config: TransformerConfig, guess: Guess) -> Defaults:
    preset = guess.preset
    source = f"preset {preset.name}" if preset else f"{guess.family} {config.model_type} models"
    if preset is None:
        preset = PRESETS[_LIKE[guess.family, config.model_type]]
    guidance = Default(preset.guidance_scale, source)
    if guess.causal is not None and guess.causal.own_guidance is not None:
        guidance = Default(guess.causal.own_guidance, guess.causal.origin)
    return Defaults(
        resolution=Default(preset.resolution, source),
        num_frames=Default(preset.num_frames, source),
        fps=Default(preset.fps, source),
        shift=_stored_shift(layout) or Default(preset.shift, source),
        guidance_scale=guidance,
        steps=Default(preset.steps, source),
        ar_step=Default(preset.ar_step, source if preset.ar_step else "all frames together"),
    )


def _stored_shift(layout: Layout) -> Default[float] | None:
    """``flow_shift`` of a diffusers scheduler, unless it is the 1.0 that converters leave there."""
    folder = layout.components.get("scheduler")
    file = folder / "scheduler_config.json" if folder else None
    if file is None or not file.exists():
        return None
    shift = read_object(file).get("flow_shift", 1.0)
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < 1000:
        raise WeightsError(f"{file}: flow_shift = {shift!r:.80} must be a positive number")
    return None if shift == 1.0 else Default(float(shift), "scheduler/scheduler_config.json")
