"""What the models share: linears, norms, embeddings, activations, and the loop over layers.

Every layer takes a :class:`Numerics` and follows one rule: what enters a matrix product is rounded
to ``numerics.compute``, everything else happens in float32. Parameter names are the original's,
with its numbered ``Sequential`` entries named ``fc1`` and ``fc2``.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int, PyTree

from skyreels_jax.models.transformer_config import Numerics
from skyreels_jax.ops.kernels.chunked import even_tile
from skyreels_jax.ops.linear import linear, row_dropout

XAVIER: Final = nnx.initializers.xavier_uniform()
NORMAL: Final = nnx.initializers.normal(0.02)
ZEROS: Final = nnx.initializers.zeros_init()
# The fastest of 510 to 1275 rows for feed-forwards of the released widths.
TILE_ROWS: Final = 850
Float32 = Float[Array, "*batch D"]
_Carry = TypeVar("_Carry")
_Layer = TypeVar("_Layer")
_Shared = TypeVar("_Shared")
_Out = TypeVar("_Out")


@runtime_checkable
class PutTogether(Protocol):
    """How parameters of which each device has a part become whole where they are used."""

    def layer(self, parameters: _Layer) -> _Layer:
        """The parameters of one layer."""
        ...

    def features(self, x: Float[Array, "*batch part"]) -> Float[Array, "*batch D"]:
        """What each device looked up of its columns of a table."""
        ...


class AreWhole:
    """Every parameter is whole already."""

    def layer(self, parameters: _Layer) -> _Layer:
        """As they are."""
        return parameters

    def features(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """As they are."""
        return x


ARE_WHOLE: Final = AreWhole()


def silu(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """``x * sigmoid(x)`` in float32."""
    return jax.nn.silu(x.astype(jnp.float32))


def gelu_tanh(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """GELU by its tanh approximation, in float32: text embedder and feed-forwards."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True)


