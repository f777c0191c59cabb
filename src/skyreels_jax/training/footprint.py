"""What a training run will take, from the recipe and from headers alone: no weight is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.stages import Traced
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from skyreels_jax.geometry import PIXELS_PER_LATENT, latent_frames
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.training.layers_in_parts import LayersInParts
from skyreels_jax.training.lora import LoraModel
from skyreels_jax.training.objective import Batch, velocity_loss
from skyreels_jax.training.step import TrainState, init_state, make_step
from skyreels_jax.training.task import LossAndMetrics, Params, ShapesOfParams, Template
from skyreels_jax.training.transformer_recipe import ClipsData, VideoTraining
from skyreels_jax.training.videos.recipe import FolderData, sides_of

if TYPE_CHECKING:
    import optax

    from skyreels_jax.training.mesh import TrainingMesh

_Model = Callable[[Params], WanModel]


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

    def offloaded(self) -> "Footprint":
        """What the device has between steps where optimiser and average wait on the host."""
        return replace(self, optimizer=0, average=0)


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


@dataclass(frozen=True, eq=False)
class AbstractStep:
    """A step of training the transformer, or a LoRA of it, of which all arrays are shapes.

    It is a :class:`.LayeredTask`, so that a mesh can run it in parts.

    Attributes:
        config: of the transformer.
        frozen: parameters that are not trained.
        state: before the step.
        batch: of clips and their conditions.
        model: of all parameters.
        optimizer: of those that are trained.
        ema: of the parameters; 0 keeps no average.
    """

    config: TransformerConfig
    frozen: ShapesOfParams
    state: TrainState
    batch: Batch
    model: _Model
    optimizer: "optax.GradientTransformation"
    ema: float

    @classmethod
    def of(
        cls,
        training: VideoTraining,
        config: TransformerConfig,
        optimizer: "Callable[[Params], optax.GradientTransformation]",
        *,
        clips: ClipShape,
        ema: float = 0.0,
    ) -> "AbstractStep":
        """The step that a recipe's tables describe; nothing is computed.

        Args:
            training: of which model and LoRA are taken.
            config: of the transformer that it describes.
            optimizer: of trained parameters.
            clips: of the batch.
            ema: of the parameters; 0 keeps no average.
        """
        made: list[tuple[_Model, optax.GradientTransformation]] = []

        def begin() -> tuple[Params, TrainState, Batch]:
            frozen, trained, model = _model_of(training, config)
            chain = optimizer(trained)
            made.append((model, chain))
            return frozen, init_state(trained, chain, ema), _batch_of(config, clips)

        frozen, state, batch = jax.eval_shape(begin)
        model, chain = made[0]
        return cls(config, frozen, state, batch, model, chain, ema)

    @property
    def layered(self) -> TransformerConfig:
        """The transformer."""
        return self.config

    def on_mesh(self, mesh: "TrainingMesh") -> None:
        """Nothing: it is never evaluated."""

    def loss(self, params: Params, batch: Batch, drawn: PyTree) -> LossAndMetrics:
        """That of the recipe's velocity."""
        return velocity_loss(self.model(params), batch, *drawn), {}

    def loss_in_parts(
        self, layers: LayersInParts, params: Params, batch: Batch, noise: PyTree
    ) -> LossAndMetrics:
        """:meth:`loss` on one of many devices."""
        model = self.model(params)
        layers.adopt(model)
        return velocity_loss(model, batch, *noise), {}

    def traced(
        self,
        accumulate: int = 1,
        mesh: "TrainingMesh | None" = None,
        kernels: DTypeLike = jnp.float32,
    ) -> Traced:
        """What JAX traced of it, with arrays where a mesh has them."""
        frozen, state, batch = self.frozen, self.state, self.batch
        loss, key = self.loss, jax.eval_shape(lambda: jax.random.key(0))
        if mesh is not None:
            loss = mesh.loss_of({**frozen, **state.params}, loss)
            frozen, state, batch = self.placed(mesh)
        made = {"accumulate": accumulate, "ema": self.ema, "mesh": mesh}
        step = make_step(loss, self.optimizer, draw=_draw, kernels=kernels, **made)
        assert isinstance(step, partial)
        return step.func.trace(state, batch, key, frozen=frozen)

    def placed(self, mesh: "TrainingMesh") -> tuple[ShapesOfParams, TrainState, Batch]:
        """Frozen parameters, state and batch with the places that they have on a mesh."""

        def at(leaf: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        frozen = {**self.frozen}
        return (
            jax.tree.map(at, frozen, mesh.weight_shardings(frozen)),
            jax.tree.map(at, self.state, mesh.state_shardings(self.state)),
            jax.tree.map(lambda leaf: at(leaf, mesh.sharding("rows")), self.batch),
        )


def footprint(
    training: VideoTraining,
    config: TransformerConfig,
    optimizer: "Callable[[Params], optax.GradientTransformation]",
    *,
    ema: float = 0.0,
    accumulate: int = 1,
    clips: ClipShape | None = None,
    kernels: DTypeLike = jnp.float32,
    compiles: bool = True,
) -> Footprint:
    """Count what a step takes, and have it compiled from shapes.

    Args:
        training: the recipe's tables.
        config: of the transformer that it describes.
        optimizer: of trained parameters.
        ema: of the parameters; 0 keeps no average.
        accumulate: parts of a batch.
        clips: the largest; as the data has them unless given.
        kernels: dtype in which the model is given what multiplies.
        compiles: whether the compiler is asked for intermediate values.
    """
    clips = largest_clips(training) if clips is None else clips
    step = AbstractStep.of(training, config, optimizer, clips=clips, ema=ema)
    temporary = None
    if compiles:
        memory = step.traced(accumulate, kernels=kernels).lower().compile().memory_analysis()
        temporary = None if memory is None else memory.temp_size_in_bytes
    return Footprint(
        clips,
        frozen=_bytes(step.frozen),
        trained=_bytes(step.state.params),
        optimizer=_bytes(step.state.optimizer),
        average=_bytes(step.state.average),
        batch=_bytes(step.batch),
        temporary=temporary,
    )


def _draw(batch: Batch, key: Array) -> PyTree:
    """Noise, and a sigma for every frame."""
    shape = batch.latents.shape
    return jax.random.normal(key, shape), jax.random.uniform(key, (shape[0], shape[2]))


def _model_of(training: VideoTraining, config: TransformerConfig) -> tuple[Params, Params, _Model]:
    """Parameters that are not trained, those that are, and the model with both."""
    shape, lora = training.model, training.lora
    base = "float32" if lora is None else lora.base
    model = WanModel(
        config,
        rngs=nnx.Rngs(0),
        dtype=jnp.dtype(shape.dtype),
        param_dtype=jnp.bfloat16 if base == "int8" else jnp.dtype(base),
        kernel_dtype=jnp.int8 if base == "int8" else None,
        remat=shape.remat,
    )
    if lora is None:
        template, params = Template.of(model)
        return {}, params, template.model
    whole = LoraModel.of(model, lora)
    return whole.frozen, whole.init(0), replace(whole, frozen={}).model


def _batch_of(config: TransformerConfig, clips: ClipShape) -> Batch:
    rows, steps = clips.batch, latent_frames(clips.frames)
    sides = clips.height // PIXELS_PER_LATENT, clips.width // PIXELS_PER_LATENT
    image = channels = None
    if config.model_type == "i2v":
        image = jnp.zeros((rows, config.image_tokens, config.image_dim or 0))
        channels = jnp.zeros((rows, config.in_dim - config.latent_dim, steps, *sides))
    return Batch(
        jnp.zeros((rows, config.latent_dim, steps, *sides)),
        jnp.zeros((rows, config.text_len, config.text_dim)),
        image,
        channels,
        jnp.zeros((rows,), jnp.int32),
    )


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
