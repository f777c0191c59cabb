"""What each legal mesh would take of an accelerator, by formula: nothing is compiled or run.

Bytes come from the shapes of the parameters and from the same bounds as
:mod:`skyreels_jax.memory`; operations and bytes between devices are counted; seconds follow from
the rates that makers state, of which a fixed share is assumed.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

from flax import nnx

from skyreels_jax.components.encoders import tiling_for
from skyreels_jax.geometry import PIXELS_PER_LATENT, latent_shape
from skyreels_jax.memory import kernel_dtype, vae_work
from skyreels_jax.models.clip_vision import CLIP_VIT_H
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.models.umt5 import UMT5_XXL
from skyreels_jax.models.vae_layers import WAN_VAE
from skyreels_jax.models.vae_tiling import Tiles
from skyreels_jax.parallel.plan import MeshPlan, all_plans
from skyreels_jax.parallel.rules import encoder_axis, weight_axis
from skyreels_jax.weights.components.clip import CLIP
from skyreels_jax.weights.components.transformer import TRANSFORMER
from skyreels_jax.weights.components.umt5 import UMT5
from skyreels_jax.weights.components.vae import VAE
from skyreels_jax.weights.engine import parameters

# Of the rate that its maker states, what a step is assumed to reach in products.
ASSUMED_SHARE: Final = 0.5
# Of a device's memory, what a program can have.
USABLE_SHARE: Final = 0.94
# Of one block at work in bfloat16, by token: bytes per feature of the model and of its hidden
# layer. With them the formula is within 10 % of what the TPU's compiler said of 1.3B and of 14B on
# 1, 8, 16 and 64 devices; on one H100 it is 13 % below.
_BYTES_PER_FEATURE: Final = 12
_BYTES_PER_HIDDEN: Final = 2
# Of the next layer, so much of it is there when most memory is taken.
_NEXT_LAYER: Final = 0.7
# Around the layers, by value of the latents.
_BYTES_AROUND: Final = 138
# Copies of the latents that a step begins with: sample and solver's state.
_STATE_COPIES: Final = 4
_LANES: Final = 128
_BF16: Final = 2
# Of cross-attention, what makes the keys and values of text and image.
_ONCE: Final = ("k", "v", "k_img", "v_img")


@dataclass(frozen=True)
class Accelerator:
    """A kind of device, by its maker's data sheet.

    Attributes:
        memory: bytes.
        operations: a second, dense products in bfloat16.
        link: bytes a second that one device sends to the others, each way.
    """

    memory: int
    operations: float
    link: float


_GIB: Final = 2**30
ACCELERATORS: Final[Mapping[str, Accelerator]] = {
    "h100": Accelerator(80 * _GIB, 989e12, 450e9),
    "h200": Accelerator(141 * _GIB, 989e12, 450e9),
    "a100": Accelerator(80 * _GIB, 312e12, 300e9),
    "l40s": Accelerator(48 * _GIB, 362e12, 32e9),
    "4090": Accelerator(24 * _GIB, 165e12, 32e9),
    "v5e": Accelerator(16 * _GIB, 197e12, 200e9),
    "v5p": Accelerator(95 * _GIB, 459e12, 600e9),
    "v6e": Accelerator(32 * _GIB, 918e12, 400e9),
}


@dataclass(frozen=True)
class Job:
    """What is to be made.

    Attributes:
        config: of the transformer.
        frames: of the video (or of one window of a long one).
        height: in pixels.
        width: in pixels.
        steps: of denoising.
        guided: whether each step has a second prompt.
        batched: whether both prompts are rows of one call.
        weights: what the blocks' kernels are kept in; ``None`` is bfloat16.
    """

    config: TransformerConfig
    frames: int
    height: int
    width: int
    steps: int
    guided: bool = True
    batched: bool = False
    weights: str | None = None

    @property
    def latent_frames(self) -> int:
        """Frames of the latents."""
        return latent_shape(self.frames, self.height, self.width)[0]

    @property
    def patches(self) -> int:
        """Tokens of a latent frame."""
        _, rows, columns = latent_shape(self.frames, self.height, self.width)
        return self.config.patches(rows, columns)

    @property
    def rows(self) -> int:
        """Rows of the batch of one call."""
        return 2 if self.guided and self.batched else 1

    @property
    def calls(self) -> int:
        """Calls of the transformer in one step."""
        return 2 if self.guided and not self.batched else 1


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one call of the transformer.

    Attributes:
        kind: as XLA names it.
        count: of all layers.
        received: bytes that each device receives, of all layers.
    """

    kind: str
    count: int
    received: int


