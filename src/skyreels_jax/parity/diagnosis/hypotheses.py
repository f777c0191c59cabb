"""Explanations of a divergence, each tried on what was recorded: NumPy, float64, no model.

Every function takes our values of a call of the transformer and the reference's, and says which
known mistake would turn the reference's into ours; ``None`` where none does.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from skyreels_jax.parity.recording import Arrays

# The kind of a known mistake, and words for it; and with a function that makes the mistake.
Explanation = tuple[str, str]
Hypothesis = tuple[str, str, Callable[[], np.ndarray]]
# Relative distance at which a hypothesis explains what is seen, and by how much it must be nearer
# than saying nothing.
_NEAR: Final = 1e-4
NEARER: Final = 0.05


@dataclass(frozen=True)
class CallShape:
    """The shape of a call of the transformer.

    Attributes:
        grid: latent frames, rows and columns of tokens.
        heads: number of heads of every attention.
        eps: epsilon of the norms.
    """

    grid: tuple[int, int, int]
    heads: int
    eps: float


def is_near(a: np.ndarray, b: np.ndarray, bound: float = _NEAR) -> bool:
    """Whether the relative distance of ``a`` from ``b`` is below ``bound``."""
    return a.shape == b.shape and relative_distance(a, b) < bound


def relative_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the relative L2 distance of ``a`` from ``b``."""
    size = float(np.linalg.norm(b))
    return float(np.linalg.norm(a - b)) / size if size else math.inf


def float64(values: np.ndarray) -> np.ndarray:
    """Convert to float64."""
    return np.asarray(values, np.float64)


def explain_activation_function(before: np.ndarray, after: np.ndarray) -> Explanation | None:
    """Find the function that turns our values before the activation into those after it."""
    x = float64(before)
    error = np.vectorize(math.erf, otypes=[float])
    return nearest_explanation(
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
        float64(after),
        # The two forms of GELU are 5e-4 relative_distance.
        bound=2e-5,
    )


def modulation_rows(theirs: Arrays, block: str, before: str, frames: int) -> np.ndarray | None:
    """Work out the six vectors of a block, ``[6, B, F, D]``, from the reference's values.

    In the model's order: shift, scale and gate of self-attention, then of the feed-forward.
    """
    start = split_frames(theirs[before], frames)
    middle = split_frames(theirs[f"{block}.after_self_attn"], frames)
    end = middle + split_frames(theirs[f"{block}.cross_attn.o"], frames)
    out = split_frames(theirs[block], frames)
    if start.shape[2] < 2:
        return None
    scale, shift = fit_line(normalise(start, 1e-6), split_frames(theirs[f"{block}.norm1"], frames))
    scale_ffn, shift_ffn = fit_line(
        normalise(end, 1e-6), split_frames(theirs[f"{block}.norm2"], frames)
    )
    gate = fit_slope(split_frames(theirs[f"{block}.self_attn.o"], frames), middle - start)
    gate_ffn = fit_slope(split_frames(theirs[f"{block}.ffn.fc2"], frames), out - end)
    return np.stack([shift, scale - 1, gate, shift_ffn, scale_ffn - 1, gate_ffn])


_ROWS: Final = ("shift", "scale", "gate", "shift of the ffn", "scale of the ffn", "gate of the ffn")


def explain_modulated_norm(
    ours: Arrays, theirs: Arrays, name: str, before: str, shape: CallShape
) -> Explanation | None:
    """Find out why ``norm1`` or ``norm2`` is not the modulated norm of what comes before."""
    block, _, norm = name.rpartition(".")
    frames = shape.grid[0]
    rows = modulation_rows(theirs, block, before, frames)
    if rows is None:
        return None
    x = split_frames(ours[before], frames)
    if norm == "norm2":
        o = split_frames(ours[f"{block}.cross_attn.o"], frames)
        x = split_frames(ours[f"{block}.after_self_attn"], frames) + o
    scale, shift = fit_line(normalise(x, shape.eps), split_frames(ours[name], frames))
    right_scale = rows[4 if norm == "norm2" else 1] + 1
    factor = scale / np.where(right_scale == 0, 1, right_scale) - 1
    if 1e-7 < abs(np.median(factor)) < 1e-2 and _alike(factor):
        return "norm epsilon", f"the norm is {np.median(factor):+.1e} off, as of another epsilon"
    wanted = (3, 4) if norm == "norm2" else (0, 1)
    found = [_row(rows, shift), _row(rows, scale - 1)]
    for other, entry in _other_blocks(theirs, block):
        strange = modulation_rows(theirs, other, entry, frames)
        if strange is not None and [_row(strange, shift), _row(strange, scale - 1)] == [*wanted]:
            return "repeated block", f"the table is that of {other}"
    if is_near(scale, rows[wanted[1]], 1e-2) and found[0] == wanted[0]:
        return "modulation", "the scale is not increased by one"
    if None not in found and tuple(found) != wanted:
        names = " and ".join(_ROWS[row] for row in found if row is not None)
        return "modulation", f"{names} of the table are taken as shift and scale"
    return None


