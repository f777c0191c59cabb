"""Who runs the encoders and the VAE: JAX, or PyTorch."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, get_args

from jax.typing import DTypeLike

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.components.encoders import (
    VAE_TILINGS,
    ClipImageEncoder,
    Umt5TextEncoder,
    VaeTiling,
    WanAutoencoder,
)
from skyreels_jax.components.lazy import Keep
from skyreels_jax.components.protocols import Autoencoder, ImageEncoder, TextEncoder
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request.settings import COMPUTE_DTYPES
from skyreels_jax.prompts import Tokenizer
from skyreels_jax.torch_side.components import (
    TorchAutoencoder,
    TorchImageEncoder,
    TorchTextEncoder,
)
from skyreels_jax.torch_side.modules import require_torch
from skyreels_jax.weights.components.clip import stored_image_encoder
from skyreels_jax.weights.components.umt5 import stored_text_encoder
from skyreels_jax.weights.components.vae import stored_vae

# The transformer is in JAX with either; `hybrid` takes the extra `torch`.
Backend = Literal["jax", "hybrid"]
BACKENDS: Final = get_args(Backend)
# Of PyTorch's parts; a number may follow cuda.
_DEVICES: Final = re.compile(r"auto|cpu|cuda(:\d+)?")


def check_options(
    *, dtype: str, backend: str, device: str, keep: Keep, vae_tiling: str, vae_dtype: str
) -> None:
    """Refuse options of a pipeline that do not exist, or that would do nothing.

    Raises:
        RequestError: says what there is.
    """
    for name, value, known in (
        ("dtype", dtype, COMPUTE_DTYPES),
        ("backend", backend, BACKENDS),
        ("vae_tiling", vae_tiling, VAE_TILINGS),
        ("vae_dtype", vae_dtype, COMPUTE_DTYPES),
        ("keep", keep, ("auto", True, False)),
    ):
        if value not in known:
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
    if backend == "jax" and device != "auto":
        raise RequestError(
            f"`device` {device!r} is of the hybrid backend's parts in PyTorch; JAX computes on "
            "the device that it finds, or that the environment's JAX_PLATFORMS names: leave it out"
        )


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
) -> ComponentLoaders:
    """Encoders and VAE in JAX, on the devices that JAX has; ``device`` is not theirs."""
    del device
    layout = checkpoint.layout

    return ComponentLoaders(
        # The tokenizer first: it is quickly read, and what is wrong with it quickly said.
        text_encoder=lambda: Umt5TextEncoder(
            tokenizer=Tokenizer.from_folder(checkpoint.tokenizer),
            model=stored_text_encoder(layout).load(dtype),
        ),
        image_encoder=lambda: ClipImageEncoder(stored_image_encoder(layout).load(dtype)),
        vae=lambda: WanAutoencoder(stored_vae(layout).load(vae_dtype), vae_tiling),
    )


def _hybrid_loaders(
    checkpoint: Checkpoint,
    dtype: DTypeLike,
    vae_dtype: DTypeLike,
    device: str,
    vae_tiling: VaeTiling,
) -> ComponentLoaders:
    """Encoders and VAE in PyTorch, the VAE on whole frames and in float32.

    Raises:
        UnsupportedError: PyTorch is not installed.
    """
    del vae_dtype, vae_tiling
    require_torch()
    return ComponentLoaders(
        text_encoder=partial(TorchTextEncoder.load, checkpoint, device, dtype),
        image_encoder=partial(TorchImageEncoder.load, checkpoint, device, dtype),
        vae=partial(TorchAutoencoder.load, checkpoint, device),
    )


LOADERS: Final[
    Mapping[Backend, Callable[[Checkpoint, DTypeLike, DTypeLike, str, VaeTiling], ComponentLoaders]]
] = {"jax": _jax_loaders, "hybrid": _hybrid_loaders}
