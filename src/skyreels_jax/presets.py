"""The released checkpoints and those of this package: all that depends on which one it is.

Sources: the model cards and command-line defaults of SkyworkAI/SkyReels-V2 and Wan-Video/Wan2.1
(resolutions, frames, shift, guidance, steps), and the cache coefficients that the former takes over
from the latter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from skyreels_jax.models.transformer_config import (
    DF_1_3B,
    DF_14B,
    FLF2V_1_3B,
    FLF2V_14B,
    I2V_1_3B,
    I2V_14B,
    T2V_1_3B,
    T2V_14B,
    TransformerConfig,
)
from skyreels_jax.prompts import NEGATIVE_PROMPT_ZH

# What a checkpoint was trained for: text, diffusion forcing (text, with a timestep per frame),
# a first image, or a first and a last one.
Task = Literal["t2v", "df", "i2v", "flf2v"]

# Whose settings a checkpoint has; the networks are the same.
Family = Literal["SkyReels-V2", "Wan2.1", "mini"]

# diffusers' pipelines by what they are for; `model_index.json` names one.
TASK_OF_PIPELINE: Final[Mapping[str, Task]] = {
    "SkyReelsV2Pipeline": "t2v",
    "SkyReelsV2ImageToVideoPipeline": "i2v",
    "SkyReelsV2DiffusionForcingPipeline": "df",
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": "df",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": "df",
    "WanPipeline": "t2v",
    "WanImageToVideoPipeline": "i2v",
    "WanVideoToVideoPipeline": "t2v",
}
# And the one to name in a folder that is written.
PIPELINE_OF_TASK: Final[Mapping[Task, str]] = {
    "t2v": "SkyReelsV2Pipeline",
    "i2v": "SkyReelsV2ImageToVideoPipeline",
    "flf2v": "SkyReelsV2ImageToVideoPipeline",
    "df": "SkyReelsV2DiffusionForcingPipeline",
}
WAN_PIPELINE_OF_TASK: Final[Mapping[Task, str]] = {
    "t2v": "WanPipeline",
    "i2v": "WanImageToVideoPipeline",
    "flf2v": "WanImageToVideoPipeline",
}

_Polynomial = tuple[float, float, float, float, float]


@dataclass(frozen=True)
class CacheCoefficients:
    """Degree-4 polynomials of TeaCache, highest power first.

    They turn the relative change of the time modulation into an estimate of the output's.
    ``retained`` goes with the variant that reads the modulation of the blocks and computes the
    first 10 calls in full; ``plain`` reads the head's and computes the first 2 and last 2.
    """

    retained: _Polynomial
    plain: _Polynomial


_CACHE_I2V_540P: Final = CacheCoefficients(
    retained=(2.57151496e5, -3.54229917e4, 1.40286849e3, -1.35890334e1, 1.32517977e-1),
    plain=(-3.02331670e2, 2.23948934e2, -5.25463970e1, 5.87348440, -2.01973289e-1),
)
_CACHE_I2V_720P: Final = CacheCoefficients(
    retained=(8.10705460e3, 2.13393892e3, -3.72934672e2, 1.66203073e1, -4.17769401e-2),
    plain=(-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
)
_CACHE_T2V_1_3B: Final = CacheCoefficients(
    retained=(-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2),
    plain=(2.39676752e3, -1.31110545e3, 2.01331979e2, -8.29855975, 1.37887774e-1),
)
_CACHE_T2V_14B: Final = CacheCoefficients(
    retained=(-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1),
    plain=(-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
)
# Our own, by ``python -m skyreels_jax.evaluation.fit_teacache --count 24 --ar-step 0 5``: they
# explain an eighth of the changes only (docs/performance.md).
_CACHE_MINI: Final = CacheCoefficients(
    retained=(2374.21146, -896.325772, 112.656944, -4.47195921, 1.08783659e-1),
    plain=(12.8385811, -15.5527935, 5.15782866, -2.82420716e-1, 5.84279244e-2),
)


@dataclass(frozen=True, kw_only=True)
class LongVideoDefaults:
    """Settings of videos made in several windows, where they are others than of one window.

    Attributes:
        overlap_history: frames that a window takes over from the one before.
        addnoise_condition: timestep to which those are noised where the model sees them.
        guidance_scale: of classifier-free guidance.
        ar_step: as the preset's own.
    """

    overlap_history: int
    addnoise_condition: int
    ar_step: int
    guidance_scale: float


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One released checkpoint.

    Attributes:
        name: as published.
        family: whose it is.
        task: what it was trained for.
        config: of its transformer.
        resolution: height and width in pixels.
        num_frames: pixel frames.
        fps: of the video.
        shift: of the sigmas.
        guidance_scale: of classifier-free guidance.
        steps: of the solver.
        cache: coefficients of TeaCache; None where nobody has measured any.
        repo: Hugging Face id in the original layout; None where there is none.
        negative_prompt: what to keep away from; None for what the original says.
        ar_step: steps by which each latent frame runs behind the one before (diffusion forcing).
        long_video: of videos made in several windows; None for those of one window and the
            original's overlap.
        learned_last_image: whether its training showed it videos that lead to a given frame.
        only_moving_shapes: whether it knows the words of their captions, in lower case, and no
            others.
    """

    name: str
    family: Family = "SkyReels-V2"
    task: Task
    config: TransformerConfig
    resolution: tuple[int, int]
    num_frames: int
    fps: int = 24
    shift: float
    guidance_scale: float
    steps: int = 30
    cache: CacheCoefficients | None
    repo: str | None
    negative_prompt: str | None = None
    ar_step: int = 0
    long_video: LongVideoDefaults | None = None
    learned_last_image: bool = True
    only_moving_shapes: bool = False


