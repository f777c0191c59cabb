"""From the first activation that diverges to its likely cause.

General signs come first (a common factor, a common vector, an exchange, rounding), then what the
activation itself suggests (:mod:`~skyreels_jax.parity.diagnosis.hypotheses`). ``unknown`` is an
answer too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from skyreels_jax.diffusion.unipc import flow_sigmas
from skyreels_jax.parity.compare import Distance
from skyreels_jax.parity.diagnosis import attention_faults
from skyreels_jax.parity.diagnosis import hypotheses as tries
from skyreels_jax.parity.diagnosis.hypotheses import (
    CallShape,
    Explanation,
    float64,
    is_near,
    relative_distance,
)
from skyreels_jax.parity.diagnosis.linear_faults import (
    LINEAR_INPUTS,
    LinearMap,
    explain_linear,
    split_name,
)
from skyreels_jax.parity.recording import Arrays

_UNKNOWN: Final = "unknown"
_NORM_INPUTS: Final[Mapping[str, str]] = {
    "self_attn.norm_q": "self_attn.q",
    "self_attn.norm_k": "self_attn.k",
    "cross_attn.norm_q": "cross_attn.q",
    "cross_attn.norm_k": "cross_attn.k",
    "cross_attn.norm_k_img": "cross_attn.k_img",
}
# Rounding to bfloat16 leaves these bits of a float32 empty.
_LOW_BITS: Final = np.uint32(0xFFFF)


@dataclass(frozen=True)
class Finding:
    """Where two sides first diverge, and how.

    Attributes:
        name: of the activation or stage.
        step: of the run; None where there is none.
        kind: of divergence; ``unknown`` where nothing fits.
        detail: in words and numbers.
    """

    name: str
    step: int | None
    kind: str
    detail: str


def diagnose_activation(
    found: Distance,
    ours: Arrays,
    theirs: Arrays,
    shape: CallShape,
    lengths: np.ndarray,
    maps: Mapping[str, LinearMap],
) -> Finding:
    """Find out how an activation of the transformer diverges.

    Args:
        found: the first that diverges.
        ours: all values of the call.
        theirs: the reference's.
        shape: of the call.
        lengths: tokens of each text that are no padding.
        maps: linear maps of the checkpoint, by names of their outputs.
    """
    name = found.name
    a, b = float64(ours[name]), float64(theirs[name])
    size = f"relative distance {found.relative_l2:.1e}, budget {found.budget:.1e}"
    if a.size != b.size:
        return Finding(name, found.step, "shape", f"{a.shape} in name of {b.shape}")
    a = a.reshape(b.shape)
    checks: list[Callable[[], Explanation | None]] = [
        lambda: _not_finite(a, b),
        lambda: _rounded(ours[name], a, b),
        lambda: _epsilon(name, ours, a, b, shape),
        lambda: _scale(a, b),
        lambda: _heads(name, a, b, shape),
        lambda: explain_linear(name, ours, a, maps),
        lambda: _common_vector(a, b),
        lambda: _exchanged(name, a, theirs),
        lambda: _by_name(name, ours, theirs, shape, lengths),
        lambda: _reordered(a, b),
    ]
    for check in checks:
        if explanation := check():
            return Finding(name, found.step, explanation[0], f"{explanation[1]} ({size})")
    return Finding(name, found.step, _UNKNOWN, f"no known mistake explains it ({size})")


def _not_finite(a: np.ndarray, b: np.ndarray) -> Explanation | None:
    bad = int(np.sum(~np.isfinite(a)))
    if bad and np.all(np.isfinite(b)):
        return "not finite", f"{bad} of {a.size} values are NaN or infinite"
    return None


def _rounded(raw: np.ndarray, a: np.ndarray, b: np.ndarray) -> Explanation | None:
    bits = np.asarray(raw, np.float32).ravel().view(np.uint32)
    if not np.any(bits & _LOW_BITS) and np.any(b) and relative_distance(a, b) < 2**-7:
        return "dtype", "every value is one of bfloat16, and near the reference's"
    return None


def _epsilon(
    name: str, ours: Arrays, a: np.ndarray, b: np.ndarray, shape: CallShape
) -> Explanation | None:
    """Find a factor for each token that follows from another epsilon under its root."""
    block, within = split_name(name)
    source = _NORM_INPUTS.get(within)
    if source is None or f"{block}.{source}" not in ours:
        return None
    x = float64(ours[f"{block}.{source}"])
    mean_square = (x**2).mean(-1)
    factor = (a * b).sum(-1) / np.maximum((b * b).sum(-1), 1e-300)
    if not is_near(a, factor[..., None] * b, 1e-5) or np.allclose(factor, 1, atol=1e-7):
        return None
    for eps in (0.0, 1e-8, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2):
        expected = np.sqrt((mean_square + shape.eps) / (mean_square + eps))
        if relative_distance(factor - 1, expected - 1) < 0.2:
            return "norm epsilon", f"epsilon {eps:g} in name of {shape.eps:g}"
    return None


def _common_factor(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return ``c`` where ``a`` is ``c b``."""
    size = float((b * b).sum())
    factor = float((a * b).sum()) / size if size else 1.0
    rest = relative_distance(a, factor * b) if factor else np.inf
    return factor if rest < max(1e-6, tries.NEARER * abs(factor - 1)) else None


