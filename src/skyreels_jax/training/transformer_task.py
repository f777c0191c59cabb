"""Training the transformer: flow matching, diffusion forcing, image-to-video."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from skyreels_jax.errors import RequestError
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.training.conditions import ImageStates, TextStates
from skyreels_jax.training.encoded import WORDINGS, Clips, Source, encoded_clips
from skyreels_jax.training.objective import Batch, Weight, cosmap, velocity_loss
from skyreels_jax.training.parameters import Params, Template
from skyreels_jax.training.sigma_distributions import (
    KNOWN,
    Continuation,
    EachFrame,
    Levels,
    LogitNormal,
    Mixed,
    NonDecreasing,
    ShiftedUniform,
    Sigmas,
)
from skyreels_jax.weights.layout import parts_of, read_layout
from skyreels_jax.weights.parts import stored_vae
from skyreels_jax.weights.rules import Dialect
from skyreels_jax.weights.transformer_folder import (
    load_transformer_state,
    read_config,
    save_transformer,
)

logger = logging.getLogger(__name__)
# Streams of random numbers that no two uses share.
TRAINING: Final = 1
# Levels at which the held-out loss is measured, and clips it is measured on.
MEASURED_AT: Final = (0.1, 0.3, 0.5, 0.7, 0.9)
EVALUATED: Final = 64

# Writes what a model makes into a folder.
Sampler = Callable[[WanModel, Path], None]


@dataclass(frozen=True)
class VideoShape:
    """The free numbers of a :class:`TransformerConfig`.

    Attributes:
        model_type: ``t2v``, or ``i2v`` for a first frame.
        inject_sample_info: whether the frame rate is told.
        start: a pipeline's or transformer's folder to begin with; its numbers replace these. A
            ``t2v`` one may begin an ``i2v`` one: what it lacks then begins with no effect.
        dtype: to compute in; parameters are float32.
        remat: keep only the blocks' inputs for the backward pass.
    """

    model_type: Literal["t2v", "i2v"] = "t2v"
    dim: int = 192
    ffn_dim: int = 512
    num_heads: int = 4
    num_layers: int = 8
    text_dim: int = 128
    image_dim: int | None = None
    inject_sample_info: bool = True
    start: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False


@dataclass(frozen=True)
class Objective:
    """Which levels are drawn, and how often the text is left out.

    Attributes:
        levels: of whole videos: ``logit_normal`` or ``uniform``.
        shift: of those levels towards noise.
        frames: share of videos whose frames have levels of their own: diffusion forcing.
        continued: share of videos whose first frames are given (almost no noise, no error counted).
        forcing: of such frames: ``non_decreasing`` (FoPP) or ``independent``.
        forcing_shift: of those levels towards noise.
        text_dropout: share of clips without text, for guidance.
        weighting: of errors by their level: ``flat``, or ``cosmap``
            (:func:`~skyreels_jax.training.objective.cosmap`).
    """

    levels: Literal["logit_normal", "uniform"] = "logit_normal"
    shift: float = 1.0
    frames: float = 0.0
    continued: float = 0.0
    forcing: Literal["non_decreasing", "independent"] = "non_decreasing"
    forcing_shift: float = 1.0
    text_dropout: float = 0.1
    weighting: Literal["flat", "cosmap"] = "flat"

    def __post_init__(self):
        shares = (self.frames, self.continued)
        if not (min(shares) >= 0 and sum(shares) <= 1 and 0 <= self.text_dropout < 1):
            raise ValueError(
                f"{self.frames=} and {self.continued=} should be shares of 1, and "
                f"{self.text_dropout=} one below 1"
            )
        self.distribution()

    def distribution(self) -> Levels:
        """Of the levels."""
        whole: Levels = (
            LogitNormal(shift=self.shift)
            if self.levels == "logit_normal"
            else ShiftedUniform(self.shift)
        )
        by_frame: Levels = (
            NonDecreasing(shift=self.forcing_shift)
            if self.forcing == "non_decreasing"
            else EachFrame(ShiftedUniform(self.forcing_shift))
        )
        shared = self.frames + self.continued
        if self.continued:
            by_frame = Mixed(Continuation(whole), by_frame, self.continued / shared)
        return Mixed(by_frame, whole, shared) if shared else whole

    def weight(self, sigma: Sigmas) -> Sigmas:
        """Of errors at these levels."""
        weight = cosmap(sigma) if self.weighting == "cosmap" else jnp.ones_like(sigma)
        return jnp.where(sigma > KNOWN, weight, 0.0) if self.continued else weight


@dataclass(frozen=True)
class ShapesData:
    """Clips of moving shapes.

    Attributes:
        vae: folder with a ``vae``.
        text: folder with ``tokenizer`` and ``text_encoder``.
        image: folder with ``image_encoder``, for i2v.
        encoded: folder in which encoded clips are kept.
        batch: clips a step.
        clips: how many different ones.
        frames: of a clip, ``4k + 1``.
        size: height and width, a multiple of 16.
        text_length: tokens that hold the longest caption.
        pairs: share of clips of two things; as many as there are in ``clips`` unless given.
    """

    vae: str
    text: str
    encoded: str
    image: str | None = None
    batch: int = 32
    clips: int = 8192
    frames: int = 17
    size: int = 64
    text_length: int = 48
    pairs: float | None = None

    def __post_init__(self):
        if self.pairs is not None and not 0 <= self.pairs <= 1:
            raise ValueError(f"{self.pairs=} should be a share of 1")


@dataclass(frozen=True)
class VideoTraining:
    """A run's tables ``data``, ``model`` and ``objective``."""

    data: ShapesData
    model: VideoShape = field(default_factory=VideoShape)
    objective: Objective = field(default_factory=Objective)


