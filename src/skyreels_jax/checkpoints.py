"""What a checkpoint folder is: its files, its transformer, and the settings it is made for."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax.numpy as jnp
from jax.typing import DTypeLike

from skyreels_jax.errors import RequestError, WeightsError
from skyreels_jax.hub import locate
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.presets import PIPELINE_OF_TASK, PRESETS, TASK_OF_PIPELINE, Preset, Task
from skyreels_jax.weights.components.clip import stored_image_encoder
from skyreels_jax.weights.components.transformer import stored_transformer
from skyreels_jax.weights.components.umt5 import stored_text_encoder
from skyreels_jax.weights.components.vae import stored_vae
from skyreels_jax.weights.engine import Placement, on_default_device
from skyreels_jax.weights.layout import ComponentName, Layout, read_layout, read_object
from skyreels_jax.weights.pipeline_folder import About

_T = TypeVar("_T")


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
class Guess:
    """Which released checkpoint a folder was taken for (None: none of them), and why."""

    preset: Preset | None
    reason: str


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
    """

    layout: Layout
    config: TransformerConfig
    task: Task
    guess: Guess
    defaults: Defaults
    repo: str | None = None

    @staticmethod
    def open(
        path_or_id: str | Path, *, revision: str | None = None, preset: str | None = None
    ) -> "Checkpoint":
        """Understand a folder or Hugging Face id.

        Args:
            path_or_id: a folder in either format, a transformer's own folder, or an id.
            revision: branch, tag or commit of an id.
            preset: name of the released checkpoint it is; overrides the guess.

        Raises:
            RequestError: there is no such folder, id or preset, or the preset has another shape.
            WeightsError: the folder is incomplete or contradicts itself.
        """
        location = locate(path_or_id, revision)
        layout = read_layout(location.folder)
        config = stored_transformer(layout).config
        guess = guess_preset(layout, config, repo=location.repo, preset=preset)
        return Checkpoint(
            layout=layout,
            config=config,
            task=guess.preset.task if guess.preset else _task(layout, config),
            guess=guess,
            defaults=_defaults(layout, config, guess),
            repo=location.repo,
        )

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
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
        return About(
            name=self.guess.preset.name if self.guess.preset else self.folder.resolve().name,
            pipeline=PIPELINE_OF_TASK[self.task],
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
                f"{self.layout.config_file}: num_frame_per_block = {value!r} must be at least 1"
            )
        return value if value > 1 else None


def load_transformer(
    checkpoint: Checkpoint,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    param_dtype: DTypeLike | None = None,
    placement: Placement = on_default_device,
) -> WanModel:
    """Load a checkpoint's transformer; host memory holds each parameter once.

    Args:
        checkpoint: to load from.
        dtype: to compute in.
        param_dtype: to store in; None stores in ``dtype``.
        placement: puts each finished parameter on its device or devices.

    Raises:
        WeightsError: if the folder and the model do not cover each other, or a value is not finite.
    """
    stored = stored_transformer(checkpoint.layout)
    return stored.load(dtype, placement, param_dtype=param_dtype)


def guess_preset(
    layout: Layout, config: TransformerConfig, *, repo: str | None = None, preset: str | None = None
) -> Guess:
    """Which released checkpoint a folder is.

    By its configuration; where several share one, by the pipeline that ``model_index.json`` names,
    then by a recorded name that is exactly a released one. If neither decides, the first is assumed
    and the reason says so.

    Raises:
        RequestError: if ``preset`` is unknown or has another configuration.
    """
    if preset is not None:
        return _given_preset(preset, config)
    candidates = [p for p in PRESETS.values() if _same_shape(p.config, config)]
    if len(candidates) <= 1:
        found = candidates[0] if candidates else None
        shape = f"{config.model_type}, width {config.dim}, {config.num_layers} layers"
        return Guess(found, "its configuration" if found else f"no release has its shape ({shape})")
    pipeline = layout.model_index.get("_class_name")
    task = TASK_OF_PIPELINE.get(pipeline) if isinstance(pipeline, str) else None
    if task in {p.task for p in candidates}:
        candidates = [p for p in candidates if p.task == task]
    for source, name in _recorded_names(layout, repo):
        for candidate in candidates:
            if name.casefold() == candidate.name.casefold():
                return Guess(candidate, f"its configuration and {source}")
    names = ", ".join(p.name for p in candidates)
    return Guess(candidates[0], f"assumed: {names} share its configuration; say which by preset")


def _given_preset(name: str, config: TransformerConfig) -> Guess:
    found = PRESETS.get(name)
    if found is None:
        raise RequestError(f"preset {name!r} is unknown; there are {', '.join(PRESETS)}")
    if not _same_shape(found.config, config):
        raise RequestError(f"preset {name} is another model: {found.config} is not {config}")
    return Guess(found, "given")


def _same_shape(a: TransformerConfig, b: TransformerConfig) -> bool:
    """Equal but for ``text_len``, which the original stores and never uses."""
    return dataclasses.replace(a, text_len=b.text_len) == b


def _recorded_names(layout: Layout, repo: str | None) -> Iterable[tuple[str, str]]:
    """Names this folder goes by, most telling first, without owner and format suffix."""
    recorded: list[tuple[str, Any]] = [
        ("its Hugging Face id", repo),
        ("_name_or_path in model_index.json", layout.model_index.get("_name_or_path")),
        ("_name_or_path in config.json", layout.config.get("_name_or_path")),
        ("the folder's name", layout.folder.resolve().name),
    ]
    for source, name in recorded:
        if isinstance(name, str) and name:
            last = name.rstrip("/").rpartition("/")[2]
            yield f"{source} ({last})", last.removesuffix("-Diffusers")


def _task(layout: Layout, config: TransformerConfig) -> Task:
    """The task of a model that is no released one."""
    if config.model_type == "i2v":
        return "i2v" if config.pos_embed_seq_len is None else "flf2v"
    pipeline = layout.model_index.get("_class_name")
    forcing = isinstance(pipeline, str) and TASK_OF_PIPELINE.get(pipeline) == "df"
    return "df" if forcing or config.inject_sample_info else "t2v"


def _defaults(layout: Layout, config: TransformerConfig, guess: Guess) -> Defaults:
    preset = guess.preset
    source = f"preset {preset.name}" if preset else f"SkyReels-V2 {config.model_type} models"
    if preset is None:
        like = (
            "SkyReels-V2-I2V-1.3B-540P"
            if config.model_type == "i2v"
            else ("SkyReels-V2-T2V-14B-540P")
        )
        preset = PRESETS[like]
    return Defaults(
        resolution=Default(preset.resolution, source),
        num_frames=Default(preset.num_frames, source),
        fps=Default(preset.fps, source),
        shift=_stored_shift(layout) or Default(preset.shift, source),
        guidance_scale=Default(preset.guidance_scale, source),
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
    if type(shift) not in (int, float) or not 0 < shift < 1000:
        raise WeightsError(f"{file}: flow_shift = {shift!r} must be a positive number")
    return None if shift == 1.0 else Default(float(shift), "scheduler/scheduler_config.json")
