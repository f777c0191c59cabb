"""The vision encoder of CLIP, up to its last block but one."""

from dataclasses import dataclass
from typing import Final

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from skyreels_jax.models.layers import (
    ARE_WHOLE,
    NORMAL,
    Linear,
    Mlp,
    PutTogether,
    WanLayerNorm,
    gelu_exact,
    scan_layers,
)
from skyreels_jax.models.transformer_config import Numerics
from skyreels_jax.ops.attention import attention
from skyreels_jax.ops.linear import linear

_States = Float[Array, "B S D"]

# Of CLIP's training images, red, green, blue, from 0 to 1: what is subtracted and divided by.
PIXEL_MEAN: Final = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
PIXEL_STD: Final = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@dataclass(frozen=True, kw_only=True)
class ClipVisionConfig:
    """The shape of one CLIP vision encoder; :data:`CLIP_VIT_H` is the one of all I2V checkpoints.

    Attributes:
        dim: width of the states.
        ffn_dim: width inside the feed-forward.
        num_heads: heads of attention.
        num_layers: blocks in the file; the features come from the last but one.
        image_size: pixels of a side of the square input.
        patch_size: pixels of a side of a patch.
        projection_dim: width of the projection to the space shared with text; None where a file
            has none. Nothing here computes it.
        eps: of the layer norms.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    image_size: int = 224
    patch_size: int = 14
    projection_dim: int | None = None
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if min(self.dim, self.ffn_dim, self.num_heads, self.image_size, self.patch_size) < 1:
            raise ValueError(f"{self}: every size must be at least 1")
        if self.dim % self.num_heads:
            raise ValueError(f"{self.dim=} does not divide into {self.num_heads=}")
        if self.image_size % self.patch_size:
            raise ValueError(f"{self.image_size=} does not divide into {self.patch_size=}")
        if self.num_layers < 2:
            raise ValueError(f"{self.num_layers=}: the last block but one needs two")

    @property
    def tokens(self) -> int:
        """The class token and one a patch: 257."""
        return 1 + (self.image_size // self.patch_size) ** 2


CLIP_VIT_H: Final = ClipVisionConfig(
    dim=1280, ffn_dim=5120, num_heads=16, num_layers=32, projection_dim=1024
)


class _ClipAttention(nnx.Module):
    """Self-attention over all tokens, scores scaled by ``head_dim ** -0.5``."""

    def __init__(self, config: ClipVisionConfig, *, numerics: Numerics, rngs: nnx.Rngs):
        dim = config.dim
        self.q = Linear(dim, dim, numerics=numerics, rngs=rngs)
        self.k = Linear(dim, dim, numerics=numerics, rngs=rngs)
        self.v = Linear(dim, dim, numerics=numerics, rngs=rngs)
        self.proj = Linear(dim, dim, numerics=numerics, rngs=rngs)
        self.num_heads = config.num_heads

    def __call__(self, x: _States) -> _States:
        """``x`` normalised."""
        query, key, value = (
            part(x).reshape(*x.shape[:2], self.num_heads, -1) for part in (self.q, self.k, self.v)
        )
        return self.proj(attention(query, key, value).reshape(x.shape))


class _ClipBlock(nnx.Module):
    """Attention and feed-forward, each normalised before and added after, in float32."""

    def __init__(self, config: ClipVisionConfig, *, numerics: Numerics, rngs: nnx.Rngs):
        widths = (config.dim, config.ffn_dim, config.dim)
        self.norm1 = WanLayerNorm(config.dim, config.eps, numerics=numerics)
        self.attn = _ClipAttention(config, numerics=numerics, rngs=rngs)
        self.norm2 = WanLayerNorm(config.dim, config.eps, numerics=numerics)
        self.mlp = Mlp(widths, gelu_exact, numerics=numerics, rngs=rngs)

    def __call__(self, x: _States) -> _States:
        """``x`` is the residual, float32 in and out."""
        x = x + self.attn(self.norm1(x)).astype(jnp.float32)
        return x + self.mlp(self.norm2(x)).astype(jnp.float32)


class _PatchKernel(nnx.Module):
    """A convolution without bias whose stride is its kernel: each patch times one matrix."""

    def __init__(self, config: ClipVisionConfig, *, numerics: Numerics, rngs: nnx.Rngs):
        shape = (config.patch_size, config.patch_size, 3, config.dim)
        self.kernel = nnx.Param(NORMAL(rngs.params(), shape, numerics.params))
        self.dtype = numerics.compute

    def __call__(self, pixels: Float[Array, "B 3 height width"]) -> _States:
        """One token a patch, row by row."""
        kernel = self.kernel[...]
        size = kernel.shape[0]
        batch, colours, height, width = pixels.shape
        grid = (batch, colours, height // size, size, width // size, size)
        patches = pixels.reshape(grid).transpose(0, 2, 4, 3, 5, 1)  # [B, rows, columns, p, p, 3]
        patches = patches.reshape(batch, -1, size * size * colours)
        return linear(patches, kernel.reshape(-1, kernel.shape[-1]), dtype=self.dtype)


class ClipVision(nnx.Module):
    """Pixels to the states of all tokens after the last block but one.

    The last block, the norm after it and the projection are parameters that nothing here computes
    with: the published files have them, and what is read must be written again. Matrix products
    are in ``dtype``; norms, softmax and the residual are float32.

    Attributes:
        parts: how parameters become whole, where devices have parts of them; whoever runs it may
            set another.
    """

    parts: PutTogether = ARE_WHOLE

    def __init__(
        self,
        config: ClipVisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.bfloat16,
    ):
        numerics = Numerics(dtype, param_dtype)
        dim = config.dim

        def table(*shape: int) -> nnx.Param:
            return nnx.Param(NORMAL(rngs.params(), shape, param_dtype))

        self.config = config
        self.cls_embedding = table(dim)
        self.pos_embedding = table(config.tokens, dim)
        self.patch_embedding = _PatchKernel(config, numerics=numerics, rngs=rngs)
        self.pre_norm = WanLayerNorm(dim, config.eps, numerics=numerics)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> _ClipBlock:
            return _ClipBlock(config, numerics=numerics, rngs=rngs)

        self.blocks = stack(rngs)
        self.post_norm = WanLayerNorm(dim, config.eps, numerics=numerics)
        if config.projection_dim is not None:
            self.head = table(dim, config.projection_dim)

    def __call__(self, pixels: Float[Array, "B 3 height width"]) -> _States:
        """Features ``[B, 257, D]``, class token first, float32.

        Args:
            pixels: normalised by CLIP's mean and standard deviation, of the size of the config.

        Raises:
            ValueError: another size.
        """
        size = self.config.image_size
        if pixels.shape[2:] != (size, size):
            raise ValueError(f"image of {pixels.shape[2:]}; this encoder takes {(size, size)}")
        patches = self.patch_embedding(pixels).astype(jnp.float32)
        first = jnp.broadcast_to(
            self.cls_embedding[...].astype(jnp.float32), (patches.shape[0], 1, patches.shape[2])
        )
        x = jnp.concatenate([first, patches], axis=1)
        x = self.pre_norm(x + self.pos_embedding[...].astype(jnp.float32)[None])

        graph, parameters = nnx.split(self.blocks)

        def layer(x: Array, of_layer: nnx.State, _: None) -> tuple[Array, None]:
            return nnx.merge(graph, self.parts.layer(of_layer))(x), None

        return scan_layers(layer, x, parameters, depth=self.config.num_layers - 1)[0]
