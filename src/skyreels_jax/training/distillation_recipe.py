"""The table of a recipe that distils the transformer into one of few steps."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from skyreels_jax.causal_settings import CausalSettings, check_schedules
from skyreels_jax.diffusion.few_steps import are_timesteps, warp
from skyreels_jax.diffusion.unipc import NUM_TRAIN_TIMESTEPS
from skyreels_jax.geometry import latent_frames
from skyreels_jax.training.config import check_at_least
from skyreels_jax.training.footprint import largest_clips
from skyreels_jax.training.transformer_recipe import (
    ClipsData,
    FolderTraining,
    ShapesTraining,
    VideoTraining,
)
from skyreels_jax.training.videos.recipe import FolderData

DistillStage = Literal["guidance", "teacher-forcing", "consistency", "continuous", "dmd"]
# Of which stages a setting is; one that is not here is of all.
STAGES_OF: Final[Mapping[str, tuple[DistillStage, ...]]] = {
    "teacher": ("guidance", "consistency", "continuous", "dmd"),
    "guidance": ("guidance", "consistency", "continuous", "dmd"),
    "sigmas": ("consistency",),
    "warmup": ("continuous",),
    "critic_steps": ("dmd",),
    "critic_rate": ("dmd",),
    "learn_context_noise": ("guidance", "teacher-forcing", "consistency", "continuous"),
}


@dataclass(frozen=True)
class Distillation:
    """How a student learns, and from whom.

    Attributes:
        stage: ``guidance`` (the teacher's guided velocity, asked once), ``teacher-forcing`` (the
            data's velocity, block by block), ``consistency`` and ``continuous`` (the end of the
            teacher's flow, by steps or by a derivative), or ``dmd`` (its own videos, held against
            the teacher by a critic).
        teacher: a pipeline's or transformer's folder, ``mini`` or a Hugging Face id; that of
            ``model.start`` unless given.
        guidance: the teacher's scale.
        block: latent frames that are made at once; as many as the video has leave nothing causal.
        first_block: of the first block, where it has its own number.
        timesteps: the student's, noisiest first, of 1000; of ``guidance`` and ``teacher-forcing``
            what sigmas are drawn from (the table ``objective`` where empty), of ``dmd`` its steps;
            consistency learns all of them, and they are of its streams alone.
        schedules: of its streams: timesteps for other numbers of steps, where even ones are not the
            best.
        shift: towards noise, of the sigmas of consistency and of those that critic and teacher are
            asked at.
        sigmas: how many steps the teacher's flow is cut into.
        warmup: steps over which the derivative comes in.
        critic_steps: of the critic, for each of the student.
        critic_rate: the critic's learning rate as a share of the student's.
        sink: of the student's streams: how many of the first latent frames never leave its window.
        context_noise: of its streams: the timestep to which finished frames are noised where later
            ones see them.
        change_noise: of its streams: the same for what is before another prompt.
        learn_context_noise: whether training sees them so too, and not clean.
    """

    stage: DistillStage
    teacher: str | None = None
    guidance: float = 4.0
    block: int = 3
    first_block: int | None = None
    timesteps: tuple[float, ...] = ()
    schedules: tuple[tuple[float, ...], ...] = ()
    shift: float = 5.0
    sigmas: int = 48
    warmup: int = 1000
    critic_steps: int = 5
    critic_rate: float = 0.2
    sink: int = 0
    context_noise: float = 0.0
    change_noise: float | None = None
    learn_context_noise: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            stages = STAGES_OF.get(field.name, (self.stage,))
            value = getattr(self, field.name)
            if self.stage not in stages and value != field.default:
                raise ValueError(
                    f"{field.name} = {value!r} is of stage {' or '.join(map(repr, stages))}, not "
                    f"of {self.stage!r}; leave it out"
                )
        check_at_least(self, 1, "block", "warmup", "critic_steps")
        check_at_least(self, 2, "sigmas", most=NUM_TRAIN_TIMESTEPS)
        if self.first_block is not None:
            check_at_least(self, 1, "first_block")
        check_at_least(self, 0, "sink")
        check_at_least(self, 0, "context_noise", most=NUM_TRAIN_TIMESTEPS - 1)
        if self.change_noise is not None:
            check_at_least(self, 0, "change_noise", most=NUM_TRAIN_TIMESTEPS - 1)
        if self.learn_context_noise and not self.context_noise:
            raise ValueError(
                "learn_context_noise = true needs a context_noise, such as context_noise = 400.0"
            )
        for name in ("shift", "critic_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} should be positive, such as 1.0")
        if self.guidance < 1:
            raise ValueError(
                f"guidance = {self.guidance} should be at least 1, which is the teacher without"
            )
        self._check_timesteps()

    def _check_timesteps(self) -> None:
        named = [("timesteps", self.timesteps), *(("schedules", one) for one in self.schedules)]
        for name, timesteps in named:
            if not are_timesteps(timesteps) or (name == "schedules" and not timesteps):
                raise ValueError(
                    f"{name} = {list(timesteps)} should fall, from at most 1000 to above 0, "
                    "such as [1000, 937.5, 833.3, 625]"
                )
        check_schedules(self.timesteps or CausalSettings.timesteps, self.schedules)
        if self.stage == "dmd" and not self.timesteps:
            raise ValueError(
                "timesteps must be given for stage 'dmd': those of the student's steps, such as "
                "[1000, 937.5, 833.3, 625]"
            )


@dataclass(frozen=True, kw_only=True)
class DistillTraining(VideoTraining):
    """A run's tables ``data``, ``model``, ``objective`` and ``distill``."""

    distill: Distillation

    def __post_init__(self):
        if self.lora is not None:
            raise ValueError("lora: a distilled student's own parameters are trained; leave it out")
        if self.model.model_type != "t2v":
            raise ValueError(
                f"model.model_type = {self.model.model_type!r}: students of text to video alone "
                "can be distilled so far"
            )
        if self.model.start is None:
            raise ValueError(
                "model.start must name what the student begins as, such as 'mini' or its teacher"
            )
        super().__post_init__()
        distill, window = self.distill, latent_frames(largest_clips(self).frames)
        if distill.block < window < distill.block + distill.sink:
            raise ValueError(
                f"distill.sink = {distill.sink} with block = {distill.block} is more than the "
                f"{window} latent frames that the student sees; at most {window - distill.block}"
            )


