"""Who runs the encoders and the VAE: JAX, or PyTorch."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypedDict, Unpack, get_args

import jax.numpy as jnp
from jax.typing import DTypeLike

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.components.encoders import (
    VAE_TILINGS,
    ClipImageEncoder,
    Umt5TextEncoder,
    VaeTiling,
    WanAutoencoder,
    encode_here,
)
from skyreels_jax.components.lazy import Keep
from skyreels_jax.components.protocols import Autoencoder, ImageEncoder, TextEncoder
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request.declaration import refuse_unknown
from skyreels_jax.generation.request.settings import COMPUTE_DTYPES, WEIGHTS
from skyreels_jax.memory import component_sizes, kernel_dtype
from skyreels_jax.models.parallelism import SINGLE_DEVICE, Parallelism
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.models.vae_runs import ON_ONE_DEVICE
from skyreels_jax.parallel.encoders import MeshEncoder, in_a_line
from skyreels_jax.parallel.loading import PlacementInParts
from skyreels_jax.parallel.plan import AUTO, MeshPlan
from skyreels_jax.parallel.processes import current_processes
from skyreels_jax.parallel.transformer import MeshTransformer
from skyreels_jax.parallel.vae import MeshFrames
from skyreels_jax.torch_side.components import (
    TorchAutoencoder,
    TorchImageEncoder,
    TorchTextEncoder,
)
from skyreels_jax.torch_side.modules import require_torch
from skyreels_jax.weights.components.clip import stored_image_encoder
from skyreels_jax.weights.components.transformer import stored_transformer
from skyreels_jax.weights.components.umt5 import stored_text_encoder
from skyreels_jax.weights.components.vae import stored_vae
from skyreels_jax.weights.engine import Placement, on_default_device
from skyreels_jax.weights.lora.binding import Lora
from skyreels_jax.weights.lora.source import with_loras
from skyreels_jax.weights.lora.stack import LoraLike
from skyreels_jax.weights.offload import on_host, require_host_memory
from skyreels_jax.weights.tokenizer_file import open_tokenizer

# The transformer is in JAX with either; `hybrid` takes the extra `torch`.
Backend = Literal["jax", "hybrid"]
BACKENDS: Final = get_args(Backend)
# Of PyTorch's parts; a number may follow cuda.
_DEVICES: Final = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True, kw_only=True)
class ChosenOptions:
    """What decides how a pipeline computes, beside its checkpoint: the keywords of its constructor.

    Attributes:
        dtype: ``bfloat16`` or ``float32``, of the transformer and the encoders.
        backend: who runs encoders and VAE.
        device: of PyTorch's parts (backend ``hybrid``): ``cpu``, ``cuda`` or ``auto``.
        keep: whether every component stays in memory for the next call, instead of being loaded
            again; ``auto`` decides for each video by the memory that is free, and logs it.
        prompt_cache: folder to keep encoded prompts in, for this and later processes; a prompt
            found there does not load the text encoder. ``None`` keeps none.
        vae_tiling: whether the VAE in JAX cuts frames into overlapping tiles, for less memory and
            faint seams: ``auto`` where it would not hold a whole frame, ``on`` or ``off``.
        vae_dtype: ``float32``, or ``bfloat16`` for a VAE in JAX that takes less memory at the cost
            in quality that ``docs/performance.md`` states.
        weights: ``int8`` or ``fp8`` keeps the kernels of the blocks of transformer and text encoder
            so, with a scale per output channel; products are still in ``dtype``. ``None`` keeps
            them in ``dtype``, which ``bf16`` says too where that is bfloat16.
        offload: whether the kernels of the transformer's blocks stay in the host's memory and
            stream through the device layer by layer.
        loras: files that are added to the transformer, each alone or with its scale:
            ``["style.safetensors", ("motion.safetensors", 0.8)]``.
        mesh: how many devices the transformer runs on, along each axis of
            :class:`~skyreels_jax.parallel.plan.MeshPlan`: a plan, its text (``fsdp=4,ulysses=2``),
            or ``auto`` for all that JAX has. ``None`` is one device.
    """

    dtype: str = "bfloat16"
    backend: Backend = "jax"
    device: str = "auto"
    keep: Keep = "auto"
    prompt_cache: Path | None = None
    vae_tiling: VaeTiling = "auto"
    vae_dtype: str = "float32"
    weights: str | None = None
    offload: bool = False
    loras: Sequence[LoraLike] = ()
    mesh: str | MeshPlan | None = None

    @property
    def kernels(self) -> DTypeLike | None:
        """What the blocks' kernels are quantised to, if they are."""
        return kernel_dtype(self.weights)

    def parallelism(self, config: TransformerConfig) -> Parallelism:
        """On what devices a transformer of ``config`` runs.

        Raises:
            RequestError: it cannot run on the mesh; says why, and what would be legal.
        """
        return SINGLE_DEVICE if self.mesh is None else MeshTransformer.of(self.mesh, config)

    def loading(self, parallelism: Parallelism) -> dict[str, Any]:
        """How the transformer is loaded: ``dtype``, ``kernel_dtype`` and ``placement``."""
        return {
            "dtype": jnp.dtype(self.dtype),
            "kernel_dtype": self.kernels,
            "placement": on_host if self.offload else _placement_of(parallelism),
        }

    def loaders(self, checkpoint: Checkpoint, parallelism: Parallelism) -> "ComponentLoaders":
        """How to load the components of a checkpoint but its transformer, for its devices.

        Raises:
            UnsupportedError: PyTorch is not installed where it is asked for, or the device has no
                memory of its own to offload from.
        """
        if self.offload:
            require_host_memory()
        kinds = jnp.dtype(self.dtype), jnp.dtype(self.vae_dtype)
        how = self.device, self.vae_tiling, self.kernels, parallelism
        return LOADERS[self.backend](checkpoint, *kinds, *how)

    def sizes(self, checkpoint: Checkpoint, devices: int) -> dict[str, int]:
        """Bytes of each component's parameters on all of so many devices together."""
        kinds = jnp.dtype(self.dtype), jnp.dtype(self.vae_dtype)
        how = {"weights": self.weights, "offload": self.offload, "devices": devices}
        return component_sizes(checkpoint.layout, checkpoint.config, *kinds, **how)

    @property
    def quantized(self) -> tuple[str, ...]:
        """What kernels are quantised to, if they are; what is without it has its old names."""
        return () if self.kernels is None else (f"weights {self.weights}",)


