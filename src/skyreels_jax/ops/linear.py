"""The one matrix product the models use."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def linear(
    x: Float[Array, "*B D"],
    kernel: Float[Array, "D E"],
    bias: Float[Array, " E"] | None = None,
    *,
    dtype: DTypeLike,
) -> Float[Array, "*B E"]:
    """``x @ kernel + bias`` with operands in ``dtype``, summed in float32, returned in ``dtype``.

    The product and the bias are rounded once, together. float32 operands are multiplied exactly
    (no TF32 or bf16 passes on accelerators): float32 is the dtype in which parity is proved.
    """
    out = lax.dot_general(
        x.astype(dtype),
        kernel.astype(dtype),
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=exact_precision(dtype),
        preferred_element_type=jnp.float32,
    )
    if bias is not None:
        out = out + lax.broadcast_in_dim(bias.astype(jnp.float32), out.shape, (out.ndim - 1,))
    return out.astype(dtype)


def exact_precision(dtype: DTypeLike) -> lax.Precision:
    """``HIGHEST`` for float32 operands, which accelerators would shorten; else their own."""
    is_float32 = jnp.dtype(dtype) == jnp.float32
    return lax.Precision.HIGHEST if is_float32 else lax.Precision.DEFAULT
