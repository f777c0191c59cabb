"""From a stream that was asked for to one in which everything is decided.

What it shares with other videos is resolved as theirs (:mod:`.resolve`), as a video of the length
of its window, which is the most that the transformer sees at once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Final, TypeVar

from skyreels_jax import geometry
from skyreels_jax.checkpoints import Checkpoint, Default
from skyreels_jax.diffusion.few_steps import CausalSchedule, CausalWindow, warp
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request.builder import GIVEN
from skyreels_jax.generation.request.live import LiveRequest, live_declared
from skyreels_jax.generation.request.resolve import resolve
from skyreels_jax.generation.request.resolved import ResolvedRequest
from skyreels_jax.geometry import latent_frames, pixel_frames
from skyreels_jax.memory import Estimate, available_memory, cache_bytes, estimate
from skyreels_jax.ops.positions import ROPE_FRAMES
from skyreels_jax.weights.lora.binding import Lora

# What diffusion forcing alone has.
_KNOWN_FRAMES: Final = (
    *("ar_step", "addnoise_condition", "addnoise_once", "continuation", "causal_attention"),
    "overlap_history",
)
# Where nothing else is known: enough for a model with guidance (docs/live.md).
_STEPS: Final = 4
_UNLIMITED: Final = 2**62
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class ResolvedLive:
    """A stream in which every setting is decided and legal.

    Attributes:
        video: what it shares with other videos, as one of the length of its window.
        schedule: the steps of each block.
        window: what of the past each block sees.
        frames: pixel frames of the whole; ``None`` where it goes on until it is stopped.
        work: bytes that it takes at least, beside the weights.
        sources: where each setting came from.
        warnings: for the user.
    """

    video: ResolvedRequest
    schedule: CausalSchedule
    window: CausalWindow
    frames: int | None
    work: int
    sources: Mapping[str, str]
    warnings: tuple[str, ...]

    @property
    def fps(self) -> int | Fraction:
        """Frames a second."""
        return self.video.fps

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.video.height, self.video.width

    def values(self) -> dict[str, object]:
        """The settings that a stream has of its own, by name, as JSON values."""
        schedule, window = self.schedule, self.window
        return {
            "causal_block_size": schedule.block,
            "steps": len(schedule.timesteps),
            "timesteps": [round(t, 4) for t in schedule.timesteps],
            "rule": schedule.rule,
            "window": window.frames,
            "sink": window.sink,
            "positions": window.positions,
            "recompute": window.recompute,
            "first_block": schedule.first_block,
            "first_timesteps": schedule.first_timesteps and list(schedule.first_timesteps),
        }

    def settings(self) -> dict[str, object]:
        """Everything that decides the video but the prompts that change, as JSON values."""
        shared = {
            name: value
            for name, value in self.video.settings().items()
            if name in live_declared() or name in ("model", "task", "prompt", "dtype", "loras")
        }
        return shared | {"num_frames": self.frames, "live": self.values()}


def resolve_live(
    request: LiveRequest,
    checkpoint: Checkpoint,
    *,
    memory: int | None = None,
    loras: Sequence[Lora] = (),
) -> ResolvedLive:
    """Complete a stream from what the checkpoint learned and check all of it.

    Args:
        request: as asked for.
        checkpoint: decides the defaults.
        memory: bytes the transformer may take; ``None`` for what is free on the device.
        loras: of the transformer; words that they were trained on are known.

    Raises:
        RequestError: with everything that is wrong, a line each.
    """
    if checkpoint.task not in ("df", "t2v"):
        raise RequestError(
            f"{checkpoint.task.upper()} checkpoints cannot be streamed: their image is a part of "
            "every frame of a video of one length; use a DF or T2V checkpoint"
        )
    chosen = _Choices(request, checkpoint)
    chosen.choose("seconds", Default(None, "until it is stopped"))
    schedule, window = chosen.schedule(), chosen.window()
    if schedule is None or window is None or chosen.problems:
        # What the rest has to say is said with it.
        usual = checkpoint.defaults.num_frames.value
        chosen.try_to(lambda: _shared(request, checkpoint, usual, loras))
        raise RequestError("\n".join(dict.fromkeys(chosen.problems)))
    video = _shared(request, checkpoint, pixel_frames(max(2, window.frames)), loras)
    frames = None
    if request.seconds is not None:
        frames = geometry.frames_in(request.seconds, video.fps)
    given = _given_frames(video)
    total = None if frames is None else latent_frames(frames)
    window = chosen.with_positions(window, None if total is None else total + given)
    problems = [*chosen.problems, *_violations(video, schedule, window, given)]
    needed, kept = _needed_memory(video, checkpoint, schedule, window)
    free = available_memory() if memory is None else memory
    if free is not None and needed.total + kept > free:
        problems.append(
            f"not enough memory: a stream of {video.height} x {video.width} in {video.dtype} takes "
            f"at least {(needed.total + kept) / 2**30:.1f} GiB (weights "
            f"{needed.weights / 2**30:.1f}, keys and values of {window.frames} latent frames "
            f"{kept / 2**30:.1f}) and {free / 2**30:.1f} GiB are free; use a smaller `window`, a "
            "smaller size, `weights` int8 or a smaller checkpoint"
        )
    if problems:
        raise RequestError("\n".join(problems))
    skipped = ("num_frames", "base_num_frames", "steps", "cache", "noise", *_KNOWN_FRAMES)
    sources = {name: source for name, source in video.sources.items() if name not in skipped}
    warnings = (*chosen.warnings(video), *_warnings(video))
    return ResolvedLive(
        video=video,
        schedule=schedule,
        window=window,
        frames=frames,
        work=needed.total - needed.weights + kept,
        sources=sources | chosen.sources,
        warnings=warnings,
    )


class _Choices:
    """The settings of its own: given, the checkpoint's, or those for models that learned none."""

    def __init__(self, request: LiveRequest, checkpoint: Checkpoint):
        self.request, self.checkpoint = request, checkpoint
        causal = checkpoint.guess.causal
        self.learned = None if causal is None else causal.settings
        self.caveat = causal and causal.preset and causal.preset.caveat
        self.origin = causal.origin if causal else ""
        self.sources: dict[str, str] = {}
        self.problems: list[str] = []

    def choose(self, name: str, default: Default[_T]) -> _T:
        """What was given under ``name``, else the default; notes its source, checks its range."""
        given = getattr(self.request, name)
        self.sources[name] = default.source if given is None else GIVEN
        value = default.value if given is None else given
        if value is not None and (wrong := live_declared()[name].kind.violation(value)):
            self.problems.append(f"`{name}` {_shown(value)} {wrong}")
        return value  # pyright: ignore[reportReturnType]

    def try_to(self, make: Callable[[], _T]) -> _T | None:
        """What ``make`` gives; what it refuses is one of the problems."""
        try:
            return make()
        except RequestError as error:
            self.problems.extend(str(error).splitlines())
            return None

    def schedule(self) -> CausalSchedule | None:
        """The steps of a block."""
        learned = self.learned
        source = self.origin if learned else "for models that have not learned it"
        timesteps = self._timesteps()
        block = learned.block if learned else self.checkpoint.block_length or 1
        block = self.choose("causal_block_size", Default(block, source))
        rule = self.choose("rule", Default(learned.rule if learned else "euler", source))
        other = learned.first_block if learned else None
        first_block = self.choose(
            "first_block", Default(other, source if other else "as in the others")
        )
        first = learned.first_timesteps if learned and not self._has_own_steps() else None
        first = first and self._warped(first)
        first = self.choose("first_timesteps", Default(first, source if first else "as the others"))
        if self.problems:
            return None
        return self.try_to(
            lambda: CausalSchedule(timesteps, block, rule, first_block, first)  # pyright: ignore
        )

    def window(self) -> CausalWindow | None:
        """What of the past a block sees."""
        learned, at_once = self.learned, self.checkpoint.defaults.num_frames
        source = self.origin if learned else at_once.source
        frames = learned.window if learned else latent_frames(at_once.value)
        frames = self.choose("window", Default(frames, source))
        source = source if learned else "for models that have not learned it"
        sink = self.choose("sink", Default(learned.sink if learned else 0, source))
        usual = Default(learned.recompute if learned else "never", source)
        recompute = self.choose("recompute", usual)
        usual = Default(learned.positions if learned else "absolute", source)
        positions = self.choose("positions", usual)
        if self.problems:
            return None
        return self.try_to(
            lambda: CausalWindow(frames, sink, positions, recompute)  # pyright: ignore
        )

    def with_positions(self, window: CausalWindow, total: int | None) -> CausalWindow:
        """Positions that do not end before the video of ``total`` latent frames does."""
        if window.positions == "relative" or (total is not None and total <= ROPE_FRAMES):
            return window
        if self.request.positions is None:
            self.sources["positions"] = f"longer than {ROPE_FRAMES} latent frames, or without end"
            return replace(window, positions="relative")
        long = "a video without end" if total is None else f"{total} latent frames"
        self.problems.append(
            f"`positions` absolute end after {ROPE_FRAMES} latent frames, and this is {long}: give "
            "`positions` relative, or fewer `seconds`"
        )
        return window

    def warnings(self, video: ResolvedRequest) -> Iterator[str]:
        """What is to be said of a model that has not learned this."""
        if self.learned is None and self.checkpoint.block_length is None:
            yield (
                f"{video.model} has not learned to make a video block by block in few steps: it "
                "can be streamed, and what it makes will be worse than a video made at once, and "
                "drift; docs/live.md names models that have"
            )
        if self.caveat:
            yield f"{self.origin}: {self.caveat}"

    def _has_own_steps(self) -> bool:
        return self.request.timesteps is not None or self.request.steps is not None

    def _timesteps(self) -> tuple[float, ...]:
        """Given as they stand, the preset's, or even ones; the latter two warped."""
        request, learned = self.request, self.learned
        if request.timesteps is not None and request.steps is not None:
            self.problems.append("`timesteps` and `steps` exclude each other: give one")
        if request.timesteps is not None:
            given = self.choose("timesteps", Default((), ""))
            return self._warped(given) if request.shift is not None else given
        if request.steps is None and learned is not None:
            self.sources["timesteps"] = self.origin
            return self._warped(learned.timesteps)
        steps = self.choose("steps", Default(_STEPS, "enough with guidance"))
        self.sources["timesteps"] = f"{steps} even steps, warped"
        if self.problems:
            return ()
        return self._warped(tuple(1000 * (1 - i / steps) for i in range(steps)))

    def _warped(self, timesteps: tuple[float, ...]) -> tuple[float, ...]:
        learned = self.learned
        usual = self.checkpoint.defaults.shift
        if learned is not None:
            usual = Default(learned.shift or 1.0, self.origin)
        shift = self.choose("shift", usual)
        return () if self.problems else warp(timesteps, shift)


