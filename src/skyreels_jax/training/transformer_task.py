"""Training the transformer: flow matching, diffusion forcing, image-to-video."""

import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from skyreels_jax.errors import RequestError
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.presets import PIPELINE_OF_TASK
from skyreels_jax.shapes import Latents
from skyreels_jax.training.dataset import (
    WORDINGS,
    CaptionEncoder,
    ClipSource,
    EncodedClips,
    FirstFrameEncoder,
    OnEncoded,
    clips_fingerprint,
    encode_clips,
)
from skyreels_jax.training.objective import Batch, velocity_loss
from skyreels_jax.training.sigma_distributions import Sigmas, draw_sigmas
from skyreels_jax.training.sources import find_sources
from skyreels_jax.training.task import LossAndMetrics, Params, Template
from skyreels_jax.training.transformer_recipe import VideoTraining
from skyreels_jax.weights.components.clip import stored_image_encoder
from skyreels_jax.weights.components.transformer import TRANSFORMER, stored_transformer
from skyreels_jax.weights.components.vae import stored_vae
from skyreels_jax.weights.layout import ComponentName, Layout
from skyreels_jax.weights.pipeline_folder import write_pipeline_files
from skyreels_jax.weights.plan import Format

# Streams of random numbers that no two uses share.
_TRAINING: Final = 1
# Sigmas at which the held-out loss is measured, and clips it is measured on.
_MEASURED_SIGMAS: Final = (0.1, 0.3, 0.5, 0.7, 0.9)
_EVALUATED: Final = 64

_logger = logging.getLogger(__name__)

# Writes what the model of a pipeline's folder makes into another folder.
SampleWriter = Callable[[Path, Path], None]


class VideoNoise(NamedTuple):
    """All that is random in a step, by video."""

    noise: Latents
    sigma: Sigmas
    known: Bool[Array, "B F"] | None


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
        self.config, data = self._sources.config, training.data
        source = ClipSource(seed, data.frames, data.size)
        # What is refused is refused before clips are encoded.
        self._draw_probabilities = (
            None if data.pairs is None else draw_probabilities(source, data.clips, data.pairs)
        )
        self._captions = CaptionEncoder(self._sources.text, data.text_length)
        image = self._sources.image
        self._first_frames = None if image is None else FirstFrameEncoder(image)
        vae = stored_vae(self._sources.vae).load(jnp.float32)
        self._clips, self._held = (
            encode_clips(
                Path(data.encoded),
                vae,
                dataclasses.replace(source, held=held),
                count,
                with_known=self.config.model_type == "i2v",
                on_encoded=on_encoded,
            )
            for held, count in ((False, data.clips), (True, _EVALUATED))
        )
        self._captions.check([text for clip in self._clips.captions for text in clip])
        self._digests = {
            "data.vae digest": clips_fingerprint(vae, source),
            "data.text digest": self._captions.digest(),
        }
        self.template, self.first = Template.of(self._begin())
        self._distribution = training.objective.distribution()
        self._padding = self.config.text_len - data.text_length
        self._held_loss = jax.jit(self._loss_at)

    def fingerprint(self) -> Mapping[str, str]:
        """Digests of what the recipe names by folder."""
        return self._digests

    def _begin(self) -> WanModel:
        model = self._fresh(self.config)
        layout, begun = self._sources.start, self._sources.begun
        if layout is None or begun is None:
            return model
        state = stored_transformer(layout).load_state(jnp.float32)
        if begun == self.config:
            nnx.update(model, state)
        else:
            graph = nnx.graphdef(self._fresh(begun))
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
        """Clips with one of their wordings each, or none."""
        rng = np.random.default_rng([self.seed, _TRAINING, index])
        count = self.training.data.batch
        rows = rng.choice(len(self._clips), size=count, p=self._draw_probabilities)
        texts = [self._clips.captions[row][int(rng.integers(WORDINGS))] for row in rows]
        empty = rng.random(len(rows)) < self.training.objective.text_dropout
        said = [("" if none else str(text)) for none, text in zip(empty, texts, strict=True)]
        return self._batch(self._clips, rows, said)

    def _batch(self, clips: EncodedClips, rows: np.ndarray, texts: list[str]) -> Batch:
        images = None if self._first_frames is None else self._first_frames(clips.first[rows])
        return Batch(
            latents=jnp.asarray(clips.latents[rows]),
            context=jnp.asarray(self._captions(texts)),
            clip_fea=None if images is None else jnp.asarray(images),
            y=None if clips.known is None else jnp.asarray(clips.known[rows]),
            fps=jnp.asarray(clips.fps[rows] != 16, jnp.int32),
        )

    def draw(self, batch: Batch, key: Array) -> VideoNoise:
        """Noise and sigmas of a batch, and which frames are given."""
        noise_key, sigma_key = jax.random.split(key)
        shape = batch.latents.shape
        noise = jax.random.normal(noise_key, shape)
        if not self.training.objective.continued:
            sigma = self._distribution.sample(sigma_key, shape[0], shape[2])
            return VideoNoise(noise, sigma, None)
        return VideoNoise(noise, *draw_sigmas(self._distribution, sigma_key, shape[0], shape[2]))

    def loss(self, params: Params, batch: Batch, noise: VideoNoise) -> LossAndMetrics:
        """See :func:`~skyreels_jax.training.objective.velocity_loss`."""
        return self._velocity_loss(params, batch, noise), {}

    def _velocity_loss(
        self, params: Params, batch: Batch, drawn: VideoNoise, *, weighted: bool = True
    ) -> Float[Array, ""]:
        model = self.template.model(params)
        context = model.prepare_context(batch.context, batch.clip_fea, padding=self._padding)
        batch = batch._replace(context=context, clip_fea=None)
        weight = self.training.objective.weight if weighted else None
        return velocity_loss(
            model, batch, drawn.noise, drawn.sigma, known=drawn.known, weight=weight
        )

    def _loss_at(self, params: Params, batch: Batch, sigma: Array) -> Float[Array, ""]:
        noise = jax.random.normal(jax.random.key(0), batch.latents.shape)
        sigmas = jnp.broadcast_to(sigma, (batch.latents.shape[0], 1))
        return self._velocity_loss(params, batch, VideoNoise(noise, sigmas, None), weighted=False)

    def evaluate(self, params: Params) -> dict[str, float]:
        """Loss on held-out combinations at fixed sigmas, and its mean."""
        rows = np.arange(_EVALUATED)
        batch = self._batch(self._held, rows, [c[0] for c in self._held.captions])
        found = {
            f"held_{sigma}": float(self._held_loss(params, batch, jnp.float32(sigma)))
            for sigma in _MEASURED_SIGMAS
        }
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
                self._write_pipeline(Path(temporary), params, jnp.float32, _link)
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


def draw_probabilities(source: ClipSource, count: int, pairs: float) -> Float[np.ndarray, " N"]:
    """With which the first ``count`` clips are drawn, so that a share ``pairs`` has two things.

    Raises:
        RequestError: none, or all, of them have two.
    """
    is_pair = np.array([len(source.scene(index)[0].things) == 2 for index in range(count)])
    of_each = np.array([np.sum(~is_pair), np.sum(is_pair)])
    wanted = np.array([1 - pairs, pairs])
    if np.any((of_each == 0) & (wanted > 0)):
        raise RequestError(
            f"data.pairs = {pairs} cannot be had from {count} clips; give more clips"
        )
    return np.where(is_pair, *(wanted / np.maximum(of_each, 1))[::-1])


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


def _link(source: str, target: str) -> None:
    os.symlink(os.path.abspath(source), target)
