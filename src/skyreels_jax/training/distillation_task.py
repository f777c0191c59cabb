"""Distilling the transformer into a causal one of few steps, as tasks of the training loop."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from skyreels_jax.causal_settings import write_streaming
from skyreels_jax.diffusion.unipc import NUM_TRAIN_TIMESTEPS
from skyreels_jax.errors import RequestError
from skyreels_jax.hub import locate
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_attention import CrossContext
from skyreels_jax.shapes import Context, Latents
from skyreels_jax.training.dataset import CaptionEncoder, OnEncoded
from skyreels_jax.training.distillation import (
    VelocityFunction,
    consistency_loss,
    consistency_sigmas,
    continuous_consistency_loss,
    denoised,
    distribution_matching_loss,
    guidance_scales,
    guided,
    regression_loss,
)
from skyreels_jax.training.distillation_recipe import DistillTraining, learned_settings
from skyreels_jax.training.objective import Batch, add_noise, mean_error
from skyreels_jax.training.optimizer import OptimizerConfig, make_optimizer
from skyreels_jax.training.self_generated import generate_own
from skyreels_jax.training.sigma_distributions import Sigmas, shifted
from skyreels_jax.training.task import AVERAGE, LossAndMetrics, Params, Template
from skyreels_jax.training.teacher_forcing import (
    SeenFrames,
    block_lengths,
    teacher_forced_velocity,
)
from skyreels_jax.training.transformer_task import VideoTask
from skyreels_jax.training.turns import take_turns
from skyreels_jax.weights.components.transformer import stored_transformer
from skyreels_jax.weights.layout import read_layout
from skyreels_jax.weights.plan import Format

if TYPE_CHECKING:
    import optax

_TEACHER: Final = "teacher."
_CRITIC: Final = "critic."
# Timesteps at which critic and teacher are asked: Yin et al. leave out the ends.
_ASKED: Final = (20 / NUM_TRAIN_TIMESTEPS, 980 / NUM_TRAIN_TIMESTEPS)


class DistillBatch(NamedTuple):
    """Clips, and the number of the step that they are of, once for each."""

    clips: Batch
    index: Int[Array, " B"]


class DistillNoise(NamedTuple):
    """All that is random in a step, by video.

    Attributes:
        noise: of the clips or, for DMD, of each step of a video: ``[B, steps, C, F, H, W]``.
        sigma: shares of noise.
        below: those of one step less, for consistency.
        asked: noise at which critic and teacher are asked, for DMD.
        last: the step in which blocks end, for DMD.
        context: of the frames before, where those are seen under noise.
    """

    noise: Float[Array, "B *steps C F H W"]
    sigma: Sigmas
    below: Sigmas | None = None
    asked: Latents | None = None
    last: Int[Array, " B"] | None = None
    context: Latents | None = None


class DistillTask(VideoTask):
    """A student of a frozen teacher as a :class:`~skyreels_jax.training.task.TrainingTask`.

    The teacher is held once, in :meth:`frozen`; the student's parameters are what is trained, and
    those of a critic beside them for DMD.
    """

    training: DistillTraining

    def __init__(
        self,
        training: DistillTraining,
        seed: int,
        on_encoded: OnEncoded = lambda what, done, total: None,
    ):
        """Load student, teacher and data; arguments and errors are those of :class:`.VideoTask`."""
        super().__init__(training, seed, on_encoded)
        self._empty: Context = jnp.asarray(
            CaptionEncoder(self._sources.text, self._clips.text_length)([""])
        )

    def _begun(self) -> tuple[Template[WanModel], Params]:
        template, first = super()._begun()
        self._frozen = self._teacher() if self.has_teacher else {}
        if self.distill.stage == "dmd":
            critic = {_CRITIC + n.removeprefix(_TEACHER): v for n, v in self._frozen.items()}
            first = {**first, **jax.tree.map(jnp.copy, critic)}
        return template, first

    @property
    def distill(self):
        """The recipe's table."""
        return self.training.distill

    @property
    def has_teacher(self) -> bool:
        """Whether the stage has one: all but teacher forcing, which learns from data."""
        return self.distill.stage != "teacher-forcing"

    def _teacher(self) -> Params:
        name = self.distill.teacher
        layout = self._sources.start if name is None else read_layout(locate(name).folder)
        assert layout is not None
        stored = stored_transformer(layout)
        if stored.config != self.config:
            raise RequestError(
                f"distill.teacher = {name!r} is another model than the student's, {self.config}; "
                f"it is {stored.config}"
            )
        _, params = Template.of(stored.load(jnp.float32))
        return {f"{_TEACHER}{name}": value for name, value in params.items()}

    def frozen(self) -> Params:
        """The teacher's parameters, which the loss is given too."""
        return self._frozen

    def fingerprint(self) -> Mapping[str, str]:
        """Digests of the data and of the teacher."""
        digest = hashlib.sha256()
        for name, value in sorted(self._frozen.items()):
            digest.update(f"{name} {value.dtype} {value.shape}".encode())
            digest.update(np.ascontiguousarray(value).data)
        return {**super().fingerprint(), "distill.teacher digest": digest.hexdigest()[:12]}

    def optimizer(self, config: OptimizerConfig, steps: int) -> "optax.GradientTransformation":
        """The recipe's; for DMD student and critic take turns, each with one of its own."""
        if self.distill.stage != "dmd":
            return make_optimizer(config, steps, self.first)
        critics = self.distill.critic_steps
        slower = dataclasses.replace(
            config, learning_rate=config.learning_rate * self.distill.critic_rate
        )
        student = {n: v for n, v in self.first.items() if not n.startswith(_CRITIC)}
        critic = {n: v for n, v in self.first.items() if n.startswith(_CRITIC)}
        return take_turns(
            make_optimizer(config, max(steps // (critics + 1), 1), student),
            make_optimizer(slower, steps, critic),
            _CRITIC,
            critics,
        )

    def batch(self, index: int) -> DistillBatch:
        """Clips with their conditions, and the step's number."""
        clips = self._clips.batch(index)
        return DistillBatch(clips, jnp.full((clips.latents.shape[0],), index, jnp.int32))

    def blocks(self, frames: int) -> tuple[int, ...]:
        """Latent frames of each block of a video."""
        return block_lengths(frames, self.distill.block, self.distill.first_block)

    def draw(self, batch: DistillBatch, key: Array) -> DistillNoise:
        """Noise and sigmas of a batch: of each block its own."""
        drawn, shape = self._draw(batch, key), batch.clips.latents.shape
        if not self.distill.learn_context_noise:
            return drawn
        # A key of its own: the rest is drawn as without.
        return drawn._replace(context=jax.random.normal(jax.random.fold_in(key, 1), shape))

    def _draw(self, batch: DistillBatch, key: Array) -> DistillNoise:
        noise_key, sigma_key, asked_key, last_key = jax.random.split(key, 4)
        distill, shape = self.distill, batch.clips.latents.shape
        rows, blocks = shape[0], self.blocks(shape[2])
        by_frame = np.repeat(np.arange(len(blocks)), blocks)
        noise = jax.random.normal(noise_key, shape)
        if distill.stage == "dmd":
            steps = len(distill.timesteps)
            noise = jax.random.normal(noise_key, (rows, steps, *shape[1:]))
            sigma = shifted(jax.random.uniform(sigma_key, (rows, 1)), distill.shift)
            last = jax.random.randint(last_key, (), 0, steps)
            asked = jax.random.normal(asked_key, shape)
            sigma = jnp.clip(sigma, *_ASKED)
            return DistillNoise(noise, sigma, None, asked, jnp.broadcast_to(last, rows))
        which = (rows, len(blocks))
        if distill.stage == "consistency":
            grid = consistency_sigmas(distill.sigmas, distill.shift)
            at = jax.random.randint(sigma_key, which, 0, distill.sigmas)
            return DistillNoise(noise, grid[at][:, by_frame], grid[at + 1][:, by_frame])
        if distill.stage == "continuous":
            sigma = shifted(jax.random.uniform(sigma_key, which), distill.shift)
        elif distill.timesteps:
            grid = jnp.asarray(distill.timesteps, jnp.float32) / NUM_TRAIN_TIMESTEPS
            sigma = grid[jax.random.randint(sigma_key, which, 0, len(grid))]
        else:
            number = rows * len(blocks)
            sigma = self._of_stills.sample(sigma_key, number, 1)[:, :1].reshape(which)
        return DistillNoise(noise, sigma[:, by_frame])

    def loss(self, params: Params, batch: DistillBatch, noise: DistillNoise) -> LossAndMetrics:
        """The stage's, of :mod:`skyreels_jax.training.distillation`."""
        clips, stage = batch.clips, self.distill.stage
        if stage == "dmd":
            return self._dmd(params, batch, noise)
        x, sigma = add_noise(clips.latents, noise.noise, noise.sigma), noise.sigma
        given, right = clips.given, noise.noise - clips.latents
        clips = clips._replace(latents=self._as_seen(clips.latents, noise.context))
        student = self._velocity(params, clips)
        if stage == "teacher-forcing":
            return mean_error(jnp.square(student(x, sigma) - right), given), {}
        teacher = self._guided(params, clips)
        if stage == "guidance":
            return regression_loss(student, teacher, x, sigma, given), {}
        if stage == "consistency":
            assert noise.below is not None
            average = self._velocity(_under(AVERAGE, params), clips)
            return consistency_loss(student, average, teacher, x, sigma, noise.below, given), {}
        warmth = jnp.minimum((batch.index[0] + 1) / self.distill.warmup, 1)
        return continuous_consistency_loss(student, teacher, x, sigma, warmth, given), {}

    def _as_seen(self, latents: Latents, noise: Latents | None) -> Latents:
        """Clean frames as later ones see them."""
        if noise is None:
            return latents
        level = jnp.full((len(latents), 1), self.distill.context_noise / NUM_TRAIN_TIMESTEPS)
        return add_noise(latents, noise, level)

    def _prepared(self, model: WanModel, text: Array) -> CrossContext:
        return model.prepare_context(text, padding=self._padding)

    def _velocity(
        self, params: Params, clips: Batch, text: Array | None = None, *, causal: bool = True
    ) -> VelocityFunction:
        """A model's velocity with the conditions of some clips, perhaps with another text."""
        model, rows = self.template.model(params), clips.latents.shape[0]
        assert not isinstance(clips.context, CrossContext)
        context = self._prepared(model, clips.context if text is None else text)
        if text is not None:
            context = jax.tree.map(
                lambda x: jnp.broadcast_to(x, (x.shape[0], rows, *x.shape[2:])), context
            )
        frames = clips.latents.shape[2]
        blocks = self.blocks(frames) if causal else (frames,)
        noise = self.distill.context_noise if self.distill.learn_context_noise else 0.0
        seen = SeenFrames(clips.latents, noise)

        def velocity(x: Latents, sigma: Sigmas) -> Latents:
            return teacher_forced_velocity(model, seen, x, sigma, context, blocks, fps=clips.fps)

        return velocity

    def _guided(self, params: Params, clips: Batch, *, causal: bool = True) -> VelocityFunction:
        """The teacher's, guided away from no text."""
        teacher = _under(_TEACHER, params)
        return guided(
            self._velocity(teacher, clips, causal=causal),
            self._velocity(teacher, clips, self._empty, causal=causal),
            guidance_scales(clips.given, self.distill.guidance),
        )

    def _dmd(self, params: Params, batch: DistillBatch, noise: DistillNoise) -> LossAndMetrics:
        """The student's loss in its turn, the critic's in the others."""
        clips, blocks = batch.clips, self.blocks(batch.clips.latents.shape[2])
        assert noise.last is not None and noise.asked is not None
        asked, last, turns = noise.asked, noise.last[0], self.distill.critic_steps + 1
        sigmas = [t / NUM_TRAIN_TIMESTEPS for t in self.distill.timesteps]
        still = self.template.model({n: stop_gradient(v) for n, v in self._own(params).items()})
        text = clips.context
        assert not isinstance(text, CrossContext)
        context = self._prepared(still, text)
        steps = jnp.moveaxis(noise.noise, 1, 0)
        made = generate_own(still, steps, sigmas, last, context, blocks, fps=clips.fps)
        whole = clips._replace(latents=made.video)

        def student(_: None) -> Float[Array, ""]:
            model = self.template.model(self._own(params))
            context = self._prepared(model, text)

            def velocity(x: Latents, sigma: Sigmas) -> Latents:
                given = (SeenFrames(made.video), x, sigma, context, blocks)
                return teacher_forced_velocity(model, *given, fps=clips.fps, detached=True)

            critic = {n: stop_gradient(v) for n, v in _under(_CRITIC, params).items()}
            return distribution_matching_loss(
                denoised(velocity, made.noisy, made.sigma),
                self._velocity(critic, whole, causal=False),
                self._guided(params, whole, causal=False),
                asked,
                noise.sigma,
            )

        def critic(_: None) -> Float[Array, ""]:
            x = add_noise(made.video, asked, noise.sigma)
            said = self._velocity(_under(_CRITIC, params), whole, causal=False)(x, noise.sigma)
            return jnp.mean(jnp.square(said - (asked - made.video)))

        is_students = batch.index[0] % turns == turns - 1
        return jax.lax.cond(is_students, student, critic, None), {}

    def _own(self, params: Params) -> Params:
        """The student's."""
        return {name: params[name] for name in self.template.variables}

    def evaluate(self, params: Params) -> dict[str, float]:
        """As :meth:`.VideoTask.evaluate`, each block after clean ones; without the critic."""
        return super().evaluate(self._own(params))

    def _loss_at(self, params: Params, batch: Batch, sigma: Array, layers=None) -> Float[Array, ""]:
        del layers
        noise = jax.random.normal(jax.random.key(0), batch.latents.shape)
        sigmas = jnp.broadcast_to(sigma, (batch.latents.shape[0], batch.latents.shape[2]))
        x = add_noise(batch.latents, noise, sigmas)
        context = jax.random.normal(jax.random.key(1), batch.latents.shape)
        seen = self._as_seen(batch.latents, context if self.distill.learn_context_noise else None)
        said = self._velocity(params, batch._replace(latents=seen))(x, sigmas)
        return jnp.mean(jnp.square(said - (noise - batch.latents)))

    def export(self, params: Params, folder: Path) -> None:
        """As :meth:`.VideoTask.export`, without the critic; says how the student is sampled."""
        super().export(self._own(params), folder)

    def _save(self, folder: Path, params: Params, format: Format, dtype: DTypeLike) -> None:
        super()._save(folder, params, format, dtype)
        if (learned := learned_settings(self.training)) is not None:
            write_streaming(folder, learned)

    def sample(self, params: Params, folder: Path) -> None:
        """As :meth:`.VideoTask.sample`, without the critic."""
        super().sample(self._own(params), folder)


def _under(prefix: str, params: Params) -> Params:
    """The parameters whose names begin with a prefix, without it."""
    return {n.removeprefix(prefix): v for n, v in params.items() if n.startswith(prefix)}