def explain_residual(
    ours: Arrays, theirs: Arrays, name: str, before: str, shape: CallShape
) -> Explanation | None:
    """Find out why a sub-layer's output is not added as it should be."""
    frames = shape.grid[0]
    block = name.removesuffix(".after_self_attn")
    rows = modulation_rows(theirs, block, before, frames)
    if rows is None:
        return None
    if name == block:  # after the feed-forward
        start = split_frames(ours[f"{block}.after_self_attn"], frames)
        start = start + split_frames(ours[f"{block}.cross_attn.o"], frames)
        output, wanted = split_frames(ours[f"{block}.ffn.fc2"], frames), 5
    else:
        start = split_frames(ours[before], frames)
        output, wanted = split_frames(ours[f"{block}.self_attn.o"], frames), 2
    out = split_frames(ours[name], frames)
    if is_near(out, output * rows[wanted][:, :, None], 1e-3):
        return "missing term", "the residual is left out"
    if is_near(out, start, 1e-6):
        return "missing term", "the sub-layer's output is left out"
    gate = fit_slope(output, out - start)
    if is_near(gate, np.ones_like(gate), 1e-3):
        return "missing gate", "the output is added without its gate"
    row = _row(rows, gate)
    if row is not None and row != wanted:
        return "modulation", f"{_ROWS[row]} of the table is taken as gate"
    return None


def _alike(values: np.ndarray) -> bool:
    """Whether most values are near their median."""
    middle = np.median(values)
    return bool(np.median(np.abs(values - middle)) < 0.3 * abs(middle))


def _row(rows: np.ndarray, vector: np.ndarray) -> int | None:
    """Return the index of the row that ``vector`` is."""
    gaps = [relative_distance(vector, row) for row in rows]
    best = int(np.argmin(gaps))
    return best if gaps[best] < 1e-2 else None


def _other_blocks(values: Arrays, block: str) -> Iterator[tuple[str, str]]:
    """Yield all blocks but one, each with the name of its input."""
    number, entry = 0, "patch_embedding"
    while f"blocks.{number}" in values:
        name = f"blocks.{number}"
        if name != block:
            yield name, entry
        number, entry = number + 1, name


def split_frames(tokens: np.ndarray, frames: int) -> np.ndarray:
    """Reshape ``[B, L, D]`` to ``[B, F, P, D]``, float64."""
    return float64(tokens).reshape(tokens.shape[0], frames, -1, tokens.shape[-1])


def normalise(x: np.ndarray, eps: float) -> np.ndarray:
    """Normalise over the last axis, without scale and shift."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)


def fit_line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit ``a, b`` of ``y = a x + b`` for each frame and feature, over its tokens (axis 2)."""
    mean_x, mean_y = x.mean(2, keepdims=True), y.mean(2, keepdims=True)
    spread = ((x - mean_x) ** 2).sum(2)
    a = ((x - mean_x) * (y - mean_y)).sum(2) / np.where(spread == 0, 1, spread)
    return a, mean_y[:, :, 0] - a * mean_x[:, :, 0]


def fit_slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Fit ``a`` of ``y = a x`` for each frame and feature."""
    size = (x**2).sum(2)
    return (x * y).sum(2) / np.where(size == 0, 1, size)


def nearest_explanation(
    tries: Sequence[Hypothesis], seen: np.ndarray, bound: float = _NEAR
) -> Explanation | None:
    """Return the hypothesis that makes what is nearest to ``seen``, if it is near enough."""
    distances = [relative_distance(make(), seen) for _, _, make in tries]
    best = int(np.argmin(distances))
    return tries[best][:2] if distances[best] < bound else None
