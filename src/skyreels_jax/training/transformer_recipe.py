"""The tables of a recipe that trains the transformer: model, objective and data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal

import jax.numpy as jnp

from skyreels_jax.models.vae_layers import FRAME_STRIDE
from skyreels_jax.moving_shapes.clips import CLIP_SIZES, FRAME_RATES, max_frames
from skyreels_jax.training.config import check_at_least, check_choice, check_heads
from skyreels_jax.training.lora import LoraTraining
from skyreels_jax.training.objective import cosmap
from skyreels_jax.training.sigma_distributions import (
    ContinuedVideo,
    IndependentFrames,
    LogitNormal,
    Mixed,
    NonDecreasing,
    ShiftedUniform,
    SigmaDistribution,
    Sigmas,
)
from skyreels_jax.training.videos.recipe import FolderData, VideoData

# Tokens of the longest caption, one a word or mark: no tokenizer makes fewer.
MAX_CAPTION_TOKENS: Final = 45
# Text tokens that a transformer sees, padding included.
_TEXT_TOKENS: Final = 512
_FRAMES: Final = tuple(range(1, min(map(max_frames, FRAME_RATES)) + 1, FRAME_STRIDE))


@dataclass(frozen=True)
class TransformerShape:
    """The free numbers of a :class:`TransformerConfig`.

    Attributes:
        model_type: ``t2v``, or ``i2v`` for a first frame.
        inject_sample_info: whether the frame rate is given.
        start: a pipeline's or transformer's folder, ``mini`` or a Hugging Face id to begin with;
            its numbers replace these. A ``t2v`` one may begin an ``i2v`` one: what it lacks then
            begins with no effect.
        dtype: to compute in; parameters are float32.
        remat: what of the blocks is computed again for the backward pass: ``full`` (or ``true``)
            keeps the blocks' inputs alone, ``dots`` the results of their linear layers too;
            ``false`` keeps all.
        export_dtype: of the exported transformer.
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
    remat: bool | Literal["full", "dots"] = False
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self):
        check_at_least(self, 1, "dim", "ffn_dim", "num_heads", "num_layers", "text_dim")
        check_heads(self, 2, 6)
        if self.image_dim is not None:
            check_at_least(self, 1, "image_dim")
        if self.model_type == "t2v" and self.image_dim is not None:
            raise ValueError(
                f"image_dim = {self.image_dim} goes with model_type = 'i2v', but it is 't2v'"
            )
        if self.model_type == "i2v" and self.image_dim is None and self.start is None:
            raise ValueError(
                "image_dim must be given for model_type = 'i2v': the width of the image encoder's "
                "states (160 for mini's)"
            )


@dataclass(frozen=True)
class Objective:
    """Which sigmas are drawn, and how often the text is left out.

    Attributes:
        sigmas: of whole videos: ``logit_normal`` or ``uniform`` (older name: ``levels``).
        shift: of those sigmas towards noise.
        frames: share of videos whose frames have sigmas of their own: diffusion forcing.
        continued: share of videos whose first frames are given (almost no noise, no error counted).
        forcing: sigmas of such frames: ``non_decreasing`` (FoPP) or ``independent``.
        forcing_shift: of those sigmas towards noise.
        text_dropout: share of clips without text, for guidance.
        weighting: of errors by their sigma: ``flat``, or ``cosmap``
            (:func:`~skyreels_jax.training.objective.cosmap`).
    """

    sigmas: Literal["logit_normal", "uniform"] = field(
        default="logit_normal", metadata={"alias": "levels"}
    )
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
                f"frames = {self.frames} and continued = {self.continued} should be shares of 1, "
                f"and text_dropout = {self.text_dropout} one below 1"
            )
        for name in ("shift", "forcing_shift"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} should be positive, such as 1.0")

    def distribution(self) -> SigmaDistribution:
        """Where sigmas are drawn from."""
        whole: SigmaDistribution = (
            LogitNormal(shift=self.shift)
            if self.sigmas == "logit_normal"
            else ShiftedUniform(self.shift)
        )
        by_frame: SigmaDistribution = (
            NonDecreasing(shift=self.forcing_shift)
            if self.forcing == "non_decreasing"
            else IndependentFrames(ShiftedUniform(self.forcing_shift))
        )
        shared = self.frames + self.continued
        if self.continued:
            by_frame = Mixed(ContinuedVideo(whole), by_frame, self.continued / shared)
        return Mixed(by_frame, whole, shared) if shared else whole

    def weight(self, sigma: Sigmas) -> Sigmas:
        """The weight of errors at these sigmas."""
        return cosmap(sigma) if self.weighting == "cosmap" else jnp.ones_like(sigma)


