"""What can go wrong in an attention: tried on its recorded queries, keys and values."""

from itertools import permutations

import numpy as np

from skyreels_jax.ops.positions import axis_dims, rope_params
from skyreels_jax.parity.diagnosis.hypotheses import (
    CallShape,
    Explanation,
    Hypothesis,
    float64,
    nearest_explanation,
)
from skyreels_jax.parity.recording import Arrays


def attend(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    *,
    allowed: np.ndarray | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """Attend over ``[B, L, N, K]`` and merge the heads to ``[B, L, N * K]``."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = np.einsum("blnk,bsnk->bnls", query, key) * scale
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bnls,bsnk->blnk", weights, value)
    return out.reshape(*out.shape[:2], -1)


def rotations(
    grid: tuple[int, int, int], width: int, order: tuple[int, int, int] = (0, 1, 2), first: int = 0
) -> np.ndarray:
    """Return unit rotations ``[L, K / 2]``; ``order`` is the axis of each group of features."""
    position = np.indices(grid).reshape(3, -1).T + np.array([first, 0, 0])
    columns = [
        rope_params(int(position.max()) + 1, dim)[position[:, axis]]
        for dim, axis in zip(axis_dims(width), order, strict=True)
    ]
    return np.concatenate(columns, axis=1)


def rotate(x: np.ndarray, table: np.ndarray, *, halves: bool = False) -> np.ndarray:
    """Rotate ``[B, L, N, K]``: neighbouring features, or (wrongly) those of both halves."""
    if halves:
        first, second = np.split(x, 2, axis=-1)
        z = (first + 1j * second) * table[None, :, None]
        return np.concatenate([z.real, z.imag], axis=-1)
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * table[None, :, None]
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def _split_heads(values: np.ndarray, heads: int) -> np.ndarray:
    """Split ``[B, L, D]`` to ``[B, L, N, K]``, float64."""
    return float64(values).reshape(*values.shape[:2], heads, -1)


def explain_self_attention(ours: Arrays, block: str, shape: CallShape) -> Explanation | None:
    """Find out why our heads are not what our queries, keys and values give."""
    q, k, v = (
        _split_heads(ours[f"{block}.self_attn.{name}"], shape.heads)
        for name in ("norm_q", "norm_k", "v")
    )
    seen, width = float64(ours[f"{block}.self_attn.heads"]), q.shape[-1]
    right = rotations(shape.grid, width)

    def with_rope(table: np.ndarray, keys: np.ndarray | None = None, **how: bool) -> np.ndarray:
        other = table if keys is None else keys
        return attend(rotate(q, table, **how), rotate(k, other, **how), v)

    tries: list[Hypothesis] = [
        ("no rope", "queries and keys are not rotated", lambda: attend(q, k, v)),
        (
            "rope pairing",
            "features are paired across halves, not with their neighbours",
            lambda: with_rope(right, halves=True),
        ),
        (
            "rope sign",
            "queries and keys are turned by opposite angles",
            lambda: with_rope(right, right.conj()),
        ),
    ]
    for first in (1, 2):
        words = f"positions of keys are {first} frame(s) ahead of those of queries"
        ahead = rotations(shape.grid, width, first=first)
        tries.append(("rope offset", words, lambda t=ahead: with_rope(right, t)))
    for first, second, third in list(permutations(range(3)))[1:]:
        order = (first, second, third)
        words = ", ".join(("frame", "row", "column")[axis] for axis in order)
        table = rotations(shape.grid, width, order)
        tries.append(
            ("rope axes", f"groups of features turn with {words}", lambda t=table: with_rope(t))
        )
    turned_q, turned_k = rotate(q, right), rotate(k, right)
    frame = np.repeat(np.arange(shape.grid[0]), shape.grid[1] * shape.grid[2])
    for size in range(1, shape.grid[0]):
        words = f"a block-causal mask of {size} frame(s) hides later blocks"
        allowed = (frame // size)[:, None] >= (frame // size)[None]
        tries.append(("mask", words, lambda a=allowed: attend(turned_q, turned_k, v, allowed=a)))
    for scale, words in ((1.0, "not scaled"), (v.shape[-1] ** -1.0, "scaled twice")):
        tries.append(
            (
                "scale",
                f"scores are {words}",
                lambda s=scale: attend(turned_q, turned_k, v, scale=s),
            )
        )
    return nearest_explanation(tries, seen)


def explain_cross_attention(
    ours: Arrays, block: str, shape: CallShape, lengths: np.ndarray
) -> Explanation | None:
    """Find out the same of the heads over text (and image)."""
    name = f"{block}.cross_attn"

    def split(module: str) -> np.ndarray:
        return _split_heads(ours[f"{name}.{module}"], shape.heads)

    q, k, v = split("norm_q"), split("norm_k"), split("v")
    seen = float64(ours[f"{name}.heads"])
    filled = (np.arange(k.shape[1]) < lengths[:, None])[:, None, None]
    image = 0.0
    if f"{name}.norm_k_img" in ours:
        image = attend(q, split("norm_k_img"), split("v_img"))
    text = attend(q, k, v)
    return nearest_explanation(
        [
            (
                "mask",
                "the padding of the text is hidden; the models attend to it",
                lambda: attend(q, k, v, allowed=filled) + image,
            ),
            ("missing term", "the output over the image is left out", lambda: text),
            ("missing term", "the output over the text is left out", lambda: image + 0 * text),
            ("scale", "scores are not scaled", lambda: attend(q, k, v, scale=1.0) + image),
        ],
        seen,
    )
