"""Attention behind one function: the table of ways to compute it, and its plain definition."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from skyreels_jax.errors import UnsupportedError
from skyreels_jax.ops.kernels.chunked import chunked_attention
from skyreels_jax.ops.kernels.contract import (
    AttentionCall,
    AttentionPath,
    PastKeyValues,
)
from skyreels_jax.ops.kernels.cudnn import cudnn_attention, cudnn_refusal
from skyreels_jax.ops.kernels.splash import splash_attention, splash_refusal
from skyreels_jax.ops.kernels.tokamax import tokamax_attention, tokamax_refusal
from skyreels_jax.ops.linear import exact_precision
from skyreels_jax.ops.masks import Mask
from skyreels_jax.ops.target import target_device

# All scores of a call at once, in float32, are worth their memory up to so many bytes.
SMALL_SCORES: Final = 4 * 1024**2


def reference_attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N V"],
    *,
    mask: Mask | None,
    scale: float,
    past: PastKeyValues | None = None,
) -> Float[Array, "B L N V"]:
    """Scores, softmax and average as written in the textbook; scores and softmax in float32."""
    own = (query.shape[1], key.shape[1])
    allowed = None if mask is None else jnp.asarray(mask.as_array(*own))
    if past is not None:
        filled = jnp.arange(past.key.shape[1]) < past.length
        filled = jnp.broadcast_to(filled, (own[0], len(filled)))
        seen = jnp.ones(own, bool) if allowed is None else allowed
        allowed = jnp.concatenate([filled, seen], axis=1)
        key = jnp.concatenate([past.key, key], axis=1)
        value = jnp.concatenate([past.value, value], axis=1)
    precision = exact_precision(query.dtype)
    scores = jnp.einsum(
        "BLNK,BSNK->BNLS", query, key, precision=precision, preferred_element_type=jnp.float32
    )
    scores = scores * scale
    if allowed is not None:
        scores = jnp.where(allowed[None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum(
        "BNLS,BSNK->BLNK", weights, value, precision=precision, preferred_element_type=jnp.float32
    )
    return out.astype(query.dtype)


def _serves_all(call: AttentionCall) -> None:
    """The refusal of a path that never refuses."""
    del call


ATTENTION_PATHS: Final[Mapping[str, AttentionPath]] = MappingProxyType(
    {
        "xla": AttentionPath(reference_attention, _serves_all, takes_past=True),
        "chunked": AttentionPath(chunked_attention, _serves_all, takes_past=True),
        "cudnn": AttentionPath(cudnn_attention, cudnn_refusal, takes_past=True),
        "splash": AttentionPath(splash_attention, splash_refusal, takes_past=True),
        "tokamax": AttentionPath(tokamax_attention, tokamax_refusal),
    }
)


def attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N V"],
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    past: PastKeyValues | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L N V"]:
    """``softmax(scale * query @ key^T) @ value`` for each head, softmax in float32.

    Args:
        query: ``[B, L, N, K]``.
        key: ``[B, S, N, K]``.
        value: ``[B, S, N, V]``; another width than the keys' is for ``xla`` alone.
        mask: which keys a query sees; ``None`` for all.
        scale: positive; ``K ** -0.5`` unless given.
        past: keys and values of tokens before these (``S`` is then ``L``), seen by every query.
        implementation: a name in :data:`ATTENTION_PATHS`; ``None`` asks :func:`choose_path`.

    Raises:
        UnsupportedError: if the named implementation does not exist or cannot serve this call. It
            is never replaced by another.
    """
    batch, q_len, heads, width = query.shape
    key_len = key.shape[1] + (0 if past is None else past.key.shape[1])
    dtype = jnp.dtype(query.dtype).name
    shape = (batch, q_len, heads, width)
    call = AttentionCall(target_device(), dtype, shape, key_len)
    name = choose_path(call) if implementation is None else implementation
    if name not in ATTENTION_PATHS:
        raise UnsupportedError(
            f"attention path {name!r} does not exist; choose one of {', '.join(ATTENTION_PATHS)}"
        )
    path = ATTENTION_PATHS[name]
    if reason := path.refusal(call):
        raise UnsupportedError(
            f"attention path {name!r} cannot serve this call: {reason}; "
            f"without a name {choose_path(call)!r} is taken"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with jax.named_scope(f"attention_{name}"):
        if past is None:
            return path.compute(query, key, value, mask=mask, scale=scale)
        if not path.takes_past:
            raise UnsupportedError(
                f"attention path {name!r} cannot take keys of earlier tokens; choose one of "
                f"{', '.join(paths_with_past())}"
            )
        return path.compute(query, key, value, mask=mask, scale=scale, past=past)


def paths_with_past() -> tuple[str, ...]:
    """Names of the paths that can take ``past``; whatever :func:`choose_path` chooses is one."""
    return tuple(name for name, path in ATTENTION_PATHS.items() if path.takes_past)


def choose_path(call: AttentionCall) -> str:
    """The path for a call that names none, by the device that it is compiled for.

    ``cudnn`` wherever it can; else ``xla`` while all scores together are small; else, on a TPU and
    in half precision, ``splash`` where it can (float32 it would shorten); else ``chunked``.
    """
    if call.device.platform == "cuda" and ATTENTION_PATHS["cudnn"].refusal(call) is None:
        return "cudnn"
    batch, q_len, heads, _ = call.query
    scores = batch * heads * q_len * call.key_len
    if 4 * scores <= SMALL_SCORES:
        return "xla"
    is_half = call.dtype in ("bfloat16", "float16")
    return "splash" if is_half and ATTENTION_PATHS["splash"].refusal(call) is None else "chunked"
