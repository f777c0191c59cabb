"""Each part of the VAE against diffusers' part, chunk after chunk, and mistakes that must show."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from encoder_oracles import relative
from flax import nnx

from skyreels_jax.models import vae_layers
from skyreels_jax.models.transformer_config import Numerics
from skyreels_jax.models.vae_layers import (
    AttentionBlock,
    Downsample,
    Resample,
    Residual,
    ResidualBlock,
    Upsample,
)

TOL = 2e-6  # measured 1.2e-7 to 5.8e-7
WRONG = 1e-2  # the least that a mistake changes; measured 0.05 and more
NUMERICS = Numerics(jnp.float32, jnp.float32)

Run = Callable[[], np.ndarray]


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma"):
            parameter.data = 1 + 0.3 * noise
        elif name.endswith("bias"):
            parameter.data = 0.2 * noise
        else:
            parameter.data = noise / parameter[0].numel() ** 0.5
    return module.eval().requires_grad_(False)


def copied(ours: nnx.Module, theirs: torch.nn.Module, names: dict[str, str]) -> nnx.Module:
    """``ours`` with the parameters of ``theirs``; ``names`` are ours and theirs, of each part."""
    parts = dict(theirs.named_modules())
    for ours_name, theirs_name in names.items():
        target, part = ours, parts[theirs_name]
        for key in ours_name.split("."):
            target = getattr(target, key)
        if hasattr(part, "gamma"):
            target.scale.set_value(jnp.asarray(part.gamma.numpy().reshape(-1)))
            continue
        kernel = np.moveaxis(part.weight.numpy(), (0, 1), (-1, -2))
        target.kernel.set_value(jnp.asarray(kernel.reshape(target.kernel.shape)))
        target.bias.set_value(jnp.asarray(part.bias.numpy()))
    return ours


def frames(count: int, channels: int, height: int = 4, width: int = 6) -> np.ndarray:
    shape = (2, count, height, width, channels)
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def run_ours(layer, x: np.ndarray, chunks: Sequence[int], *, carry: bool = True) -> np.ndarray:
    step = nnx.jit(lambda layer, x, cache: layer(x, cache))
    outs, cache, done = [], None, 0
    for length in chunks:
        out, cache = step(layer, jnp.asarray(x[:, done : done + length]), cache)
        cache = cache if carry else None
        outs.append(np.asarray(out))
        done += length
    return np.concatenate(outs, axis=1)


def run_theirs(module: torch.nn.Module, x: np.ndarray, chunks: Sequence[int]) -> np.ndarray:
    slots = sum(isinstance(m, wan.WanCausalConv3d) for m in module.modules())
    video = torch.from_numpy(x).permute(0, 4, 1, 2, 3)
    outs, cache = [], [None] * slots
    for part in video.split(tuple(chunks), dim=2):
        outs.append(module(part, cache, [0]) if slots else module(part))
    return torch.cat(outs, dim=2).permute(0, 2, 3, 4, 1).numpy()


RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
SHORTCUT = RESIDUAL | {"shortcut": "conv_shortcut"}
RESAMPLE = {"conv": "resample.1"}
IN_TIME = RESAMPLE | {"time_conv": "time_conv"}


def residual(before: int, dim: int) -> tuple[ResidualBlock, torch.nn.Module]:
    theirs = randomised(wan.WanResidualBlock(before, dim))
    block = ResidualBlock(Residual(before, dim), numerics=NUMERICS, rngs=nnx.Rngs(0))
    return copied(block, theirs, RESIDUAL if before == dim else SHORTCUT), theirs


def downsample(temporal: bool) -> tuple[Downsample, torch.nn.Module]:
    theirs = randomised(wan.WanResample(6, "downsample3d" if temporal else "downsample2d"))
    layer = Downsample(Resample(6, 6, temporal), numerics=NUMERICS, rngs=nnx.Rngs(0))
    return copied(layer, theirs, IN_TIME if temporal else RESAMPLE), theirs


def upsample(temporal: bool) -> tuple[Upsample, torch.nn.Module]:
    theirs = randomised(wan.WanResample(6, "upsample3d" if temporal else "upsample2d"))
    layer = Upsample(Resample(6, 3, temporal), numerics=NUMERICS, rngs=nnx.Rngs(0))
    return copied(layer, theirs, IN_TIME if temporal else RESAMPLE), theirs


def attention_block() -> tuple[AttentionBlock, torch.nn.Module]:
    theirs = randomised(wan.WanAttentionBlock(6))
    block = AttentionBlock(6, numerics=NUMERICS, rngs=nnx.Rngs(0))
    return copied(block, theirs, {"norm": "norm", "to_qkv": "to_qkv", "proj": "proj"}), theirs


CASES = {
    "residual": (lambda: residual(6, 6), (1, 2, 2)),
    "residual with shortcut": (lambda: residual(6, 5), (1, 4, 1)),
    "down": (lambda: downsample(False), (1, 4)),
    "down in time": (lambda: downsample(True), (1, 4, 2, 4)),
    "up": (lambda: upsample(False), (1, 2)),
    "up in time": (lambda: upsample(True), (1, 1, 1, 2, 2)),
    "attention": (attention_block, (1, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(case: str):
    make, chunks = CASES[case]
    layer, theirs = make()
    x = frames(sum(chunks), 6)
    assert relative(run_ours(layer, x, chunks), run_theirs(theirs, x, chunks)) <= TOL


@pytest.mark.parametrize("case", ["residual", "down in time", "up in time"])
def test_a_cache_that_is_not_carried_is_caught(case: str):
    make, chunks = CASES[case]
    layer, theirs = make()
    x = frames(sum(chunks), 6)
    wrong, right = run_ours(layer, x, chunks, carry=False), run_theirs(theirs, x, chunks)
    if case == "residual":
        assert relative(wrong, right) > WRONG
    else:  # without a past, time is not resampled at all
        assert wrong.shape != right.shape


def test_history_of_the_first_frame_in_upsampling_is_caught():
    """The second chunk sees zeros, not the first frame."""
    layer, theirs = upsample(temporal=True)
    x = frames(3, 6)
    seen = jnp.concatenate([jnp.zeros((2, 1, 4, 6, 6)), jnp.asarray(x[:, :1])], axis=1)
    out, _ = layer(jnp.asarray(x[:, 1:2]), seen)
    assert relative(out, run_theirs(theirs, x, (1, 1, 1))[:, 1:3]) > WRONG


def test_frames_interleaved_in_another_order_are_caught(monkeypatch: pytest.MonkeyPatch):
    layer, theirs = upsample(temporal=True)
    x, right = frames(3, 6), run_theirs(theirs, frames(3, 6), (1, 2))
    monkeypatch.setattr(
        vae_layers, "interleaved", lambda x: x.reshape(*x.shape[:1], -1, *x.shape[2:4], 6)
    )
    with_pairs = run_ours(layer, x, (1, 2))
    assert with_pairs.shape == right.shape
    assert relative(with_pairs, right) > WRONG
    monkeypatch.setattr(
        vae_layers, "interleaved", lambda x: jnp.concatenate(jnp.split(x, 2, -1), axis=1)
    )
    assert relative(run_ours(layer, x, (1, 2)), right) > WRONG


def test_interleaving_as_drawn():
    even, odd = np.arange(6.0).reshape(1, 3, 1, 1, 2), -np.arange(6.0).reshape(1, 3, 1, 1, 2)
    both = vae_layers.interleaved(jnp.asarray(np.concatenate([even, odd], axis=-1)))
    expected = [[0, 1], [0, -1], [2, 3], [-2, -3], [4, 5], [-4, -5]]
    np.testing.assert_array_equal(np.asarray(both)[0, :, 0, 0], expected)


def test_padding_on_the_other_side_is_caught(monkeypatch: pytest.MonkeyPatch):
    layer, theirs = downsample(temporal=False)
    x = frames(2, 6)
    right = run_theirs(theirs, x, (2,))
    call = vae_layers.FrameConv.__call__
    monkeypatch.setattr(
        vae_layers.FrameConv,
        "__call__",
        lambda self, x, stride, padding: call(self, x, stride=stride, padding=padding[::-1]),
    )
    assert relative(run_ours(layer, x, (2,)), right) > WRONG


def test_wrong_parameters_are_caught():
    block, theirs = residual(6, 5)
    x = frames(2, 6)
    right = run_theirs(theirs, x, (2,))
    mistakes = {
        "no scale": (block.norm2.scale, jnp.ones),
        "no bias": (block.conv1.bias, jnp.zeros),
        "no shortcut": (block.shortcut.kernel, jnp.zeros),
    }
    for mistake, (parameter, fill) in mistakes.items():
        kept = parameter[...]
        parameter.set_value(fill(kept.shape, kept.dtype))
        assert relative(run_ours(block, x, (2,)), right) > WRONG, mistake
        parameter.set_value(kept)
    assert relative(run_ours(block, x, (2,)), right) <= TOL


def test_queries_and_values_swapped_are_caught():
    block, theirs = attention_block()
    x = frames(1, 6)
    order = np.r_[12:18, 6:12, 0:6]
    block.to_qkv.kernel.set_value(block.to_qkv.kernel[...][:, order])
    block.to_qkv.bias.set_value(block.to_qkv.bias[...][order])
    assert relative(run_ours(block, x, (1,)), run_theirs(theirs, x, (1,))) > WRONG


def test_attention_stays_within_its_frame():
    block, _ = attention_block()
    x = frames(2, 6)
    other = x.copy()
    other[:, 1] = 7
    a, b = run_ours(block, x, (2,)), run_ours(block, other, (2,))
    np.testing.assert_array_equal(a[:, 0], b[:, 0])
    assert relative(a[:, 1], b[:, 1]) > WRONG
