"""Explanations of a departure, each tried on what was recorded: NumPy, float64, no model.

Every function takes our values of a call of the transformer and the reference's, and says which
known mistake would turn the reference's into ours; ``None`` where none does.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Final

import numpy as np

from skyreels_jax.ops.rope import axis_dims, rope_params

Values = Mapping[str, np.ndarray]
# Relative distance at which a hypothesis explains what is seen, and by how much it must be nearer
# than saying nothing.
NEAR: Final = 1e-4
NEARER: Final = 0.05


@dataclass(frozen=True)
class Shape:
    """Of a call: what the recorded tokens are.

    Attributes:
        grid: latent frames, rows and columns of tokens.
        heads: of every attention.
        eps: of the norms.
    """

    grid: tuple[int, int, int]
    heads: int
    eps: float


def near(a: np.ndarray, b: np.ndarray, bound: float = NEAR) -> bool:
    """Relative distance of ``a`` from ``b`` below ``bound``."""
    return a.shape == b.shape and apart(a, b) < bound


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Relative L2 distance of ``a`` from ``b``."""
    size = float(np.linalg.norm(b))
    return float(np.linalg.norm(a - b)) / size if size else math.inf


def wide(values: np.ndarray) -> np.ndarray:
    """In float64."""
    return np.asarray(values, np.float64)


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
    return _first_near(tries, seen)


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
    return _first_near(
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


def of_activation(before: np.ndarray, after: np.ndarray) -> tuple[str, str] | None:
    """Which function turns our values before the activation into those after it."""
    x = wide(before)
    error = np.vectorize(math.erf, otypes=[float])
    return _first_near(
        [
            (
                "activation",
                "GELU by the error function, not its tanh approximation",
                lambda: 0.5 * x * (1 + error(x / math.sqrt(2))),
            ),
            ("activation", "SiLU", lambda: x / (1 + np.exp(-x))),
            ("activation", "ReLU", lambda: np.maximum(x, 0)),
            ("activation", "none at all", lambda: x),
        ],
        wide(after),
        # The two forms of GELU are 5e-4 apart.
        bound=2e-5,
    )


def rows_of_modulation(theirs: Values, block: str, before: str, frames: int) -> np.ndarray | None:
    """The six vectors of a block, ``[6, B, F, D]``, worked out of the reference's values.

    In the model's order: shift, scale and gate of self-attention, then of the feed-forward.
    """
    start = by_frame(theirs[before], frames)
    middle = by_frame(theirs[f"{block}.after_self_attn"], frames)
    end = middle + by_frame(theirs[f"{block}.cross_attn.o"], frames)
    out = by_frame(theirs[block], frames)
    if start.shape[2] < 2:
        return None
    scale, shift = line(normed(start, 1e-6), by_frame(theirs[f"{block}.norm1"], frames))
    scale_ffn, shift_ffn = line(normed(end, 1e-6), by_frame(theirs[f"{block}.norm2"], frames))
    gate = slope(by_frame(theirs[f"{block}.self_attn.o"], frames), middle - start)
    gate_ffn = slope(by_frame(theirs[f"{block}.ffn.fc2"], frames), out - end)
    return np.stack([shift, scale - 1, gate, shift_ffn, scale_ffn - 1, gate_ffn])


ROWS: Final = ("shift", "scale", "gate", "shift of the ffn", "scale of the ffn", "gate of the ffn")


def of_modulated(ours: Values, theirs: Values, place: str, before: str, shape: Shape):
    """Why ``norm1`` or ``norm2`` is not the modulated norm of what comes before."""
    block, _, part = place.rpartition(".")
    frames = shape.grid[0]
    rows = rows_of_modulation(theirs, block, before, frames)
    if rows is None:
        return None
    x = by_frame(ours[before], frames)
    if part == "norm2":
        o = by_frame(ours[f"{block}.cross_attn.o"], frames)
        x = by_frame(ours[f"{block}.after_self_attn"], frames) + o
    scale, shift = line(normed(x, shape.eps), by_frame(ours[place], frames))
    right_scale = rows[4 if part == "norm2" else 1] + 1
    factor = scale / np.where(right_scale == 0, 1, right_scale) - 1
    if 1e-7 < abs(np.median(factor)) < 1e-2 and _alike(factor):
        return "norm epsilon", f"the norm is {np.median(factor):+.1e} off, as of another epsilon"
    wanted = (3, 4) if part == "norm2" else (0, 1)
    found = [_row(rows, shift), _row(rows, scale - 1)]
    for other, entry in _other_blocks(theirs, block):
        strange = rows_of_modulation(theirs, other, entry, frames)
        if strange is not None and [_row(strange, shift), _row(strange, scale - 1)] == [*wanted]:
            return "repeated block", f"the table is that of {other}"
    if near(scale, rows[wanted[1]], 1e-2) and found[0] == wanted[0]:
        return "modulation", "the scale is not increased by one"
    if None not in found and tuple(found) != wanted:
        names = " and ".join(ROWS[row] for row in found if row is not None)
        return "modulation", f"{names} of the table are taken as shift and scale"
    return None


def of_residual(ours: Values, theirs: Values, place: str, before: str, shape: Shape):
    """Why a sub-layer's answer is not added as it should be."""
    frames = shape.grid[0]
    block = place.removesuffix(".after_self_attn")
    rows = rows_of_modulation(theirs, block, before, frames)
    if rows is None:
        return None
    if place == block:  # after the feed-forward
        start = by_frame(ours[f"{block}.after_self_attn"], frames)
        start = start + by_frame(ours[f"{block}.cross_attn.o"], frames)
        answer, wanted = by_frame(ours[f"{block}.ffn.fc2"], frames), 5
    else:
        start = by_frame(ours[before], frames)
        answer, wanted = by_frame(ours[f"{block}.self_attn.o"], frames), 2
    out = by_frame(ours[place], frames)
    if near(out, answer * rows[wanted][:, :, None], 1e-3):
        return "missing term", "the residual is left out"
    if near(out, start, 1e-6):
        return "missing term", "the sub-layer's answer is left out"
    gate = slope(answer, out - start)
    if near(gate, np.ones_like(gate), 1e-3):
        return "missing gate", "the answer is added without its gate"
    row = _row(rows, gate)
    if row is not None and row != wanted:
        return "modulation", f"{ROWS[row]} of the table is taken as gate"
    return None


def _alike(values: np.ndarray) -> bool:
    """Most of them are near their median."""
    middle = np.median(values)
    return bool(np.median(np.abs(values - middle)) < 0.3 * abs(middle))


def _row(rows: np.ndarray, vector: np.ndarray) -> int | None:
    """Which row ``vector`` is."""
    gaps = [apart(vector, row) for row in rows]
    best = int(np.argmin(gaps))
    return best if gaps[best] < 1e-2 else None


def _other_blocks(values: Values, block: str) -> Iterator[tuple[str, str]]:
    """All blocks but one, each with what goes into it."""
    number, entry = 0, "patch_embedding"
    while f"blocks.{number}" in values:
        name = f"blocks.{number}"
        if name != block:
            yield name, entry
        number, entry = number + 1, name


def by_frame(tokens: np.ndarray, frames: int) -> np.ndarray:
    """``[B, L, D]`` as ``[B, F, P, D]``, float64."""
    return wide(tokens).reshape(tokens.shape[0], frames, -1, tokens.shape[-1])


def normed(x: np.ndarray, eps: float) -> np.ndarray:
    """Layer norm over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)


def line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``a, b`` of ``y = a x + b`` for each frame and feature, over its tokens (axis 2)."""
    mean_x, mean_y = x.mean(2, keepdims=True), y.mean(2, keepdims=True)
    spread = ((x - mean_x) ** 2).sum(2)
    a = ((x - mean_x) * (y - mean_y)).sum(2) / np.where(spread == 0, 1, spread)
    return a, mean_y[:, :, 0] - a * mean_x[:, :, 0]


def slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``a`` of ``y = a x`` for each frame and feature."""
    size = (x**2).sum(2)
    return (x * y).sum(2) / np.where(size == 0, 1, size)


def _first_near(
    tries: list[tuple[str, str, Callable[[], np.ndarray]]], seen: np.ndarray, bound: float = NEAR
) -> tuple[str, str] | None:
    """The kind and the words of the nearest explanation, if one is near enough."""
    gaps = list(_gaps(tries, seen))
    best = min(range(len(gaps)), key=gaps.__getitem__)
    return tries[best][:2] if gaps[best] < bound else None


def _gaps(
    tries: list[tuple[str, str, Callable[[], np.ndarray]]], seen: np.ndarray
) -> Iterator[float]:
    for _, _, make in tries:
        yield apart(make(), seen)
