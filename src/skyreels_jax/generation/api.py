"""One generation, stage by stage: text, image, condition, denoise, decode."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from skyreels_jax.diffusion.forcing import Timetable, plan_blocks, timetable
from skyreels_jax.diffusion.guidance import Guidance, NoGuidance, guidance_of
from skyreels_jax.diffusion.schedule import FlowSchedule, flow_sigmas
from skyreels_jax.errors import NumericsError
from skyreels_jax.generation import sizes
from skyreels_jax.generation.components import (
    ImageEncoder,
    TextEncoder,
    VideoCodec,
)
from skyreels_jax.generation.conditioning import (
    condition_latents,
    encode_first_frame,
    prepare_image,
    to_frames,
)
from skyreels_jax.generation.denoise import Denoiser, Sampling, draw_noise, together
from skyreels_jax.generation.progress import Clock, NoProgress, Progress, Timings
from skyreels_jax.generation.request import ResolvedRequest
from skyreels_jax.generation.video import Video
from skyreels_jax.media import VideoWriter
from skyreels_jax.shapes import Context, Frames, HostLatents, Latents

# The frame rate that fps embeddings know as their first entry; every other is the second.
FIRST_FPS: Final = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Components:
    """All parts but the transformer; ``image_encoder`` only where the checkpoint has one."""

    text_encoder: TextEncoder
    codec: VideoCodec
    image_encoder: ImageEncoder | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """A video that is denoised and not decoded yet.

    Attributes:
        latents: finished, ``[16, F, H, W]``.
        settings: all that decided them, as JSON values.
        fps: frames a second, once decoded.
        step_seconds: of each step of the solver.
        clock: has timed the stages so far, and goes on with the decoding.
    """

    latents: HostLatents
    settings: Mapping[str, Any]
    fps: int
    step_seconds: tuple[float, ...] = ()
    clock: Clock = field(default_factory=Clock)

    @property
    def timings(self) -> Timings:
        """Seconds by stage, so far."""
        return Timings(dict(self.clock.seconds), self.step_seconds)

    @property
    def num_frames(self) -> int:
        """Pixel frames, once decoded."""
        return (self.latents.shape[1] - 1) * sizes.FRAMES_PER_LATENT + 1

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, once decoded."""
        _, _, rows, columns = self.latents.shape
        return rows * sizes.PIXELS_PER_LATENT, columns * sizes.PIXELS_PER_LATENT


def generate(
    components: Components,
    denoiser: Denoiser,
    request: ResolvedRequest,
    *,
    noise: Latents | None = None,
    schedule: FlowSchedule | None = None,
    progress: Progress | None = None,
) -> Video:
    """Make the video of a request: :func:`sample`, then :func:`finish`.

    Args:
        components: encoders and VAE.
        denoiser: the transformer; keep it between calls to compile once.
        request: from :func:`skyreels_jax.generation.resolve.resolve`.
        noise: latents ``[1, 16, F, H, W]`` in place of the seed's.
        schedule: noise levels in place of those of ``request.steps`` and ``request.shift``.
        progress: told of every stage.

    Raises:
        NumericsError: something was not finite; says what and where.
        ValueError: ``noise`` has another shape than the request's latents.
    """
    sampled = sample(
        components, lambda: denoiser, request, noise=noise, schedule=schedule, progress=progress
    )
    return finish(components.codec, sampled)


def sample(
    components: Components,
    load: Callable[[], Denoiser],
    request: ResolvedRequest,
    *,
    noise: Latents | None = None,
    schedule: FlowSchedule | None = None,
    progress: Progress | None = None,
) -> Sample:
    """Everything up to finished latents; as :func:`generate`, but for ``load``.

    ``load`` gives the transformer. It is called once text and image are encoded, and what it gives
    is let go of before this returns: no two large models need to be in memory together.
    """
    clock = Clock(progress or NoProgress())
    schedule = schedule or flow_sigmas(request.steps, request.shift)
    noise = starting_noise(request) if noise is None else noise
    shape = (1, sizes.LATENT_CHANNELS, *request.latent_shape)
    if noise.shape != shape:
        raise ValueError(f"noise has shape {noise.shape}; this request's latents are {shape}")
    guidance = guidance_of(request.guidance_scale, batched=request.batched_guidance)
    encoded = encode(components, request, guidance, clock)
    frames, noise = hold_first_frame(components, request, schedule, noise, clock)
    with clock.stage("load"):
        denoiser = load()
    conditioning = denoiser.condition(
        guidance,
        encoded.positive,
        encoded.negative,
        clip_fea=encoded.clip_fea,
        y=encoded.y,
        fps=jnp.array([0 if request.fps == FIRST_FPS else 1], jnp.int32),
        clock=clock,
    )
    sampling = Sampling(schedule, guidance, request.attention)
    denoised = denoiser.run(noise, conditioning, sampling, frames=frames, clock=clock)
    settings = request.settings() | {
        "generator": f"skyreels-jax {version('skyreels-jax')}",
        "sources": dict(request.sources),
    }
    latents = np.asarray(denoised.latents[0])
    return Sample(latents, settings, request.fps, denoised.step_seconds, clock)


