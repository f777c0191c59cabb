"""What can go wrong with a linear map: tried with the checkpoint's own kernels and biases."""

from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

import jax.numpy as jnp
import numpy as np

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.parity.diagnosis.hypotheses import Values, apart, near, wide
from skyreels_jax.parity.diagnosis.places import HEAD, block_sites
from skyreels_jax.weights.convert import rename
from skyreels_jax.weights.transformer_rules import TRANSFORMER_IGNORED, transformer_rules

# Linear maps, by where they are in a block or behind the blocks: what goes in.
INPUTS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("self_attn.q", "self_attn.k", "self_attn.v"), "norm1"),
    "self_attn.o": "self_attn.heads",
    "cross_attn.q": "norm3",
    "cross_attn.o": "cross_attn.heads",
    "ffn.fc1": "norm2",
    "ffn.fc2": "ffn.activation",
    "head": "head.norm",
}


class Affine(NamedTuple):
    """``y = x @ kernel + bias``, float64."""

    kernel: np.ndarray
    bias: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Along the last axis."""
        return x @ self.kernel + self.bias


def split_place(place: str) -> tuple[str, str]:
    """A place's block (empty outside) and its name within."""
    if not place.startswith("blocks."):
        return "", place
    _, number, *rest = place.split(".", 2)
    return f"blocks.{number}", rest[0] if rest else ""


def kernels_of(checkpoint: Checkpoint, place: str) -> dict[str, Affine]:
    """The linear map of a place and all it might be mistaken for, read from the checkpoint.

    Args:
        checkpoint: whose transformer's file is read.
        place: of a linear map's output; for others nothing is read.

    Returns:
        by place: itself first, its siblings, and the same in other blocks.
    """
    block, part = split_place(place)
    if part not in INPUTS:
        return {}
    config = checkpoint.config
    sites = (*block_sites(image=config.model_type == "i2v"), *HEAD)
    theirs = {site.after: site.theirs for site in sites}
    wanted = {_joined(block, name): _joined(block, theirs[name]) for name in _alike(part)}
    for number in range(config.num_layers) if block else ():
        wanted[f"blocks.{number}.{part}"] = f"blocks.{number}.{theirs[part]}"
    names = {f"{path}.{end}" for path in wanted.values() for end in ("weight", "bias")}
    named = rename(
        transformer_rules(config),
        checkpoint.layout.tensors(),
        checkpoint.layout.dialect,
        "diffusers",
        ignored=TRANSFORMER_IGNORED,
    )
    read = {name: wide(np.asarray(value, np.float32)) for name, value in named if name in names}
    return {
        name: Affine(read[f"{path}.weight"].T, read[f"{path}.bias"])
        for name, path in wanted.items()
    }


def _joined(block: str, name: str) -> str:
    return f"{block}.{name}" if block else name


def _alike(part: str) -> Iterator[str]:
    """Itself and its siblings of the same shape."""
    yield part
    owner = part.partition(".")[0]
    if owner.endswith("attn"):
        names = (f"{where}.{name}" for where in (owner, "self_attn") for name in "qkvo")
        yield from (name for name in names if name != part and name in INPUTS)


def of_linear(
    place: str, ours: Values, a: np.ndarray, kernels: Mapping[str, Affine]
) -> tuple[str, str] | None:
    """Why our output is not the linear map of our input.

    Args:
        place: of the output.
        ours: our values, by place.
        a: our output, float64.
        kernels: from :func:`kernels_of`.
    """
    block, part = split_place(place)
    right = kernels.get(place)
    if right is None:
        return None
    x = wide(ours[_joined(block, INPUTS[part])])
    bare = x @ right.kernel
    half = right.kernel.astype(jnp.bfloat16).astype(np.float64)
    tries: list[tuple[str, str, Callable[[], np.ndarray]]] = [
        ("missing bias", "the bias is left out", lambda: bare),
        ("dtype", "the kernel is rounded to bfloat16", lambda: x @ half + right.bias),
    ]
    if right.kernel.shape[0] == right.kernel.shape[1]:
        turned = right.kernel.T
        tries.append(("transposition", "the kernel is transposed", lambda: x @ turned + right.bias))
    for name, other in kernels.items():
        if name != place and other.kernel.shape == right.kernel.shape:
            kind = "repeated block" if split_place(name)[1] == part else "exchanged"
            tries.append((kind, f"kernel and bias are those of {name}", lambda o=other: o(x)))
            told = f"the kernel is that of {name}"
            tries.append((kind, told, lambda o=other: x @ o.kernel + right.bias))
    gaps = [apart(make(), a) for _, _, make in tries]
    best = int(np.argmin(gaps))
    # Nearer than the map as it should be, from which a small fault is not far.
    if gaps[best] < min(1e-4, 0.1 * apart(right(x), a)):
        return tries[best][:2]
    return _factor(a - right.bias, bare) or _order(a, right(x)) or _bias(a - bare, right.bias)


def _factor(seen: np.ndarray, bare: np.ndarray) -> tuple[str, str] | None:
    factor = float((seen * bare).sum() / (bare * bare).sum())
    if abs(factor - 1) > 1e-5 and near(seen, factor * bare, 0.05 * abs(factor - 1)):
        return "scale", f"the kernel is {factor:.6g} times the checkpoint's"
    return None


def _order(a: np.ndarray, expected: np.ndarray) -> tuple[str, str] | None:
    """Features of the output in another order."""
    ours, theirs = (x.reshape(-1, x.shape[-1]).T for x in (a, expected))
    if len(ours) > 1 << 12:
        return None
    picks = [int(np.argmin(np.linalg.norm(theirs - row, axis=1))) for row in ours]
    if picks != sorted(picks) and near(ours, theirs[picks], 1e-4):
        return "order of elements", "features of the output are in another order"
    return None


def _bias(seen: np.ndarray, right: np.ndarray) -> tuple[str, str] | None:
    rows = seen.reshape(-1, seen.shape[-1])
    bias = rows.mean(0)
    if near(rows, np.broadcast_to(bias, rows.shape), 1e-4) and not near(bias, right, 1e-3):
        return "bias", "the kernel is right, the bias is another"
    return None
