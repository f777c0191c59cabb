"""How far bfloat16 is from float32: ours beside diffusers', on the same weights and inputs."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models import SkyReelsV2Transformer3DModel
from transformer_oracle import (
    Shape,
    diffusers_model,
    inputs,
    jax_model,
    run_diffusers,
    run_jax,
)

SEEDS = range(4)
# 96 features and four layers: the sizes with which the specification's figures were taken.
SHAPE = Shape(heads=4, head_dim=24, layers=4, ffn=128, height=6, width=8)
# Ours over diffusers', mean of the seeds: t2v 0.83 (0.0058 of 0.0070), i2v 0.83, df 0.81.
BUDGET = 1.2


def error(approximate: np.ndarray, exact: np.ndarray) -> float:
    """Relative error in the 2-norm."""
    return float(np.linalg.norm(approximate - exact) / np.linalg.norm(exact))


def rounded(model: torch.nn.Module) -> torch.nn.Module:
    """To bfloat16 as ``from_pretrained(torch_dtype=bfloat16)`` does: some modules stay float32."""
    pinned = SkyReelsV2Transformer3DModel._keep_in_fp32_modules
    assert pinned
    for name, parameter in model.named_parameters():
        if not any(part in name.split(".") for part in pinned):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def errors(kind: str, seed: int, **change: bool) -> tuple[float, float]:
    """Of ours and of diffusers' bfloat16, each against diffusers' float32."""
    config = SHAPE.config(kind, inject_sample_info=kind == "df")
    oracle = diffusers_model(config, seed)
    arguments = inputs(config, SHAPE, seed, per_frame=kind == "df")
    exact = run_diffusers(oracle, arguments)
    ours = run_jax(jax_model(config, oracle, jnp.bfloat16), arguments)
    if change.get("halved"):
        ours = ours.astype(jnp.float8_e4m3fn).astype(np.float32)
    return error(ours, exact), error(run_diffusers(rounded(oracle), arguments), exact)


@pytest.mark.parametrize("kind", ["t2v", "i2v", "df"])
def test_bfloat16_is_as_near_to_float32_as_diffusers(kind: str):
    ours, theirs = np.mean([errors(kind, seed) for seed in SEEDS], axis=0)
    assert ours <= BUDGET * theirs
    # Not by computing in float32 after all.
    assert ours >= 0.05 * theirs


def test_a_coarser_rounding_of_the_output_alone_is_caught():
    ours, theirs = errors("t2v", 0, halved=True)
    assert ours > BUDGET * theirs
