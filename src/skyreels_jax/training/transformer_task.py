"""Training the transformer: flow matching, diffusion forcing, image-to-video."""

import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt32

from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_attention import CrossContext
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.presets import PIPELINE_OF_TASK
from skyreels_jax.shapes import Latents
from skyreels_jax.training.batches import ClipBatches, Example, MovingShapes
from skyreels_jax.training.dataset import OnEncoded
from skyreels_jax.training.layers_in_parts import LayersInParts
from skyreels_jax.training.objective import Batch, velocity_loss
from skyreels_jax.training.sigma_distributions import Sigmas, draw_sigmas
from skyreels_jax.training.sources import TrainingSources, find_sources
from skyreels_jax.training.task import LossAndMetrics, Params, Template
from skyreels_jax.training.transformer_recipe import ClipsData, VideoTraining
from skyreels_jax.training.videos.clips import Videos
from skyreels_jax.training.videos.recipe import FolderData
from skyreels_jax.weights.components.clip import stored_image_encoder
from skyreels_jax.weights.components.transformer import TRANSFORMER, stored_transformer
from skyreels_jax.weights.layout import ComponentName, Layout
from skyreels_jax.weights.pipeline_folder import write_pipeline_files
from skyreels_jax.weights.plan import Format

if TYPE_CHECKING:
    from skyreels_jax.training.mesh import TrainingMesh

# Sigmas at which the held-out loss is measured.
_MEASURED_SIGMAS: Final = (0.1, 0.3, 0.5, 0.7, 0.9)

_logger = logging.getLogger(__name__)


@runtime_checkable
class SampleWriter(Protocol):
    """Writes what the model of a pipeline's folder makes, with LoRAs, into another folder."""

    def __call__(self, model: Path, folder: Path, loras: Sequence[Path] = ()) -> None:
        """Write what the model in ``model`` makes into ``folder``."""
        ...


class VideoNoise(NamedTuple):
    """All that is random in a step, by video."""

    noise: Latents
    sigma: Sigmas
    known: Bool[Array, "B F"] | None
    # Data of a random key, where a LoRA's inputs are dropped.
    dropout: UInt32[Array, "B 2"] | None = None


