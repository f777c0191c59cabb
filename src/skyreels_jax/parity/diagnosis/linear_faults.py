"""What can go wrong with a linear map: tried with the checkpoint's own kernels and biases."""

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

import jax.numpy as jnp
import numpy as np

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.parity.activation_sites import HEAD_SITES, block_sites
from skyreels_jax.parity.diagnosis.hypotheses import (
    Explanation,
    Hypothesis,
    float64,
    is_near,
    relative_distance,
)
from skyreels_jax.parity.recording import Arrays
from skyreels_jax.weights.components.transformer import stored_transformer

# The input of each linear layer, by their names in a block or behind the blocks.
LINEAR_INPUTS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("self_attn.q", "self_attn.k", "self_attn.v"), "norm1"),
    "self_attn.o": "self_attn.heads",
    "cross_attn.q": "norm3",
    "cross_attn.o": "cross_attn.heads",
    "ffn.fc1": "norm2",
    "ffn.fc2": "ffn.activation",
    "head": "head.norm",
}


class LinearMap(NamedTuple):
    """``y = x @ kernel + bias``, float64."""

    kernel: np.ndarray
    bias: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Map the last axis."""
        return x @ self.kernel + self.bias


def split_name(activation: str) -> tuple[str, str]:
    """Split the name of an activation into its block (empty outside) and its name within."""
    if not activation.startswith("blocks."):
        return "", activation
    _, number, *rest = activation.split(".", 2)
    return f"blocks.{number}", rest[0] if rest else ""


def read_linear_maps(checkpoint: Checkpoint, activation: str) -> dict[str, LinearMap]:
    """Read the linear map behind an activation and all it might be mistaken for.

    Args:
        checkpoint: whose transformer's file is read.
        activation: output of a linear layer; for others nothing is read.

    Returns:
        by name: itself first, its siblings, and the same in other blocks.
    """
    block, name = split_name(activation)
    if name not in LINEAR_INPUTS:
        return {}
    config = checkpoint.config
    sites = (*block_sites(image=config.model_type == "i2v"), *HEAD_SITES)
    theirs = {site.output_name: site.torch_module for site in sites}
    wanted = {_joined(block, one): _joined(block, theirs[one]) for one in _alike(name)}
    for number in range(config.num_layers) if block else ():
        wanted[f"blocks.{number}.{name}"] = f"blocks.{number}.{theirs[name]}"
    names = {f"{path}.{end}" for path in wanted.values() for end in ("weight", "bias")}
    named = stored_transformer(checkpoint.layout).tensors("diffusers")
    read = {name: float64(np.asarray(value, np.float32)) for name, value in named if name in names}
    return {
        name: LinearMap(read[f"{path}.weight"].T, read[f"{path}.bias"])
        for name, path in wanted.items()
    }


def _joined(block: str, name: str) -> str:
    return f"{block}.{name}" if block else name


def _alike(layer: str) -> Iterator[str]:
    """Yield a layer and its siblings of the same shape."""
    yield layer
    owner = layer.partition(".")[0]
    if owner.endswith("attn"):
        names = (f"{where}.{name}" for where in (owner, "self_attn") for name in "qkvo")
        yield from (name for name in names if name != layer and name in LINEAR_INPUTS)


def explain_linear(
    activation: str, ours: Arrays, a: np.ndarray, maps: Mapping[str, LinearMap]
) -> Explanation | None:
    """Find out why our output is not the linear map of our input.

    Args:
        activation: name of the output.
        ours: our values, by name.
        a: our output, float64.
        maps: from :func:`read_linear_maps`.
    """
    block, layer = split_name(activation)
    right = maps.get(activation)
    if right is None:
        return None
    x = float64(ours[_joined(block, LINEAR_INPUTS[layer])])
    bare = x @ right.kernel
    half = right.kernel.astype(jnp.bfloat16).astype(np.float64)
    tries: list[Hypothesis] = [
        ("missing bias", "the bias is left out", lambda: bare),
        ("dtype", "the kernel is rounded to bfloat16", lambda: x @ half + right.bias),
    ]
    if right.kernel.shape[0] == right.kernel.shape[1]:
        turned = right.kernel.T
        tries.append(("transposition", "the kernel is transposed", lambda: x @ turned + right.bias))
    for name, other in maps.items():
        if name != activation and other.kernel.shape == right.kernel.shape:
            kind = "repeated block" if split_name(name)[1] == layer else "exchanged"
            tries.append((kind, f"kernel and bias are those of {name}", lambda o=other: o(x)))
            words = f"the kernel is that of {name}"
            tries.append((kind, words, lambda o=other: x @ o.kernel + right.bias))
    gaps = [relative_distance(make(), a) for _, _, make in tries]
    best = int(np.argmin(gaps))
    # Nearer than the map as it should be, from which a small fault is not far.
    if gaps[best] < min(1e-4, 0.1 * relative_distance(right(x), a)):
        return tries[best][:2]
    return _factor(a - right.bias, bare) or _order(a, right(x)) or _bias(a - bare, right.bias)


def _factor(seen: np.ndarray, bare: np.ndarray) -> Explanation | None:
    factor = float((seen * bare).sum() / (bare * bare).sum())
    if abs(factor - 1) > 1e-5 and is_near(seen, factor * bare, 0.05 * abs(factor - 1)):
        return "scale", f"the kernel is {factor:.6g} times the checkpoint's"
    return None


def _order(a: np.ndarray, expected: np.ndarray) -> Explanation | None:
    """Find features of the output in another order."""
    ours, theirs = (x.reshape(-1, x.shape[-1]).T for x in (a, expected))
    if len(ours) > 1 << 12:
        return None
    picks = [int(np.argmin(np.linalg.norm(theirs - row, axis=1))) for row in ours]
    if picks != sorted(picks) and is_near(ours, theirs[picks], 1e-4):
        return "order of elements", "features of the output are in another order"
    return None


def _bias(seen: np.ndarray, right: np.ndarray) -> Explanation | None:
    rows = seen.reshape(-1, seen.shape[-1])
    bias = rows.mean(0)
    if is_near(rows, np.broadcast_to(bias, rows.shape), 1e-4) and not is_near(bias, right, 1e-3):
        return "bias", "the kernel is right, the bias is another"
    return None
