"""Attention of the optional ``tokamax`` package: it picks its own kernel for the device."""

from functools import partial
from importlib import import_module
from importlib.util import find_spec

from jaxtyping import Array, Float

from skyreels_jax.ops.kernels.contract import AttentionCall, by_query_block
from skyreels_jax.ops.masks import Mask


def tokamax_refusal(call: AttentionCall) -> str | None:
    """It must be installed; what it can do on a device it decides itself."""
    del call
    if find_spec("tokamax") is None:
        return "the package tokamax is not installed"
    return None


def tokamax_attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    *,
    mask: Mask | None,
    scale: float,
) -> Float[Array, "B L N K"]:
    """Asked for by name only: nothing here has been measured with it."""
    fused = partial(import_module("tokamax").dot_product_attention, scale=scale)
    return by_query_block(fused, query, key, value, mask=mask)