@dataclass(frozen=True, kw_only=True)
class ClipsData(VideoData):
    """Clips of moving shapes.

    Attributes:
        source: ``shapes``.
        clips: how many different ones.
        frames: of a clip, ``4k + 1``.
        size: height and width, a multiple of 16.
        text_length: tokens that hold the longest caption.
        pairs: share of clips of two things; as many as there are in ``clips`` unless given.
        changes: share of clips that begin with another scene, of which their caption does not tell
            (``train = "distill"``): what a stream shows when its prompt is changed.
    """

    source: Literal["shapes"] = "shapes"
    batch: int = field(default=32, metadata={"alias": "batch_size"})
    clips: int = 8192
    frames: int = 17
    size: int = 64
    text_length: int = 48
    pairs: float | None = None
    changes: float = 0.0

    def __post_init__(self):
        check_at_least(self, 1, "batch", "clips", most=10**7)
        rule = f"4 k + 1, from {_FRAMES[0]} to {_FRAMES[-1]}"
        check_choice(self, "frames", _FRAMES, rule)
        rule = f"a multiple of 16 from {CLIP_SIZES[0]} to {CLIP_SIZES[-1]}"
        check_choice(self, "size", CLIP_SIZES, rule)
        check_at_least(self, MAX_CAPTION_TOKENS, "text_length", most=_TEXT_TOKENS)
        if self.pairs is not None and not 0 <= self.pairs <= 1:
            raise ValueError(f"pairs = {self.pairs} should be a share of 1, from 0 to 1")
        if not 0 <= self.changes <= 1:
            raise ValueError(f"changes = {self.changes} should be a share of 1, from 0 to 1")
        if self.changes and self.frames < _FRAMES[2]:
            raise ValueError(
                f"changes = {self.changes} needs clips of three latent frames, but frames = "
                f"{self.frames}; nearest: {_FRAMES[2]}"
            )


@dataclass(frozen=True)
class VideoTraining:
    """A run's tables ``data``, ``model``, ``objective`` and, where a LoRA is trained, ``lora``."""

    data: VideoData
    model: TransformerShape = field(default_factory=TransformerShape)
    objective: Objective = field(default_factory=Objective)
    lora: LoraTraining | None = None

    def __post_init__(self):
        if self.lora is not None and self.model.start is None:
            raise ValueError(
                "model.start must name what the LoRA is of, such as 'mini' or a Hugging Face id"
            )
        if self.model.model_type == "i2v" and self.data.image is None:
            raise ValueError(
                "data.image must name the folder of an image encoder for i2v, such as 'mini-i2v'"
            )


@dataclass(frozen=True)
class ShapesTraining(VideoTraining):
    """A run on moving shapes."""

    data: ClipsData

    # Whether a clip may begin with a scene that its caption does not tell of.
    takes_changes: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if self.data.frames == 1 and self.objective.continued:
            raise ValueError(
                f"objective.continued = {self.objective.continued} needs clips of several latent "
                f"frames, but data.frames = 1; nearest: {_FRAMES[1]}"
            )
        if self.data.changes and not self.takes_changes:
            raise ValueError(
                f"data.changes = {self.data.changes} is of train = 'distill', whose model sees "
                "what was before; leave it out"
            )


@dataclass(frozen=True)
class FolderTraining(VideoTraining):
    """A run on one's own videos and images."""

    data: FolderData

    def __post_init__(self):
        super().__post_init__()
        for number, dataset in enumerate(self.data.datasets):
            still = not dataset.is_video or 1 in dataset.target_frames
            if self.model.model_type == "i2v" and still:
                raise ValueError(
                    f"data.datasets[{number}] gives single frames, of which i2v has nothing to "
                    "learn; give videos, of 5 frames or more"
                )


# By `data.source`.
TRAINING_OF_SOURCE: Final[Mapping[str, type[VideoTraining]]] = {
    "shapes": ShapesTraining,
    "folder": FolderTraining,
}