def gelu_exact(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """GELU by the error function, in float32: the image embedder."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False)


class Linear(nnx.Module):
    """``x @ kernel + bias`` with ``kernel [in, out]``; the result is in the compute dtype.

    Where ``numerics.kernels`` says so, the kernel is stored as int8 or float8 and stands for
    ``kernel * kernel_scale`` with a float32 scale of each output channel. It is all zeros until it
    is loaded. A LoRA can stand beside any kernel: ``lora_down [in, rank]`` and ``lora_up [rank,
    out]``, ``None`` where there is none. In training, what enters it may be dropped: at the share
    ``lora_dropout``, by the data of a random key for each video, ``lora_keys [B, 2]``.
    """

    lora_down: nnx.Param | None
    lora_up: nnx.Param | None
    lora_keys: nnx.Variable | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        numerics: Numerics,
        rngs: nnx.Rngs,
        init: nnx.Initializer = XAVIER,
        use_bias: bool = True,
    ):
        shape = (in_features, out_features)
        if numerics.kernels is None:
            self.kernel = nnx.Param(init(rngs.params(), shape, numerics.params))
            self.kernel_scale = None
        else:
            self.kernel = nnx.Param(jnp.zeros(shape, numerics.kernels))
            self.kernel_scale = nnx.Param(jnp.ones((out_features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_features,), numerics.params)) if use_bias else None
        self.lora_down = self.lora_up = self.lora_keys = None
        self.lora_dropout = 0.0
        self.dtype = numerics.compute

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """Along the last axis of ``x``."""
        bias = None if self.bias is None else self.bias[...]
        scale = None if self.kernel_scale is None else self.kernel_scale[...]
        lora = dropped = None
        if self.lora_down is not None and self.lora_up is not None:
            lora = self.lora_down[...], self.lora_up[...]
            if self.lora_keys is not None:
                dropped = row_dropout(x, self.lora_keys[...], self.lora_dropout)
        low_rank = {"low_rank": lora, "low_rank_input": dropped}
        return linear(x, self.kernel[...], bias, scale=scale, dtype=self.dtype, **low_rank)


class Mlp(nnx.Module):
    """Two linears with an activation between them; ``init`` is that of both kernels."""

    def __init__(
        self,
        widths: tuple[int, int, int],
        activation: Callable[[Array], Array],
        *,
        numerics: Numerics,
        rngs: nnx.Rngs,
        init: tuple[nnx.Initializer, nnx.Initializer] = (XAVIER, XAVIER),
    ):
        first, hidden, last = widths
        self.fc1 = Linear(first, hidden, numerics=numerics, rngs=rngs, init=init[0])
        self.fc2 = Linear(hidden, last, numerics=numerics, rngs=rngs, init=init[1])
        self.activation = activation

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """Along the last axis of ``x``; the activation is computed in float32."""
        return self.fc2(self.activation(self.fc1(x)))


class WanRMSNorm(nnx.Module):
    """RMS norm over the last axis with a scale; float32 out."""

    def __init__(self, dim: int, eps: float = 1e-5, *, numerics: Numerics):
        self.scale = nnx.Param(jnp.ones((dim,), numerics.params))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Along the last axis of ``x``."""
        return rms_norm(x, self.scale[...], self.eps)


class WanLayerNorm(nnx.Module):
    """Layer norm over the last axis with scale and bias; float32 out.

    The norms before modulation have no parameters: they are :func:`layer_norm`.
    """

    def __init__(self, dim: int, eps: float = 1e-6, *, numerics: Numerics):
        self.scale = nnx.Param(jnp.ones((dim,), numerics.params))
        self.bias = nnx.Param(jnp.zeros((dim,), numerics.params))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Along the last axis of ``x``."""
        return layer_norm(x, self.scale[...], self.bias[...], eps=self.eps)


class Embedding(nnx.Module):
    """A row of a table for each id; ids past the table give NaN rather than another row."""

    def __init__(self, rows: int, dim: int, *, numerics: Numerics, rngs: nnx.Rngs):
        self.embedding = nnx.Param(NORMAL(rngs.params(), (rows, dim), numerics.params))

    def __call__(self, ids: Int[Array, " B"]) -> Float[Array, "B D"]:
        """Rows of the table, as stored."""
        return (
            self.embedding[...]
            .at[ids]
            .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        )


def rms_norm(x: Float[Array, "*batch D"], scale: Float[Array, " D"], eps: float) -> Float32:
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis; float32 whatever comes in.

    The original casts "back" to an array that is float32 already, so its result stays float32 too.
    """
    x = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * inverse * _along(scale, x)


def layer_norm(
    x: Float[Array, "*batch D"],
    scale: Float[Array, " D"] | None = None,
    bias: Float[Array, " D"] | None = None,
    *,
    eps: float,
) -> Float32:
    """Zero mean and unit variance over the last axis, then scale and bias where given; float32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    if scale is not None:
        x = x * _along(scale, x)
    if bias is not None:
        x = x + _along(bias, x)
    return x


def mul_add(
    x: Float[Array, "*batch D"], y: Float[Array, "*batch D"], z: Float[Array, "*#batch D"]
) -> Float32:
    """``x + y * z`` in float32: a gated residual."""
    return x.astype(jnp.float32) + y.astype(jnp.float32) * z.astype(jnp.float32)


def mul_add_add(
    x: Float[Array, "*batch D"], y: Float[Array, "*#batch D"], z: Float[Array, "*#batch D"]
) -> Float32:
    """``x * (1 + y) + z`` in float32: a modulated norm, with scale ``y`` and shift ``z``."""
    return x.astype(jnp.float32) * (1 + y.astype(jnp.float32)) + z.astype(jnp.float32)


def _along(vector: Float[Array, " D"], x: Float[Array, "*batch D"]) -> Float[Array, "*ones D"]:
    """``vector`` in float32 with the rank of ``x``: rank promotion is always spelled out."""
    return vector.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + vector.shape)


def scan_layers(
    step: Callable[[_Carry, _Layer, _Shared], tuple[_Carry, _Out]],
    carry: _Carry,
    layers: _Layer,
    shared: _Shared = None,
    *,
    depth: int | None = None,
) -> tuple[_Carry, _Out]:
    """``carry, out = step(carry, layer, shared)`` for each layer in order; the outs are stacked.

    ``layers`` is a pytree of arrays stacked along a leading axis, of which the first ``depth`` (or
    all) are run. Arrays that every layer takes go into ``shared``, so that gradients reach them;
    what ``step`` closes over must be constant.

    This is ``jax.lax.scan``, and is differentiated as such. But XLA's CPU compiler cannot slice
    bfloat16: it widens what is sliced to float32, and where that is the same in every turn of the
    loop it does so before the loop, to all layers at once. A bfloat16 model then takes three times
    its memory. Here the stack depends on the turn as far as the compiler can tell, and only the
    slice is widened.

    A stack may lie in the host's memory (``pinned_host``): each layer is moved to the device's when
    its turn comes.
    """
    count = len(jax.tree.leaves(layers)[0]) if depth is None else depth

    def plain(carry: _Carry, layers: _Layer, shared: _Shared) -> tuple[_Carry, _Out]:
        layers = jax.tree.map(lambda leaf: leaf[:count], layers)
        return jax.lax.scan(lambda carry, layer: step(carry, layer, shared), carry, layers)

    tied = jax.custom_jvp(
        lambda carry, layers, shared: jax.lax.scan(
            lambda carry, index: step(carry, layer_at(layers, index), shared),
            carry,
            jnp.arange(count),
        )
    )
    # A gradient of slices taken inside the loop would have the whole stack's size in every turn.
    tied.defjvp(partial(_jvp_of, plain), symbolic_zeros=True)
    return tied(carry, layers, shared)


def _jvp_of(
    function: Callable[..., PyTree], primals: PyTree, tangents: PyTree
) -> tuple[PyTree, PyTree]:
    """A ``jax.jvp`` along what moves alone: what is frozen costs neither memory nor work."""
    leaves, tree = jax.tree.flatten(primals)
    slopes = tree.flatten_up_to(tangents)
    moving = [i for i, slope in enumerate(slopes) if not isinstance(slope, SymbolicZero)]

    def along_moving(*values: Array) -> PyTree:
        given = dict(zip(moving, values, strict=True))
        return function(*tree.unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)]))

    return jax.jvp(along_moving, [leaves[i] for i in moving], [slopes[i] for i in moving])


def layer_at(layers: _Layer, index: Int[Array, ""]) -> _Layer:
    """One layer's arrays, of a stack that depends on the turn of the loop (:func:`scan_layers`)."""
    stack, index = jax.lax.optimization_barrier((layers, index))
    return jax.tree.map(
        lambda leaf: _on_device(jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)), stack
    )