def _scale(a: np.ndarray, b: np.ndarray) -> Explanation | None:
    factor = _common_factor(a, b)
    if factor is None or abs(factor - 1) < 1e-7:
        return None
    kind = "sign" if abs(factor + 1) < 1e-3 else "scale"
    return kind, f"ours is {factor:.6g} times the reference"


def _heads(name: str, a: np.ndarray, b: np.ndarray, shape: CallShape) -> Explanation | None:
    """Find whole heads in another order."""
    if "attn." not in name or a.shape[-1] % shape.heads or shape.heads == 1:
        return None
    ours, theirs = (x.reshape(-1, shape.heads, a.shape[-1] // shape.heads) for x in (a, b))
    order = []
    for head in range(shape.heads):
        gaps = [relative_distance(ours[:, head], theirs[:, other]) for other in range(shape.heads)]
        best = int(np.argmin(gaps))
        if gaps[best] > 1e-3:
            return None
        order.append(best)
    if order == list(range(shape.heads)) or sorted(order) != list(range(shape.heads)):
        return None
    return "permuted heads", f"our heads are the reference's {order}"


def _common_vector(a: np.ndarray, b: np.ndarray) -> Explanation | None:
    """Find the same difference at every token."""
    gap, values = ((x.reshape(-1, a.shape[-1])) for x in (a - b, b))
    if np.linalg.norm(values - values.mean(0)) < 1e-3 * np.linalg.norm(values):
        return None  # All tokens are alike: any difference is the same at each.
    mean = gap.mean(0)
    if np.linalg.norm(gap - mean) < 1e-3 * np.linalg.norm(gap):
        return "missing bias", "the difference is the same vector at every token"
    return None


def _exchanged(name: str, a: np.ndarray, theirs: Arrays) -> Explanation | None:
    """Find our values among the reference's other activations."""
    block, within = split_name(name)
    keys_and_values = (f"cross_attn.{one}" for one in ("v", "k", "k_img", "v_img"))
    for one in (*LINEAR_INPUTS, *_NORM_INPUTS, *keys_and_values):
        other = f"{block}.{one}"
        if other != name and other in theirs and is_near(a, float64(theirs[other]), 1e-3):
            return "exchanged", f"ours is the reference's {other}"
    return None


def _by_name(
    name: str,
    ours: Arrays,
    theirs: Arrays,
    shape: CallShape,
    lengths: np.ndarray,
) -> Explanation | None:
    """Try what is known to go wrong just here."""
    block, within = split_name(name)
    if within == "self_attn.heads":
        return attention_faults.explain_self_attention(ours, block, shape)
    if within == "cross_attn.heads":
        return attention_faults.explain_cross_attention(ours, block, shape, lengths)
    if within == "ffn.activation":
        return tries.explain_activation_function(ours[f"{block}.ffn.fc1"], ours[name])
    if block and within in ("norm1", "norm2"):
        before = _entry(block)
        return tries.explain_modulated_norm(ours, theirs, name, before, shape)
    if within == "after_self_attn" or (within == "" and block):
        if f"{block}.norm1" not in ours:
            return None
        return tries.explain_residual(ours, theirs, name, _entry(block), shape)
    if within == "sinusoid":
        return _sinusoid(float64(ours[name]), float64(theirs[name]))
    return None


def _sinusoid(a: np.ndarray, b: np.ndarray) -> Explanation | None:
    a = a.reshape(b.shape)
    half = b.shape[-1] // 2
    if is_near(a, np.concatenate([b[..., half:], b[..., :half]], -1), 1e-3):
        return "order of elements", "sines come before cosines"
    return None


def _reordered(a: np.ndarray, b: np.ndarray) -> Explanation | None:
    if (
        relative_distance(a, b) > 1e-2
        and a.size <= 1 << 24
        and is_near(np.sort(a.ravel()), np.sort(b.ravel()), 1e-4)
    ):
        return "order of elements", "the same values in another order"
    return None


def _entry(block: str) -> str:
    """Return the name of a block's input."""
    number = int(block.partition(".")[2])
    return f"blocks.{number - 1}" if number else "patch_embedding"


def diagnose_stage(found: Distance, ours: Arrays, theirs: Arrays, steps: int) -> Finding:
    """Find out how a stage outside the transformer diverges."""
    name = found.name
    size = f"relative distance {found.relative_l2:.1e}, budget {found.budget:.1e}"
    a, b = float64(ours.get(name, np.zeros(0))), float64(theirs[name])
    kind, detail = _UNKNOWN, "no known mistake explains it"
    if name in ("timesteps", "sigmas"):
        kind, detail = _schedule(ours, theirs)
    elif a.size != b.size:
        kind, detail = "steps", f"there are {a.size} values in name of {b.size}"
    elif name == "mask" and is_near(a, 1 - b):
        kind, detail = "inverted", "ones and zeros are exchanged"
    elif (explanation := _scale(a, b)) or (explanation := _affine_by_channel(a, b)):
        kind, detail = explanation
    elif name.startswith("latents"):
        last = found.step == steps - 1
        kind = "solver"
        detail = "the transformer agrees on the same inputs, what is made of its outputs does not"
        detail += "; only after the last step" if last else ""
    elif explanation := _reordered(a, b):
        kind, detail = explanation
    return Finding(name, found.step, kind, f"{detail} ({size})")


def _schedule(ours: Arrays, theirs: Arrays) -> Explanation:
    a, b = float64(ours["timesteps"]), float64(theirs["timesteps"])
    if len(a) != len(b):
        return "steps", f"{len(a)} steps in name of {len(b)}"
    sigmas = float64(ours["sigmas"])
    for shift in np.arange(1, 13, 0.5):
        if is_near(flow_sigmas(len(a), float(shift)).sigmas, sigmas, 1e-5):
            return "shift", f"the sigmas are those of shift {shift:g}"
    return _UNKNOWN, "other sigmas"


def _affine_by_channel(a: np.ndarray, b: np.ndarray) -> Explanation | None:
    """Find channels (axis 1) of ours that are the reference's, scaled and moved."""
    if a.ndim < 3 or a.shape != b.shape:
        return None
    ours, theirs = (np.moveaxis(x, 1, 0).reshape(x.shape[1], -1) for x in (a, b))
    centred = theirs - theirs.mean(1, keepdims=True)
    slope = (ours * centred).sum(1) / np.maximum((centred**2).sum(1), 1e-300)
    fitted = slope[:, None] * centred + ours.mean(1, keepdims=True)
    if is_near(ours, fitted, 1e-4) and not is_near(ours, theirs, 1e-4):
        return "normalisation", "each channel is the reference's, scaled and moved"
    return None
