"""The windows of a video, one after the other: the inputs of each, and its run of the transformer.

A video that the transformer sees at once is one window; all tasks take this path.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from skyreels_jax import geometry
from skyreels_jax.components.encoders import (
    condition_latents,
    encode_first_frame,
    encode_last_frames,
    prepare_image,
)
from skyreels_jax.components.protocols import Components
from skyreels_jax.diffusion.frame_schedule import (
    FrameSchedule,
    plan_blocks,
    schedule_frames,
    synchronous_schedule,
)
from skyreels_jax.diffusion.guidance import Guidance, NoGuidance, guidance_of
from skyreels_jax.diffusion.step_cache import CacheState, step_cache
from skyreels_jax.diffusion.unipc import FlowSchedule, flow_sigmas
from skyreels_jax.generation.request.reference import call_counter, takes_state
from skyreels_jax.generation.request.resolved import ResolvedRequest, Window
from skyreels_jax.generation.store import NoStore, WindowStore
from skyreels_jax.memory import refused_in_words
from skyreels_jax.sampling.denoiser import Denoised, Denoiser, Sampling
from skyreels_jax.sampling.noise import draw_noise, draw_torch_noise, noise_key
from skyreels_jax.sampling.progress import Clock, Stage
from skyreels_jax.sampling.step import Conditioning, ConditioningNoise
from skyreels_jax.shapes import Context, HostLatents, Latents

# Latents of known frames, beside those of the window that they begin or follow.
KnownLatents = Float[np.ndarray, "C known H W"]
# Apart from all window numbers, so that the noise over known frames is no window's own.
_CONDITIONING_STREAM: Final = 2**31

logger = logging.getLogger(__name__)

_SMALLER_MODEL: Final = "use `dtype` bfloat16, a smaller checkpoint or more memory"
_SMALLER_VIDEO: Final = "use fewer frames, a smaller size or a smaller dtype"
SMALLER_WINDOWS: Final = (
    "use shorter windows (`base_num_frames`), a smaller size or `dtype` bfloat16"
)
# What takes less memory, by stage.
_LESS: Final[Mapping[Stage, str]] = {
    "text": f"encoding the prompt: {_SMALLER_MODEL}",
    "image": f"encoding the image: {_SMALLER_MODEL}",
    "condition": "encoding what is given: use `vae_tiling` on or a smaller size",
    "load": f"loading the transformer: {_SMALLER_MODEL}",
}


@contextmanager
def _stage(clock: Clock, stage: Stage) -> Iterator[None]:
    """A stage of which memory that runs out is said in its own words."""
    with refused_in_words(_LESS[stage]), clock.stage(stage):
        yield


@dataclass(frozen=True)
class EncodedInputs:
    """Prompts and images as the transformer takes them, with a batch of one."""

    positive: Mapping[str, Context]
    negative: Context | None
    clip_fea: Float[Array, "B I image_dim"] | None
    y: Float[Array, "B Y F H W"] | None


@dataclass(frozen=True, eq=False)
class KnownFrames:
    """Latents that are known before anything is made: before the first window, and after all."""

    prefix: KnownLatents | None = None
    end: KnownLatents | None = None


@dataclass(eq=False)
class _Loaded:
    """The transformer with what it is conditioned on; prepared for one prompt at a time."""

    denoiser: Denoiser
    inputs: EncodedInputs
    guidance: Guidance
    prompt: str | None = None
    conditioning: Conditioning | None = None

    def condition(self, prompt: str, fps: int | Fraction, clock: Clock) -> Conditioning:
        """Keys and values of a prompt, and what does not depend on it."""
        if self.conditioning is None or self.prompt != prompt:
            self.conditioning = None  # No two are in memory.
            self.conditioning = self.denoiser.condition(
                self.guidance,
                self.inputs.positive[prompt],
                self.inputs.negative,
                clip_fea=self.inputs.clip_fea,
                y=self.inputs.y,
                fps=jnp.array([geometry.fps_entry(fps)], jnp.int32),
                clock=clock,
            )
            self.prompt = prompt
        return self.conditioning


class WindowGenerator:
    """Makes the latents of a request's windows, or takes them from where they are stored.

    Attributes:
        components: encoders and VAE.
        request: resolved.
        clock: times, reports, and may be asked to stop.
        store: where finished windows are.
    """

    def __init__(
        self,
        components: Components,
        load: Callable[[], Denoiser],
        request: ResolvedRequest,
        *,
        clock: Clock | None = None,
        store: WindowStore | None = None,
        noise: Callable[[Window], Latents] | None = None,
        schedule: FlowSchedule | None = None,
    ):
        """Nothing is loaded or encoded yet.

        Args:
            components: encoders and VAE.
            load: gives the transformer. It is called once text and images are encoded, and what it
                gives is let go of after the last window.
            request: from :func:`skyreels_jax.generation.request.resolve.resolve`.
            clock: times, reports, and may be asked to stop.
            store: where finished windows are kept and taken from; ``None`` for nowhere.
            noise: of a window, ``[1, 16, frames, H, W]`` with its known frames, in place of the
                seed's.
            schedule: sigmas in place of those of ``request.steps`` and ``request.shift``.
        """
        self.components = components
        self.request = request
        self.clock = clock or Clock()
        self.store = store or NoStore()
        self._load = load
        self._noise = noise or (lambda window: starting_noise(request, window))
        self._schedule = schedule or flow_sigmas(request.steps, request.shift)
        self._loaded: _Loaded | None = None
        # What the original's TeaCache takes over from one window into the next; only here.
        self._caches: tuple[CacheState, ...] | None = None
        self._takes_state = any(takes_state(request, window) for window in request.windows)

    @cached_property
    def known(self) -> KnownFrames:
        """Frames that the request gives: an image or the end of a video, and an end frame."""
        return encode_known_frames(self.components, self.request, self.clock)

    def make(self, window: Window, prefix: KnownLatents | None = None) -> HostLatents:
        """The latents of a window, known frames included: ``[16, F, H, W]``.

        Args:
            window: the windows of a request come in their order.
            prefix: its known frames; of the first those of the request, if no others are given.

        Raises:
            NumericsError: a prediction was not finite; says in which step.
            Stopped: somebody asked the clock to.
            UnsupportedError: the memory is not enough.
            ValueError: the noise has another shape than the window's latents.
        """
        request = self.request
        if prefix is None and not window.number:
            prefix = self.known.prefix
        latents = self.store.load(window) if self._may_load() else None
        if latents is None:
            if self._loaded is None:
                guidance = guidance_of(request.guidance_scale, batched=request.batched_guidance)
                inputs = encode_inputs(self.components, request, guidance, self.clock)
                with _stage(self.clock, "load"):
                    denoiser = self._load()
                if request.forcing is not None:
                    denoiser = replace(denoiser, block_length=request.forcing.causal_attention)
                self._loaded = _Loaded(denoiser, inputs, guidance)
            loaded, caches, self._caches = self._loaded, self._caches, None
            with refused_in_words(_SMALLER_VIDEO if len(request.windows) == 1 else SMALLER_WINDOWS):
                denoised = loaded.denoiser.run(
                    self._start(window, prefix),
                    loaded.condition(request.prompts[window.number], request.fps, self.clock),
                    self._sampling(loaded.guidance, window),
                    frame_schedule=frame_schedule_for(request, self._schedule, window),
                    conditioning_noise=conditioning_noise(request, window),
                    caches=caches,
                    clock=self.clock,
                )
                self._note(denoised, window)
                latents = np.asarray(denoised.latents[0, :, : window.frames])
            self.store.save(window, latents)
        if window == self.request.windows[-1]:
            self._loaded = None
        return latents

    def _may_load(self) -> bool:
        """Whether a stored window will do: not where later ones need what is not stored."""
        return not self._takes_state or self.store.load(self.request.windows[-1]) is not None

    def _start(self, window: Window, prefix: KnownLatents | None) -> Latents:
        """Noise of all frames but those that are known."""
        noise = self._noise(window)
        shape = (1, geometry.LATENT_CHANNELS, window.frames, *self.request.latent_shape[1:])
        if noise.shape != shape:
            raise ValueError(f"noise has shape {noise.shape}; this window's latents are {shape}")
        if prefix is not None:
            noise = noise.at[0, :, : window.prefix].set(jnp.asarray(prefix))
        if window.end:
            assert self.known.end is not None
            noise = jnp.concatenate([noise, jnp.asarray(self.known.end)[None]], axis=2)
        return noise

    def _sampling(self, guidance: Guidance, window: Window) -> Sampling:
        request = self.request
        return Sampling(
            self._schedule,
            guidance,
            request.attention,
            step_cache(request.cache, request.steps, call_counter(request, window)),
            latents=request.latent_dtype,
            exact=request.exact_forcing,
        )

    def _note(self, denoised: Denoised, window: Window) -> None:
        """Count a window's calls, and keep what the next one's step cache takes over."""
        following = self.request.windows[window.number + 1 :][:1]
        if any(takes_state(self.request, after) for after in following):
            self._caches = denoised.caches
        self.clock.ran(
            denoised.step_seconds, denoised.computed, denoised.calls, denoised.block_counts
        )


def starting_noise(request: ResolvedRequest, window: Window | None = None) -> Latents:
    """The noise of the request's seed for a window; by default its first."""
    window = window or request.windows[0]
    one = (1, geometry.LATENT_CHANNELS, 1, *request.latent_shape[1:])
    shape = (*one[:2], window.frames, *one[3:])
    if request.noise == "torch":
        earlier = sum(before.frames for before in request.windows[: window.number])
        return draw_torch_noise(request.seed, shape, skip=earlier * math.prod(one))
    return draw_noise(request.seed, shape, window.number)