def _on_device(layer: Array) -> Array:
    """What lies in the host's memory on the device; anything else as it is."""
    if jax.typeof(layer).memory_space == jax.memory.Space.Host:
        return jax.device_put(layer, jax.memory.Space.Device)
    return layer


def in_row_tiles(layer: nnx.Module, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
    """``layer(x)`` for a layer that takes each row by itself, on CPUs a tile of rows at a time.

    What the layer makes in between then stays in cache and does not grow with the rows:
    ``docs/performance.md`` has both. The result is the same. Accelerators, and gradients, take all
    rows at once.
    """
    count = math.prod(x.shape[:-1])
    if count <= TILE_ROWS:
        return layer(x)
    graph, parameters = nnx.split(layer)

    def whole(parameters: nnx.State, x: Array) -> Array:
        return nnx.merge(graph, parameters)(x)

    def tiles(parameters: nnx.State, x: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        size = even_tile(count, TILE_ROWS)
        filled = jnp.pad(rows, ((0, -count % size), (0, 0)))
        out = jax.lax.map(partial(whole, parameters), filled.reshape(-1, size, rows.shape[1]))
        return out.reshape(len(filled), -1)[:count].reshape(*x.shape[:-1], -1)

    tiled = jax.custom_jvp(
        lambda parameters, x: jax.lax.platform_dependent(parameters, x, cpu=tiles, default=whole)
    )
    tiled.defjvp(partial(_jvp_of, whole), symbolic_zeros=True)
    return tiled(parameters, x)
