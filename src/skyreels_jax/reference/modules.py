"""The VAE, UMT5 and CLIP as PyTorch modules, from a checkpoint in either layout.

diffusers and transformers supply the modules. Their configurations and weights are read by the same
tables as those of the JAX modules, so both sides refuse an incomplete file in the same words.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.errors import RequestError, UnsupportedError, WeightsError
from skyreels_jax.reference.torch_source import TorchSource, to_torch
from skyreels_jax.weights import clip_rules, umt5_rules, vae_rules
from skyreels_jax.weights.convert import rename
from skyreels_jax.weights.layout import read_json, safetensors_of
from skyreels_jax.weights.rules import Dialect
from skyreels_jax.weights.source import TensorSource

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLWan
    from transformers import UMT5EncoderModel

ModuleT = TypeVar("ModuleT", bound="torch.nn.Module")
ConfigT = TypeVar("ConfigT")


def torch_device(name: str) -> "torch.device":
    """``cpu``, ``cuda``, ``cuda:1``, or ``auto``: a GPU if PyTorch sees one, else the CPU.

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
    """The same dtype in PyTorch."""
    import torch

    return getattr(torch, jnp.dtype(dtype).name)


def load_umt5(
    checkpoint: Checkpoint, device: "torch.device", dtype: "torch.dtype"
) -> "UMT5EncoderModel":
    """The text encoder.

    Raises:
        WeightsError: the part is missing, unsound or incomplete.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    path, dialect = checkpoint.text_encoder, checkpoint.layout.dialect
    source = _source(path)
    config = _config(path, source, umt5_rules.config_from_json, umt5_rules.config_from_tensors)

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
        rules, ignored = umt5_rules.UMT5_RULES, umt5_rules.UMT5_IGNORED
        for name, value in rename(rules, source, dialect, "diffusers", ignored=ignored):
            yield name, value
            if name == "shared.weight":  # the module has the embedding under two names
                yield "encoder.embed_tokens.weight", value

    model = _filled(build, named(), device, dtype, path)
    model.tie_weights()
    return model


def load_clip(
    checkpoint: Checkpoint, device: "torch.device", dtype: "torch.dtype"
) -> "torch.nn.Module":
    """The image encoder's tower, without the projection to the space shared with text.

    Raises:
        WeightsError: the part is missing, unsound or incomplete.
    """
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    path, dialect = checkpoint.image_encoder, checkpoint.layout.dialect
    source = _source(path)
    config = _config(path, source, clip_rules.config_from_json, clip_rules.config_from_tensors)
    prefix = clip_rules.diffusers_prefix(source.tensors())

    def build() -> torch.nn.Module:
        # The tower has the same names within this class in every version of transformers.
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
        rules = clip_rules.clip_rules(config, prefix=prefix)
        ignored = clip_rules.CLIP_IGNORED
        for name, value in rename(rules, source, dialect, "diffusers", ignored=ignored):
            if not name.startswith("visual_projection"):
                yield name.removeprefix(prefix), value

    model = _filled(build, named(), device, dtype, path)
    # Not a parameter, so no file has it.
    positions = torch.arange(config.tokens, device=device)[None]
    model.get_submodule("embeddings").register_buffer("position_ids", positions, persistent=False)
    return model


def load_vae(
    checkpoint: Checkpoint, device: "torch.device", dtype: "torch.dtype"
) -> "AutoencoderKLWan":
    """The VAE.

    Raises:
        WeightsError: the part is missing, unsound or incomplete.
    """
    from diffusers import AutoencoderKLWan

    path, dialect = checkpoint.vae, checkpoint.layout.dialect
    source = _source(path)
    config = _config(path, source, vae_rules.config_from_json, vae_rules.config_from_tensors)

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

    named = rename(vae_rules.vae_rules(config), source, dialect, "diffusers")
    return _filled(build, named, device, dtype, path)


def _source(path: Path) -> TensorSource:
    return safetensors_of(path) if path.is_dir() else TorchSource(path)


def _config(
    path: Path,
    source: TensorSource,
    from_json: Callable[[Mapping[str, object]], ConfigT],
    from_tensors: Callable[[Mapping[str, Sequence[int]], Dialect], ConfigT],
) -> ConfigT:
    """Of a part: in its ``config.json`` if it is a folder, else in the shapes of its tensors."""
    if path.is_dir():
        return from_json(read_json(path / "config.json"))
    return from_tensors({n: info.shape for n, info in source.tensors().items()}, "original")


def _filled(
    build: Callable[[], ModuleT],
    tensors: Iterator[tuple[str, np.ndarray]],
    device: "torch.device",
    dtype: "torch.dtype",
    path: Path,
) -> ModuleT:
    """A module with exactly these parameters; it is built without memory, and filled strictly."""
    import torch

    with torch.device("meta"):
        module = build()
    values = {name: to_torch(value).to(device, dtype) for name, value in tensors}
    try:
        module.load_state_dict(values, strict=True, assign=True)
    except RuntimeError as error:
        raise WeightsError(f"{path}: {error}") from error
    return module.eval().requires_grad_(False)