class PipelineOptions(TypedDict, total=False):
    """The fields of :class:`ChosenOptions` as typed keywords; what is left out has its default."""

    dtype: str
    backend: Backend
    device: str
    keep: Keep
    prompt_cache: Path | None
    vae_tiling: VaeTiling
    vae_dtype: str
    weights: str | None
    offload: bool
    loras: Sequence[LoraLike]
    mesh: str | MeshPlan | None


OPTIONS: Final = tuple(entry.name for entry in fields(ChosenOptions))


def check_options(**options: Unpack[PipelineOptions]) -> ChosenOptions:
    """The options of a pipeline, those not given at their defaults.

    Raises:
        RequestError: one does not exist, has no such value or would do nothing; says what there is.
    """
    refuse_unknown(options, OPTIONS)
    chosen: Mapping[str, Any] = {**vars(ChosenOptions()), **options}
    backend, device = chosen["backend"], chosen["device"]
    vae_tiling, vae_dtype = chosen["vae_tiling"], chosen["vae_dtype"]
    for name, known in (
        ("dtype", COMPUTE_DTYPES),
        ("backend", BACKENDS),
        ("vae_tiling", VAE_TILINGS),
        ("vae_dtype", COMPUTE_DTYPES),
        ("keep", ("auto", True, False)),
        ("offload", (True, False)),
    ):
        if (value := chosen[name]) not in known:
            raise RequestError(
                f"`{name}` {value!r} is unknown; there are {', '.join(map(str, known))}"
            )
    if not _DEVICES.fullmatch(device):
        meant = "; did you mean 'cuda'?" if device == "gpu" else ""
        raise RequestError(f"`device` {device!r} is unknown; there are auto, cpu, cuda{meant}")
    if (backend, vae_tiling) == ("hybrid", "on"):
        raise RequestError("the hybrid backend's VAE has no tiles: leave `vae_tiling` out")
    if (backend, vae_dtype) == ("hybrid", "bfloat16"):
        raise RequestError("the hybrid backend's VAE runs in float32: leave `vae_dtype` out")
    if (weights := chosen["weights"]) is not None and weights not in WEIGHTS:
        raise RequestError(f"`weights` {weights!r} is unknown; there are {', '.join(WEIGHTS)}")
    if weights == "bf16" and chosen["dtype"] != "bfloat16":
        raise RequestError(
            f"`weights` bf16 is what `dtype` bfloat16 keeps, and `dtype` is {chosen['dtype']}: "
            "leave one out"
        )
    if backend == "hybrid" and weights not in (None, "bf16"):
        raise RequestError(
            f"`weights` {weights} is of models in JAX, and the hybrid backend's text "
            "encoder is in PyTorch: leave `weights` out"
        )
    if isinstance(mesh := chosen["mesh"], str) and mesh != AUTO:
        MeshPlan.parse(mesh)
    elif not isinstance(mesh, str | MeshPlan | None):
        raise RequestError(f"`mesh` {mesh!r} is none: a MeshPlan, its text or `auto`")
    if mesh is not None and chosen["offload"]:
        raise RequestError(
            "`offload` keeps weights in the host's memory, and `mesh` cuts them over the memories "
            "of devices: leave one out"
        )
    if backend == "jax" and device != "auto":
        raise RequestError(
            f"`device` {device!r} is of the hybrid backend's parts in PyTorch; JAX computes on "
            "the device that it finds, or that the environment's JAX_PLATFORMS names: leave it out"
        )
    if current_processes() is not None:
        if mesh is None or backend != "jax":
            raise RequestError(
                "several processes make one video on a `mesh` of all their devices, with `backend` "
                "jax"
            )
        # What one process finds in its cache, another would have to compute with all.
        options["prompt_cache"] = None
    return ChosenOptions(**options)