class VideoTask:
    """The transformer as a :class:`~skyreels_jax.training.task.TrainingTask`."""

    # Shows what the model makes; whoever can generate sets it.
    sample_writer: SampleWriter | None = None

    def __init__(
        self,
        training: VideoTraining,
        seed: int,
        on_encoded: OnEncoded = lambda what, done, total: None,
    ):
        """Load all that the recipe names, and encode clips where that has not been done.

        Args:
            training: the recipe's tables.
            seed: decides initial values and the order of data.
            on_encoded: called as clips are encoded.

        Raises:
            RequestError: what the recipe names cannot be found, or does not go together.
        """
        self.training, self.seed = training, seed
        self._sources = find_sources(training)
        self.config = self._sources.config
        self._clips = _opened(training, self._sources, seed, on_encoded)
        self.template, self.first = self._begun()
        self._distribution = training.objective.distribution()
        self._of_stills = dataclasses.replace(training.objective, continued=0.0).distribution()
        self._padding = self.config.text_len - self._clips.text_length
        self._held_loss = jax.jit(self._loss_at)

    def fingerprint(self) -> Mapping[str, str]:
        """Digests of what the recipe names by folder."""
        return self._clips.fingerprint()

    def examples(self) -> Sequence[Example]:
        """What is shown while training."""
        return self._clips.examples()

    def _begun(self) -> tuple[Template[WanModel], Params]:
        return Template.of(self._begin())

    def _begin(self) -> WanModel:
        layout, begun = self._sources.start, self._sources.begun
        if layout is None or begun is None:
            return self._fresh(self.config)
        state = stored_transformer(layout).load_state(jnp.float32)
        if begun == self.config:
            # Of the fresh one only the structure: there is one model in memory, not two.
            graph = nnx.graphdef(nnx.eval_shape(lambda: self._fresh(self.config)))
            return nnx.merge(graph, state)
        _logger.warning(
            "%s is %s: the i2v model begins with its parameters; %d new input channels and the "
            "image's values are zero, and what else looks at the image is drawn at random",
            *(self.training.model.start, begun.model_type, self.config.in_dim - begun.in_dim),
        )
        model, graph = self._fresh(self.config), nnx.graphdef(self._fresh(begun))
        widen_to_i2v(model, Template.of(nnx.merge(graph, state))[1])
        return model

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
        """Fresh parameters, or those of ``model.start``."""
        return self.first

    def batch(self, index: int) -> Batch:
        """Clips with their conditions."""
        return self._clips.batch(index)

    def draw(self, batch: Batch, key: Array) -> VideoNoise:
        """Noise and sigmas of a batch, and which frames are given."""
        noise_key, sigma_key = jax.random.split(key)
        shape = batch.latents.shape
        noise = jax.random.normal(noise_key, shape)
        # A single frame, as an image is, cannot be continued.
        distribution = self._of_stills if shape[2] == 1 else self._distribution
        if not self.training.objective.continued or shape[2] == 1:
            sigma = distribution.sample(sigma_key, shape[0], shape[2])
            return VideoNoise(noise, sigma, None)
        return VideoNoise(noise, *draw_sigmas(self._distribution, sigma_key, shape[0], shape[2]))

    def loss(self, params: Params, batch: Batch, noise: VideoNoise) -> LossAndMetrics:
        """See :func:`~skyreels_jax.training.objective.velocity_loss`."""
        return self._velocity_loss(params, batch, noise), {}

    def _model(self, params: Params, drawn: VideoNoise) -> WanModel:
        """The model with its parameters, for a loss."""
        del drawn
        return self.template.model(params)

    def on_mesh(self, mesh: "TrainingMesh") -> None:
        """Evaluate parameters that are on a mesh from now on."""

        def loss_at(
            layers: LayersInParts, params: Params, batch: Batch, sigma: Array
        ) -> Float[Array, ""]:
            return self._loss_at(params, batch, sigma, layers)

        self._held_loss = mesh.evaluation_of(self._all_parameters(), loss_at)

    def _all_parameters(self) -> Params:
        """All that :meth:`loss` takes."""
        return self.first

    @property
    def layered(self) -> TransformerConfig | None:
        """The transformer; its loss can put layers together on a mesh."""
        return self.config

    def loss_in_parts(
        self, layers: LayersInParts, params: Params, batch: Batch, noise: VideoNoise
    ) -> LossAndMetrics:
        """:meth:`loss` on one of many devices, of its parts of the blocks' parameters."""
        return self._velocity_loss(params, batch, noise, layers=layers), {}

    def _velocity_loss(
        self,
        params: Params,
        batch: Batch,
        drawn: VideoNoise,
        *,
        weighted: bool = True,
        layers: LayersInParts | None = None,
    ) -> Float[Array, ""]:
        model = self._model(params, drawn)
        assert not isinstance(batch.context, CrossContext)
        if layers is not None:
            layers.adopt(model)
        context = model.prepare_context(batch.context, batch.clip_fea, padding=self._padding)
        batch = batch._replace(context=context, clip_fea=None)
        weight = self.training.objective.weight if weighted else None
        return velocity_loss(
            model, batch, drawn.noise, drawn.sigma, known=drawn.known, weight=weight
        )

    def _loss_at(
        self, params: Params, batch: Batch, sigma: Array, layers: LayersInParts | None = None
    ) -> Float[Array, ""]:
        noise = jax.random.normal(jax.random.key(0), batch.latents.shape)
        sigmas = jnp.broadcast_to(sigma, (batch.latents.shape[0], 1))
        drawn = VideoNoise(noise, sigmas, None)
        return self._velocity_loss(params, batch, drawn, weighted=False, layers=layers)

    def evaluate(self, params: Params) -> dict[str, float]:
        """Loss on held-out clips at fixed sigmas, and its mean; nothing where there are none."""
        found = {f"held_{sigma}": 0.0 for sigma in _MEASURED_SIGMAS}
        batches = self._clips.held()
        clips = sum(len(batch.latents) for batch in batches)
        if not clips:
            return {}
        for batch in batches:
            for sigma in _MEASURED_SIGMAS:
                loss = float(self._held_loss(params, batch, jnp.float32(sigma)))
                found[f"held_{sigma}"] += loss * (len(batch.latents) / clips)
        return {**found, "held": float(np.mean(list(found.values())))}

    def export(self, params: Params, folder: Path) -> None:
        """A pipeline's folder in diffusers' layout, and the transformer alone as ``original``."""
        dtype = jnp.dtype(self.training.model.export_dtype)
        self._write_pipeline(folder, params, dtype, shutil.copyfile)
        self._save(folder / "original", params, "original", dtype)

    def sample(self, params: Params, folder: Path) -> None:
        """What the sample writer writes, if there is one."""
        if self.sample_writer is not None:
            with tempfile.TemporaryDirectory() as temporary:
                self._write_pipeline(Path(temporary), params, jnp.float32, symlink_to)
                self.sample_writer(Path(temporary), folder)

    def _save(self, folder: Path, params: Params, format: Format, dtype: DTypeLike) -> None:
        model = self.template.model(params)
        TRANSFORMER.save(folder, model, self.config, format=format, dtype=dtype)

    def _write_pipeline(
        self, folder: Path, params: Params, dtype: DTypeLike, copy: Callable[[str, str], object]
    ) -> None:
        """The transformer and the components that it is trained with."""
        self._save(folder / "transformer", params, "diffusers", dtype)
        named: dict[ComponentName, Layout] = {
            "vae": self._sources.vae,
            "tokenizer": self._sources.text,
            "text_encoder": self._sources.text,
        }
        if (image := self._sources.image) is not None:
            named |= {"image_encoder": image, "image_processor": image}
        if any(layout.format != "diffusers" for layout in named.values()):
            _logger.warning(
                "the exported folder holds the transformer alone: the recipe's other parts are in "
                "the original format; `skyreels-jax convert` them first"
            )
            return
        for part, layout in named.items():
            shutil.copytree(layout.component(part), folder / part, copy_function=copy)
        config = None if image is None else stored_image_encoder(image).config
        pipeline = PIPELINE_OF_TASK["df" if image is None else "i2v"]
        write_pipeline_files(folder, pipeline, named, 1.0, config)


def _opened(
    training: VideoTraining, sources: TrainingSources, seed: int, on_encoded: OnEncoded
) -> ClipBatches:
    """The data that a recipe names, encoded where that has not been done."""
    data, dropout = training.data, training.objective.text_dropout
    if isinstance(data, FolderData):
        return Videos(data, sources, seed, dropout, on_encoded)
    assert isinstance(data, ClipsData)
    return MovingShapes(data, sources, seed, dropout, on_encoded)


def widen_to_i2v(model: WanModel, begun: Params) -> None:
    """Give an ``i2v`` model the parameters of a ``t2v`` one, so that it predicts the same.

    The condition's channels have no weight yet, and the image's values are zero.
    """
    updated = []
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
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


def symlink_to(source: str, target: str) -> None:
    """Make ``target`` a link to a file, in place of a copy."""
    os.symlink(os.path.abspath(source), target)
