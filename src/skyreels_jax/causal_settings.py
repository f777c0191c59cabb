"""How a causal student is sampled, and the file in which a trained one says it.

``streaming.json`` beside a transformer's ``config.json`` has the fields of :class:`CausalSettings`
by name; ``block``, ``timesteps`` and ``window`` must be there. The trainer writes it for students
that it distils, and ``convert`` takes it along.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from skyreels_jax.diffusion.few_steps import (
    CausalSchedule,
    CausalWindow,
    Recomputation,
    StepRule,
    WindowPositions,
    warp,
)
from skyreels_jax.errors import RequestError, WeightsError
from skyreels_jax.weights.folder_files import read_object
from skyreels_jax.weights.layout import STREAMING
from skyreels_jax.weights.writer import write_config


@dataclass(frozen=True, kw_only=True)
class CausalSettings:
    """What a causal student learned. Frames are latent frames.

    Attributes:
        block: frames that are made at once.
        first_block: frames of the first block, where it has its own number.
        timesteps: of a block, noisiest first, in (0, 1000], before ``shift``.
        schedules: timesteps for other numbers of steps, where even ones are not the best.
        shift: by which all of them are warped; None where they are taken as they stand.
        first_timesteps: of the first block, where they are others.
        rule: from one timestep to the next.
        window: frames that attention sees, the block included.
        sink: how many of them are the first of the video, which never leave.
        positions: rotary positions in the video, or relative to the window.
        recompute: when keys and values of earlier frames are computed anew.
        context_noise: timestep to which earlier frames are noised for their keys and values.
        change_noise: the same where another prompt has them computed anew; None is no other.
        is_rolling: whether each block runs a step behind the one before, all in one call.
        guidance_scale: 1 for students that have it in them; None where it is the checkpoint's.
    """

    block: int = 3
    first_block: int | None = None
    timesteps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    schedules: tuple[tuple[float, ...], ...] = ()
    shift: float | None = 5.0
    first_timesteps: tuple[float, ...] | None = None
    rule: StepRule = "renoise"
    window: int = 21
    sink: int = 0
    positions: WindowPositions = "absolute"
    recompute: Recomputation = "never"
    context_noise: float = 0.0
    change_noise: float | None = None
    is_rolling: bool = False
    guidance_scale: float | None = 1.0

    def schedule(self) -> CausalSchedule:
        """How each block is made, with its timesteps warped."""
        first = None if self.first_timesteps is None else self._warped(self.first_timesteps)
        return CausalSchedule(
            self._warped(self.timesteps),
            self.block,
            self.rule,
            self.first_block,
            first_timesteps=first,
            rolling=self.is_rolling,
        )

    def timesteps_of(self, steps: int | None) -> tuple[float, ...] | None:
        """Those of so many steps, or the usual ones, before ``shift``; None where even ones do."""
        known = {len(timesteps): timesteps for timesteps in (self.timesteps, *self.schedules)}
        return self.timesteps if steps is None else known.get(steps)

    def _warped(self, timesteps: tuple[float, ...]) -> tuple[float, ...]:
        return timesteps if self.shift is None else warp(timesteps, self.shift)

    def attention_window(self) -> CausalWindow:
        """What a block sees."""
        kept = (self.positions, self.recompute, self.context_noise, self.change_noise)
        return CausalWindow(self.window, self.sink, *kept)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # pyright: ignore


def _is_whole(value: object) -> bool:
    return type(value) is int


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _are_lists(value: object) -> bool:
    return isinstance(value, list) and all(map(_are_numbers, value))


def _one_of(kind: object) -> tuple[Callable[[object], bool], str]:
    names = get_args(kind)
    return (lambda value: value in names), f"one of {', '.join(names)}"


# What a field's value is in JSON, and how that is called.
_KINDS: Final[Mapping[str, tuple[Callable[[object], bool], str]]] = {
    **dict.fromkeys(("block", "first_block", "window", "sink"), (_is_whole, "a whole number")),
    **dict.fromkeys(("timesteps", "first_timesteps"), (_are_numbers, "a list of numbers")),
    "schedules": (_are_lists, "a list of lists of numbers"),
    **dict.fromkeys(
        ("shift", "guidance_scale", "context_noise", "change_noise"), (_is_number, "a number")
    ),
    "rule": _one_of(StepRule),
    "positions": _one_of(WindowPositions),
    "recompute": _one_of(Recomputation),
    "is_rolling": (lambda value: isinstance(value, bool), "true or false"),
}
_NEEDED: Final = ("block", "timesteps", "window")


def read_streaming(file: Path) -> CausalSettings:
    """What the student beside ``file`` learned.

    Raises:
        WeightsError: the file cannot be read, lacks a field or has an illegal one.
    """
    given: dict[str, Any] = read_object(file)
    if missing := [name for name in _NEEDED if given.get(name) is None]:
        raise WeightsError(f"{file} has no {' and no '.join(missing)}: a causal student needs it")
    for name, value in given.items():
        if name not in _KINDS:
            raise WeightsError(f"{file}: {name:.80} is unknown; there are {', '.join(_KINDS)}")
        fits, what = _KINDS[name]
        if value is not None and not fits(value):
            raise WeightsError(f"{file}: {name} = {value!r:.80} should be {what}")
        if isinstance(value, list):
            given[name] = tuple(
                tuple(map(float, one)) if isinstance(one, list) else float(one) for one in value
            )
        elif fits is _is_number and value is not None:
            given[name] = float(value)
    optional = ("first_block", "first_timesteps", "shift", "guidance_scale")
    values = {n: v for n, v in given.items() if v is not None or n in optional}
    # Not those of published students: a trainer writes what it means.
    settings = CausalSettings(**{"shift": None, **values})
    try:
        check_schedules(settings.timesteps, settings.schedules)
        settings.attention_window().slots(settings.schedule().at_once)
        for timesteps in settings.schedules:
            dataclasses.replace(settings, timesteps=timesteps).schedule()
    except RequestError as error:
        raise WeightsError(f"{file}: {error}") from error
    if settings.guidance_scale is not None and not 1 <= settings.guidance_scale <= 100:
        raise WeightsError(
            f"{file}: guidance_scale = {settings.guidance_scale} should be from 1 to 100"
        )
    return settings


def check_schedules(timesteps: tuple[float, ...], schedules: tuple[tuple[float, ...], ...]) -> None:
    """Refuse two lists of timesteps for one number of steps by a RequestError."""
    counts = [len(one) for one in (timesteps, *schedules)]
    if twice := next((count for count in counts if counts.count(count) > 1), None):
        raise RequestError(
            f"schedules: {twice} steps have two lists of timesteps; `timesteps` is one of them"
        )


def write_streaming(folder: Path, settings: CausalSettings) -> Path:
    """Write what the student in a transformer's ``folder`` learned; returns the file."""
    file = folder / STREAMING
    fields = dataclasses.asdict(settings)
    # Packages before this key refuse it.
    write_config(file, {name: value for name, value in fields.items() if value != ()})
    return file
