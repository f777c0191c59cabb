"""cuDNN's fused attention, through JAX."""

from functools import partial
from typing import Final

import jax
from jaxtyping import Array, Float

from skyreels_jax.ops.kernels.contract import AttentionCall, PastKeyValues, by_query_block
from skyreels_jax.ops.masks import Mask

_AMPERE: Final = 8.0
_HOPPER: Final = 9.0


def cudnn_refusal(call: AttentionCall) -> str | None:
    """cuDNN has half precision only, on CUDA devices from Ampere on."""
    width = call.query[-1]
    widest = 256 if call.device.capability >= _HOPPER else 128
    if call.device.platform != "cuda":
        return f"it needs a CUDA device, and this is {call.device.platform}"
    if call.device.capability < _AMPERE:
        return f"it needs compute capability {_AMPERE}, and this is {call.device.capability}"
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
    past: PastKeyValues | None = None,
) -> Float[Array, "B L N K"]:
    """Never given the mask: JAX would draw it out as an additive bias of L x L numbers.

    How many keys of ``past`` count is told to cuDNN, which does not look at the others.
    """
    fused = partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    return by_query_block(fused, query, key, value, mask=mask, past=past)
