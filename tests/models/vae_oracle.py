"""diffusers' Wan VAE with a random value in every parameter, and ours with the same weights."""

from collections.abc import Mapping

import diffusers
import jax.numpy as jnp
import numpy as np
import torch
from encoder_oracles import tensors_of
from flax import nnx
from tests.weights.fakes import InMemory

from skyreels_jax.models.vae import WanVae
from skyreels_jax.models.vae_layers import VaeConfig
from skyreels_jax.weights.components.vae import vae_rules
from skyreels_jax.weights.engine import load_into
from skyreels_jax.weights.plan import Format

TINY = VaeConfig(base_dim=4, z_dim=16, dim_mult=(1, 2, 2, 2), num_res_blocks=1)


def oracle(config: VaeConfig, seed: int = 0) -> diffusers.AutoencoderKLWan:
    """Convolutions keep the variance of their input; scales scatter about 1, biases about 0."""
    vae = diffusers.AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
        latents_mean=list(config.latents_mean),
        latents_std=list(config.latents_std),
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in vae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma"):
            parameter.data = 1 + 0.3 * noise
        elif name.endswith("bias"):
            parameter.data = 0.2 * noise
        else:
            parameter.data = noise / parameter[0].numel() ** 0.5
    # Few pixels leave [-1, 1], where decoding would clamp errors away.
    vae.decoder.conv_out.weight.data *= 0.3
    return vae.eval().requires_grad_(False)


def ours(
    config: VaeConfig,
    tensors: Mapping[str, np.ndarray],
    dtype: str = "float32",
    dialect: Format = "diffusers",
) -> WanVae:
    def make() -> WanVae:
        return WanVae(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)

    graph, abstract = nnx.split(nnx.eval_shape(make))
    source, kind = InMemory(tensors), jnp.dtype(dtype)
    return nnx.merge(graph, load_into(abstract, vae_rules(config), source, dialect, dtype=kind))


def pair(config: VaeConfig, seed: int = 0) -> tuple[diffusers.AutoencoderKLWan, WanVae]:
    theirs = oracle(config, seed)
    return theirs, ours(config, tensors_of(theirs))


def statistics(config: VaeConfig) -> tuple[np.ndarray, np.ndarray]:
    mean, std = (
        np.asarray(v, np.float32).reshape(1, -1, 1, 1, 1)
        for v in (config.latents_mean, config.latents_std)
    )
    return mean, std


def encoded(theirs: diffusers.AutoencoderKLWan, config: VaeConfig, pixels: np.ndarray):
    mean, std = statistics(config)
    return (theirs.encode(torch.from_numpy(pixels)).latent_dist.mode().numpy() - mean) / std


def decoded(theirs: diffusers.AutoencoderKLWan, config: VaeConfig, latents: np.ndarray):
    mean, std = statistics(config)
    return theirs.decode(torch.from_numpy(latents * std + mean)).sample.numpy()


def pixels(frames: int, height: int = 24, width: int = 40, batch: int = 1) -> np.ndarray:
    rng = np.random.default_rng(frames)
    return rng.uniform(-1, 1, (batch, 3, frames, height, width)).astype(np.float32)


def latents(frames: int, height: int = 3, width: int = 5, batch: int = 1) -> np.ndarray:
    rng = np.random.default_rng(frames)
    return rng.standard_normal((batch, 16, frames, height, width), np.float32)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, of pixels in [-1, 1]."""
    return float(10 * np.log10(4 / np.mean((a - b) ** 2)))
