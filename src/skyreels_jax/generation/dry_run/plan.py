"""What each stage of a generation will take, by the compiler's own analysis and from shapes alone.

Each stage's largest program is compiled for the device that it would run on. No weight is read.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import ShapeDtypeStruct as Abstract

from skyreels_jax import geometry
from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.components.encoders import VaeTiling, tiling_for
from skyreels_jax.diffusion.guidance import NoGuidance, guidance_of
from skyreels_jax.diffusion.step_cache import step_cache
from skyreels_jax.diffusion.unipc import flow_sigmas
from skyreels_jax.generation.dry_run.operations import operations
from skyreels_jax.generation.request.reference import call_counter
from skyreels_jax.generation.request.resolved import ResolvedRequest, Window
from skyreels_jax.generation.window_generator import conditioning_noise, frame_schedule_for
from skyreels_jax.geometry import latent_frames
from skyreels_jax.memory import Direction, bytes_of, kernel_dtype, resident_bytes, vae_work
from skyreels_jax.models.vae import WanVae
from skyreels_jax.prompts import TEXT_LEN
from skyreels_jax.sampling.denoiser import AbstractInputs, Denoiser, Sampling
from skyreels_jax.weights.components.clip import stored_image_encoder
from skyreels_jax.weights.components.transformer import TRANSFORMER
from skyreels_jax.weights.components.umt5 import stored_text_encoder
from skyreels_jax.weights.components.vae import stored_vae
from skyreels_jax.weights.offload import abstract_on_host


@dataclass(frozen=True)
class Work:
    """One program at work, in bytes, besides the weights.

    Attributes:
        state: what goes in: latents, solver, keys and values of texts, what a VAE keeps of frames.
        temporary: what the compiler allots for intermediate values and results; None if it does
            not tell.
        compile_seconds: how long its analysis took.
    """

    state: int
    temporary: int | None
    compile_seconds: float

    @property
    def total(self) -> int:
        """All bytes that are known of."""
        return self.state + (self.temporary or 0)


@dataclass(frozen=True)
class Memory:
    """What a plan is made for.

    Attributes:
        free: bytes that there are; None if nobody can tell.
        tiling: whether the VAE cuts frames into tiles.
    """

    free: int | None
    tiling: VaeTiling = "auto"


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes.

    Attributes:
        stage: its name, as in progress reports.
        weights: bytes of parameters.
        work: of its largest program; None where JAX does not run the stage.
        operations: of all its calls; of text, for prompts of full length.
        tiles: that the VAE cuts a frame into; 1 leaves it whole.
    """

    stage: str
    weights: int
    work: Work | None
    operations: int
    tiles: int = 1

    @property
    def total(self) -> int:
        """All bytes that are known of."""
        return self.weights + (0 if self.work is None else self.work.total)


def plan(
    checkpoint: Checkpoint,
    request: ResolvedRequest,
    *,
    hybrid: bool,
    memory: Memory,
    vae_dtype: str = "float32",
) -> Iterator[StagePlan]:
    """The stages in the order they run, each yielded as soon as it is analysed.

    Args:
        checkpoint: of which configurations and headers are read.
        request: settled.
        hybrid: whether PyTorch runs the encoders and the VAE; of these only weights are counted.
        memory: what there is, and how the VAE is to deal with it.
        vae_dtype: of the VAE.
    """
    dtype, layout = jnp.dtype(request.dtype), checkpoint.layout
    images = sum(image is not None for image in (request.image, request.last_image))
    on_images = request.task in ("i2v", "flf2v")
    unguided = isinstance(guidance_of(request.guidance_scale), NoGuidance)
    prompts = len(set(request.prompts)) + (0 if unguided else 1)

    def part(stage: str, model: nnx.Module, calls: int, *inputs: Abstract) -> StagePlan:
        if hybrid:
            return StagePlan(stage, bytes_of(nnx.state(model, nnx.Param)), None, 0)
        return _plan_module(stage, model, calls, *inputs)

    tokens = (Abstract((1, TEXT_LEN), kind) for kind in (jnp.int32, jnp.bool_))
    kernels = kernel_dtype(request.weights)
    text_encoder = stored_text_encoder(layout).abstract(dtype, kernel_dtype=kernels)
    yield part("text", text_encoder, prompts, *tokens)
    if on_images:
        encoder = stored_image_encoder(layout).abstract(dtype)
        side = encoder.config.image_size
        yield part("image", encoder, images, Abstract((1, 3, side, side), jnp.float32))
    vae = stored_vae(layout).abstract(jnp.dtype(vae_dtype))
    size = (request.height, request.width)

    vae_weights = bytes_of(nnx.state(vae, nnx.Param))

    def video(stage: str, direction: Direction, chunks: int, beside: int = 0) -> StagePlan:
        if hybrid:
            return StagePlan(stage, vae_weights + beside, None, 0)
        return plan_vae(stage, vae, direction, (size, chunks), memory, beside)

    if known := _known_latents(request):
        yield video("condition", "encode", known)
    # Windows of a long video are decoded in turn: both models are in memory all the while.
    denoising = plan_denoising(checkpoint, request)
    if request.is_long:
        yield replace(denoising, weights=denoising.weights + vae_weights)
    else:
        yield denoising
    beside = denoising.weights if request.is_long else 0
    yield video("decode", "decode", request.latent_shape[0], beside)


