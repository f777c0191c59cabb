"""A video that is made while it plays: block by block, as fast as somebody takes it.

The first block is delivered before the second is begun. From then on the device works on the next
block while the frames of this one are looked at, and never on more than that one: a consumer that
is slow holds everything up, and nothing is queued. There is no thread of ours; what fails is raised
where the frames are taken.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Final, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from skyreels_jax import geometry
from skyreels_jax.components.encoders import padding_rows, to_frames
from skyreels_jax.components.lazy import loaded_vae
from skyreels_jax.components.protocols import Components
from skyreels_jax.diffusion.guidance import Guidance, guidance_of
from skyreels_jax.errors import NumericsError, RequestError
from skyreels_jax.generation.live_times import LiveTimes, Pacemaker
from skyreels_jax.generation.request.resolve_live import ResolvedLive
from skyreels_jax.generation.window_generator import encode_inputs, encode_known_frames
from skyreels_jax.memory import refused_in_words
from skyreels_jax.sampling.causal import CausalSampler
from skyreels_jax.sampling.denoiser import Denoiser
from skyreels_jax.sampling.progress import Clock
from skyreels_jax.sampling.step import Conditioning
from skyreels_jax.shapes import Context, Frames, HostLatents, Latents, Pixels

_SMALLER: Final = "use a smaller `window`, a smaller size or `dtype` bfloat16"


@runtime_checkable
class BlockSampler(Protocol):
    """Makes latents block by block; :class:`.CausalSampler` is one."""

    def given(self, latents: Latents) -> None:
        """Frames that are known, before any is made."""
        ...

    def change(self, conditioning: Conditioning) -> None:
        """Another prompt from the next block on."""
        ...

    def next(self) -> Latents:
        """The next block, which may still be computed."""
        ...


@dataclass(eq=False)
class _Begun:
    """What a stream holds while it runs."""

    sampler: BlockSampler
    denoiser: Denoiser
    guidance: Guidance
    positive: Mapping[str, Context]
    negative: Context | None
    pixels: Iterator[Pixels]
    given: HostLatents | None
    pending: Latents | None = None
    waiting: list[HostLatents] = field(default_factory=list)


class LiveStream:
    """Frames of a stream as they come: an iterator, and a context manager that ends it.

    ::

        with pipe.stream("a red star moves right") as stream:
            for frames in stream:  # uint8 [frames, height, width, 3]
                show(frames)
                if seen_enough():
                    stream.change("a red star grows")

    :meth:`change` and :meth:`stop` may be called from another thread.

    Attributes:
        request: every setting, decided.
        clock: times loading and compiling.
        make_sampler: makes what makes the blocks, when the stream begins.
    """

    def __init__(
        self,
        components: Components,
        load: Callable[[], Denoiser],
        request: ResolvedLive,
        *,
        known: Callable[[str], str] = str,
        clock: Clock | None = None,
        sampler: Callable[["LiveStream", Denoiser, Guidance], BlockSampler] | None = None,
    ):
        """Nothing is loaded before the first frames are asked for.

        Args:
            components: encoders and VAE.
            load: gives the transformer.
            request: from :func:`.resolve_live`.
            known: a prompt as the model takes it; may refuse it.
            clock: times loading and compiling.
            sampler: makes the one that is used, in tests.
        """
        self.request, self._pace = request, Pacemaker(request.fps)
        self._components, self._load, self._known = components, load, known
        self.clock = clock or Clock()
        self.make_sampler = sampler or causal_sampler
        self._prompt = request.video.prompt
        # By the second of the video from which on each holds.
        self._changes: list[tuple[float, str, Context | None]] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._begun: _Begun | None = None
        self._submitted = 0  # Pixel frames of all blocks that were begun.

    @property
    def times(self) -> LiveTimes:
        """How it keeps up."""
        return self._pace.times

    @property
    def prompt(self) -> str:
        """What it shows from the next block on; set it to change that."""
        return self._prompt

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        self.change(prompt)

    def change(self, prompt: str, *, at: float | None = None) -> None:
        """Show something else, from the next block that is begun.

        The text is encoded here, so that the stream is not held up by it; that of a stream which
        has not begun is encoded with the first one.

        Args:
            prompt: what to show.
            at: second of the video from which on; ``None`` for as soon as possible.

        Raises:
            RequestError: it is empty, or not one text.
            WeightsError: the text encoder cannot be loaded.
        """
        if not isinstance(prompt, str):
            raise RequestError(f"`prompt` of type {type(prompt).__name__} must be text")
        known, states = self._known(prompt), None
        if self._begun is not None:
            states = self._encoded(known)
        with self._lock:
            self._changes.append((self.begun_seconds if at is None else at, known, states))
            self._changes.sort(key=lambda change: change[0])
            if at is None:
                self._prompt = known

    def _encoded(self, prompt: str) -> Context:
        return jnp.asarray(self._components.text_encoder.encode([prompt]))

    @property
    def begun_seconds(self) -> float:
        """Second of the video at which the next block begins."""
        return float(self._submitted / self.request.fps)

    def stop(self) -> None:
        """End it: what is delivered is all there will be."""
        self._stopping.set()

    def wait(self, seconds: float) -> None:
        """Let so many seconds go by, or fewer if it is stopped."""
        if seconds > 0:
            self._stopping.wait(seconds)

    def close(self) -> None:
        """End it, and let go of all models."""
        self.stop()
        self._begun = None

    def __enter__(self) -> "LiveStream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> "LiveStream":
        return self

    def __next__(self) -> Frames:
        """The frames of the next block, ``[frames, height, width, 3]``.

        Raises:
            NumericsError: latents or frames hold what is no number; says from which second on.
            UnsupportedError: the memory is not enough.
            SkyReelsError: whatever else went wrong; the stream is closed then.
        """
        self._pace.asked()
        try:
            if self._is_over():
                self.close()
                raise StopIteration
            with refused_in_words(_SMALLER):
                frames = self._next(self._begun or self._begin())
        except BaseException:
            self.close()
            raise
        self._pace.delivered(len(frames))
        return frames

    def _is_over(self) -> bool:
        total = self.request.frames
        return self._stopping.is_set() or (total is not None and self.times.frames >= total)

    def _begin(self) -> _Begun:
        """Encode, load and compile."""
        video, clock, components = self.request.video, self.clock, self._components
        guidance = guidance_of(video.guidance_scale)
        prompts = (video.prompt, *(prompt for _, prompt, _ in self._changes))
        inputs = encode_inputs(components, replace(video, prompts=prompts), guidance, clock)
        given = encode_known_frames(components, video, clock).prefix
        with clock.stage("load"):
            denoiser = self._load()
        sampler = self.make_sampler(self, denoiser, guidance)
        waiting: list[HostLatents] = []

        def pieces() -> Iterator[HostLatents]:
            while waiting:
                yield waiting.pop(0)

        vae = loaded_vae(components.vae)
        pixels = vae.decode_pieces(pieces())
        texts = inputs.positive, inputs.negative
        begun = _Begun(sampler, denoiser, guidance, *texts, pixels, given, None, waiting)
        sampler.change(self._condition(begun, inputs.positive[video.prompt]))
        if given is not None:
            sampler.given(jnp.asarray(given)[None])
        self._begun = begun
        return begun

    def _condition(self, begun: _Begun, positive: Context) -> Conditioning:
        fps = jnp.array([geometry.fps_entry(self.request.fps)], jnp.int32)
        texts = positive, begun.negative
        height, width = (side // geometry.SIZE_MULTIPLE for side in self.request.size)  # Patches.
        padding = padding_rows(texts, self.request.schedule.at_once * height * width)
        how = {"fps": fps, "padding": padding, "clock": self.clock}
        return begun.denoiser.condition(begun.guidance, *texts, **how)

    def _next(self, begun: _Begun) -> Frames:
        """Wait for a block's frames; hand an accelerator the next block behind them.

        So it computes while frames are looked at. A CPU, which somebody who looks shares with it,
        begins no block before it is asked for: another prompt then shows in the very next one.
        """
        is_first = not self.times.frames
        latents = begun.pending if begun.pending is not None else self._submit(begun)
        begun.pending = None
        chunks = self._decoded(begun, latents)
        if not is_first and jax.default_backend() != "cpu":
            begun.pending = self._ahead(begun)
        frames = np.concatenate([to_frames(chunk) for chunk in chunks])
        total = self.request.frames
        return frames if total is None else frames[: total - self.times.frames]

    def _ahead(self, begun: _Begun) -> Latents | None:
        """The block after this one, unless this one is the last."""
        total = self.request.frames
        over = self._stopping.is_set() or (total is not None and self._submitted >= total)
        return None if over else self._submit(begun)

    def _submit(self, begun: _Begun) -> Latents:
        """Hand a block to the device, with the prompt that holds where it begins."""
        with self._lock:
            due = [change for change in self._changes if change[0] <= self.begun_seconds]
            self._changes = self._changes[len(due) :]
        if due:
            _, self._prompt, states = due[-1]
            if states is None:
                states = begun.positive.get(self._prompt)
            if states is None:  # It came while the stream was begun.
                states = self._encoded(self._prompt)
            begun.sampler.change(self._condition(begun, states))
        latents = begun.sampler.next()
        made = geometry.FRAMES_PER_LATENT * latents.shape[2]
        self._submitted += made if self._submitted else self._first_frames(begun, made)[0]
        return latents

    def _first_frames(self, begun: _Begun, made: int) -> tuple[int, int]:
        """Frames that the first block is shown with, and frames before it that are not shown.

        An image is the first frame of this video; one that is continued was seen before.
        """
        if begun.given is None:
            return made - geometry.FRAMES_PER_LATENT + 1, 0
        known = geometry.pixel_frames(begun.given.shape[1])
        return (made + known, 0) if self.request.video.video is None else (made, known)

    def _decoded(self, begun: _Begun, latents: Latents) -> list[Pixels]:
        """The pixels of a block, at the beginning with those that were given before it."""
        block = np.asarray(latents[0], np.float32)
        second = float(self.times.frames / self.request.fps)
        if not np.all(np.isfinite(block)):
            raise NumericsError(
                f"the latents from second {second:.1f} on hold NaN or infinity: the weights do, or "
                "a value overflowed; try `dtype` float32"
            )
        missing, skipped = geometry.FRAMES_PER_LATENT * block.shape[1], 0
        if not self.times.frames:
            missing, skipped = self._first_frames(begun, missing)
            missing += skipped
            if begun.given is not None:
                begun.waiting.append(begun.given)
        begun.waiting.append(block)
        chunks: list[Pixels] = []
        while missing:
            chunk = next(begun.pixels)
            missing -= chunk.shape[1]
            if not np.all(np.isfinite(chunk)):
                raise NumericsError(f"the frames from second {second:.1f} on hold NaN or infinity")
            passed = min(skipped, chunk.shape[1])
            skipped -= passed
            if passed < chunk.shape[1]:
                chunks.append(chunk[:, passed:])
        return chunks


def causal_sampler(stream: LiveStream, denoiser: Denoiser, guidance: Guidance) -> BlockSampler:
    """The sampler of a stream that was begun."""
    request = stream.request
    height, width = request.size
    return CausalSampler(
        denoiser,
        request.schedule,
        request.window,
        guidance=guidance,
        latent_size=(height // geometry.PIXELS_PER_LATENT, width // geometry.PIXELS_PER_LATENT),
        seed=request.video.seed,
        attention=request.video.attention,
        clock=stream.clock,
    )
