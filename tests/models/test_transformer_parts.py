"""Each part of the model in float32 against its counterpart in diffusers."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformer_oracle import (
    Shape,
    diffusers_model,
    inputs,
    jax_model,
    layer_of,
    nudge_one,
    paths,
    relative,
    with_change,
)

from skyreels_jax.models.transformer import unpatchify
from skyreels_jax.ops.masks import BlockCausal
from skyreels_jax.ops.positions import rope_table

SHAPE = Shape(heads=3, head_dim=14, layers=2, ffn=50, frames=4, height=4, width=6, batch=2)
GRID = (4, 2, 3)
LAYER = 1
Values = dict[str, np.ndarray]


class Pair:
    """A part of ours as a function of (module, inputs), and what diffusers gives for it."""

    def __init__(self, part: nnx.Module, ours: Callable, theirs: torch.Tensor | np.ndarray):
        self.part = part
        self.run = nnx.jit(ours)
        self.expected = np.asarray(theirs.detach() if torch.is_tensor(theirs) else theirs)

    def difference(self, part: nnx.Module) -> float:
        return relative(np.asarray(self.run(part)), self.expected)


def build(kind: str, block: int = 1):
    config = SHAPE.config(kind, inject_sample_info=kind == "i2v")
    oracle = diffusers_model(config, seed=3, block=block)
    return config, oracle, jax_model(config, oracle)


@pytest.fixture(scope="module")
def i2v():
    return build("i2v")


@pytest.fixture(scope="module")
def t2v():
    return build("t2v")


def tokens(config, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((SHAPE.batch, int(np.prod(GRID)), config.dim), dtype=np.float32)


def by_frame(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[0], GRID[0], -1, x.shape[-1])


def mask_of(frames: int) -> BlockCausal:
    return BlockCausal(GRID[1] * GRID[2], frames)


def rotary(oracle) -> tuple[torch.Tensor, torch.Tensor]:
    return oracle.rope(torch.zeros(1, 1, SHAPE.frames, SHAPE.height, SHAPE.width))


def drawn(mask: BlockCausal) -> torch.Tensor:
    length = int(np.prod(GRID))
    return torch.from_numpy(np.asarray(mask.as_array(length, length)))[None, None]


def patch_embedding(i2v, t2v) -> Pair:
    config, oracle, model = i2v
    a = inputs(config, SHAPE, 1, per_frame=True)
    x = np.concatenate([a["x"], a["y"]], axis=1)
    theirs = oracle.patch_embedding(torch.from_numpy(x)).permute(0, 2, 3, 4, 1)
    return Pair(model.patch_embedding, lambda part: part(part.patches(jnp.asarray(x))), theirs)


def text_embedding(i2v, t2v) -> Pair:
    config, oracle, model = t2v
    context = inputs(config, SHAPE, 1, per_frame=True)["context"]
    theirs = oracle.condition_embedder.text_embedder(torch.from_numpy(context))
    return Pair(model.text_embedding, lambda part: part(jnp.asarray(context)), theirs)


def image_embedding(i2v, t2v) -> Pair:
    config, oracle, model = i2v
    # Small values, so that the norms' epsilon (1e-5 here, 1e-6 elsewhere) counts.
    image = 0.01 * inputs(config, SHAPE, 1, per_frame=True)["clip_fea"]
    theirs = oracle.condition_embedder.image_embedder(torch.from_numpy(image))
    return Pair(model.img_emb, lambda part: part(jnp.asarray(image)), theirs)


def time_embedding(i2v, t2v) -> Pair:
    """Both vectors, the frame rate included: first the head's, then the six of the blocks."""
    config, oracle, model = i2v
    a = inputs(config, SHAPE, 1, per_frame=True)
    e, e0, _, _ = oracle.condition_embedder(
        torch.from_numpy(a["t"]).flatten(), torch.zeros(1, 1, config.text_dim)
    )
    e = e.reshape(SHAPE.batch, SHAPE.frames, 1, -1)
    e0 = e0.reshape(SHAPE.batch, SHAPE.frames, 6, -1)
    rate = oracle.fps_projection(oracle.fps_embedding(torch.from_numpy(a["fps"])))
    theirs = torch.cat([e, e0 + rate.reshape(SHAPE.batch, 1, 6, -1)], dim=2)

    def ours(part):
        e, e0 = part.embed_time(jnp.asarray(a["t"]), jnp.asarray(a["fps"]))
        return jnp.concatenate([e[:, :, None], e0], axis=2)

    time_path = nnx.clone(model)
    for other in ("patch_embedding", "text_embedding", "img_emb", "blocks", "head"):
        delattr(time_path, other)
    return Pair(time_path, ours, theirs)


def self_attention(i2v, t2v) -> Pair:
    config, oracle, model = t2v
    x = tokens(config, 2)
    theirs = oracle.blocks[LAYER].attn1(torch.from_numpy(x), None, None, rotary(oracle))
    rope = rope_table(GRID, config.head_dim)
    part = layer_of(model.blocks.self_attn, LAYER)
    return Pair(part, lambda part: part(jnp.asarray(x), rope), theirs)


def block_causal_self_attention(i2v, t2v) -> Pair:
    config, oracle, model = t2v
    x, mask = tokens(config, 2), mask_of(3)  # a block of three frames and a short one of one
    theirs = oracle.blocks[LAYER].attn1(torch.from_numpy(x), None, drawn(mask), rotary(oracle))
    rope = rope_table(GRID, config.head_dim)
    part = layer_of(model.blocks.self_attn, LAYER)
    return Pair(part, lambda part: part(jnp.asarray(x), rope, mask=mask), theirs)


