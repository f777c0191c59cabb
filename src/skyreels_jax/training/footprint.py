"""What a training run will take, from the recipe and from headers alone: no weight is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Abstract
from jaxtyping import PyTree

from skyreels_jax.geometry import PIXELS_PER_LATENT, latent_frames
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.training.lora import LoraModel
from skyreels_jax.training.objective import Batch, velocity_loss
from skyreels_jax.training.step import init_state, make_step
from skyreels_jax.training.task import LossAndMetrics, Params, Template
from skyreels_jax.training.transformer_recipe import ClipsData, VideoTraining
from skyreels_jax.training.videos.recipe import FolderData, sides_of
from skyreels_jax.weights.components.transformer import TRANSFORMER

if TYPE_CHECKING:
    import optax


@dataclass(frozen=True)
class ClipShape:
    """The largest clips of a step.

    Attributes:
        batch: how many.
        frames: of each.
        height, width: in pixels.
    """

    batch: int
    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch} of {self.width} x {self.height} x {self.frames}"


@dataclass(frozen=True)
class Footprint:
    """Bytes of a training step on one device.

    Attributes:
        clips: that it was counted for.
        frozen: parameters that are not trained.
        trained: those that are.
        optimizer: what the optimiser keeps.
        average: of the parameters.
        batch: the clips and their conditions.
        temporary: what the compiler allots for intermediate values, of this machine's device;
            ``None`` if it does not tell.
    """

    clips: ClipShape
    frozen: int
    trained: int
    optimizer: int
    average: int
    batch: int
    temporary: int | None

    def parts(self) -> Mapping[str, int | None]:
        """All of it in words, and together."""
        found = {
            "parameters that are not trained": self.frozen,
            "parameters that are": self.trained,
            "optimiser": self.optimizer,
            "average": self.average,
            "clips and conditions": self.batch,
            "intermediate values": self.temporary,
        }
        return {**found, "together": sum(size or 0 for size in found.values())}


def largest_clips(training: VideoTraining) -> ClipShape:
    """The largest clips that a recipe's data can have."""
    data = training.data
    if isinstance(data, ClipsData):
        return ClipShape(data.batch, data.frames, data.size, data.size)
    assert isinstance(data, FolderData)
    found = []
    for dataset in map(data.filled, data.datasets):
        width, height = sides_of(dataset.resolution or 0)
        full = dataset.max_frames if dataset.frame_extraction == "full" else 1
        frames = max((*dataset.target_frames, full))
        found.append(ClipShape(dataset.batch_size or 1, frames, height, width))
    return max(found, key=lambda clip: clip.batch * clip.frames * clip.height * clip.width)


def footprint(
    training: VideoTraining,
    config: TransformerConfig,
    optimizer: "Callable[[Params], optax.GradientTransformation]",
    *,
    ema: float = 0.0,
    accumulate: int = 1,
    clips: ClipShape | None = None,
    compiles: bool = True,
) -> Footprint:
    """Count what a step takes, and have it compiled from shapes.

    Args:
        training: the recipe's tables.
        config: of the transformer that it describes.
        optimizer: of trained parameters, or their shapes.
        ema: of the parameters; 0 keeps no average.
        accumulate: parts of a batch.
        clips: the largest; as the data has them unless given.
        compiles: whether the compiler is asked for intermediate values.
    """
    clips = largest_clips(training) if clips is None else clips
    template, trained, lora = _abstract(training, config)
    chain = optimizer(trained)
    frozen = {} if lora is None else lora.frozen
    batch = _abstract_batch(config, clips)
    state = jax.eval_shape(lambda params: init_state(params, chain, ema), trained)

    def loss(params: Params, batch: Batch, drawn: PyTree) -> LossAndMetrics:
        noise, sigma = drawn
        model = template.model(params) if lora is None else lora.model(params)
        return velocity_loss(model, batch, noise, sigma), {}

    def draw(batch: Batch, key: jax.Array) -> PyTree:
        shape = batch.latents.shape
        noise = jax.random.normal(key, shape)
        return noise, jax.random.uniform(key, (shape[0], shape[2]))

    temporary = None
    if compiles:
        step = make_step(loss, chain, draw=draw, accumulate=accumulate, frozen=frozen)
        key = jax.eval_shape(lambda: jax.random.key(0))
        lowered = step.func.lower(state, batch, key, **step.keywords)  # pyright: ignore
        memory = lowered.compile().memory_analysis()
        temporary = None if memory is None else memory.temp_size_in_bytes
    parts = (frozen, trained, state.optimizer, state.average, batch)
    return Footprint(clips, *map(_bytes, parts), temporary)


def _abstract(
    training: VideoTraining, config: TransformerConfig
) -> tuple[Template[WanModel], Params, LoraModel | None]:
    """A model of shapes alone, its trained parameters, and the LoRA that they are, if so."""
    shape, lora = training.model, training.lora
    base = "float32" if lora is None else lora.base
    kernels = jnp.int8 if base == "int8" else None
    stored = jnp.bfloat16 if base == "int8" else jnp.dtype(base)
    model = TRANSFORMER.abstract(config, jnp.dtype(shape.dtype), stored, kernels)
    model.remat = shape.remat
    if lora is None:
        template, params = Template.of(model)
        return template, params, None
    made = LoraModel.of(model, lora)
    return made.template, jax.eval_shape(lambda: made.init(0)), made


def _abstract_batch(config: TransformerConfig, clips: ClipShape) -> Batch:
    rows, steps = clips.batch, latent_frames(clips.frames)
    sides = clips.height // PIXELS_PER_LATENT, clips.width // PIXELS_PER_LATENT
    image = channels = None
    if config.model_type == "i2v":
        image = Abstract((rows, config.image_tokens, config.image_dim or 0), jnp.float32)
        channels = Abstract((rows, config.in_dim - config.latent_dim, steps, *sides), jnp.float32)
    return Batch(
        Abstract((rows, config.latent_dim, steps, *sides), jnp.float32),
        Abstract((rows, config.text_len, config.text_dim), jnp.float32),
        image,
        channels,
        Abstract((rows,), jnp.int32),
    )


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
