"""Who runs the encoders and the VAE: JAX, or PyTorch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, get_args

from jax.typing import DTypeLike

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.components.encoders import (
    ClipImageEncoder,
    Umt5TextEncoder,
    VaeTiling,
    WanAutoencoder,
)
from skyreels_jax.components.protocols import Autoencoder, ImageEncoder, TextEncoder
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

    def text_encoder() -> TextEncoder:
        # The tokenizer first: it is quickly read, and what is wrong with it quickly said.
        tokenizer = Tokenizer.from_folder(checkpoint.tokenizer)
        return Umt5TextEncoder(stored_text_encoder(layout).load(dtype), tokenizer)

    return ComponentLoaders(
        text_encoder=text_encoder,
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