def cross_attention(kind: str) -> Callable[..., Pair]:
    def pair(i2v, t2v) -> Pair:
        config, oracle, model = {"i2v": i2v, "t2v": t2v}[kind]
        rng = np.random.default_rng(4)
        x = tokens(config, 2)
        text = rng.standard_normal((2, config.text_len, config.dim), dtype=np.float32)
        image = rng.standard_normal((2, config.image_tokens, config.dim), dtype=np.float32)
        both = torch.from_numpy(np.concatenate([image, text], axis=1))
        theirs = oracle.blocks[LAYER].attn2(torch.from_numpy(x), both, None, None)

        def ours(part):
            given = jnp.asarray(image) if kind == "i2v" else None
            return part(jnp.asarray(x), part.prepare(jnp.asarray(text), given))

        return Pair(layer_of(model.blocks.cross_attn, LAYER), ours, theirs)

    return pair


def feed_forward(i2v, t2v) -> Pair:
    config, oracle, model = t2v
    x = tokens(config, 2)
    part = layer_of(model.blocks.ffn, LAYER)
    theirs = oracle.blocks[LAYER].ffn(torch.from_numpy(x))
    return Pair(part, lambda part: part(jnp.asarray(x)), theirs)


def block(i2v, t2v) -> Pair:
    config, oracle, model = t2v
    rng = np.random.default_rng(4)
    x, mask = tokens(config, 2), mask_of(2)
    text = rng.standard_normal((2, config.text_len, config.dim), dtype=np.float32)
    e0 = rng.standard_normal((2, SHAPE.frames, 6, config.dim), dtype=np.float32)
    of_token = np.repeat(e0, GRID[1] * GRID[2], axis=1).swapaxes(1, 2)
    theirs = oracle.blocks[LAYER](
        *(torch.from_numpy(v) for v in (x, text, of_token)), rotary(oracle), drawn(mask)
    ).reshape(by_frame(x).shape)
    rope = rope_table(GRID, config.head_dim)

    def ours(part):
        context = part.cross_attn.prepare(jnp.asarray(text))
        return part(jnp.asarray(by_frame(x)), jnp.asarray(e0), context, rope, mask=mask).tokens

    return Pair(layer_of(model.blocks, LAYER), ours, theirs)


def head(i2v, t2v) -> Pair:
    config, oracle, model = t2v
    rng = np.random.default_rng(4)
    x = tokens(config, 2)
    e = rng.standard_normal((2, SHAPE.frames, config.dim), dtype=np.float32)
    # diffusers has this in the model's forward.
    table = oracle.scale_shift_table[:, None] + torch.from_numpy(e)[:, :, None]
    shift, scale = table.repeat_interleave(GRID[1] * GRID[2], dim=1).unbind(2)
    normed = oracle.norm_out(torch.from_numpy(x)) * (1 + scale) + shift
    theirs = by_frame(oracle.proj_out(normed).detach().numpy())
    return Pair(model.head, lambda part: part(jnp.asarray(by_frame(x)), jnp.asarray(e)), theirs)


# Each with the difference measured, relative to the largest value; the budget is five times that.
PARTS: dict[str, tuple[Callable[..., Pair], float]] = {
    "patch embedding": (patch_embedding, 4.1e-7),
    "text embedding": (text_embedding, 1.1e-7),
    "image embedding": (image_embedding, 2.8e-7),
    "time embedding": (time_embedding, 1.7e-7),
    "self-attention": (self_attention, 3.1e-7),
    "block-causal self-attention": (block_causal_self_attention, 3.2e-7),
    "text cross-attention": (cross_attention("t2v"), 2.2e-7),
    "image cross-attention": (cross_attention("i2v"), 3.5e-7),
    "feed-forward": (feed_forward, 1.2e-7),
    "block": (block, 3.8e-7),
    "head": (head, 1.3e-7),
}


@pytest.mark.parametrize("name", PARTS)
def test_part_equals_diffusers_and_reads_every_parameter(name, i2v, t2v):
    make, measured = PARTS[name]
    pair = make(i2v, t2v)
    tolerance = 5 * measured
    assert pair.difference(pair.part) <= tolerance
    unnoticed = [
        path
        for path in paths(pair.part)
        if pair.difference(with_change(pair.part, path, nudge_one)) <= 10 * tolerance
    ]
    assert unnoticed == []


def test_the_image_embedder_has_its_own_epsilon(i2v, t2v):
    pair = image_embedding(i2v, t2v)
    other = nnx.clone(pair.part)
    other.norm1.eps = 1e-6
    assert pair.difference(other) > 1e-3


def test_unpatchify_orders_rows_columns_channels():
    """Against the definition, element by element."""
    frames, rows, columns, channels = 2, 2, 3, 5
    rng = np.random.default_rng(0)
    patches = rng.standard_normal((1, frames, rows * columns, 4 * channels), dtype=np.float32)
    video = np.asarray(unpatchify(jnp.asarray(patches), (rows, columns), (1, 2, 2)))
    assert video.shape == (1, channels, frames, 2 * rows, 2 * columns)
    for c, f, h, w in np.ndindex(*video.shape[1:]):
        token, offset = (h // 2) * columns + w // 2, ((h % 2) * 2 + w % 2) * channels + c
        assert video[0, c, f, h, w] == patches[0, f, token, offset]
