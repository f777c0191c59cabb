"""What can go wrong in an attention: tried on its recorded queries, keys and values."""

from collections.abc import Callable
from itertools import permutations

import numpy as np

from skyreels_jax.ops.positions import axis_dims, rope_params
from skyreels_jax.parity.diagnosis.hypotheses import Shape, Values, first_near, wide


def attended(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    *,
    allowed: np.ndarray | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """Attention of ``[B, L, N, K]``, merged to ``[B, L, N * K]``."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = np.einsum("blnk,bsnk->bnls", query, key) * scale
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bnls,bsnk->blnk", weights, value)
    return out.reshape(*out.shape[:2], -1)


def angles(
    grid: tuple[int, int, int], width: int, order: tuple[int, int, int] = (0, 1, 2), first: int = 0
) -> np.ndarray:
    """Unit rotations ``[L, K / 2]``; ``order`` says which position each group of features has."""
    place = np.stack(np.meshgrid(*(np.arange(n) for n in grid), indexing="ij"), -1).reshape(-1, 3)
    place = place + np.array([first, 0, 0])
    columns = [
        rope_params(int(place.max()) + 1, dim)[place[:, axis]]
        for dim, axis in zip(axis_dims(width), order, strict=True)
    ]
    return np.concatenate(columns, axis=1)


def turned(x: np.ndarray, table: np.ndarray, *, halves: bool = False) -> np.ndarray:
    """``[B, L, N, K]`` rotated: neighbouring features, or (wrongly) those of both halves."""
    if halves:
        first, second = np.split(x, 2, axis=-1)
        z = (first + 1j * second) * table[None, :, None]
        return np.concatenate([z.real, z.imag], axis=-1)
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * table[None, :, None]
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def of_self_attention(ours: Values, block: str, shape: Shape) -> tuple[str, str] | None:
    """Why our heads are not what our queries, keys and values give."""
    parts = (wide(ours[f"{block}.self_attn.{name}"]) for name in ("norm_q", "norm_k", "v"))
    q, k, v = (x.reshape(*x.shape[:2], shape.heads, -1) for x in parts)
    seen, width = wide(ours[f"{block}.self_attn.heads"]), q.shape[-1]
    right = angles(shape.grid, width)

    def with_rope(table: np.ndarray, keys: np.ndarray | None = None, **how: bool) -> np.ndarray:
        other = table if keys is None else keys
        return attended(turned(q, table, **how), turned(k, other, **how), v)

    tries: list[tuple[str, str, Callable[[], np.ndarray]]] = [
        ("no rope", "queries and keys are not rotated", lambda: attended(q, k, v)),
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
        tries.append(
            (
                "rope offset",
                f"positions of keys are {first} frame(s) ahead of those of queries",
                lambda first=first: with_rope(right, angles(shape.grid, width, first=first)),
            )
        )
    for first, second, third in list(permutations(range(3)))[1:]:
        order = (first, second, third)
        names = [("frame", "row", "column")[axis] for axis in order]
        tries.append(
            (
                "rope axes",
                f"groups of features turn with {', '.join(names)}",
                lambda order=order: with_rope(angles(shape.grid, width, order)),
            )
        )
    frame = np.repeat(np.arange(shape.grid[0]), shape.grid[1] * shape.grid[2])
    for size in range(1, shape.grid[0]):
        allowed = (frame // size)[:, None] >= (frame // size)[None]
        tries.append(
            (
                "mask",
                f"a block-causal mask of {size} frame(s) hides later blocks",
                lambda allowed=allowed: attended(
                    turned(q, right), turned(k, right), v, allowed=allowed
                ),
            )
        )
    for factor, what in ((1.0, "not scaled"), (v.shape[-1] ** -1.0, "scaled twice")):
        tries.append(
            (
                "scale",
                f"scores are {what}",
                lambda factor=factor: attended(turned(q, right), turned(k, right), v, scale=factor),
            )
        )
    return first_near(tries, seen)


def of_cross_attention(
    ours: Values, block: str, shape: Shape, lengths: np.ndarray
) -> tuple[str, str] | None:
    """Why our heads over text (and image) are not what our queries, keys and values give."""
    name = f"{block}.cross_attn"

    def split(part: str) -> np.ndarray:
        x = wide(ours[f"{name}.{part}"])
        return x.reshape(*x.shape[:2], shape.heads, -1)

    q, k, v = split("norm_q"), split("norm_k"), split("v")
    seen = wide(ours[f"{name}.heads"])
    filled = (np.arange(k.shape[1]) < lengths[:, None])[:, None, None]
    image = 0.0
    if f"{name}.norm_k_img" in ours:
        image = attended(q, split("norm_k_img"), split("v_img"))
    text = attended(q, k, v)
    return first_near(
        [
            (
                "mask",
                "the padding of the text is hidden; the models attend to it",
                lambda: attended(q, k, v, allowed=filled) + image,
            ),
            ("missing term", "the answer over the image is left out", lambda: text),
            ("missing term", "the answer over the text is left out", lambda: image + 0 * text),
            ("scale", "scores are not scaled", lambda: attended(q, k, v, scale=1.0) + image),
        ],
        seen,
    )