@dataclass(frozen=True)
class MeshForecast:
    """One mesh: bytes of each stage on the fullest device, work and seconds of a step.

    Attributes:
        plan: of the mesh.
        stages: bytes by stage, and in it by kind; a stage is alone in memory.
        traffic: in one call.
        operations: of one step, on each device.
        seconds: of one step, computing and waiting for links one after the other.
        fits: whether the largest stage does.
    """

    plan: MeshPlan
    stages: Mapping[str, Mapping[str, int]]
    traffic: tuple[Traffic, ...]
    operations: int
    seconds: float
    fits: bool

    @property
    def arguments(self) -> int:
        """Bytes of the transformer's stage that are there before a step."""
        parts = self.stages["transformer"]
        return parts["weights"] + parts["contexts"] + parts["latents"]

    @property
    def largest(self) -> tuple[str, int]:
        """The stage that takes most, and its bytes."""
        return max(((n, sum(v.values())) for n, v in self.stages.items()), key=lambda one: one[1])


def forecasts(job: Job, devices: int, kind: Accelerator) -> list[MeshForecast]:
    """All legal meshes of so many devices, those that fit first, the fastest of them first."""
    legal = [plan for plan in all_plans(devices) if not list(plan.problems(job.config, job.rows))]
    found = [forecast(job, plan, kind) for plan in legal]
    # Of equals those with a fused kernel for attention, which a ring has not.
    return sorted(found, key=lambda one: (not one.fits, one.seconds, one.plan.ring))


def forecast(job: Job, plan: MeshPlan, kind: Accelerator) -> MeshForecast:
    """What one mesh takes."""
    stages = dict(_other_stages(job, plan, kind)) | {"transformer": transformer_bytes(job, plan)}
    traffic = tuple(one for one in traffic_of(job, plan) if one.received)
    # Slabs are of one size: where patches do not divide, all compute what fills up the last.
    slab = math.ceil(job.patches / plan.sequence)
    share = slab * job.rows / (job.patches * plan.data)
    operations = round(job.calls * step_operations(job) * share)
    computing = operations / (ASSUMED_SHARE * kind.operations)
    waiting = job.calls * sum(one.received for one in traffic) / kind.link
    largest = max(sum(parts.values()) for parts in stages.values())
    fits = largest <= USABLE_SHARE * kind.memory
    return MeshForecast(plan, stages, traffic, operations, computing + waiting, fits)


def step_operations(job: Job) -> int:
    """Multiplications and additions of one row of one call, in the blocks.

    With ``L`` tokens, ``T`` states of text and image, width ``D`` and hidden width ``H``, a block
    has ``8 L D² + 4 L² D`` in self-attention, ``4 L D² + 4 L T D`` in cross-attention (the prompt's
    keys and values are made once a video) and ``4 L D H`` in the feed-forward.
    """
    config = job.config
    tokens = job.latent_frames * job.patches
    states = config.text_len + config.image_tokens
    width, hidden = config.dim, config.ffn_dim
    layer = 12 * tokens * width**2 + 4 * tokens**2 * width
    layer += 4 * tokens * states * width + 4 * tokens * width * hidden
    return config.num_layers * layer


def transformer_bytes(job: Job, plan: MeshPlan) -> Mapping[str, int]:
    """Bytes of the transformer's stage on one device, by kind."""
    config, parts = job.config, plan.devices
    weights = sum(
        size if weight_axis(path, shape, parts) is None else size // parts
        for path, (shape, size) in _parameters(config, job.weights).items()
    )
    layer = sum(_put_together(job, plan)) // config.num_layers if parts > 1 else 0
    tokens = job.latent_frames * math.ceil(job.patches / plan.sequence) * job.rows // plan.data
    states = config.text_len + config.image_tokens
    prompts = 2 if job.guided else 1
    context = 2 * prompts * config.num_layers * states * config.dim * _BF16 // plan.sequence
    latents = latent_shape(job.frames, job.height, job.width)
    values = config.in_dim * math.prod(latents)
    # TPUs fill up rows or columns, whichever takes less.
    filled = min(_LANES * math.ceil(side / _LANES) / side for side in latents[1:])
    # Those that are gathered, device by device and then frame by frame.
    keys_values = 2 * 2 * plan.fsdp * tokens * config.dim * _BF16 if plan.fsdp > 1 else 0
    together = layer + max(round(_NEXT_LAYER * layer), keys_values)
    working = tokens * (_BYTES_PER_FEATURE * config.dim + _BYTES_PER_HIDDEN * config.ffn_dim)
    # Before and after the layers every device has whole latents, and patches of them.
    around = _BYTES_AROUND * job.rows * values - together
    return {
        "weights": weights,
        "layers put together": together,
        "contexts": context,
        "latents": round(_STATE_COPIES * 4 * values * filled),
        "activations": max(working, around),
    }


