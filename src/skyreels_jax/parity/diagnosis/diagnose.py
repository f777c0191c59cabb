"""From a departure to its likely cause: the first place that departs, and what kind it is.

General signs come first (a common factor, a common vector, an exchange, rounding), then what the
place itself suggests (:mod:`~skyreels_jax.parity.diagnosis.hypotheses`). ``unknown`` is an
answer too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from skyreels_jax.diffusion.sigmas import flow_sigmas
from skyreels_jax.parity.compare import Distance
from skyreels_jax.parity.diagnosis import attention_faults
from skyreels_jax.parity.diagnosis import hypotheses as tries
from skyreels_jax.parity.diagnosis.hypotheses import Shape, Values, apart, near, wide
from skyreels_jax.parity.diagnosis.linear_faults import INPUTS, Affine, of_linear, split_place

UNKNOWN: Final = "unknown"
NORMS: Final[Mapping[str, str]] = {
    "self_attn.norm_q": "self_attn.q",
    "self_attn.norm_k": "self_attn.k",
    "cross_attn.norm_q": "cross_attn.q",
    "cross_attn.norm_k": "cross_attn.k",
    "cross_attn.norm_k_img": "cross_attn.k_img",
}
# Rounding to bfloat16 leaves these bits of a float32 empty.
LOW_BITS: Final = np.uint32(0xFFFF)

Verdict = tuple[str, str]


@dataclass(frozen=True)
class Finding:
    """Where two sides first depart, and how.

    Attributes:
        place: of the transformer, or a stage.
        step: of the run; None where there is none.
        kind: of departure; ``unknown`` where nothing fits.
        detail: in words, with figures.
    """

    place: str
    step: int | None
    kind: str
    detail: str


def first_departure(distances: Sequence[Distance]) -> Distance | None:
    """The first that is out of its budget, in the order of the work."""
    return next((found for found in distances if not found.passed), None)


def diagnose_place(
    found: Distance,
    ours: Values,
    theirs: Values,
    names: Sequence[str],
    shape: Shape,
    lengths: np.ndarray,
    kernels: Mapping[str, Affine],
) -> Finding:
    """What kind of departure a place of the transformer shows.

    Args:
        found: the first that departs.
        ours: all values of the call.
        theirs: the reference's.
        names: of places, in order.
        shape: of the call.
        lengths: tokens of each text that are no padding.
        kernels: linear maps of the checkpoint, by place.
    """
    place = found.name
    a, b = wide(ours[place]), wide(theirs[place])
    size = f"relative distance {found.relative_l2:.1e}, budget {found.budget:.1e}"
    if a.size != b.size:
        return Finding(place, found.step, "shape", f"{a.shape} in place of {b.shape}")
    a = a.reshape(b.shape)
    checks: list[Callable[[], Verdict | None]] = [
        lambda: _not_finite(a, b),
        lambda: _rounded(ours[place], a, b),
        lambda: _epsilon(place, ours, a, b, shape),
        lambda: _scale(a, b),
        lambda: _heads(place, a, b, shape),
        lambda: of_linear(place, ours, a, kernels),
        lambda: _common_vector(a, b),
        lambda: _exchanged(place, a, theirs),
        lambda: _by_place(place, ours, theirs, names, shape, lengths),
        lambda: _reordered(a, b),
    ]
    for check in checks:
        if verdict := check():
            return Finding(place, found.step, verdict[0], f"{verdict[1]} ({size})")
    return Finding(place, found.step, UNKNOWN, f"no known mistake explains it ({size})")


def _not_finite(a: np.ndarray, b: np.ndarray) -> Verdict | None:
    bad = int(np.sum(~np.isfinite(a)))
    if bad and np.all(np.isfinite(b)):
        return "not finite", f"{bad} of {a.size} values are NaN or infinite"
    return None


def _rounded(raw: np.ndarray, a: np.ndarray, b: np.ndarray) -> Verdict | None:
    bits = np.asarray(raw, np.float32).ravel().view(np.uint32)
    if not np.any(bits & LOW_BITS) and np.any(b) and apart(a, b) < 2**-7:
        return "dtype", "every value is one of bfloat16, and near the reference's"
    return None


def _epsilon(
    place: str, ours: Values, a: np.ndarray, b: np.ndarray, shape: Shape
) -> Verdict | None:
    """A factor for each token that follows from another epsilon under its root."""
    block, part = split_place(place)
    source = NORMS.get(part)
    if source is None or f"{block}.{source}" not in ours:
        return None
    x = wide(ours[f"{block}.{source}"])
    mean_square = (x**2).mean(-1)
    factor = (a * b).sum(-1) / np.maximum((b * b).sum(-1), 1e-300)
    if not near(a, factor[..., None] * b, 1e-5) or np.allclose(factor, 1, atol=1e-7):
        return None
    for eps in (0.0, 1e-8, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2):
        expected = np.sqrt((mean_square + shape.eps) / (mean_square + eps))
        if apart(factor - 1, expected - 1) < 0.2:
            return "norm epsilon", f"epsilon {eps:g} in place of {shape.eps:g}"
    return None


def _common_factor(a: np.ndarray, b: np.ndarray) -> float | None:
    """``c`` where ``a`` is ``c b``."""
    size = float((b * b).sum())
    factor = float((a * b).sum()) / size if size else 1.0
    rest = apart(a, factor * b) if factor else np.inf
    return factor if rest < max(1e-6, tries.NEARER * abs(factor - 1)) else None


def _scale(a: np.ndarray, b: np.ndarray) -> Verdict | None:
    factor = _common_factor(a, b)
    if factor is None or abs(factor - 1) < 1e-7:
        return None
    kind = "sign" if abs(factor + 1) < 1e-3 else "scale"
    return kind, f"ours is {factor:.6g} times the reference"


def _heads(place: str, a: np.ndarray, b: np.ndarray, shape: Shape) -> Verdict | None:
    """Whole heads in another order."""
    if "attn." not in place or a.shape[-1] % shape.heads or shape.heads == 1:
        return None
    ours, theirs = (x.reshape(-1, shape.heads, a.shape[-1] // shape.heads) for x in (a, b))
    order = []
    for head in range(shape.heads):
        gaps = [apart(ours[:, head], theirs[:, other]) for other in range(shape.heads)]
        best = int(np.argmin(gaps))
        if gaps[best] > 1e-3:
            return None
        order.append(best)
    if order == list(range(shape.heads)) or sorted(order) != list(range(shape.heads)):
        return None
    return "permuted heads", f"our heads are the reference's {order}"


def _common_vector(a: np.ndarray, b: np.ndarray) -> Verdict | None:
    """The same difference at every token."""
    gap, values = ((x.reshape(-1, a.shape[-1])) for x in (a - b, b))
    if np.linalg.norm(values - values.mean(0)) < 1e-3 * np.linalg.norm(values):
        return None  # All tokens are alike: any difference is the same at each.
    mean = gap.mean(0)
    if np.linalg.norm(gap - mean) < 1e-3 * np.linalg.norm(gap):
        return "missing bias", "the difference is the same vector at every token"
    return None


def _exchanged(place: str, a: np.ndarray, theirs: Values) -> Verdict | None:
    """Ours is the reference's value of another place."""
    block, part = split_place(place)
    siblings = [f"{block}.{name}" for name in (*INPUTS, *NORMS, "cross_attn.v", "cross_attn.k")]
    siblings += [f"{block}.cross_attn.{name}" for name in ("k_img", "v_img")]
    for other in siblings:
        if other != place and other in theirs and near(a, wide(theirs[other]), 1e-3):
            return "exchanged", f"ours is the reference's {other}"
    return None


