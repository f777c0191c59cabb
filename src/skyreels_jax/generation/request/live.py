"""Settings of a video that is made while it plays, declared once as those of other videos are.

What a stream has in common with other videos is a :class:`.Request` and means the same there; what
only it has is a field of :class:`LiveSettings`. Nothing heavy is imported: help comes from here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final

from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request.conversion import refuse_truth
from skyreels_jax.generation.request.declaration import (
    LATENT_COUNT,
    LIVE,
    Setting,
    described,
    refuse_unknown,
    setting,
)
from skyreels_jax.generation.request.kinds import Choice, Real, SettingKind, Switch, WholeNumber
from skyreels_jax.generation.request.settings import Request, declared

# Of `diffusion.few_steps`: `StepRule`, `WindowPositions` and `Recomputation`, which a test holds
# equal.
RULES: Final = ("renoise", "euler")
POSITIONS: Final = ("absolute", "relative")
RECOMPUTATIONS: Final = ("never", "prompt", "block")
# Steps of a block: more are no longer few.
MAX_LIVE_STEPS: Final = 8
_LEARNED: Final = "the checkpoint's"


@dataclass(frozen=True)
class TimestepList(SettingKind):
    """Timesteps, noisiest first, from numbers or from text with commas between them."""

    annotation = "str | Sequence[float]"
    metavar = "T,T,..."

    takes = (
        f"1 to {MAX_LIVE_STEPS} numbers above 0, at most 1000, each less than the one before, for "
        "example 1000,750,500,250"
    )

    def convert(self, value: object) -> tuple[float, ...]:
        """A tuple of numbers."""
        try:
            parts = value.replace(",", " ").split() if isinstance(value, str) else value
            if not isinstance(parts, Sequence):
                raise TypeError
            for part in parts:
                refuse_truth(part)
            return tuple(map(float, parts))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"must be {self.takes}") from error

    def violation(self, value: tuple[float, ...]) -> str | None:
        """None at all, too many, out of range or not descending."""
        falls = all(a > b for a, b in zip(value, value[1:], strict=False))
        inside = all(0 < timestep <= 1000 for timestep in value)
        if 1 <= len(value) <= MAX_LIVE_STEPS and falls and inside:
            return None
        return f"must be {self.takes}"


@dataclass(frozen=True, kw_only=True)
class LiveSettings:
    """What only a video has that is made while it plays; ``None`` leaves it to the checkpoint."""

    timesteps: tuple[float, ...] | None = setting(
        TimestepList(),
        "of a block of frames, in place of steps; as they stand, or warped where shift is given",
        LIVE,
        unset=f"{_LEARNED}, or even ones that shift warps",
    )
    rule: str | None = setting(
        Choice(RULES),
        "from one timestep to the next: new noise over what is predicted, or a step of Euler's",
        LIVE,
        unset="renoise; for checkpoints that have not learned few steps euler",
    )
    window: int | None = setting(
        LATENT_COUNT,
        "latent frames that attention sees, the block included",
        LIVE,
        unset=f"{_LEARNED}, or as many as it makes at once",
    )
    sink: int | None = setting(
        WholeNumber(0, LATENT_COUNT.most),
        "how many of them are the first of the video, which never leave",
        LIVE,
        unset=f"{_LEARNED}, or 0",
    )
    positions: str | None = setting(
        Choice(POSITIONS),
        "of frames: in the video, for at most 1024 latent frames, or relative to the window",
        LIVE,
        unset=f"{_LEARNED}; relative for videos that are longer or have no end",
    )
    recompute: str | None = setting(
        Choice(RECOMPUTATIONS),
        "for which changes keys and values are computed anew: another prompt, or every block",
        LIVE,
        unset=f"{_LEARNED}, or never",
    )
    context_noise: float | None = setting(
        Real(0.0, 999.0),
        "timestep to which finished frames are noised where later ones see them",
        LIVE,
        unset=f"{_LEARNED}, or 0",
    )
    change_noise: float | None = setting(
        Real(0.0, 999.0),
        "the same for what is before another prompt, where recompute is prompt: more lets go of it",
        LIVE,
        unset=f"{_LEARNED}, or as context_noise",
    )
    rolling: bool | None = setting(
        Switch(has_off=True),
        "each block runs a step behind the one before, as many at once as there are steps",
        LIVE,
        unset=f"{_LEARNED}, or off",
    )
    first_block: int | None = setting(
        LATENT_COUNT, "latent frames in the first block", LIVE, unset="as in the others"
    )
    first_timesteps: tuple[float, ...] | None = setting(
        TimestepList(), "of the first block", LIVE, unset=f"{_LEARNED}, or as of the others"
    )


# Settings of other videos that a stream has too, and what is said of them in another way.
_SHARED: Final[Mapping[str, Mapping[str, str | tuple[str, ...] | SettingKind]]] = {
    **{
        name: {}
        for name in (
            *("negative_prompt", "resolution", "aspect", "height", "width", "fps", "seed"),
            *("attention", "weights", "offload"),
        )
    },
    "image": {"tasks": ()},
    "video": {"help": "a video to continue; its own frames are not shown again", "tasks": ()},
    "overlap_history": {"help": "frames of it that are looked at, 4 k + 1", "tasks": ()},
    "seconds": {"help": "how long it is", "unset": "it goes on until it is stopped"},
    "steps": {
        "kind": WholeNumber(1, MAX_LIVE_STEPS),
        "help": "steps of a block of frames",
        "unset": f"{_LEARNED}, or 4",
    },
    "causal_block_size": {
        "help": "latent frames that are made at once",
        "unset": f"{_LEARNED}, or 1",
        "flags": ("--block",),
        "tasks": (),
    },
    "guidance_scale": {"unset": "1, off, for checkpoints that learned few steps"},
    "shift": {"help": "warps the timesteps towards noise"},
}


@cache
def live_declared() -> Mapping[str, Setting]:
    """All settings of a stream by name, those that it shares with other videos first."""
    shared = {
        name: dataclasses.replace(declared()[name], **changes)  # pyright: ignore[reportArgumentType]
        for name, changes in _SHARED.items()
    }
    own = {
        entry.name: dataclasses.replace(entry.metadata["setting"], name=entry.name)
        for entry in dataclasses.fields(LiveSettings)
    }
    return shared | own


def different_settings() -> tuple[Setting, ...]:
    """Those that other videos have not, or of which something else is to be said."""
    return tuple(one for name, one in live_declared().items() if _SHARED.get(name, one))


def live_keywords() -> Mapping[str, Setting]:
    """Those that a call of :meth:`.Pipeline.stream` takes."""
    return {name: one for name, one in live_declared().items() if one.keyword}


@dataclass(frozen=True, kw_only=True)
class LiveRequest(LiveSettings):
    """A stream somebody wants.

    Attributes:
        video: what it shares with other videos, among it the prompt it begins with.
        steps: of a block of frames.
        causal_block_size: latent frames that are made at once.
        shift: warps the timesteps.
        seconds: how long it is.
    """

    video: Request
    steps: int | None = None
    causal_block_size: int | None = None
    shift: float | None = None
    seconds: float | None = field(default=None)

    @classmethod
    def of(cls, values: Mapping[str, object], **others: object) -> "LiveRequest":
        """The request of a call's keywords, of which some may not exist, and ``others`` that do.

        Raises:
            RequestError: a keyword does not exist; says which was probably meant. Or it names every
                value of a wrong kind.
        """
        values = {name: value for name, value in values.items() if value is not None}
        refuse_unknown(values, ("prompt", *live_keywords()), "progress")
        own: dict[str, object] = {}
        problems: list[str] = []
        if not isinstance(values.get("prompt"), str):
            problems.append(
                f"`prompt` {described(values.get('prompt'))} must be one text: others are given "
                "while it runs"
            )
        for name in (*_own_names(), *_APART):
            if name in values:
                try:
                    own[name] = live_declared()[name].kind.convert(values[name])
                except ValueError as error:
                    problems.append(f"`{name}` {described(values[name])} {error}")
        if problems:
            raise RequestError("\n".join(problems))
        shared = {name: value for name, value in values.items() if name not in own}
        return cls(video=Request.of(shared, **others), **own)  # pyright: ignore[reportArgumentType]


# Shared by name and kind, but of another meaning to what resolves other videos.
_APART: Final = ("steps", "causal_block_size", "shift", "seconds")


def _own_names() -> list[str]:
    return [entry.name for entry in dataclasses.fields(LiveSettings)]