def _known_latents(request: ResolvedRequest) -> int:
    """Latent frames that are encoded before anything is denoised."""
    if request.task in ("i2v", "flf2v"):
        return request.latent_shape[0]
    if request.video is not None and request.forcing is not None:
        return latent_frames(request.forcing.overlap_history)
    return sum(image is not None for image in (request.image, request.last_image))


def plan_denoising(checkpoint: Checkpoint, request: ResolvedRequest) -> StagePlan:
    """The transformer and the very step that sampling would compile, of the largest window."""
    config = checkpoint.config
    kernels = kernel_dtype(request.weights)
    model = TRANSFORMER.abstract(config, jnp.dtype(request.dtype), kernel_dtype=kernels)
    weights = resident_bytes(model, offload=request.offload)
    if request.offload:
        model = abstract_on_host(model)
    forcing = request.forcing
    denoiser = Denoiser(model, forcing.causal_attention if forcing else checkpoint.block_length)
    schedule = flow_sigmas(request.steps, request.shift)
    guidance = guidance_of(request.guidance_scale, batched=request.batched_guidance)
    text = Abstract((1, config.text_len, config.text_dim), jnp.float32)
    features = None
    if config.model_type == "i2v":
        features = Abstract((1, config.image_tokens, config.image_dim), jnp.float32)

    def programs(window: Window, attention: str | None) -> Sequence[tuple[jax.stages.Traced, int]]:
        shape = (window.columns, *request.latent_shape[1:])
        channels = config.in_dim - geometry.LATENT_CHANNELS
        y = Abstract((1, channels, *shape), jnp.float32) if channels else None
        frame_schedule = frame_schedule_for(request, schedule, window)
        cache = step_cache(request.cache, request.steps, call_counter(request, window))
        return denoiser.programs(
            Abstract((1, geometry.LATENT_CHANNELS, *shape), jnp.float32),
            AbstractInputs(text, features, y, Abstract((1,), jnp.int32)),
            Sampling(
                *(schedule, guidance, attention, cache),
                latents=request.latent_dtype,
                exact=request.exact_forcing,
            ),
            frame_schedule=frame_schedule,
            conditioning_noise=conditioning_noise(request, window),
        )

    parameters = nnx.state(model, nnx.Param)
    largest = max(request.windows, key=lambda window: window.columns)
    program, _ = programs(largest, request.attention)[0]
    alike = Counter(replace(window, number=0, start=0) for window in request.windows)
    # Counted on a path whose products can be seen, which those inside a kernel cannot.
    count = sum(
        windows * times * operations(traced.jaxpr.jaxpr)
        for window, windows in alike.items()
        for traced, times in programs(window, "chunked")
    )
    return StagePlan("denoise", weights, analysed(program, parameters), count)