class VideoTask:
    """A :class:`~skyreels_jax.training.task.Task`."""

    # Shows what the model makes; whoever can generate sets it.
    sampler: Sampler | None = None

    def __init__(self, training: VideoTraining, seed: int):
        """``seed`` decides initial values and the order of data.

        Raises:
            RequestError: ``model.start`` and ``model.model_type`` do not go together.
        """
        self.training, self.seed = training, seed
        data = training.data
        self.config, first = self._begin()
        vae = stored_vae(parts_of(Path(data.vae))).load(jnp.float32)
        source = Source(seed, data.frames, data.size)
        encode = (Path(data.encoded), vae)
        wanted = {"with_known": self.config.model_type == "i2v", "say": logger.warning}
        self._clips = encoded_clips(*encode, source, data.clips, **wanted)
        held = dataclasses.replace(source, held=True)
        self._held = encoded_clips(*encode, held, EVALUATED, **wanted)
        self._chances = None if data.pairs is None else chances(source, data.clips, data.pairs)
        self._texts = TextStates(Path(data.text), data.text_length)
        self._images = self._image_states()
        self.template, self.first = Template.of(first)
        self._levels = training.objective.distribution()
        self._padding = self.config.text_len - data.text_length
        self._held_loss = jax.jit(self._loss_at)

    def _image_states(self) -> ImageStates | None:
        if self.config.model_type == "t2v":
            return None
        if self.training.data.image is None:
            raise RequestError("data.image must name the folder of an image encoder for i2v")
        return ImageStates(Path(self.training.data.image))

    def _begin(self) -> tuple[TransformerConfig, WanModel]:
        shape = self.training.model
        numbers = {
            name: getattr(shape, name)
            for name in ("model_type", "dim", "ffn_dim", "num_heads", "num_layers", "text_dim")
        }
        if shape.start is None:
            config = TransformerConfig(
                **numbers,
                image_dim=shape.image_dim,
                in_dim=36 if shape.model_type == "i2v" else 16,
                inject_sample_info=shape.inject_sample_info,
            )
            return config, self._fresh(config)
        layout = read_layout(Path(shape.start))
        begun = read_config(layout)
        state = load_transformer_state(layout, begun, dtype=jnp.float32)
        if begun.model_type == shape.model_type:
            model = self._fresh(begun)
            nnx.update(model, state)
            return begun, model
        if shape.model_type == "t2v":
            raise RequestError(f"model.start {shape.start} is i2v and model.model_type is t2v")
        config = dataclasses.replace(
            begun,
            model_type="i2v",
            in_dim=begun.in_dim + 20,
            image_dim=shape.image_dim,
            inject_sample_info=shape.inject_sample_info,
        )
        model = self._fresh(config)
        widen(model, Template.of(nnx.merge(nnx.graphdef(self._fresh(begun)), state))[1])
        return config, model

    def _fresh(self, config: TransformerConfig) -> WanModel:
        shape = self.training.model
        return WanModel(
            config,
            rngs=nnx.Rngs(self.seed),
            dtype=jnp.dtype(shape.dtype),
            param_dtype=jnp.float32,
            remat=shape.remat,
        )

    def init(self) -> Params:
        """Fresh, or those of ``model.start``."""
        return self.first

    def batch(self, index: int) -> Batch:
        """Clips with one of their wordings each, or none."""
        rng = np.random.default_rng([self.seed, TRAINING, index])
        rows = rng.choice(len(self._clips), size=self.training.data.batch, p=self._chances)
        texts = [self._clips.captions[row][int(rng.integers(WORDINGS))] for row in rows]
        empty = rng.random(len(rows)) < self.training.objective.text_dropout
        said = [("" if none else str(text)) for none, text in zip(empty, texts, strict=True)]
        return self._batch(self._clips, rows, said)

    def _batch(self, clips: Clips, rows: np.ndarray, texts: list[str]) -> Batch:
        images = None if self._images is None else self._images(clips.first[rows])
        return Batch(
            latents=jnp.asarray(clips.latents[rows]),
            context=jnp.asarray(self._texts(texts)),
            clip_fea=None if images is None else jnp.asarray(images),
            y=None if clips.known is None else jnp.asarray(clips.known[rows]),
            fps=jnp.asarray(clips.fps[rows] != 16, jnp.int32),
        )

    def loss(
        self, params: Params, batch: Batch, key: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """See :func:`~skyreels_jax.training.objective.velocity_loss`."""
        noise_key, level_key = jax.random.split(key)
        shape = batch.latents.shape
        noise = jax.random.normal(noise_key, shape)
        sigma = self._levels.sample(level_key, shape[0], shape[2])
        weight = self.training.objective.weight
        return self._velocity_loss(params, batch, noise, sigma, weight), {}

    def _velocity_loss(
        self, params: Params, batch: Batch, noise: Array, sigma: Array, weight: Weight | None = None
    ) -> Float[Array, ""]:
        model = self.template.model(params)
        context = model.prepare_context(batch.context, batch.clip_fea, padding=self._padding)
        batch = batch._replace(context=context, clip_fea=None)
        return velocity_loss(model, batch, noise, sigma, weight=weight)

    def _loss_at(self, params: Params, batch: Batch, sigma: Array) -> Float[Array, ""]:
        noise = jax.random.normal(jax.random.key(0), batch.latents.shape)
        levels = jnp.broadcast_to(sigma, (batch.latents.shape[0], 1))
        return self._velocity_loss(params, batch, noise, levels)

    def evaluate(self, params: Params) -> dict[str, float]:
        """Loss on held-out combinations at fixed levels, and its mean."""
        rows = np.arange(EVALUATED)
        batch = self._batch(self._held, rows, [c[0] for c in self._held.captions])
        found = {
            f"held_{level}": float(self._held_loss(params, batch, jnp.float32(level)))
            for level in MEASURED_AT
        }
        return {**found, "held": float(np.mean(list(found.values())))}

    def export(self, params: Params, folder: Path) -> None:
        """``transformer`` in diffusers' layout and ``original``, both bfloat16."""
        model = self.template.model(params)
        names: dict[Dialect, str] = {"diffusers": "transformer", "original": "original"}
        for layout, name in names.items():
            save_transformer(folder / name, model, self.config, layout=layout, dtype=jnp.bfloat16)

    def sample(self, params: Params, folder: Path) -> None:
        """What the sampler writes, if there is one."""
        if self.sampler is not None:
            self.sampler(self.template.model(params), folder)


def chances(source: Source, count: int, pairs: float) -> Float[np.ndarray, " N"]:
    """Of the first ``count`` clips, so that a share ``pairs`` of those drawn has two things."""
    is_pair = np.array([len(source.scene(index)[0].things) == 2 for index in range(count)])
    of_each = np.array([np.sum(~is_pair), np.sum(is_pair)])
    wanted = np.array([1 - pairs, pairs])
    if np.any((of_each == 0) & (wanted > 0)):
        raise RequestError(f"data.pairs = {pairs} cannot be had from {count} clips")
    return np.where(is_pair, *(wanted / np.maximum(of_each, 1))[::-1])


def widen(model: WanModel, begun: Params) -> None:
    """Give an ``i2v`` model the parameters of a ``t2v`` one, so that it predicts the same.

    The condition's channels have no weight yet, and the image's values are zero.
    """
    state = nnx.state(model)
    flat = nnx.to_flat_state(state)
    updated = []
    for path, leaf in flat:
        name = ".".join(map(str, path))
        value = leaf.get_value()
        if name == "patch_embedding.kernel":
            known = begun[name]
            value = jnp.zeros_like(value).at[..., : known.shape[-2], :].set(known)
        elif name in begun:
            value = begun[name]
        elif "v_img" in path:
            value = jnp.zeros_like(value)
        updated.append((path, leaf.replace(value)))
    nnx.update(model, nnx.from_flat_state(updated))
