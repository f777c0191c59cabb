"""The whole model in float32 against diffusers', every parameter random."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from transformer_oracle import (
    Shape,
    compiled,
    diffusers_model,
    inputs,
    jax_model,
    nudge_one,
    paths,
    relative,
    run_diffusers,
    run_jax,
    with_change,
)

from skyreels_jax.models import transformer
from skyreels_jax.ops.positions import RopeTable, rope_table

# Measured over all cases: t2v 7.6e-7, i2v 2.3e-6 (two attentions, 769 keys), df 6.9e-7,
# df with frame rates 4.4e-7, block-causal 5.6e-7, everything at once 1.5e-6.
TOL = 1e-5

SHAPES = (
    Shape(),
    Shape(heads=3, head_dim=8, layers=3, ffn=40, frames=1, batch=2),
    Shape(heads=1, head_dim=16, layers=1, frames=5, height=6, width=4),
    Shape(heads=4, head_dim=10, layers=2, ffn=24, frames=2, height=8, width=2, batch=3),
    Shape(heads=2, head_dim=32, layers=4, ffn=64, frames=4, height=2, width=8),
    Shape(heads=2, head_dim=12, layers=2, ffn=96, frames=7, height=4, width=4, batch=2),
)
# Kind -> one timestep a frame (else one a video). diffusers' "df" is t2v with timesteps by frame.
PER_FRAME = {"t2v": False, "i2v": False, "df": True, "df_fps": True}


def difference(kind: str, shape: Shape, block: int | None = None, **overrides) -> float:
    config = shape.config(kind, inject_sample_info=kind == "df_fps", **overrides)
    oracle = diffusers_model(config, seed=shape.layers, block=block or 1)
    arguments = inputs(config, shape, seed=shape.frames, per_frame=PER_FRAME[kind])
    ours = run_jax(jax_model(config, oracle), arguments, block_length=block)
    return relative(ours, run_diffusers(oracle, arguments))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(shape, id=str(i), marks=() if i in (0, 3, 5) else pytest.mark.slow)
        for i, shape in enumerate(SHAPES)
    ],
)
@pytest.mark.parametrize("kind", PER_FRAME)
def test_equals_diffusers(kind, shape):
    assert difference(kind, shape) <= TOL


@pytest.mark.parametrize("block", [2, 3, 5])
@pytest.mark.parametrize(
    "shape",
    [pytest.param(SHAPES[0], id="0", marks=pytest.mark.slow), pytest.param(SHAPES[3], id="3")],
)
def test_block_causal_equals_diffusers(shape, block):
    # diffusers needs whole blocks, and leaves blocks of one frame unmasked.
    assert difference("df", replace(shape, frames=2 * block), block) <= TOL


@pytest.fixture(scope="module")
def everything():
    """Two images, frame rate, timesteps by frame and blocks of two frames, all in one model."""
    shape = Shape(frames=4, height=4, width=6)
    config = shape.config("i2v", inject_sample_info=True, pos_embed_seq_len=514)
    oracle = diffusers_model(config, seed=5, block=2)
    arguments = inputs(config, shape, seed=6, per_frame=True)
    model = jax_model(config, oracle)
    return model, arguments, run_diffusers(oracle, arguments), compiled(block_length=2)


def test_everything_at_once_equals_diffusers(everything):
    model, arguments, expected, run = everything
    assert relative(run(model, arguments), expected) <= TOL


def test_every_parameter_counts(everything):
    """Nothing above passes by a parameter that is not read: one element of each is changed."""
    model, arguments, expected, run = everything
    unnoticed = [
        path
        for path in paths(model)
        if relative(run(with_change(model, path, nudge_one), arguments), expected) <= TOL
    ]
    assert unnoticed == []


def swap_first_rows(table: np.ndarray) -> np.ndarray:
    """Shift and scale exchanged."""
    return table[..., [1, 0, *range(2, table.shape[-2])], :]


@pytest.mark.parametrize("path", ["blocks.modulation", "head.modulation"])
def test_the_order_of_modulation_counts(everything, path):
    model, arguments, expected, run = everything
    assert relative(run(with_change(model, path, swap_first_rows), arguments), expected) > 100 * TOL


CHANGED_INPUTS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "another frame rate": ("fps", lambda v: 1 - v),
    "a later timestep of one frame": ("t", lambda v: v + np.array([0, 0, 1, 0])),
    "a masked padding token": ("context", lambda v: np.where(np.arange(512)[:, None] == 511, 1, v)),
    "image latents before the mask": ("y", lambda v: np.roll(v, 4, axis=1)),
    "image tokens in another order": ("clip_fea", lambda v: v[:, ::-1]),
}


@pytest.mark.parametrize("what", CHANGED_INPUTS)
def test_every_input_counts(everything, what):
    model, arguments, expected, run = everything
    name, change = CHANGED_INPUTS[what]
    changed = {**arguments, name: change(arguments[name]).astype(arguments[name].dtype)}
    assert relative(run(model, changed), expected) > 5 * TOL


@pytest.mark.parametrize("block", [1, None])
def test_a_wrong_block_length_is_caught(everything, block):
    model, arguments, expected, _ = everything
    assert relative(run_jax(model, arguments, block_length=block), expected) > 100 * TOL


def test_swapped_rope_axes_are_caught(everything, monkeypatch):
    model, arguments, expected, _ = everything

    def swapped(grid: tuple[int, int, int], head_dim: int) -> RopeTable:
        frames, rows, columns = grid
        table = rope_table((frames, columns, rows), head_dim)
        return RopeTable(
            *(
                part.reshape(frames, columns, rows, -1).swapaxes(1, 2).reshape(part.shape)
                for part in table
            )
        )

    monkeypatch.setattr(transformer, "rope_table", swapped)
    assert relative(run_jax(model, arguments, block_length=2), expected) > 100 * TOL