def traffic_of(job: Job, plan: MeshPlan) -> Iterator[Traffic]:
    """The collectives of one call of the transformer."""
    config, layers = job.config, job.config.num_layers
    others = (plan.devices - 1) / plan.devices
    cut = list(_put_together(job, plan))
    yield Traffic("all-gather of weights", layers * len(cut), round(others * sum(cut)))
    states = 2 * layers * job.rows * (config.text_len + config.image_tokens) * config.dim * _BF16
    elsewhere = (plan.sequence - 1) / plan.sequence
    yield Traffic(
        "all-gather of the prompt's keys and values",
        2 * layers,
        round(elsewhere * states / plan.data),
    )
    slab = job.latent_frames * math.ceil(job.patches / plan.sequence) * job.rows // plan.data
    # Queries, keys, values there and the result back: of what is sent one part stays.
    tensor = layers * slab * config.dim * _BF16
    moved = (plan.ulysses - 1) / plan.ulysses
    yield Traffic("all-to-all of heads", 2 * layers, round(4 * tensor * moved))
    keys_values = 2 * tensor
    yield Traffic("all-gather of keys and values", layers, (plan.fsdp - 1) * keys_values)
    turns = plan.ring - 1
    yield Traffic(
        "collective-permute of keys and values", turns * layers, turns * plan.fsdp * keys_values
    )


def _put_together(job: Job, plan: MeshPlan) -> Iterator[int]:
    """Bytes, in all layers, of each matrix that is put together when its layer runs.

    Those that make the prompt's keys and values are not: they are used once a video.
    """
    for path, (shape, size) in _parameters(job.config, job.weights).items():
        once = path.startswith("blocks.cross_attn.") and path.split(".")[2] in _ONCE
        is_cut = weight_axis(path, shape, plan.devices) is not None
        if path.startswith("blocks.") and is_cut and not once:
            yield size


@cache
def _parameters(
    config: TransformerConfig, weights: str | None
) -> Mapping[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes of every parameter of a transformer."""
    model = TRANSFORMER.abstract(config, "bfloat16", kernel_dtype=kernel_dtype(weights))
    return _shapes_and_bytes(model)


@cache
def _encoders(weights: str | None) -> Mapping[str, Mapping[str, tuple[tuple[int, ...], int]]]:
    """Shape and bytes of every parameter of the released encoders and the VAE."""
    text = UMT5.abstract(UMT5_XXL, "bfloat16", kernel_dtype=kernel_dtype(weights))
    models = {
        "text encoder": text,
        "image encoder": CLIP.abstract(CLIP_VIT_H, "bfloat16"),
        "VAE": VAE.abstract(WAN_VAE, "float32"),
    }
    return {name: _shapes_and_bytes(model) for name, model in models.items()}


def _shapes_and_bytes(model: nnx.Module) -> Mapping[str, tuple[tuple[int, ...], int]]:
    return {
        path: (variable.shape, variable.size * variable.dtype.itemsize)
        for path, variable in parameters(model).items()
    }


def _encoder_stage(weights: str | None, name: str, parts: int) -> Mapping[str, int]:
    """Bytes of an encoder of which every device has its part, and one matrix whole at a time."""
    own, whole = 0, 0
    for path, (shape, size) in _encoders(weights)[name].items():
        cut = encoder_axis(path, shape, parts) is not None
        own += size // parts if cut else size
        if cut and path.startswith("blocks."):
            whole = max(whole, size // shape[0])
    return {"weights": own, "matrix put together": whole}


def _other_stages(
    job: Job, plan: MeshPlan, kind: Accelerator
) -> Iterator[tuple[str, Mapping[str, int]]]:
    """The stages before and after denoising, on all devices of the mesh."""
    yield "text encoder", _encoder_stage(job.weights, "text encoder", plan.devices)
    if job.config.image_dim is not None:
        yield "image encoder", _encoder_stage(job.weights, "image encoder", plan.devices)
    there = sum(size for _, size in _encoders(job.weights)["VAE"].values())
    # The VAE's weights are on every device, of its work each has the rows of latents of its slab.
    slab = PIXELS_PER_LATENT * math.ceil(job.height // PIXELS_PER_LATENT / plan.devices)
    work = vae_work(WAN_VAE, "decode", slab, job.width)
    tiling = tiling_for("auto", work, kind.memory - there)
    if isinstance(tiling, Tiles):
        work = vae_work(WAN_VAE, "decode", tiling.size, tiling.size)
    name = "a tile at work" if isinstance(tiling, Tiles) else "a frame's chunk at work"
    yield "VAE", {"weights": there, name: work}
