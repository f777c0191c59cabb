"""Attention behind one function, and the table of ways to compute it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import jax
from jaxtyping import Array, Float

from skyreels_jax.errors import UnsupportedError
from skyreels_jax.ops.kernels.chunked import chunked_attention
from skyreels_jax.ops.kernels.contract import (
    AttentionCall,
    AttentionPath,
    PastKeyValues,
    describe_call,
    serves_all,
)
from skyreels_jax.ops.kernels.cudnn import cudnn_attention, cudnn_refusal
from skyreels_jax.ops.kernels.reference import reference_attention
from skyreels_jax.ops.kernels.splash import splash_attention, splash_refusal
from skyreels_jax.ops.kernels.tokamax import tokamax_attention, tokamax_refusal
from skyreels_jax.ops.masks import Mask

ATTENTION_PATHS: Final[Mapping[str, AttentionPath]] = MappingProxyType(
    {
        "xla": AttentionPath(reference_attention, serves_all, takes_past=True),
        "chunked": AttentionPath(chunked_attention, serves_all, takes_past=True),
        "cudnn": AttentionPath(cudnn_attention, cudnn_refusal, takes_past=True),
        "splash": AttentionPath(splash_attention, splash_refusal),
        "tokamax": AttentionPath(tokamax_attention, tokamax_refusal),
    }
)

# All scores of a call at once are worth their memory up to here.
SMALL_SCORES: Final = 4 * 1024**2


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
    call = describe_call(query, key, past)
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
    """The path for a call that names none: the fastest on its device that has been tested there.

    ``cudnn`` wherever it can; else ``xla`` while all scores together are small, else ``chunked``.
    """
    if ATTENTION_PATHS["cudnn"].refusal(call) is None:
        return "cudnn"
    return "xla" if call.score_bytes <= SMALL_SCORES else "chunked"
