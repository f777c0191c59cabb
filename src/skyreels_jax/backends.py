"""Who runs the encoders and the VAE: JAX, or PyTorch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, get_args

from jax.typing import DTypeLike

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.components.autoencoder import VaeTiling, WanVideoCodec
from skyreels_jax.components.encoders import ClipImageEncoder, Umt5TextEncoder
from skyreels_jax.components.protocols import ImageEncoder, TextEncoder, VideoCodec
from skyreels_jax.prompts import Tokenizer
from skyreels_jax.torch_side.components import (
    TorchAutoencoder,
    TorchImageEncoder,
    TorchTextEncoder,
)
from skyreels_jax.torch_side.modules import require_torch
from skyreels_jax.weights.parts import stored_image_encoder, stored_text_encoder, stored_vae

# The transformer is in JAX with either; `hybrid` takes the extra `torch`.
Backend = Literal["jax", "hybrid"]
BACKENDS: Final = get_args(Backend)


@dataclass(frozen=True)
class Parts:
    """How to load each part of a checkpoint but its transformer."""

    text_encoder: Callable[[], TextEncoder]
    image_encoder: Callable[[], ImageEncoder]
    codec: Callable[[], VideoCodec]


def jax_parts(
    checkpoint: Checkpoint,
    dtype: DTypeLike,
    vae_dtype: DTypeLike,
    device: str,
    vae_tiling: VaeTiling,
) -> Parts:
    """Encoders and VAE in JAX, on the devices that JAX has; ``device`` is not theirs."""
    del device
    layout = checkpoint.layout

    def text_encoder() -> TextEncoder:
        # The tokenizer first: it is quickly read, and what is wrong with it quickly told.
        tokenizer = Tokenizer.from_folder(checkpoint.tokenizer)
        return Umt5TextEncoder(stored_text_encoder(layout).load(dtype), tokenizer)

    return Parts(
        text_encoder=text_encoder,
        image_encoder=lambda: ClipImageEncoder(stored_image_encoder(layout).load(dtype)),
        codec=lambda: WanVideoCodec(stored_vae(layout).load(vae_dtype), vae_tiling),
    )


def hybrid_parts(
    checkpoint: Checkpoint,
    dtype: DTypeLike,
    vae_dtype: DTypeLike,
    device: str,
    vae_tiling: VaeTiling,
) -> Parts:
    """Encoders and VAE in PyTorch, the VAE on whole frames and in float32.

    Raises:
        UnsupportedError: PyTorch is not installed.
    """
    del vae_dtype, vae_tiling
    require_torch()
    return Parts(
        text_encoder=partial(TorchTextEncoder.load, checkpoint, device, dtype),
        image_encoder=partial(TorchImageEncoder.load, checkpoint, device, dtype),
        codec=partial(TorchAutoencoder.load, checkpoint, device),
    )


PARTS: Final[dict[Backend, Callable[[Checkpoint, DTypeLike, DTypeLike, str, VaeTiling], Parts]]] = {
    "jax": jax_parts,
    "hybrid": hybrid_parts,
}
