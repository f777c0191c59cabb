"""Attention behind one function, and the table of ways to compute it."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import jax
from jaxtyping import Array, Float

from skyreels_jax.errors import UnsupportedError
from skyreels_jax.ops.kernels.chunked import chunked_attention
from skyreels_jax.ops.kernels.reference import reference_attention
from skyreels_jax.ops.masks import Mask

Implementation = Callable[..., Float[Array, "B L N K"]]

IMPLEMENTATIONS: Final[Mapping[str, Implementation]] = MappingProxyType(
    {"xla": reference_attention, "chunked": chunked_attention}
)


def attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L N K"]:
    """``softmax(scale * query @ key^T) @ value`` per head, softmax in float32.

    ``scale`` is ``K ** -0.5`` unless given.
    """
    if implementation is None:
        implementation = "chunked" if query.shape[1] * key.shape[1] > 1 << 20 else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedError(
            f"attention implementation {implementation!r} is unknown; "
            f"there are {', '.join(IMPLEMENTATIONS)}"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with jax.named_scope("attention"):
        return IMPLEMENTATIONS[implementation](query, key, value, mask=mask, scale=scale)