def conditioning_noise(request: ResolvedRequest, window: Window) -> ConditioningNoise | None:
    """Noise that the model sees over known frames, where the request has it so."""
    if request.forcing is None or not (window.prefix and request.forcing.addnoise_condition):
        return None
    key = jax.random.fold_in(noise_key(request.seed, window.number), _CONDITIONING_STREAM)
    forcing = request.forcing
    return ConditioningNoise(forcing.addnoise_condition, window.prefix, key, forcing.addnoise_once)


def frame_schedule_for(
    request: ResolvedRequest, schedule: FlowSchedule, window: Window | None = None
) -> FrameSchedule:
    """When each frame of a window moves (by default of the largest, which decides the memory)."""
    window = window or max(request.windows, key=lambda window: window.columns)
    forcing = request.forcing
    if forcing is None:
        return synchronous_schedule(schedule.timesteps)
    # Windows of one video are alike, so that they share one compiled step.
    alone = len(request.windows) == 1
    if alone and not (window.prefix or window.end or forcing.ar_step):
        return synchronous_schedule(schedule.timesteps)
    blocks = plan_blocks(
        window.frames, forcing.causal_block_size, prefix=window.prefix, end=int(window.end)
    )
    return schedule_frames(blocks, schedule.timesteps, ar_step=forcing.ar_step)