def _by_place(
    place: str,
    ours: Values,
    theirs: Values,
    names: Sequence[str],
    shape: Shape,
    lengths: np.ndarray,
) -> Verdict | None:
    """What is known to go wrong just here."""
    block, part = split_place(place)
    if part == "self_attn.heads":
        return attention_faults.of_self_attention(ours, block, shape)
    if part == "cross_attn.heads":
        return attention_faults.of_cross_attention(ours, block, shape, lengths)
    if part == "ffn.activation":
        return tries.of_activation(ours[f"{block}.ffn.fc1"], ours[place])
    if block and part in ("norm1", "norm2"):
        before = _entry(block)
        return tries.of_modulated(ours, theirs, place, before, shape)
    if part == "after_self_attn" or (part == "" and block):
        if f"{block}.norm1" not in ours:
            return None
        return tries.of_residual(ours, theirs, place, _entry(block), shape)
    if part == "sinusoid":
        return _sinusoid(wide(ours[place]), wide(theirs[place]))
    return None


def _sinusoid(a: np.ndarray, b: np.ndarray) -> Verdict | None:
    a = a.reshape(b.shape)
    half = b.shape[-1] // 2
    if near(a, np.concatenate([b[..., half:], b[..., :half]], -1), 1e-3):
        return "order of elements", "sines come before cosines"
    return None


