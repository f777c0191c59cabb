"""Explanations of a departure, each tried on what was recorded: NumPy, float64, no model.

Every function takes our values of a call of the transformer and the reference's, and says which
known mistake would turn the reference's into ours; ``None`` where none does.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

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


def of_activation(before: np.ndarray, after: np.ndarray) -> tuple[str, str] | None:
    """Which function turns our values before the activation into those after it."""
    x = wide(before)
    error = np.vectorize(math.erf, otypes=[float])
    return first_near(
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


def first_near(
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