def _placement_of(parallelism: Parallelism) -> Placement:
    """How the transformer's parameters are placed; several processes read a part each."""
    if isinstance(parallelism, MeshTransformer) and current_processes() is not None:
        return PlacementInParts(parallelism)
    return parallelism.placement


@dataclass(frozen=True)
class ComponentLoaders:
    """How to load each component of a checkpoint but its transformer."""

    text_encoder: Callable[[], TextEncoder]
    image_encoder: Callable[[], ImageEncoder]
    vae: Callable[[], Autoencoder]


def _jax_loaders(
    checkpoint: Checkpoint,
    dtype: DTypeLike,
    vae_dtype: DTypeLike,
    device: str,
    vae_tiling: VaeTiling,
    kernels: DTypeLike | None,
    parallelism: Parallelism,
) -> ComponentLoaders:
    """Encoders and VAE in JAX, on the transformer's devices; ``device`` is not theirs."""
    del device
    layout = checkpoint.layout
    frames, apply = ON_ONE_DEVICE, encode_here
    of_encoder = of_vae = on_default_device
    if isinstance(parallelism, MeshTransformer):
        encoders = MeshEncoder(in_a_line(parallelism.mesh))
        frames, apply = MeshFrames(encoders.mesh), encoders.apply
        of_encoder, of_vae = encoders.placement, frames.placement

    return ComponentLoaders(
        # The tokenizer first: it is quickly read, and what is wrong with it quickly said.
        text_encoder=lambda: Umt5TextEncoder(
            tokenizer=open_tokenizer(checkpoint.tokenizer),
            model=stored_text_encoder(layout).load(dtype, of_encoder, kernel_dtype=kernels),
            apply=apply,
        ),
        image_encoder=lambda: ClipImageEncoder(
            stored_image_encoder(layout).load(dtype, of_encoder), apply=apply
        ),
        vae=lambda: WanAutoencoder(stored_vae(layout).load(vae_dtype, of_vae), vae_tiling, frames),
    )


def _hybrid_loaders(
    checkpoint: Checkpoint,
    dtype: DTypeLike,
    vae_dtype: DTypeLike,
    device: str,
    vae_tiling: VaeTiling,
    kernels: DTypeLike | None,
    parallelism: Parallelism,
) -> ComponentLoaders:
    """Encoders and VAE in PyTorch, the VAE on whole frames and in float32.

    Raises:
        UnsupportedError: PyTorch is not installed.
    """
    del vae_dtype, vae_tiling, kernels, parallelism
    require_torch()
    return ComponentLoaders(
        text_encoder=partial(TorchTextEncoder.load, checkpoint, device, dtype),
        image_encoder=partial(TorchImageEncoder.load, checkpoint, device, dtype),
        vae=partial(TorchAutoencoder.load, checkpoint, device),
    )


_Loaders = Callable[
    [Checkpoint, DTypeLike, DTypeLike, str, VaeTiling, DTypeLike | None, Parallelism],
    ComponentLoaders,
]
LOADERS: Final[Mapping[Backend, _Loaders]] = {"jax": _jax_loaders, "hybrid": _hybrid_loaders}


def verify_checkpoint(checkpoint: Checkpoint, loras: tuple[Lora, ...]) -> None:
    """Prove by headers that a checkpoint holds all that a generation takes; reads its tokenizer.

    Raises:
        WeightsError: a component is missing, unsound or incomplete, or a LoRA does not fit.
    """
    open_tokenizer(checkpoint.tokenizer)
    checkpoint.verify()
    if loras:
        with_loras(stored_transformer(checkpoint.layout), loras)
