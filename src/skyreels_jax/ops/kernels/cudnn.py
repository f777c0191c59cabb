"""cuDNN's fused attention, through JAX."""

from functools import partial
from typing import Final

import jax
from jaxtyping import Array, Float

from skyreels_jax.ops.kernels.contract import Call, Earlier, by_length, by_prefix
from skyreels_jax.ops.masks import Mask

AMPERE: Final = 8.0
HOPPER: Final = 9.0


def refusal(call: Call) -> str | None:
    """cuDNN has half precision only, on CUDA devices from Ampere on."""
    width = call.query[-1]
    widest = 256 if call.device.capability >= HOPPER else 128
    if call.device.platform != "cuda":
        return f"it needs a CUDA device, and this is {call.device.platform}"
    if call.device.capability < AMPERE:
        return f"it needs compute capability {AMPERE}, and this is {call.device.capability}"
    if call.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 or float16, and the operands are {call.dtype}"
    if width % 8 or width > widest:
        return f"heads must have a multiple of 8 features, at most {widest}; these have {width}"
    return None


def cudnn_attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    *,
    mask: Mask | None,
    scale: float,
) -> Float[Array, "B L N K"]:
    """Never given the mask: JAX would draw it out as an additive bias of L x L numbers."""
    fused = partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    return by_prefix(fused, query, key, value, mask=mask)


def cudnn_attention_after(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B L N K"],
    value: Float[Array, "B L N K"],
    *,
    earlier: Earlier,
    mask: Mask | None,
    scale: float,
) -> Float[Array, "B L N K"]:
    """How many keys count is told to cuDNN, which does not look at the others."""
    fused = partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    return by_length(fused, query, key, value, earlier=earlier, mask=mask)
