"""Every setting of a video, declared once.

A field of :class:`Request` says what a setting takes, where it is from if nobody gives it, and how
it is called on the command line. From that come the flag and its help, the conversion and the
checks, the typed keywords of a call (:mod:`.keywords`), the table in ``docs/settings.md``, what is
printed, and the entry in the settings of a video. :mod:`.documentation` writes keywords and table
anew. Nothing heavy is imported: help comes from here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from skyreels_jax import geometry
from skyreels_jax.diffusion.cache_settings import CACHE_KINDS, CACHES
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request.declaration import (
    DIMENSIONS,
    FORCING,
    FRAME_COUNT,
    GROUPS,
    LATENT_COUNT,
    MAX_SECONDS,
    MAX_STEPS,
    OUTPUT,
    RUNNING,
    SAMPLING,
    SHOWN,
    SIDE_LENGTH,
    Setting,
    described,
    refuse_unknown,
    setting,
)
from skyreels_jax.generation.request.kinds import (
    Choice,
    File,
    FrameRate,
    Picture,
    Prompts,
    Real,
    Switch,
    Text,
    WholeNumber,
)

if TYPE_CHECKING:
    from skyreels_jax.media import ImageInput as _Image
else:
    _Image = object

# What a window is given of the one before: its last latents, or their decoded pixels encoded anew.
_Continuation = Literal["latents", "pixels"]
CONTINUATIONS: Final = get_args(_Continuation)
COMPUTE_DTYPES: Final = ("bfloat16", "float32")
# Whose numbers a seed means, JAX's generator's or those of PyTorch's on the CPU; the largest seed.
MAX_SEEDS: Final[Mapping[str, int]] = {"jax": 2**32 - 1, "torch": 2**64 - 1}
NOISES: Final = tuple(MAX_SEEDS)
DRAW_SEED: Final = -1
# Names of `models.transformer_config.QUANTIZED_DTYPES`, and bf16, which is `dtype` bfloat16.
WEIGHTS: Final = ("bf16", "int8", "fp8")
# Names of `ops.attention.ATTENTION_PATHS`, which a test holds equal: help must not wait for JAX.
ATTENTION_NAMES: Final = ("xla", "chunked", "cudnn", "splash", "tokamax")

_of_pipeline: Final = partial(setting, group=RUNNING, keyword=False)
_PRESET: Final = "the checkpoint's"
_Prompts = str | Sequence[str] | Mapping[int, str]


@dataclass(frozen=True, kw_only=True)
class PlainSettings:
    """Settings that are resolved as they are asked for, whatever the checkpoint."""

    dtype: str = _of_pipeline(
        Choice(COMPUTE_DTYPES), "dtype to compute in", default="bfloat16", unset="bfloat16"
    )
    weights: str | None = _of_pipeline(
        Choice(WEIGHTS), "what kernels of blocks are kept in", unset="`dtype`"
    )
    offload: bool = _of_pipeline(
        Switch(), "stream the blocks' kernels from the host's memory", default=False
    )
    attention: str | None = setting(
        Choice(ATTENTION_NAMES),
        "path that computes attention",
        RUNNING,
        unset="chosen by device and shape",
    )
    reference_exact: bool = setting(
        Switch(),
        "round and continue windows as the original does, and refuse what it gets wrong",
        SAMPLING,
        default=False,
    )
    batched_guidance: bool = setting(
        Switch(),
        "both prompts in one call of the transformer, for twice the memory",
        RUNNING,
        default=False,
    )


@dataclass(frozen=True, kw_only=True)
class Request(PlainSettings):
    """A video somebody wants; ``None`` leaves a setting to the checkpoint.

    Values are converted when it is made: ``steps=np.int64(30)`` and ``steps="30"`` are 30. What
    each setting is stands with its field and in ``docs/settings.md``.

    Raises a RequestError that names every value of a wrong kind.
    """

    prompt: _Prompts = setting(
        Prompts(),
        "what the video shows; several are for the windows of a long video in turn, or by the "
        "frame from which on each holds",
        SHOWN,
        default=dataclasses.MISSING,
    )
    negative_prompt: str | None = setting(
        Text(), "what to keep away from; empty for nothing in particular", SHOWN, unset=_PRESET
    )
    image: _Image | None = setting(
        Picture(), "the first frame", SHOWN, tasks=("i2v", "flf2v", "df")
    )
    last_image: _Image | None = setting(
        Picture(),
        "the last frame; with DF, what comes right after it",
        SHOWN,
        flags=("--end_image",),
        tasks=("flf2v", "df"),
    )
    video: str | Path | None = setting(
        File(), "a video to continue", SHOWN, flags=("--video_path",), tasks=("df",)
    )
    resolution: str | None = setting(
        Text(f"one of {', '.join(geometry.RESOLUTIONS)}"),
        "in place of height and width",
        DIMENSIONS,
        metavar="|".join(geometry.RESOLUTIONS),
    )
    aspect: str | None = setting(
        Text("width:height, for example 9:16, or image"),
        "width to height such as 9:16, or `image` for that of the image; keeps the area",
        DIMENSIONS,
        metavar="W:H",
        unset="the checkpoint's, turned to an upright image",
    )
    height: int | None = setting(
        SIDE_LENGTH,
        "in pixels, a multiple of 16; together with width",
        DIMENSIONS,
        metavar="PIXELS",
        unset=_PRESET,
    )
    width: int | None = setting(
        SIDE_LENGTH,
        "in pixels, a multiple of 16; together with height",
        DIMENSIONS,
        metavar="PIXELS",
        unset=_PRESET,
    )
    num_frames: int | None = setting(
        FRAME_COUNT,
        "4 k + 1; where a video is continued, with the frames taken over from it",
        DIMENSIONS,
        unset=_PRESET,
    )
    seconds: float | None = setting(
        Real(0.0, MAX_SECONDS, open=True),
        "in place of num_frames; the nearest legal number is taken",
        DIMENSIONS,
    )
    fps: int | float | str | Fraction | None = setting(
        FrameRate(), "frames a second, such as 24, 29.97 or 30000/1001", DIMENSIONS, unset=_PRESET
    )
    steps: int | None = setting(
        WholeNumber(1, MAX_STEPS),
        "steps of the solver",
        SAMPLING,
        unset=_PRESET,
        flags=("--inference_steps", "--num_inference_steps"),
    )
    guidance_scale: float | None = setting(
        Real(0.0, 100.0, usual="5 and 6 are usual, 1 turns it off", common=(0.0, 15.0)),
        "scale of classifier-free guidance; at exactly 1 it is off",
        SAMPLING,
        unset=_PRESET,
    )
    shift: float | None = setting(
        Real(0.0, 1000.0, open=True, usual="3 to 8 are usual", common=(1.0, 20.0)),
        "shift of the sigmas towards noise",
        SAMPLING,
        unset=_PRESET,
    )
    seed: int | None = setting(
        WholeNumber(DRAW_SEED, MAX_SEEDS["torch"]),
        "seed of the noise, below 2**32, or below 2**64 with noise torch; -1 draws one",
        SAMPLING,
        unset="drawn at random",
    )
    noise: str | None = setting(
        Choice(NOISES),
        "whose numbers a seed means; torch: those of PyTorch's CPU generator",
        SAMPLING,
        unset="jax",
    )
    base_num_frames: int | None = setting(
        FRAME_COUNT,
        "most frames that are made at once, 4 k + 1",
        FORCING,
        unset="the checkpoint's num_frames",
        tasks=("df",),
    )
    overlap_history: int | None = setting(
        FRAME_COUNT,
        "frames that a window takes over from the one before, 4 k + 1",
        FORCING,
        unset="17, of short windows less than half; with mini 9",
        tasks=("df",),
    )
    ar_step: int | None = setting(
        WholeNumber(0, MAX_STEPS),
        "steps by which each block of frames runs behind the one before; 0: together",
        FORCING,
        unset=_PRESET,
        tasks=("df",),
    )
    causal_block_size: int | None = setting(
        LATENT_COUNT, "latent frames in a block", FORCING, unset="1", tasks=("df",)
    )
    addnoise_condition: int | None = setting(
        WholeNumber(0, MAX_STEPS - 1, usual="20 is usual"),
        "timestep to which given frames are noised where the model sees them",
        FORCING,
        unset="0; in long videos of mini 300",
        tasks=("df",),
    )
    addnoise_once: bool | None = setting(
        Switch(),
        "the same such noise in every step: finished blocks are then not computed anew",
        FORCING,
        tasks=("df",),
    )
    continuation: str | None = setting(
        Choice(CONTINUATIONS),
        "what a window is given of the one before: its latents, or its frames encoded anew",
        FORCING,
        unset="latents",
        flags=("--hand-over",),  # the old name
        former="hand_over",  # the old name
        tasks=("df",),
    )
    causal_attention: int | None = setting(
        LATENT_COUNT,
        "latent frames in a block of block-causal attention, for models that learned with it",
        FORCING,
        unset=_PRESET,
        tasks=("df",),
    )
    cache: str | None = setting(
        Choice(CACHES),
        "leave calls of the transformer out where little changes",
        RUNNING,
        unset="none",
    )
    cache_threshold: float | None = setting(
        Real(0.0, 1.0, usual="0.05 to 0.3 are usual", common=(0.0, 0.5)),
        "how much change may go by before the transformer runs again",
        RUNNING,
        unset=", ".join(f"{kind.threshold} for {name}" for name, kind in CACHE_KINDS.items()),
        flags=("--teacache_thresh",),
    )
    use_ret_steps: bool = setting(
        Switch(),
        "teacache looks at the time embedding that the blocks take",
        RUNNING,
        default=False,
    )
    output: str | Path | None = setting(
        File(), "the file to write, if any", OUTPUT, metavar="FILE.mp4", keyword=False
    )

    def __post_init__(self):
        """Convert what is given."""
        for name, value in _converted({name: getattr(self, name) for name in declared()}).items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, values: Mapping[str, Any], **others: Any) -> "Request":
        """The request of a call's keywords, of which some may not exist, and ``others`` that do.

        Raises:
            RequestError: a keyword does not exist; says which was probably meant. Or as above.
        """
        values = current_names(values)
        refuse_unknown(values, keywords(), "progress")
        return cls(**_converted({**values, **others}))


def _converted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Each value as its setting's one type; a RequestError names all that cannot be."""
    made, problems = {}, []
    for name, value in values.items():
        kind = declared()[name].kind
        try:
            made[name] = None if value is None and name != "prompt" else kind.convert(value)
        except ValueError as error:
            problems.append(f"`{name}` {described(value)} {error}")
    if problems:
        raise RequestError("\n".join(problems))
    return made


@cache
def declared() -> Mapping[str, Setting]:
    """All settings by name, in the order of the groups and in each as they are declared."""
    found = [
        dataclasses.replace(entry.metadata["setting"], name=entry.name)
        for entry in dataclasses.fields(Request)
    ]
    found.sort(key=lambda one: GROUPS.index(one.group))
    return {one.name: one for one in found}


def keywords() -> Mapping[str, Setting]:
    """Those that a call of a pipeline takes."""
    return {name: one for name, one in declared().items() if one.keyword}


def violation(name: str, value: Any) -> str | None:
    """A line on what is wrong with a converted value of a setting, or nothing."""
    kind = declared()[name].kind
    wrong = kind.violation(value)
    shown = "" if isinstance(kind, Prompts) else f" {described(value)}"
    return None if wrong is None else f"`{name}`{shown} {wrong}"


def current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by today's names: what was kept or is typed under an old name is understood."""
    today = {one.former: name for name, one in declared().items() if one.former}
    return {today.get(name, name): value for name, value in values.items()}
