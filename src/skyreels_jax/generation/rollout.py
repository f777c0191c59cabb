"""The windows of a video, one after the other: what each is given, and its run of the transformer.

A video that the transformer sees at once is one window; all tasks take this path.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from skyreels_jax import geometry
from skyreels_jax.components.conditioning import (
    condition_latents,
    encode_first_frame,
    encode_last_frames,
    prepare_image,
)
from skyreels_jax.components.protocols import Components
from skyreels_jax.diffusion.cache_settings import step_cache
from skyreels_jax.diffusion.frame_schedule import (
    FrameSchedule,
    plan_blocks,
    schedule_frames,
    synchronous_schedule,
)
from skyreels_jax.diffusion.guidance import Guidance, NoGuidance, guidance_of
from skyreels_jax.diffusion.sigmas import FlowSchedule, flow_sigmas
from skyreels_jax.generation.request import ResolvedRequest
from skyreels_jax.generation.windows import Window
from skyreels_jax.sampling.denoiser import Denoiser, Sampling
from skyreels_jax.sampling.noise import draw_noise, draw_torch_noise, noise_key
from skyreels_jax.sampling.progress import Clock
from skyreels_jax.sampling.step import Conditioning, ConditioningNoise
from skyreels_jax.shapes import Context, HostLatents, Latents

# Given frames, beside those of the window they are given to.
Prefix = Float[np.ndarray, "C given H W"]
# The frame rate that fps embeddings know as their first entry; every other is the second.
FIRST_FPS: Final = 16
# Apart from all window numbers, so that the noise over given frames is no window's own.
PREFIX_STREAM: Final = 2**31

logger = logging.getLogger(__name__)


@runtime_checkable
class Kept(Protocol):
    """Where finished windows are kept, so that an interruption costs none of them."""

    def load(self, window: Window) -> HostLatents | None:
        """What was saved of a window, if it was."""
        ...

    def save(self, window: Window, latents: HostLatents) -> None:
        """Keep a finished window, all its frames but an end frame."""
        ...


class NotKept:
    """Nowhere."""

    def load(self, window: Window) -> None:
        """Nothing."""

    def save(self, window: Window, latents: HostLatents) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Encoded:
    """Prompts and images as the transformer takes them, with a batch of one."""

    positive: Mapping[str, Context]
    negative: Context | None
    clip_fea: Float[Array, "B I image_dim"] | None
    y: Float[Array, "B Y F H W"] | None


@dataclass(frozen=True, eq=False)
class Given:
    """Latents that are known before anything is made: before the first window, and after all."""

    prefix: Prefix | None
    end: Prefix | None


@dataclass(eq=False)
class Rollout:
    """The windows of one request, made or taken from where they are kept.

    Attributes:
        components: encoders and VAE.
        load: gives the transformer. It is called once text and images are encoded, and what it
            gives is let go of after the last window: no two large models are in memory together.
        request: settled.
        clock: times and reports.
        schedule: the sigmas.
        noise: of a window, in place of the seed's: ``[1, 16, frames, H, W]``.
        kept: where finished windows are.
    """

    components: Components
    load: Callable[[], Denoiser]
    request: ResolvedRequest
    clock: Clock
    schedule: FlowSchedule
    noise: Callable[[Window], Latents]
    kept: Kept = field(default_factory=NotKept)
    _transformer: "_Transformer | None" = None
    _given: Given | None = None

    def prefix(self) -> Prefix | None:
        """What the first window is given: an image, or the end of a video."""
        return self._known().prefix

    def latents(self, window: Window, prefix: Prefix | None) -> HostLatents:
        """The frames of a window, given ones included: ``[16, F, H, W]``.

        Args:
            window: the windows of a request come in their order.
            prefix: its given frames.

        Raises:
            NumericsError: a prediction was not finite; says in which step.
            Stopped: somebody asked the clock to.
        """
        latents = self.kept.load(window)
        if latents is None:
            latents = self._denoise(window, prefix)
            self.kept.save(window, latents)
        if window == self.request.windows[-1]:
            self._transformer = None
        return latents

    def _known(self) -> Given:
        if self._given is None:
            self._given = given(self.components, self.request, self.clock)
        return self._given

    def _denoise(self, window: Window, prefix: Prefix | None) -> HostLatents:
        request = self.request
        if self._transformer is None:
            guidance = guidance_of(request.guidance_scale, batched=request.batched_guidance)
            encoded = encode(self.components, request, guidance, self.clock)
            self._known()
            with self.clock.stage("load"):
                denoiser = self.load()
            sampling = Sampling(
                self.schedule, guidance, request.attention, latents=request.latent_dtype
            )
            self._transformer = _Transformer(denoiser, encoded, sampling)
        denoiser, sampling = self._transformer.denoiser, self._transformer.sampling
        if request.forcing is not None:
            block_length = request.forcing.causal_attention
            denoiser = dataclasses.replace(denoiser, block_length=block_length)
        noise = self.noise(window)
        shape = (1, geometry.LATENT_CHANNELS, window.frames, *request.latent_shape[1:])
        if noise.shape != shape:
            raise ValueError(f"noise has shape {noise.shape}; this window's latents are {shape}")
        if prefix is not None:
            noise = noise.at[0, :, : window.prefix].set(jnp.asarray(prefix))
        if window.end:
            end = self._known().end
            assert end is not None
            noise = jnp.concatenate([noise, jnp.asarray(end)[None]], axis=2)
        frame_schedule = frame_schedule_for(request, self.schedule, window)
        cache = step_cache(request.cache, request.steps, frame_schedule.iterations)
        denoised = denoiser.run(
            noise,
            self._transformer.conditioning(request, window, self.clock),
            dataclasses.replace(sampling, cache=cache),
            frame_schedule=frame_schedule,
            conditioning_noise=conditioning_noise(request, window),
            clock=self.clock,
        )
        self.clock.ran(
            denoised.step_seconds, denoised.computed, denoised.calls, denoised.block_counts
        )
        return np.asarray(denoised.latents[0, :, : window.frames])


@dataclass(eq=False)
class _Transformer:
    """The transformer with the texts it is told; keys and values of one prompt at a time."""

    denoiser: Denoiser
    encoded: Encoded
    sampling: Sampling
    prepared: tuple[str, Conditioning] | None = None

    def conditioning(self, request: ResolvedRequest, window: Window, clock: Clock) -> Conditioning:
        prompt = request.prompts[window.number]
        if self.prepared is None or self.prepared[0] != prompt:
            self.prepared = None
            conditioning = self.denoiser.condition(
                self.sampling.guidance,
                self.encoded.positive[prompt],
                self.encoded.negative,
                clip_fea=self.encoded.clip_fea,
                y=self.encoded.y,
                fps=jnp.array([0 if request.fps == FIRST_FPS else 1], jnp.int32),
                clock=clock,
            )
            self.prepared = (prompt, conditioning)
        return self.prepared[1]


def roll_out(
    components: Components,
    load: Callable[[], Denoiser],
    request: ResolvedRequest,
    clock: Clock,
    *,
    noise: Callable[[Window], Latents] | None = None,
    schedule: FlowSchedule | None = None,
    kept: Kept | None = None,
) -> Rollout:
    """A :class:`Rollout` with the request's own noise and sigmas, unless others are given."""
    return Rollout(
        components,
        load,
        request,
        clock,
        schedule or flow_sigmas(request.steps, request.shift),
        noise or (lambda window: starting_noise(request, window)),
        kept or NotKept(),
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
    """What the model is shown over given frames, where the request has it so."""
    if request.forcing is None or not (window.prefix and request.forcing.addnoise_condition):
        return None
    key = jax.random.fold_in(noise_key(request.seed, window.number), PREFIX_STREAM)
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


def given(components: Components, request: ResolvedRequest, clock: Clock) -> Given:
    """Encode what diffusion forcing takes as frames that are there."""
    forcing, prefix, end = request.forcing, None, None
    if forcing is None or not (request.windows[0].prefix or request.last_image is not None):
        return Given(None, None)
    size = request.height, request.width
    with clock.stage("condition"):
        if request.video is not None:
            prefix = encode_last_frames(
                components.codec, request.video.path, forcing.overlap_history, size, request.fps
            )
        elif request.image is not None:
            image = prepare_image(request.image, *size, Image.Resampling.BICUBIC)
            prefix = encode_first_frame(components.codec, image)
        if request.last_image is not None:
            image = prepare_image(request.last_image, *size, Image.Resampling.BICUBIC)
            end = encode_first_frame(components.codec, image)
    return Given(prefix, end)


def encode(
    components: Components, request: ResolvedRequest, guidance: Guidance, clock: Clock
) -> Encoded:
    """Encode the prompts that guidance needs and, for image-to-video checkpoints, the images."""
    prompts = list(dict.fromkeys(request.prompts))
    told = prompts if isinstance(guidance, NoGuidance) else [*prompts, request.negative_prompt]
    with clock.stage("text"):
        states = jnp.asarray(components.text_encoder.encode(told))
    logger.debug("text states %s %s", states.shape, states.dtype)
    clip_fea, y = None, None
    if request.task in ("i2v", "flf2v"):
        clip_fea, y = _condition_on_images(components, request, clock)
    positive = {prompt: states[i : i + 1] for i, prompt in enumerate(prompts)}
    negative = states[len(prompts) :] if len(told) > len(prompts) else None
    return Encoded(positive, negative, clip_fea, y)


def _condition_on_images(
    components: Components, request: ResolvedRequest, clock: Clock
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Image features, those of a last image after the first's, and mask with latents."""
    if components.image_encoder is None:
        raise ValueError(f"a request of task {request.task} takes an image encoder")
    with clock.stage("image"):
        images = [
            prepare_image(image, request.height, request.width)
            for image in (request.image, request.last_image)
            if image is not None
        ]
        features = np.concatenate([components.image_encoder.encode(image) for image in images])
    with clock.stage("condition"):
        last = images[1] if len(images) > 1 else None
        y = condition_latents(components.codec, images[0], last, request.num_frames)
    logger.debug("image features %s, condition %s", features.shape, y.shape)
    return jnp.asarray(features)[None], jnp.asarray(y)[None]
