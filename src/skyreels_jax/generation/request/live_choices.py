"""The settings that a stream has of its own: given, learned by the checkpoint, or for any other."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

from skyreels_jax.checkpoints import Checkpoint, Default
from skyreels_jax.diffusion.few_steps import CausalSchedule, CausalWindow, warp
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request.builder import GIVEN
from skyreels_jax.generation.request.live import LiveRequest, live_declared
from skyreels_jax.generation.request.notes import FRAMES_LEARNED
from skyreels_jax.generation.request.resolved import ResolvedRequest
from skyreels_jax.geometry import latent_frames
from skyreels_jax.ops.positions import ROPE_FRAMES

# Where nothing else is known: enough for a model with guidance (docs/live.md).
_STEPS: Final = 4
_T = TypeVar("_T")


class LiveChoices:
    """The settings of its own: given, the checkpoint's, or those for models that learned none."""

    def __init__(self, request: LiveRequest, checkpoint: Checkpoint):
        self.request, self.checkpoint = request, checkpoint
        causal = checkpoint.guess.causal
        self.learned = None if causal is None else causal.settings
        self.caveat = causal and causal.preset and causal.preset.caveat
        self.origin = causal.origin if causal else ""
        self.sources: dict[str, str] = {}
        self.problems: list[str] = []
        # By which timesteps are warped, if they are.
        self.shift: float | None = None

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
        rolling = self.choose("rolling", Default(bool(learned and learned.is_rolling), source))
        if rolling:
            self._refuse_another_first()
        other = learned.first_block if learned and not rolling else None
        first_block = self.choose(
            "first_block", Default(other, source if other else "as in the others")
        )
        is_alike = rolling or self._has_own_steps()
        first = learned.first_timesteps if learned and not is_alike else None
        first = first and self._warped(first)
        first = self.choose("first_timesteps", Default(first, source if first else "as the others"))
        if self.problems:
            return None
        kind = partial(CausalSchedule, rolling=rolling)
        return self.try_to(
            lambda: kind(timesteps, block, rule, first_block, first)  # pyright: ignore
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
        usual = Default(learned.context_noise if learned else 0.0, source)
        noise = self.choose("context_noise", usual)
        # What was learned for another prompt is of no use where nothing is computed again for it.
        change = learned.change_noise if learned and recompute == "prompt" else None
        none = source if change is not None else "as context_noise"
        change = self.choose("change_noise", Default(change, none))
        if self.problems:
            return None
        kept = (positions, recompute, noise, change)
        return self.try_to(lambda: CausalWindow(frames, sink, *kept))  # pyright: ignore

    def with_positions(self, window: CausalWindow, total: int | None) -> CausalWindow:
        """Positions that do not end before the last of ``total`` latent frames is made."""
        if window.positions == "relative" or (total is not None and total <= ROPE_FRAMES):
            return window
        if self.request.positions is None:
            self.sources["positions"] = f"longer than {ROPE_FRAMES} latent frames, or without end"
            return replace(window, positions="relative")
        long = "has no end" if total is None else f"takes {total}"
        self.problems.append(
            f"`positions` absolute end after {ROPE_FRAMES} latent frames, and this video {long}: "
            "give `positions` relative, or fewer `seconds`"
        )
        return window

    def warnings(self, video: ResolvedRequest, window: CausalWindow) -> Iterator[str]:
        """What is to be said of a model that has not learned this, and of what does nothing."""
        if self.learned is None and self.checkpoint.block_length is None:
            yield (
                f"{video.model} has not learned to make a video block by block in few steps: it "
                "can be streamed, and what it makes will be worse than a video made at once, and "
                "drift; docs/live.md names models that have"
            )
        if self.caveat:
            yield f"{self.origin}: {self.caveat}"
        usual = latent_frames(self.checkpoint.defaults.num_frames.value)
        if window.frames > FRAMES_LEARNED * usual:
            yield (
                f"`window` {window.frames}: the checkpoint was made for {usual} latent frames: "
                "expect motion that repeats or stops"
            )
        if self.request.video.overlap_history is not None and video.video is None:
            yield "`overlap_history` does nothing: there is no `video` to go on from"

    def _refuse_another_first(self) -> None:
        """Note settings of the first block, which blocks that roll do not take."""
        names = [n for n in ("first_block", "first_timesteps") if getattr(self.request, n)]
        if names:
            self.problems.append(
                f"{' and '.join(f'`{name}`' for name in names)} with `rolling`: blocks that roll "
                f"are all alike; leave {'them' if len(names) > 1 else 'it'} out, or turn `rolling` "
                "off"
            )

    def _has_own_steps(self) -> bool:
        return self.request.timesteps is not None or self.request.steps is not None

    def _timesteps(self) -> tuple[float, ...]:
        """Given as they stand, the student's, or even ones; the latter two warped."""
        request, learned = self.request, self.learned
        if request.timesteps is not None and request.steps is not None:
            self.problems.append("`timesteps` and `steps` exclude each other: give one")
        if request.timesteps is not None:
            given = self.choose("timesteps", Default((), ""))
            return self._warped(given) if request.shift is not None else given
        if learned is not None and (known := learned.timesteps_of(request.steps)) is not None:
            if request.steps is not None:
                self.sources["steps"] = GIVEN
            self.sources["timesteps"] = self.origin
            return self._warped(known)
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
        self.shift = shift = self.choose("shift", usual)
        return () if self.problems else warp(timesteps, shift)


def _shown(value: object) -> str:
    return ", ".join(f"{t:g}" for t in value) if isinstance(value, tuple) else str(value)