_SIZES: Final[Mapping[str, tuple[tuple[int, int], int]]] = {
    "540P": ((544, 960), 97),
    "720P": ((720, 1280), 121),
}


def _preset(task: Task, size: str, shape: str, config: TransformerConfig) -> Preset:
    name = f"SkyReels-V2-{task.upper()}-{size}-{shape}"
    resolution, num_frames = _SIZES[shape]
    from_image = task in ("i2v", "flf2v")
    if from_image:
        cache = _CACHE_I2V_540P if shape == "540P" else _CACHE_I2V_720P
    else:
        cache = _CACHE_T2V_1_3B if size == "1.3B" else _CACHE_T2V_14B
    return Preset(
        name=name,
        task=task,
        config=config,
        resolution=resolution,
        num_frames=num_frames,
        # The model cards of image-to-video give shift 3 in a note and 5 in their table of settings.
        shift=5.0 if from_image else 8.0,
        guidance_scale=5.0 if from_image else 6.0,
        cache=cache,
        repo=f"Skywork/{name}" if task != "flf2v" else None,
    )


def _wan(
    name: str, task: Task, config: TransformerConfig, resolution: tuple[int, int], shift: float
) -> Preset:
    """Wan 2.1's own, which move at 16 frames a second."""
    caches = {"Wan2.1-T2V-1.3B": _CACHE_T2V_1_3B, "Wan2.1-T2V-14B": _CACHE_T2V_14B}
    caches |= {"Wan2.1-I2V-14B-480P": _CACHE_I2V_540P, "Wan2.1-I2V-14B-720P": _CACHE_I2V_720P}
    return Preset(
        name=name,
        family="Wan2.1",
        task=task,
        config=config,
        resolution=resolution,
        num_frames=81,
        fps=16,
        shift=shift,
        guidance_scale=6.0 if config is T2V_1_3B else 5.0,
        steps=40 if task == "i2v" else 50,
        cache=caches.get(name),
        repo=f"Wan-AI/{name}",
        negative_prompt=NEGATIVE_PROMPT_ZH,
    )


def _mini(name: str, task: Task, config: TransformerConfig) -> Preset:
    """The small models of this package, of moving shapes."""
    return Preset(
        name=name,
        family="mini",
        task=task,
        config=config,
        resolution=(64, 64),
        num_frames=17,
        fps=16,
        shift=4.0,
        # More of it moves the first frame away from the image (docs/quality.md).
        guidance_scale=2.0 if task == "i2v" else 4.0,
        steps=20,
        cache=_CACHE_MINI if task == "df" else None,
        repo=None,
        # In training, no text is the empty text.
        negative_prompt="",
        # Which way things move is decided with their first frame in sight (docs/quality.md).
        ar_step=5 if task == "df" else 0,
        # What a window makes, the next ones make worse, the more so with guidance; noise hides
        # enough of it to be made anew (docs/quality.md).
        long_video=LongVideoDefaults(
            overlap_history=9, addnoise_condition=300, ar_step=0, guidance_scale=2.0
        )
        if task == "df"
        else None,
        learned_last_image=False,
        only_moving_shapes=True,
    )


MINI_DF: Final = TransformerConfig(
    model_type="t2v",
    dim=192,
    ffn_dim=512,
    num_heads=4,
    num_layers=8,
    in_dim=16,
    text_dim=128,
    inject_sample_info=True,
)
MINI_I2V: Final = replace(
    MINI_DF, model_type="i2v", in_dim=36, image_dim=160, inject_sample_info=False
)

# Of several with one configuration, the one assumed when nothing else tells stands first. First-
# last-frame checkpoints are the image-to-video weights with positions for a second image; they
# exist in the diffusers layout only.
_ALL: Final = (
    _preset("t2v", "14B", "540P", T2V_14B),
    _preset("t2v", "14B", "720P", T2V_14B),
    _preset("df", "1.3B", "540P", DF_1_3B),
    _preset("df", "14B", "540P", DF_14B),
    _preset("df", "14B", "720P", DF_14B),
    _preset("i2v", "1.3B", "540P", I2V_1_3B),
    _preset("i2v", "14B", "540P", I2V_14B),
    _preset("i2v", "14B", "720P", I2V_14B),
    _preset("flf2v", "1.3B", "540P", FLF2V_1_3B),
    _preset("flf2v", "14B", "540P", FLF2V_14B),
    _preset("flf2v", "14B", "720P", FLF2V_14B),
    _wan("Wan2.1-T2V-1.3B", "t2v", T2V_1_3B, (480, 832), 3.0),
    _wan("Wan2.1-T2V-14B", "t2v", T2V_14B, (720, 1280), 5.0),
    _wan("Wan2.1-I2V-14B-480P", "i2v", I2V_14B, (480, 832), 3.0),
    _wan("Wan2.1-I2V-14B-720P", "i2v", I2V_14B, (720, 1280), 5.0),
    _wan("Wan2.1-FLF2V-14B-720P", "flf2v", FLF2V_14B, (720, 1280), 16.0),
    _mini("mini", "df", MINI_DF),
    _mini("mini-i2v", "i2v", MINI_I2V),
)
PRESETS: Final[Mapping[str, Preset]] = {preset.name: preset for preset in _ALL}