def finish(codec: VideoCodec, sampled: Sample) -> Video:
    """Decode a sample into a video that is held in memory.

    Raises:
        NumericsError: the VAE's output is not finite.
    """
    frames = np.concatenate(list(decode(codec, sampled)))
    logger.debug("seconds by stage: %s", sampled.clock.seconds)
    return Video(frames, sampled.fps, sampled.settings, sampled.latents, sampled.timings)


def write(codec: VideoCodec, sampled: Sample, path: Path, *, metadata: bool = True) -> None:
    """Decode a sample straight into an MP4: memory does not grow with the video's length.

    Args:
        codec: decodes.
        sampled: what to decode.
        path: ends in ``.mp4``; the file appears when all of it is written.
        metadata: whether the file carries the settings in its ``comment`` tag.

    Raises:
        NumericsError: the VAE's output is not finite.
        RequestError: the path cannot be written to.
    """
    settings = sampled.settings if metadata else None
    with VideoWriter(path, fps=sampled.fps, size=sampled.size, settings=settings) as writer:
        for frames in decode(codec, sampled):
            writer.append(frames)


def starting_noise(request: ResolvedRequest) -> Latents:
    """The noise of the request's seed."""
    return draw_noise(request.seed, (1, sizes.LATENT_CHANNELS, *request.latent_shape))


@dataclass(frozen=True)
class Encoded:
    """Prompts and images as the transformer takes them, with a batch of one."""

    positive: Context
    negative: Context | None
    clip_fea: Float[Array, "B I image_dim"] | None
    y: Float[Array, "B Y F H W"] | None


def encode(
    components: Components, request: ResolvedRequest, guidance: Guidance, clock: Clock
) -> Encoded:
    """Encode the prompts that guidance needs and, for image-to-video checkpoints, the images."""
    prompts = [request.prompt]
    if not isinstance(guidance, NoGuidance):
        prompts.append(request.negative_prompt)
    with clock.stage("text"):
        states = jnp.asarray(components.text_encoder.encode(prompts))
    logger.debug("text states %s %s", states.shape, states.dtype)
    clip_fea, y = None, None
    if request.task in ("i2v", "flf2v"):
        clip_fea, y = _condition_on_images(components, request, clock)
    return Encoded(states[:1], states[1:] if len(prompts) > 1 else None, clip_fea, y)


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


def hold_first_frame(
    components: Components,
    request: ResolvedRequest,
    schedule: FlowSchedule,
    noise: Latents,
    clock: Clock,
) -> tuple[Timetable, Latents]:
    """When each frame moves, and what they start from.

    Diffusion-forcing checkpoints take an image as a first latent frame that is clean throughout;
    in all other cases every frame starts from noise and all move together.
    """
    frames = movement(request, schedule)
    if request.task != "df" or request.image is None:
        return frames, noise
    with clock.stage("condition"):
        image = prepare_image(
            request.image, request.height, request.width, Image.Resampling.BICUBIC
        )
        first = jnp.asarray(encode_first_frame(components.codec, image))
    return frames, noise.at[0, :, :1].set(first)


def movement(request: ResolvedRequest, schedule: FlowSchedule) -> Timetable:
    """When each latent frame moves: all together, or all but a first one that is held."""
    if request.task != "df" or request.image is None:
        return together(schedule)
    frames = request.latent_shape[0]
    return timetable(plan_blocks(frames, frames, prefix=1), schedule.timesteps, ar_step=0)


def decode(codec: VideoCodec, sampled: Sample) -> Iterator[Frames]:
    """Decode piece by piece, so that frames can be written while later ones are still latents.

    Raises:
        NumericsError: the VAE's output is not finite.
    """
    clock, total = sampled.clock, sampled.num_frames
    done = 0
    with clock.stage("decode", total):
        for pixels in codec.decode_chunks(sampled.latents):
            if not np.all(np.isfinite(pixels)):
                raise NumericsError(
                    f"decoding gave NaN or infinity after frame {done} of {total}: the VAE's "
                    "weights are damaged or a value overflowed in its dtype"
                )
            frames = to_frames(pixels)
            done += len(frames)
            clock.progress.advance("decode", done)
            yield frames
            clock.check()
