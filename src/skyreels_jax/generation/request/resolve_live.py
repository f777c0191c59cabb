"""From a stream that was asked for to one in which everything is decided.

What it shares with other videos is resolved as theirs (:mod:`.resolve`), as a video of the length
of its window, which is the most that the transformer sees at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Final

from skyreels_jax import geometry
from skyreels_jax.checkpoints import Checkpoint, Default
from skyreels_jax.diffusion.few_steps import CausalSchedule, CausalWindow
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request.live import LiveRequest, live_declared
from skyreels_jax.generation.request.live_choices import LiveChoices
from skyreels_jax.generation.request.resolve import resolve
from skyreels_jax.generation.request.resolved import ResolvedRequest
from skyreels_jax.geometry import latent_frames, pixel_frames
from skyreels_jax.memory import Estimate, available_memory, cache_bytes, estimate
from skyreels_jax.weights.lora.binding import Lora

# What diffusion forcing alone has.
_KNOWN_FRAMES: Final = (
    *("ar_step", "addnoise_condition", "addnoise_once", "continuation", "causal_attention"),
    "overlap_history",
)
_UNLIMITED: Final = 2**62


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
            "context_noise": window.context_noise,
            "change_noise": window.change_noise,
            "rolling": schedule.rolling,
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
    chosen = LiveChoices(request, checkpoint)
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
    # Blocks are whole, and others may be under way: they end after the video does.
    total = None if frames is None else latent_frames(frames) + given + schedule.at_once - 1
    window = chosen.with_positions(window, total)
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
    skipped = ("num_frames", "base_num_frames", "steps", "shift", "cache", "noise", *_KNOWN_FRAMES)
    sources = {name: source for name, source in video.sources.items() if name not in skipped}
    shared = (warning for warning in video.warnings if warning not in video.length_warnings)
    warnings = (*chosen.warnings(video, window), *shared)
    # Said as what it is: the checkpoint's own is of videos that are made at once.
    video = video if chosen.shift is None else replace(video, shift=chosen.shift)
    return ResolvedLive(
        video=video,
        schedule=schedule,
        window=window,
        frames=frames,
        work=needed.total - needed.weights + kept,
        sources=sources | chosen.sources,
        warnings=warnings,
    )


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
        window.slots(schedule.at_once)
    except RequestError as error:
        yield f"`window` {window.frames}: {error}"
        return
    if (first := schedule.first_block) is not None and first > window.frames:
        yield f"`first_block` {first} is more than `window` {window.frames}: at most that"
    room = window.frames - schedule.at_once
    if given > room and video.video is not None:
        yield (
            f"`overlap_history` {pixel_frames(given)} is more than `window` {window.frames} with "
            f"{schedule.at_once} made at once has room for; at most {pixel_frames(room)}"
        )


def _needed_memory(
    video: ResolvedRequest, checkpoint: Checkpoint, schedule: CausalSchedule, window: CausalWindow
) -> tuple[Estimate, int]:
    """What weights and the frames of one call take at least, and the window's keys and values."""
    _, rows, columns = video.latent_shape
    needed = estimate(
        checkpoint.config,
        (max(schedule.at_once, schedule.first_block or 0), rows, columns),
        dtype=video.dtype,
        weights=video.weights,
        offload=video.offload,
    )
    kept = cache_bytes(checkpoint.config, (window.frames, rows, columns), video.dtype)
    return needed, kept * (2 if video.is_guided else 1)