def _reordered(a: np.ndarray, b: np.ndarray) -> Verdict | None:
    if (
        apart(a, b) > 1e-2
        and a.size <= 1 << 24
        and near(np.sort(a.ravel()), np.sort(b.ravel()), 1e-4)
    ):
        return "order of elements", "the same values in another order"
    return None


def _entry(block: str) -> str:
    """What a block is given."""
    number = int(block.partition(".")[2])
    return f"blocks.{number - 1}" if number else "patch_embedding"


def diagnose_stage(found: Distance, ours: Values, theirs: Values, steps: int) -> Finding:
    """What kind of departure a stage outside the transformer shows."""
    name = found.name
    size = f"relative distance {found.relative_l2:.1e}, budget {found.budget:.1e}"
    a, b = wide(ours.get(name, np.zeros(0))), wide(theirs[name])
    kind, detail = UNKNOWN, "no known mistake explains it"
    if name in ("timesteps", "sigmas"):
        kind, detail = _schedule(ours, theirs)
    elif a.size != b.size:
        kind, detail = "steps", f"there are {a.size} values in place of {b.size}"
    elif name == "mask" and near(a, 1 - b):
        kind, detail = "inverted", "ones and zeros are exchanged"
    elif (verdict := _scale(a, b)) or (verdict := _affine_by_channel(a, b)):
        kind, detail = verdict
    elif name.startswith("latents"):
        last = found.step == steps - 1
        kind = "solver"
        detail = "the transformer agrees on the same inputs, what is made of its answers does not"
        detail += "; only after the last step" if last else ""
    elif verdict := _reordered(a, b):
        kind, detail = verdict
    return Finding(name, found.step, kind, f"{detail} ({size})")


def _schedule(ours: Values, theirs: Values) -> Verdict:
    a, b = wide(ours["timesteps"]), wide(theirs["timesteps"])
    if len(a) != len(b):
        return "steps", f"{len(a)} steps in place of {len(b)}"
    sigmas = wide(ours["sigmas"])
    for shift in np.arange(1, 13, 0.5):
        if near(flow_sigmas(len(a), float(shift)).sigmas, sigmas, 1e-5):
            return "shift", f"the levels are those of shift {shift:g}"
    return UNKNOWN, "other noise levels"


def _affine_by_channel(a: np.ndarray, b: np.ndarray) -> Verdict | None:
    """Each channel (axis 1) of ours is the reference's, scaled and moved."""
    if a.ndim < 3 or a.shape != b.shape:
        return None
    ours, theirs = (np.moveaxis(x, 1, 0).reshape(x.shape[1], -1) for x in (a, b))
    centred = theirs - theirs.mean(1, keepdims=True)
    slope = (ours * centred).sum(1) / np.maximum((centred**2).sum(1), 1e-300)
    fitted = slope[:, None] * centred + ours.mean(1, keepdims=True)
    if near(ours, fitted, 1e-4) and not near(ours, theirs, 1e-4):
        return "normalisation", "each channel is the reference's, scaled and moved"
    return None
