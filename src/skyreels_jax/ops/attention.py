"""Attention behind one function, and the table of ways to compute it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import jax
from jaxtyping import Array, Float

from skyreels_jax.errors import UnsupportedError
from skyreels_jax.ops.kernels import cudnn, splash, tokamax
from skyreels_jax.ops.kernels.chunked import chunked_attention, chunked_attention_after
from skyreels_jax.ops.kernels.contract import Call, Earlier, Path, describe, serves_all
from skyreels_jax.ops.kernels.reference import reference_attention, reference_attention_after
from skyreels_jax.ops.masks import Mask

PATHS: Final[Mapping[str, Path]] = MappingProxyType(
    {
        "xla": Path(reference_attention, serves_all, reference_attention_after),
        "chunked": Path(chunked_attention, serves_all, chunked_attention_after),
        "cudnn": Path(cudnn.cudnn_attention, cudnn.refusal, cudnn.cudnn_attention_after),
        "splash": Path(splash.splash_attention_path, splash.refusal),
        "tokamax": Path(tokamax.tokamax_attention, tokamax.refusal),
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
    earlier: Earlier | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L N V"]:
    """``softmax(scale * query @ key^T) @ value`` for each head, softmax in float32.

    Args:
        query: ``[B, L, N, K]``.
        key: ``[B, S, N, K]``.
        value: ``[B, S, N, V]``; another width than the keys' is for ``xla`` alone.
        mask: which keys a query sees; ``None`` for all.
        scale: positive; ``K ** -0.5`` unless given.
        earlier: more keys, of tokens before these (``S`` is then ``L``).
        implementation: a name in :data:`PATHS`; ``None`` leaves it to :func:`choose`.

    Raises:
        UnsupportedError: if the named implementation does not exist or cannot serve this call. It
            is never replaced by another.
    """
    call = describe(query, key, earlier)
    name = choose(call) if implementation is None else implementation
    if name not in PATHS:
        raise UnsupportedError(
            f"attention path {name!r} does not exist; choose one of {', '.join(PATHS)}"
        )
    path = PATHS[name]
    if reason := path.refusal(call):
        raise UnsupportedError(
            f"attention path {name!r} cannot serve this call: {reason}; "
            f"without a name {choose(call)!r} is taken"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with jax.named_scope(f"attention_{name}"):
        if earlier is None:
            return path.compute(query, key, value, mask=mask, scale=scale)
        if path.after is None:
            raise UnsupportedError(
                f"attention path {name!r} cannot take keys of earlier tokens; choose one of "
                f"{', '.join(paths_after())}"
            )
        return path.after(query, key, value, earlier=earlier, mask=mask, scale=scale)


def paths_after() -> tuple[str, ...]:
    """Names of the paths that can take ``earlier``; whatever :func:`choose` chooses is one."""
    return tuple(name for name, path in PATHS.items() if path.after is not None)


def choose(call: Call) -> str:
    """The path for a call that names none: the fastest on its device that has been tested there.

    ``cudnn`` wherever it can; else ``xla`` while all scores together are small, else ``chunked``.
    """
    if PATHS["cudnn"].refusal(call) is None:
        return "cudnn"
    return "xla" if call.score_bytes <= SMALL_SCORES else "chunked"
