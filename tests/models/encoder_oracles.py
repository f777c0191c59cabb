"""transformers' encoders with a random value in every parameter, and ours with the same weights."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from tests.weights.fakes import InMemory
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    UMT5Config,
    UMT5EncoderModel,
)

from skyreels_jax.models.clip_vision import ClipVision, ClipVisionConfig
from skyreels_jax.models.umt5 import Umt5Config, Umt5Encoder
from skyreels_jax.weights.components import clip, umt5
from skyreels_jax.weights.engine import load_into

UMT5 = Umt5Config(vocab_size=50, dim=24, head_dim=10, num_heads=3, ffn_dim=40, num_layers=3)
CLIP = ClipVisionConfig(
    dim=32,
    ffn_dim=48,
    num_heads=4,
    num_layers=3,
    image_size=56,
    patch_size=14,
    projection_dim=20,
)


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter non-trivial: matrices of gain 1, scales about 1, biases about 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2 and "embed" not in name and "relative" not in name:
            noise *= parameter[0].numel() ** -0.5
        elif name.endswith("weight") and parameter.ndim == 1:
            noise = 1 + 0.3 * noise
        parameter.data = noise
    return module.eval().requires_grad_(False)


def umt5_oracle(config: Umt5Config, seed: int = 0) -> UMT5EncoderModel:
    theirs = UMT5Config(
        vocab_size=config.vocab_size,
        d_model=config.dim,
        d_kv=config.head_dim,
        d_ff=config.ffn_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
    )
    return randomise(UMT5EncoderModel(theirs), seed)


def clip_oracle(config: ClipVisionConfig, seed: int = 0) -> CLIPVisionModelWithProjection:
    theirs = CLIPVisionConfig(
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        projection_dim=config.projection_dim,
        hidden_act="gelu",
    )
    return randomise(CLIPVisionModelWithProjection(theirs), seed)


def tensors_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.float().numpy() for name, value in module.state_dict().items()}


def umt5_from(
    config: Umt5Config, tensors: Mapping[str, np.ndarray], dtype: str = "float32"
) -> Umt5Encoder:
    def make() -> Umt5Encoder:
        return Umt5Encoder(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)

    return filled(nnx.eval_shape(make), umt5.UMT5.rules(config), tensors, umt5.UMT5.ignored, dtype)


def clip_from(
    config: ClipVisionConfig, tensors: Mapping[str, np.ndarray], dtype: str = "float32"
) -> ClipVision:
    def make() -> ClipVision:
        return ClipVision(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)

    return filled(nnx.eval_shape(make), clip.clip_rules(config), tensors, clip.CLIP.ignored, dtype)


def filled(model, rules, tensors, ignored, dtype):
    graph, abstract = nnx.split(model)
    source = InMemory(tensors)
    state = load_into(abstract, rules, source, "diffusers", dtype=jnp.dtype(dtype), ignored=ignored)
    return nnx.merge(graph, state)


def padded_ids(
    lengths: tuple[int, ...], size: int, vocab: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Random ids ending in 1, padded by 0, and the mask."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((len(lengths), size), np.int32)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = rng.integers(2, vocab, length)
        row[length - 1] = 1
    return ids, np.arange(size) < np.array(lengths)[:, None]


def run_umt5_oracle(module: UMT5EncoderModel, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Masked as the original and diffusers mask the result."""
    out = module(torch.from_numpy(ids).long(), torch.from_numpy(mask).long()).last_hidden_state
    return out.float().numpy() * mask[:, :, None]


def run_clip_oracle(module: CLIPVisionModelWithProjection, pixels: np.ndarray) -> np.ndarray:
    return module(torch.from_numpy(pixels), output_hidden_states=True).hidden_states[-2].numpy()


def relative(ours: jax.Array | np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max())