def encode_known_frames(
    components: Components, request: ResolvedRequest, clock: Clock
) -> KnownFrames:
    """Encode the frames that diffusion forcing continues, and the one that it leads to."""
    forcing, prefix, end = request.forcing, None, None
    if forcing is None or not (request.windows[0].prefix or request.last_image is not None):
        return KnownFrames()
    size = request.height, request.width
    with _stage(clock, "condition"):
        if request.video is not None:
            prefix = encode_last_frames(
                *(components.vae, request.video.path, forcing.overlap_history, size),
                request.reading_rate,
            )
        elif request.image is not None:
            image = prepare_image(request.image, *size, Image.Resampling.BICUBIC)
            prefix = encode_first_frame(components.vae, image)
        if request.last_image is not None:
            image = prepare_image(request.last_image, *size, Image.Resampling.BICUBIC)
            end = encode_first_frame(components.vae, image)
    return KnownFrames(prefix, end)


def encode_inputs(
    components: Components, request: ResolvedRequest, guidance: Guidance, clock: Clock
) -> EncodedInputs:
    """Encode the prompts that guidance needs and, for image-to-video checkpoints, the images."""
    prompts = list(dict.fromkeys(request.prompts))
    texts = prompts if isinstance(guidance, NoGuidance) else [*prompts, request.negative_prompt]
    with _stage(clock, "text"):
        states = jnp.asarray(components.text_encoder.encode(texts))
    logger.debug("text states %s %s", states.shape, states.dtype)
    clip_fea, y = None, None
    if request.task in ("i2v", "flf2v"):
        clip_fea, y = _encode_images(components, request, clock)
    positive = {prompt: states[i : i + 1] for i, prompt in enumerate(prompts)}
    negative = states[len(prompts) :] if len(texts) > len(prompts) else None
    return EncodedInputs(positive, negative, clip_fea, y)


def _encode_images(
    components: Components, request: ResolvedRequest, clock: Clock
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Image features, those of a last image after the first's, and mask with latents."""
    if components.image_encoder is None:
        raise ValueError(f"a request of task {request.task} takes an image encoder")
    with _stage(clock, "image"):
        images = [
            prepare_image(image, request.height, request.width)
            for image in (request.image, request.last_image)
            if image is not None
        ]
        features = np.concatenate([components.image_encoder.encode(image) for image in images])
    with _stage(clock, "condition"):
        last = images[1] if len(images) > 1 else None
        y = condition_latents(components.vae, images[0], last, request.num_frames)
    logger.debug("image features %s, condition %s", features.shape, y.shape)
    return jnp.asarray(features)[None], jnp.asarray(y)[None]
