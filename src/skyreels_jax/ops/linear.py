"""The linear maps of the models: matrix product, and convolution causal in time, in chunks."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped, UInt32

from skyreels_jax.ops.target import target_device, with_rows_around

_Video = Float[Array, "B T height width I"]
_Kernel = Float[Array, "taps kernel_height kernel_width I O"]
_History = Float[Array, "B past height width I"]
_Convolved = Float[Array, "B U height width O"]


def linear(
    x: Float[Array, "*B D"],
    kernel: Shaped[Array, "D E"],
    bias: Float[Array, " E"] | None = None,
    *,
    scale: Float[Array, " E"] | None = None,
    low_rank: tuple[Float[Array, "D R"], Float[Array, "R E"]] | None = None,
    low_rank_input: Float[Array, "*B D"] | None = None,
    dtype: DTypeLike,
) -> Float[Array, "*B E"]:
    """``x @ kernel + bias`` with operands in ``dtype``, summed in float32, returned in ``dtype``.

    A kernel in int8 or float8 stands for ``kernel * scale``: its values are exact in ``dtype``, and
    the float32 sums are multiplied by ``scale``. ``low_rank`` are two matrices of which the product
    is added to that kernel, without ever being made: ``(x @ down) @ up``, of which ``x @ down`` is
    rounded to ``dtype``; ``low_rank_input`` is what they multiply in place of ``x``. The products,
    the scale and the bias are rounded once, together. float32 operands are multiplied exactly (no
    TF32 or bf16 passes on accelerators): float32 is the dtype in which parity is proved.
    """
    out = _product(x, kernel, dtype)
    if scale is not None:
        out = out * lax.broadcast_in_dim(scale, out.shape, (out.ndim - 1,))
    if low_rank is not None:
        down, up = low_rank
        given = x if low_rank_input is None else low_rank_input
        out = out + _product(_product(given, down, dtype), up, dtype)
    if bias is not None:
        out = out + lax.broadcast_in_dim(bias.astype(jnp.float32), out.shape, (out.ndim - 1,))
    return out.astype(dtype)


def row_dropout(
    x: Float[Array, "B *rest"], keys: UInt32[Array, "B 2"], share: float
) -> Float[Array, "B *rest"]:
    """``x`` with a ``share`` of its values zero and the others larger, so that the mean stays.

    Which ones follows from the data of a random key for each row of the batch, whatever the others.
    """

    def one(x: Array, key: Array) -> Array:
        keep = jax.random.bernoulli(jax.random.wrap_key_data(key), 1 - share, x.shape)
        return jnp.where(keep, x / (1 - share), jnp.zeros_like(x))

    return jax.vmap(one)(x, keys)


def _product(
    x: Float[Array, "*B D"], kernel: Shaped[Array, "D E"], dtype: DTypeLike
) -> Float[Array, "*B E"]:
    return lax.dot_general(
        x.astype(dtype),
        kernel.astype(dtype),
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=exact_precision(dtype),
        preferred_element_type=jnp.float32,
    )


def exact_precision(dtype: DTypeLike) -> lax.Precision:
    """``HIGHEST`` for float32 operands, which accelerators would shorten; else their own."""
    is_float32 = jnp.dtype(dtype) == jnp.float32
    return lax.Precision.HIGHEST if is_float32 else lax.Precision.DEFAULT


def causal_conv(
    x: _Video,
    kernel: _Kernel,
    bias: Float[Array, " O"],
    history: _History | None = None,
    *,
    stride: int = 1,
    dtype: DTypeLike,
) -> tuple[_Convolved, _History]:
    """Convolve a chunk of frames; with its history, the result is that of the whole video.

    Frame ``t`` of the result is ``bias + sum_d kernel[d] * frames[t * stride + d]`` over the frames
    of the history and of ``x``, where each product is a convolution in space with zeros around.
    That is also how it is computed: a 2-D convolution for each tap, over all frames at once. XLA's
    3-D convolution has a third to three quarters of the speed on CPUs, and is reported to have a
    thirtieth in bfloat16 on NVIDIA GPUs; ``docs/performance.md`` has these and other formulations.
    For TPUs it is one 3-D convolution: their compiler takes 3 to 5 times as long for the three.

    Args:
        x: the chunk; the number of its frames is a multiple of ``stride``.
        kernel: of odd sizes in space.
        bias: in float32 or as stored.
        history: the last ``taps - stride`` frames before ``x``; None where the video begins, which
            stands for zeros (and costs nothing).
        stride: in time.
        dtype: of the operands and the result; sums are in float32.

    Returns:
        The result, and the history of the next chunk, in ``dtype``. Where frames are cut in rows
        over devices (:mod:`.ops.target`), the history has the rows around this device's.
    """
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    x, around = with_rows_around(x, kernel.shape[1] // 2, kernel.shape[1] // 2)
    length = kernel.shape[0] - stride
    frames = x if history is None else jnp.concatenate([history.astype(dtype), x], axis=1)
    convolve = _in_one_piece if target_device().platform == "tpu" else _summed_over_taps
    out = convolve(frames, kernel, stride, length if history is None else 0, around)
    out = out + bias.astype(jnp.float32)[None, None, None, None]
    if frames.shape[1] < length:
        zeros = jnp.zeros((x.shape[0], length, *x.shape[2:]), dtype)
        frames = jnp.concatenate([zeros, frames], axis=1)
    return out.astype(dtype), frames[:, frames.shape[1] - length :]


def conv2d(
    x: Float[Array, "N height width I"],
    kernel: Float[Array, "kernel_height kernel_width I O"],
    *,
    stride: int = 1,
    padding: tuple[int, int],
) -> Float[Array, "N new_height new_width O"]:
    """Convolve images with a kernel of the same dtype; summed and returned in float32.

    Args:
        x: images.
        kernel: one for all.
        stride: along both sides.
        padding: zeros before and after, along both sides.
    """
    x, around = with_rows_around(x, *padding)
    return _conv2d(x, kernel, stride, (around, padding))


def _conv2d(
    x: Float[Array, "N height width I"],
    kernel: Float[Array, "kernel_height kernel_width I O"],
    stride: int,
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> Float[Array, "N new_height new_width O"]:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=exact_precision(x.dtype),
        preferred_element_type=jnp.float32,
    )


def _summed_over_taps(
    frames: _Video, kernel: _Kernel, stride: int, missing: int, around: tuple[int, int]
) -> _Convolved:
    """Without bias; ``missing`` is how many frames of zeros stand before ``frames``.

    ``around`` is how many rows of zeros stand above and below each.
    """
    count = (frames.shape[1] + missing - kernel.shape[0]) // stride + 1
    parts = []
    for tap in range(kernel.shape[0]):
        # Of the result, the first frame for which this tap does not look before the beginning.
        first = max(0, -((tap - missing) // stride))
        if first < count:
            start = first * stride + tap - missing
            seen = frames[:, start : start + (count - first - 1) * stride + 1 : stride]
            part = _in_space(seen, kernel[tap], around)
            parts.append(jnp.pad(part, ((0, 0), (first, 0), (0, 0), (0, 0), (0, 0))))
    return sum(parts[1:], start=parts[0])


def _in_one_piece(
    frames: _Video, kernel: _Kernel, stride: int, missing: int, around: tuple[int, int]
) -> _Convolved:
    """The same as one 3-D convolution, without the taps that see no frame but missing ones."""
    last = (frames.shape[1] + missing - kernel.shape[0]) // stride * stride
    unseen = max(0, missing - last)
    kernel = kernel[unseen:]
    beside = (kernel.shape[2] // 2, kernel.shape[2] // 2)
    return lax.conv_general_dilated(
        frames,
        kernel,
        (stride, 1, 1),
        ((missing - unseen, 0), around, beside),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        precision=exact_precision(frames.dtype),
        preferred_element_type=jnp.float32,
    )


def _in_space(
    frames: _Video, kernel: Float[Array, "kh kw I O"], around: tuple[int, int]
) -> _Convolved:
    size = kernel.shape[1]
    if size == 1:
        return lax.dot_general(
            frames,
            kernel[0, 0],
            (((4,), (0,)), ((), ())),
            precision=exact_precision(frames.dtype),
            preferred_element_type=jnp.float32,
        )
    flat = frames.reshape(-1, *frames.shape[2:])
    out = _conv2d(flat, kernel, 1, (around, (size // 2, size // 2)))
    return out.reshape(*frames.shape[:2], *out.shape[1:3], -1)
