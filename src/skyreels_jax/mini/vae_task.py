"""Training a VAE on moving shapes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from skyreels_jax.media import write_image
from skyreels_jax.models.vae import WanVae
from skyreels_jax.models.vae_layers import FRAME_STRIDE, LEVELS, PIXEL_STRIDE, VaeConfig
from skyreels_jax.moving_shapes.render import render
from skyreels_jax.moving_shapes.scene import Scene, draw_scene
from skyreels_jax.training.config import check_at_least, check_choice
from skyreels_jax.training.sources import layout_of
from skyreels_jax.training.task import LossAndMetrics, Params, Template
from skyreels_jax.training.vae_objective import VaeLoss, frames, moments, vae_loss
from skyreels_jax.weights.components.vae import VAE, stored_vae

# Streams of random numbers that no two uses share.
_TRAINING: Final = 1
_EVALUATION: Final = 2
# EncodedClips of an evaluation, and of the statistics of the latents.
_EVALUATED: Final = 32
_MEASURED: Final = 128
# In PSNR: values lie in [-1, 1].
_PIXEL_RANGE: Final = 2.0


# A scene lasts a second; a clip of several may be longer than what one shape's path allows.
_FRAMES: Final = tuple(range(1, 82, FRAME_STRIDE))
_SIZES: Final = tuple(range(32, 513, PIXEL_STRIDE))


@dataclass(frozen=True)
class VaeShape:
    """The free numbers of a :class:`VaeConfig`; ``start`` is a folder (or ``mini``, or a
    Hugging Face id) to go on from instead.
    """

    base_dim: int = 8
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 8)
    num_res_blocks: int = 1
    start: str | None = None

    def __post_init__(self):
        check_at_least(self, 1, "base_dim", "z_dim", "num_res_blocks")
        if len(self.dim_mult) != LEVELS or min(self.dim_mult, default=0) < 1:
            raise ValueError(
                f"dim_mult = {list(self.dim_mult)} should be {LEVELS} positive numbers, such as "
                "[1, 2, 4, 8]"
            )


@dataclass(frozen=True)
class VaeData:
    """Clips of moving shapes.

    Attributes:
        batch: clips a step.
        frames: of a clip, ``4k + 1``.
        size: height and width, a multiple of 8.
        crowded: share of the clips that hold three scenes' things at once: more outlines to learn
            from for the same work.
    """

    batch: int = 16
    frames: int = 1
    size: int = 64
    crowded: float = 0.6

    def __post_init__(self):
        check_at_least(self, 1, "batch", most=10**6)
        check_choice(self, "frames", _FRAMES, f"4 k + 1, from 1 to {_FRAMES[-1]}")
        check_choice(self, "size", _SIZES, f"a multiple of 8 from {_SIZES[0]} to {_SIZES[-1]}")
        if not 0 <= self.crowded <= 1:
            raise ValueError(f"crowded = {self.crowded} should be a share of 1, from 0 to 1")


@dataclass(frozen=True)
class VaeTraining:
    """A run's tables ``model``, ``data`` and ``loss``."""

    model: VaeShape = field(default_factory=VaeShape)
    data: VaeData = field(default_factory=VaeData)
    loss: VaeLoss = field(default_factory=VaeLoss)


