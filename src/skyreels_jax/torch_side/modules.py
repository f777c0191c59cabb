"""The VAE, UMT5 and CLIP as PyTorch modules, from a checkpoint in either format.

diffusers and transformers supply the modules. Configurations and weights are read as those of the
JAX modules are, so both sides refuse an incomplete file in the same words, and no pickle is run.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.errors import RequestError, UnsupportedError
from skyreels_jax.weights.components.clip import CLIP_PREFIX, stored_image_encoder
from skyreels_jax.weights.components.stored import StoredComponent
from skyreels_jax.weights.components.umt5 import stored_text_encoder
from skyreels_jax.weights.components.vae import stored_vae

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLWan
    from transformers import UMT5EncoderModel

_PACKAGES: Final = ("torch", "diffusers", "transformers")

_ModuleT = TypeVar("_ModuleT", bound="torch.nn.Module")


def require_torch() -> None:
    """Refuse to go on where the PyTorch side is not installed; imports nothing.

    Raises:
        UnsupportedError: with what is missing, and how to install it.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"the hybrid backend needs {', '.join(missing)}, which this environment does not have: "
            "use the backend jax, or pip install 'skyreels-jax[torch]'"
        )


def torch_device(name: str) -> "torch.device":
    """Return the device ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: a GPU if there is one.

    Raises:
        UnsupportedError: a GPU is asked for and PyTorch sees none.
        RequestError: PyTorch knows no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RequestError(f"device {name!r} is unknown: give cpu, cuda or auto") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(
            f"device {name!r}: PyTorch {torch.__version__} sees no CUDA device here; give device "
            '"cpu" or "auto", or install a PyTorch built for CUDA'
        )
    return device


def torch_dtype(dtype: DTypeLike) -> "torch.dtype":
    """Return the same dtype in PyTorch."""
    import torch

    return getattr(torch, jnp.dtype(dtype).name)


def load_umt5(
    checkpoint: Checkpoint, device: "torch.device", dtype: "torch.dtype"
) -> "UMT5EncoderModel":
    """Load the text encoder.

    Raises:
        WeightsError: the component is missing, unsound or incomplete.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    stored = stored_text_encoder(checkpoint.layout)
    config = stored.config

    def build() -> UMT5EncoderModel:
        return UMT5EncoderModel(
            UMT5Config(
                vocab_size=config.vocab_size,
                d_model=config.dim,
                d_kv=config.head_dim,
                d_ff=config.ffn_dim,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                layer_norm_epsilon=config.eps,
            )
        )

    def named() -> Iterator[tuple[str, np.ndarray]]:
        for name, value in _diffusers_named(stored):
            yield name, value
            if name == "shared.weight":  # the module has the embedding under two names
                yield "encoder.embed_tokens.weight", value

    model = _filled(build, named(), device, dtype)
    model.tie_weights()
    return model


def load_clip(
    checkpoint: Checkpoint, device: "torch.device", dtype: "torch.dtype"
) -> "torch.nn.Module":
    """Load the image encoder, without the projection to the space shared with text.

    Raises:
        WeightsError: the component is missing, unsound or incomplete.
    """
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    stored = stored_image_encoder(checkpoint.layout)
    config = stored.config

    def build() -> torch.nn.Module:
        # The encoder has the same names within this class in every version of transformers.
        return CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=config.dim,
                intermediate_size=config.ffn_dim,
                num_attention_heads=config.num_heads,
                num_hidden_layers=config.num_layers,
                image_size=config.image_size,
                patch_size=config.patch_size,
                layer_norm_eps=config.eps,
                hidden_act="gelu",
            )
        ).vision_model

    def named() -> Iterator[tuple[str, np.ndarray]]:
        for name, value in _diffusers_named(stored):
            if not name.startswith("visual_projection"):
                yield name.removeprefix(CLIP_PREFIX), value

    model = _filled(build, named(), device, dtype)
    # Not a parameter, so no file has it.
    positions = torch.arange(config.tokens, device=device)[None]
    model.get_submodule("embeddings").register_buffer("position_ids", positions, persistent=False)
    return model


def load_vae(
    checkpoint: Checkpoint, device: "torch.device", dtype: "torch.dtype"
) -> "AutoencoderKLWan":
    """Load the VAE.

    Raises:
        WeightsError: the component is missing, unsound or incomplete.
    """
    from diffusers import AutoencoderKLWan

    stored = stored_vae(checkpoint.layout)
    config = stored.config

    def build() -> AutoencoderKLWan:
        return AutoencoderKLWan(
            base_dim=config.base_dim,
            z_dim=config.z_dim,
            dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=list(config.temporal_downsample),
            latents_mean=list(config.latents_mean),
            latents_std=list(config.latents_std),
        )

    return _filled(build, _diffusers_named(stored), device, dtype)


def _diffusers_named(stored: StoredComponent) -> Iterator[tuple[str, np.ndarray]]:
    """Yield all tensors under diffusers' names: complete before the first is read, all finite."""
    stored.verify()
    return stored.tensors("diffusers").values


def _filled(
    build: Callable[[], _ModuleT],
    tensors: Iterator[tuple[str, np.ndarray]],
    device: "torch.device",
    dtype: "torch.dtype",
) -> _ModuleT:
    """Build a module without memory, and fill it with exactly these parameters."""
    import torch

    with torch.device("meta"):
        module = build()
    values = {name: to_torch(value).to(device, dtype) for name, value in tensors}
    module.load_state_dict(values, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def to_torch(array: np.ndarray) -> "torch.Tensor":
    """Copy to a tensor on the CPU, of the same dtype; bfloat16 is that of ml_dtypes."""
    import torch

    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