def analysed(traced: jax.stages.Traced, parameters: Any) -> Work:
    """Compile what was traced and ask the compiler; ``parameters`` are among its arguments."""
    start = time.perf_counter()
    memory = traced.lower().compile().memory_analysis()
    seconds = time.perf_counter() - start
    state = bytes_of(traced.jaxpr.in_avals) - bytes_of(parameters)
    if memory is None:
        return Work(state, None, seconds)
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Work(state, memory.temp_size_in_bytes + max(0, fresh), seconds)


def _plan_module(stage: str, model: nnx.Module, calls: int, *inputs: Abstract) -> StagePlan:
    """A model that is one function of its inputs."""
    graph, parameters = nnx.split(model)

    def call(parameters: nnx.State, *inputs: jax.Array) -> Any:
        return nnx.merge(graph, parameters)(*inputs)

    traced = jax.jit(call).trace(parameters, *inputs)
    count = calls * operations(traced.jaxpr.jaxpr)
    return StagePlan(stage, bytes_of(parameters), analysed(traced, parameters), count)


def plan_vae(
    stage: str,
    vae: WanVae,
    direction: Direction,
    video: tuple[tuple[int, int], int],
    memory: Memory,
    beside: int = 0,
) -> StagePlan:
    """A direction of the VAE over a video, in tiles where need be.

    Args:
        stage: its name.
        vae: the model, of shapes alone.
        direction: of the work.
        video: height and width in pixels, and latent frames.
        memory: decides whether there are tiles.
        beside: bytes of weights that are in memory besides the VAE's.
    """
    weights = bytes_of(nnx.state(vae, nnx.Param)) + beside
    (height, width), chunks = video
    needed = vae_work(vae.config, direction, height, width)
    free = None if memory.free is None else memory.free - weights
    tiling = tiling_for(memory.tiling, needed, free)
    if direction == "encode":
        step, unit, chunk = (
            WanVae.encode_chunk,
            1,
            (1, 3, geometry.FRAMES_PER_LATENT, height, width),
        )
    else:
        step, unit = WanVae.decode_chunk, geometry.PIXELS_PER_LATENT
        chunk = (1, vae.config.z_dim, 1, height // unit, width // unit)
    # One number seen from everywhere: of the shape of a chunk, and without its memory.
    rows = tiling.cut(np.broadcast_to(np.float32(0), chunk), unit)
    shapes = Counter(tile.shape for row in rows for tile in row)
    plans = {shape: _plan_chunks(vae, step, shape, chunks) for shape in shapes}
    work = max((plan[0] for plan in plans.values()), key=lambda work: work.total)
    if jax.default_backend() == "cpu":
        # What tiles keep of their frames waits on the host while others are computed: here too.
        kept = sum(count * plans[shape][0].state for shape, count in shapes.items())
        work = replace(work, state=kept)
    count = sum(count * plans[shape][1] for shape, count in shapes.items())
    return StagePlan(stage, weights, work, count, tiles=shapes.total())


def _plan_chunks(
    vae: WanVae, chunk: Callable[..., Any], shape: tuple[int, ...], count: int
) -> tuple[Work, int]:
    """A direction of the VAE over ``count`` chunks: its steady program, and operations in all.

    ``shape`` is of a chunk that is not the first; a first one has a single frame.
    """
    graph, parameters = nnx.split(vae)

    def call(parameters: nnx.State, inputs: jax.Array, cache: Any) -> Any:
        return chunk(nnx.merge(graph, parameters), inputs, cache)

    def traced(inputs: Abstract, cache: Any) -> jax.stages.Traced:
        return jax.jit(call, donate_argnums=2).trace(parameters, inputs, cache)

    first = Abstract((*shape[:2], 1, *shape[3:]), jnp.float32)
    later = Abstract(shape, jnp.float32)
    programs = [traced(first, None)]
    # The third is the steady one: what the second keeps has other shapes than what the first does.
    while len(programs) < min(count, 3):
        programs.append(traced(later, programs[-1].out_info[1]))
    each = [operations(program.jaxpr.jaxpr) for program in programs]
    return analysed(programs[-1], parameters), sum(each) + (count - len(each)) * each[-1]