@dataclass(frozen=True, kw_only=True)
class DistillShapes(DistillTraining, ShapesTraining):
    """A distillation on moving shapes."""

    data: ClipsData

    takes_changes: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.data.changes and self.distill.stage == "dmd":
            raise ValueError(
                f"data.changes = {self.data.changes} is not of distill.stage = 'dmd', which learns "
                "from its own videos; leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class DistillFolder(DistillTraining, FolderTraining):
    """A distillation on one's own videos."""

    data: FolderData


# By `data.source`.
DISTILLATION_OF_SOURCE: Final[Mapping[str, type[DistillTraining]]] = {
    "shapes": DistillShapes,
    "folder": DistillFolder,
}


# Velocities that were learned at all noise are followed; what ends a flow is noised anew.
_FOLLOWED: Final[tuple[DistillStage, ...]] = ("guidance", "teacher-forcing")


def learned_settings(training: DistillTraining) -> CausalSettings | None:
    """How the student of a recipe is sampled: as it learned to; None where blocks are whole videos.

    What it has not learned is the usual: four even timesteps, warped. It has seen the frames of a
    clip together, counted from the first: windows of as many, with positions relative to them.
    """
    distill = training.distill
    window = latent_frames(largest_clips(training).frames)
    if distill.block >= window:
        return None
    changes = isinstance(training.data, ClipsData) and training.data.changes > 0

    def unwarped(timesteps: tuple[float, ...]) -> tuple[float, ...]:
        # So that another number of steps is warped too; 6 digits are below float32's.
        return tuple(round(t, 6) for t in warp(timesteps, 1 / distill.shift))

    return CausalSettings(
        block=distill.block,
        first_block=distill.first_block,
        timesteps=unwarped(distill.timesteps) or CausalSettings.timesteps,
        schedules=tuple(map(unwarped, distill.schedules)),
        shift=distill.shift,
        rule="euler" if distill.stage in _FOLLOWED else "renoise",
        window=window,
        sink=distill.sink,
        positions="relative",
        # What is before a change was seen with the text after it, or is to be seen through noise.
        recompute="prompt" if changes or distill.change_noise is not None else "never",
        context_noise=distill.context_noise,
        change_noise=distill.change_noise,
        # Teacher forcing learns from data, which has none in it.
        guidance_scale=None if distill.stage == "teacher-forcing" else 1.0,
    )