class VaeTask:
    """A :class:`~skyreels_jax.training.task.TrainingTask`."""

    def __init__(self, training: VaeTraining, seed: int):
        """``seed`` decides initial values and data."""
        self.training, self.seed = training, seed
        shape = training.model
        if shape.start is None:
            neutral = ((0.0,) * shape.z_dim, (1.0,) * shape.z_dim)
            self.config = VaeConfig(
                base_dim=shape.base_dim,
                z_dim=shape.z_dim,
                dim_mult=shape.dim_mult,
                num_res_blocks=shape.num_res_blocks,
                latents_mean=neutral[0],
                latents_std=neutral[1],
            )
            vae = WanVae(self.config, rngs=nnx.Rngs(seed))
            self.template, params = Template.of(vae)
            self.first = holding_still(params)
        else:
            stored = stored_vae(layout_of("model.start", shape.start))
            self.config = stored.config
            self.template, self.first = Template.of(stored.load(jnp.float32))
        self._reconstruct = jax.jit(self._reconstructed)

    def init(self) -> Params:
        """Fresh ones hold a clip's frames still (:func:`holding_still`)."""
        return self.first

    def batch(self, index: int) -> Float[np.ndarray, "B 3 T height width"]:
        """Clips in [-1, 1]."""
        return self._clips(_TRAINING, index, self.training.data.batch, self.training.data.crowded)

    def fingerprint(self) -> Mapping[str, str]:
        """Nothing: all data follows from the recipe."""
        return {}

    def draw(self, batch: Array, key: Array) -> Float[Array, "B F H W C"]:
        """Noise of the latents' shape."""
        count, _, length, height, width = batch.shape
        size = ((length + FRAME_STRIDE - 1) // FRAME_STRIDE, height // PIXEL_STRIDE)
        return jax.random.normal(key, (count, *size, width // PIXEL_STRIDE, self.config.z_dim))

    def loss(self, params: Params, batch: Array, noise: Array) -> LossAndMetrics:
        """See :func:`~skyreels_jax.training.vae_objective.vae_loss`."""
        return vae_loss(self.template.model(params), batch, noise, self.training.loss)

    def evaluate(self, params: Params) -> dict[str, float]:
        """Peak signal-to-noise ratio in dB on clips not trained on, from the latents' means."""
        errors = [
            np.mean(np.square(np.clip(self._reconstruct(params, clip), -1, 1) - clip))
            for clip in np.split(self._clips(_EVALUATION, 0, _EVALUATED, 0.0), _EVALUATED // 8)
        ]
        return {"psnr": float(10 * np.log10(_PIXEL_RANGE**2 / np.mean(errors)))}

    def export(self, params: Params, folder: Path) -> None:
        """A ``vae`` folder in diffusers' layout, with the statistics of its latents, float16."""
        config = self._with_statistics(params)
        model = self.template.model(params)
        VAE.save(folder / "vae", model, config, dtype=np.float16)

    def sample(self, params: Params, folder: Path) -> None:
        """Clips above what the VAE gives back: the first and the last frame of each."""
        clips = self._clips(_EVALUATION, 1, 8, 0.0)
        pairs = (clips, np.clip(self._reconstruct(params, clips), -1, 1))
        rows = [np.concatenate(list(video[:, :, i]), axis=2) for i in (0, -1) for video in pairs]
        image = np.rint((np.concatenate(rows, axis=1) + 1) * 127.5).astype(np.uint8)
        write_image(folder / "reconstructions.png", image.transpose(1, 2, 0))

    def _reconstructed(self, params: Params, pixels: Array) -> Array:
        vae = self.template.model(params)
        return frames(vae, moments(vae, pixels).mean)

    def _with_statistics(self, params: Params) -> VaeConfig:
        def means(params: Params, pixels: Array) -> Array:
            return moments(self.template.model(params), pixels).mean

        clips = np.split(self._clips(_EVALUATION, 2, _MEASURED, 0.0), _MEASURED // 8)
        found = jax.jit(means)
        values = np.concatenate([np.asarray(found(params, clip)) for clip in clips])
        values = values.reshape(-1, self.config.z_dim).astype(np.float64)
        return replace(
            self.config,
            latents_mean=tuple(np.round(values.mean(0), 4).tolist()),
            latents_std=tuple(np.round(values.std(0), 4).tolist()),
        )

    def _clips(
        self, stream: int, index: int, count: int, crowded: float
    ) -> Float[np.ndarray, "B 3 T height width"]:
        rng = np.random.default_rng([self.seed, stream, index])
        clips = np.stack([self._clip(rng, crowded) for _ in range(count)])
        return clips.transpose(0, 4, 1, 2, 3) / np.float32(127.5) - np.float32(1)

    def _clip(self, rng: np.random.Generator, crowded: float) -> np.ndarray:
        data = self.training.data
        seconds = 1.0
        count = 3 if rng.random() < crowded else 1
        scenes = [draw_scene(rng, seconds) for _ in range(count)]
        things = tuple(thing for scene in scenes for thing in scene.things)
        scene = Scene(things, scenes[0].background)
        fps = (16.0, 24.0)[int(rng.integers(2))]
        return render(scene, frames=data.frames, fps=fps, size=(data.size, data.size))


def holding_still(params: Params) -> dict[str, Array]:
    """Parameters with which each latent frame is the last of its four frames, four times.

    No convolution looks back, and those between frames pass on what they are given: what single
    frames teach is then true of clips, and clips teach the rest.
    """

    def still(name: str, value: Array) -> Array:
        if value.ndim != 5 or not name.endswith("kernel") or value.shape[0] == 1:
            return value
        last = value[-1]
        if name.endswith("time_conv.kernel"):
            before, after = value.shape[3:]
            last = jnp.tile(jnp.eye(before, dtype=value.dtype), (1, after // before))[None, None]
        return jnp.zeros_like(value).at[-1].set(last)

    return {name: still(name, value) for name, value in params.items()}