def _shared(
    request: LiveRequest, checkpoint: Checkpoint, num_frames: int, loras: Sequence[Lora]
) -> ResolvedRequest:
    """What a stream shares with other videos, as one of ``num_frames``."""
    wanted = replace(request.video, num_frames=num_frames, base_num_frames=num_frames)
    causal = checkpoint.guess.causal
    settings = None if causal is None else causal.settings
    scale = None if settings is None else settings.guidance_scale
    if request.video.guidance_scale is None and causal is not None and scale is not None:
        # Not "given": nobody did.
        usual = Default(scale, causal.origin)
        defaults = replace(checkpoint.defaults, guidance_scale=usual)
        checkpoint = replace(checkpoint, defaults=defaults)
    task = checkpoint.task
    # Known frames come before those that are made, as in diffusion forcing, whatever the model.
    resolved = resolve(wanted, replace(checkpoint, task="df"), memory=_UNLIMITED, loras=loras)
    return replace(resolved, task=task)


def _given_frames(video: ResolvedRequest) -> int:
    """Latent frames that an image or a video gives."""
    assert video.forcing is not None
    if video.video is not None:
        return latent_frames(video.forcing.overlap_history)
    return int(video.image is not None)


def _violations(
    video: ResolvedRequest, schedule: CausalSchedule, window: CausalWindow, given: int
) -> Iterator[str]:
    try:
        window.slots(schedule.block)
    except RequestError as error:
        yield f"`window` {window.frames}: {error}"
        return
    if (first := schedule.first_block) is not None and first > window.frames:
        yield f"`first_block` {first} is more than `window` {window.frames}: at most that"
    room = window.frames - schedule.block
    if given > room and video.video is not None:
        yield (
            f"`overlap_history` {pixel_frames(given)} is more than `window` {window.frames} with "
            f"`causal_block_size` {schedule.block} has room for; at most {pixel_frames(room)}"
        )


def _needed_memory(
    video: ResolvedRequest, checkpoint: Checkpoint, schedule: CausalSchedule, window: CausalWindow
) -> tuple[Estimate, int]:
    """What weights and one block at work take at least, and the window's keys and values."""
    _, rows, columns = video.latent_shape
    needed = estimate(
        checkpoint.config,
        (max(schedule.block, schedule.first_block or 0), rows, columns),
        dtype=video.dtype,
        weights=video.weights,
        offload=video.offload,
    )
    kept = cache_bytes(checkpoint.config, (window.frames, rows, columns), video.dtype)
    return needed, kept * (2 if video.is_guided else 1)


def _warnings(video: ResolvedRequest) -> Iterator[str]:
    """Those of the shared settings that are true of a stream too."""
    for warning in video.warnings:
        if " follow, " not in warning:  # How many frames a continued video has in all.
            yield warning


def _shown(value: object) -> str:
    return ", ".join(f"{t:g}" for t in value) if isinstance(value, tuple) else str(value)
