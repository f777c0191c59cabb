"""One generation, stage by stage: text, image, condition, denoise, decode."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from skyreels_jax.diffusion.forcing import Timetable, plan_blocks, timetable
from skyreels_jax.diffusion.guidance import Guidance, NoGuidance, guidance_of
from skyreels_jax.diffusion.schedule import FlowSchedule, flow_sigmas
from skyreels_jax.errors import NumericsError
from skyreels_jax.generation.components import (
    ImageCondition,
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
from skyreels_jax.generation.denoise import Conditioning, Denoiser, draw_noise, together
from skyreels_jax.generation.progress import Clock, NoProgress, Progress, Timings
from skyreels_jax.generation.request import ResolvedRequest
from skyreels_jax.generation.sizes import LATENT_CHANNELS
from skyreels_jax.generation.video import Video
from skyreels_jax.shapes import Frames, HostLatents, Latents

# The frame rate that fps embeddings know as their first entry; every other is the second.
FIRST_FPS: Final = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Components:
    """All parts but the transformer; ``image_encoder`` only where the checkpoint has one."""

    text_encoder: TextEncoder
    codec: VideoCodec
    image_encoder: ImageEncoder | None = None


def generate(
    components: Components,
    denoiser: Denoiser,
    request: ResolvedRequest,
    *,
    noise: Latents | None = None,
    schedule: FlowSchedule | None = None,
    progress: Progress | None = None,
) -> Video:
    """Make the video of a request.

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
    clock = Clock(progress or NoProgress())
    schedule = schedule or flow_sigmas(request.steps, request.shift)
    noise = starting_noise(request) if noise is None else noise
    shape = (1, LATENT_CHANNELS, *request.latent_shape)
    if noise.shape != shape:
        raise ValueError(f"noise has shape {noise.shape}; this request's latents are {shape}")
    guidance = guidance_of(request.guidance_scale, batched=request.batched_guidance)
    conditioning = condition(components, denoiser, request, guidance, clock)
    frames, noise = hold_first_frame(components, request, schedule, noise, clock)
    denoised = denoiser.run(noise, schedule, conditioning, guidance, frames=frames, clock=clock)
    latents = np.asarray(denoised.latents[0])
    decoded = np.concatenate(list(decode(components.codec, latents, request.num_frames, clock)))
    timings = Timings(clock.seconds, denoised.step_seconds)
    logger.debug("seconds by stage: %s", clock.seconds)
    return Video(decoded, request.fps, _settings(request), latents, timings)


def starting_noise(request: ResolvedRequest) -> Latents:
    """The noise of the request's seed."""
    return draw_noise(request.seed, (1, LATENT_CHANNELS, *request.latent_shape))


def condition(
    components: Components,
    denoiser: Denoiser,
    request: ResolvedRequest,
    guidance: Guidance,
    clock: Clock,
) -> Conditioning:
    """Encode prompts and, for image-to-video checkpoints, images; prepare them for every step."""
    prompts = [request.prompt]
    if not isinstance(guidance, NoGuidance):
        prompts.append(request.negative_prompt)
    with clock.stage("text"):
        states = jnp.asarray(components.text_encoder.encode(prompts))
    logger.debug("text states %s %s", states.shape, states.dtype)
    clip_fea, y = None, None
    if request.task in ("i2v", "flf2v"):
        clip_fea, y = _condition_on_images(components, request, clock)
    return denoiser.condition(
        guidance,
        states[:1],
        states[1:] if len(prompts) > 1 else None,
        clip_fea=clip_fea,
        y=y,
        fps=jnp.array([0 if request.fps == FIRST_FPS else 1], jnp.int32),
        clock=clock,
    )


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
    if request.task != "df" or request.image is None:
        return together(schedule), noise
    with clock.stage("condition"):
        image: ImageCondition = prepare_image(request.image, request.height, request.width)
        first = jnp.asarray(encode_first_frame(components.codec, image))
    frames = noise.shape[2]
    table = timetable(plan_blocks(frames, frames, prefix=1), schedule.timesteps, ar_step=0)
    return table, noise.at[0, :, :1].set(first)


def decode(
    codec: VideoCodec, latents: HostLatents, num_frames: int, clock: Clock
) -> Iterator[Frames]:
    """Decode piece by piece, so that frames can be written while later ones are still latents.

    Raises:
        NumericsError: the VAE's output is not finite.
    """
    done = 0
    with clock.stage("decode", num_frames):
        for pixels in codec.decode_chunks(latents):
            if not np.all(np.isfinite(pixels)):
                raise NumericsError(
                    f"decoding gave NaN or infinity after frame {done} of {num_frames}: the VAE's "
                    "weights are damaged or a value overflowed in its dtype"
                )
            frames = to_frames(pixels)
            done += len(frames)
            clock.progress.advance("decode", done)
            yield frames


def _settings(request: ResolvedRequest) -> dict[str, Any]:
    """What the file says of how it was made."""
    return request.settings() | {
        "generator": f"skyreels-jax {version('skyreels-jax')}",
        "sources": dict(request.sources),
    }
