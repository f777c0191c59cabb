"""The SkyReels-V2 transformer: Wan 2.1 with a timestep for every latent frame."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from skyreels_jax.models.layers import (
    NORMAL,
    XAVIER,
    ZEROS,
    CrossContext,
    Embedding,
    Head,
    ImageEmbedding,
    Linear,
    Mlp,
    PatchEmbedding,
    WanI2VCrossAttention,
    WanLayerNorm,
    WanSelfAttention,
    WanT2VCrossAttention,
    gelu_tanh,
    modulation_init,
    silu,
)
from skyreels_jax.models.transformer_config import Numerics, TransformerConfig
from skyreels_jax.ops.masks import BlockCausal
from skyreels_jax.ops.norms import layer_norm, mul_add, mul_add_add
from skyreels_jax.ops.rope import RopeTable, rope_table
from skyreels_jax.ops.scan_layers import scan_layers
from skyreels_jax.ops.sinusoid import sinusoidal_embedding_1d
from skyreels_jax.shapes import Latents, Timesteps

FrameTokens = Float[Array, "B F P D"]


class Modulation(NamedTuple):
    """What one sub-layer takes of the timestep, per frame: ``[B, F or 1, 1, D]`` each."""

    shift: Float[Array, "B steps 1 D"]
    scale: Float[Array, "B steps 1 D"]
    gate: Float[Array, "B steps 1 D"]


class Passage(NamedTuple):
    """One evaluation of the transformer, cut where a cache of its steps may come between.

    The prediction is ``head(blocks(tokens))``. ``latents`` are those given, without an image
    condition; ``e`` and ``e0`` are the time embedding and its projection for the blocks.
    """

    latents: Latents
    e: Float[Array, "B steps D"]
    e0: Float[Array, "B steps 6 D"]
    tokens: FrameTokens
    blocks: Callable[[FrameTokens], FrameTokens]
    head: Callable[[FrameTokens], Latents]


class WanAttentionBlock(nnx.Module):
    """Self-attention, cross-attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: TransformerConfig, *, numerics: Numerics, rngs: nnx.Rngs):
        dim, eps = config.dim, config.eps
        cross_attention = (
            WanI2VCrossAttention if config.model_type == "i2v" else WanT2VCrossAttention
        )
        self.self_attn = WanSelfAttention(dim, config.num_heads, eps, numerics=numerics, rngs=rngs)
        self.norm3 = WanLayerNorm(dim, eps, numerics=numerics)
        self.cross_attn = cross_attention(dim, config.num_heads, eps, numerics=numerics, rngs=rngs)
        self.ffn = Mlp((dim, config.ffn_dim, dim), gelu_tanh, numerics=numerics, rngs=rngs)
        self.modulation = nnx.Param(modulation_init(rngs, 6, dim, numerics))
        self.eps = eps
        self.dtype = numerics.compute

    def modulations(self, e0: Float[Array, "B steps 6 D"]) -> tuple[Modulation, Modulation]:
        """Of self-attention and of the feed-forward."""
        table = self.modulation[...].astype(jnp.float32)[None, None]
        rows = jnp.moveaxis(table + e0, 2, 0)[:, :, :, None]
        return Modulation(*rows[:3]), Modulation(*rows[3:])

    def __call__(
        self,
        x: FrameTokens,
        e0: Float[Array, "B steps 6 D"],
        context: CrossContext,
        rope: RopeTable,
        *,
        mask: BlockCausal | None = None,
        implementation: str | None = None,
    ) -> FrameTokens:
        """``x`` tokens by frame; the residual is float32 inside and rounded at the end."""
        batch, frames, patches, dim = x.shape
        flat = (batch, frames * patches, dim)
        attn, ffn = self.modulations(e0)

        h = mul_add_add(layer_norm(x, eps=self.eps), attn.scale, attn.shift)
        h = self.self_attn(h.reshape(flat), rope, mask=mask, implementation=implementation)
        x = mul_add(x, h.reshape(x.shape), attn.gate)

        h = self.cross_attn(self.norm3(x).reshape(flat), context, implementation=implementation)
        x = x + h.reshape(x.shape).astype(jnp.float32)

        h = mul_add_add(layer_norm(x, eps=self.eps), ffn.scale, ffn.shift)
        x = mul_add(x, self.ffn(h), ffn.gate)
        return x.astype(self.dtype)


class WanModel(nnx.Module):
    """Predicts the flow's velocity ``noise - data`` of video latents.

    The blocks' parameters are stacked along a leading layer axis and run by ``lax.scan``, so that
    compile time does not grow with depth (docs/adr/0001-scan-over-layers.md).
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.bfloat16,
        remat: bool = False,
    ):
        """Parameters as the original initialises them for training from scratch.

        ``dtype`` computes and ``param_dtype`` stores (see :class:`Numerics`). ``remat`` keeps only
        the blocks' inputs for the backward pass and computes the rest again.
        """
        numerics = Numerics(dtype, param_dtype)
        exact = numerics.in_float32()
        dim = config.dim
        self.config = config
        self.numerics = numerics
        self.remat = remat
        self.patch_embedding = PatchEmbedding(config, numerics=numerics, rngs=rngs)
        self.text_embedding = Mlp(
            (config.text_dim, dim, dim),
            gelu_tanh,
            numerics=numerics,
            rngs=rngs,
            init=(NORMAL, NORMAL),
        )
        self.time_embedding = Mlp(
            (config.freq_dim, dim, dim), silu, numerics=exact, rngs=rngs, init=(NORMAL, NORMAL)
        )
        self.time_projection = Linear(dim, 6 * dim, numerics=exact, rngs=rngs)
        if config.inject_sample_info:
            self.fps_embedding = Embedding(2, dim, numerics=numerics, rngs=rngs)
            self.fps_projection = Mlp(
                (dim, dim, 6 * dim), silu, numerics=exact, rngs=rngs, init=(XAVIER, ZEROS)
            )
        if config.model_type == "i2v":
            self.img_emb = ImageEmbedding(config, numerics=numerics, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> WanAttentionBlock:
            return WanAttentionBlock(config, numerics=numerics, rngs=rngs)

        self.blocks = stack(rngs)
        self.head = Head(config, numerics=numerics, rngs=rngs)

    def __call__(
        self,
        x: Latents,
        t: Timesteps,
        context: Float[Array, "B S text_dim"] | CrossContext,
        clip_fea: Float[Array, "B I image_dim"] | None = None,
        y: Float[Array, "B Y F H W"] | None = None,
        fps: Int[Array, " B"] | None = None,
        *,
        block_length: int | None = None,
        attention: str | None = None,
    ) -> Latents:
        """Velocity of ``x``, float32.

        Args:
            x: noisy latents ``[B, 16, F, H, W]``, H and W even.
            t: timesteps in [0, 1000], one a video ``[B]`` or one a frame ``[B, F]``.
            context: text states ``[B, 512, text_dim]`` with zeros past the prompt's end, or what
                :meth:`prepare_context` made of them.
            clip_fea: image states ``[B, 257, 1280]`` (i2v; unless ``context`` is prepared).
            y: mask and image latents ``[B, 20, F, H, W]`` (i2v).
            fps: 0 for 16 frames a second, else 1 (models with ``inject_sample_info``; the others
                ignore it, as the original does).
            block_length: frames a block of block-causal attention; ``None`` attends to all. The
                last block may be shorter.
            attention: name of a path of :mod:`skyreels_jax.ops.attention`; ``None`` chooses.

        Raises:
            ValueError: if shapes do not fit the configuration or each other.
        """
        passage = self.passage(
            x, t, context, clip_fea, y, fps, block_length=block_length, attention=attention
        )
        return passage.head(passage.blocks(passage.tokens))

    def passage(
        self,
        x: Latents,
        t: Timesteps,
        context: Float[Array, "B S text_dim"] | CrossContext,
        clip_fea: Float[Array, "B I image_dim"] | None = None,
        y: Float[Array, "B Y F H W"] | None = None,
        fps: Int[Array, " B"] | None = None,
        *,
        block_length: int | None = None,
        attention: str | None = None,
    ) -> Passage:
        """What a call does, in parts; arguments and errors are those of a call."""
        check_video(self.config, x, t, y)
        if isinstance(context, CrossContext):
            if clip_fea is not None:
                raise ValueError("clip_fea is part of a prepared context: give it there, not here")
        else:
            context = self.prepare_context(context, clip_fea)
        e, e0 = self.embed_time(t, fps)
        tokens = self.patch_embedding(
            x if y is None else jnp.concatenate([x, y.astype(x.dtype)], axis=1)
        )
        batch, frames, rows, columns, dim = tokens.shape
        rope = rope_table((frames, rows, columns), self.config.head_dim)
        mask = None if block_length is None else BlockCausal(rows * columns, block_length)

        def blocks(tokens: FrameTokens) -> FrameTokens:
            return self.run_blocks(tokens, context, (e0, rope), mask, attention)

        def head(tokens: FrameTokens) -> Latents:
            return unpatchify(self.head(tokens, e), (rows, columns), self.config.patch_size)

        tokens = tokens.reshape(batch, frames, rows * columns, dim)
        return Passage(x, e, e0, tokens, blocks, head)

    def run_blocks(
        self,
        tokens: FrameTokens,
        context: CrossContext,
        shared: tuple[Float[Array, "B steps 6 D"], RopeTable],
        mask: BlockCausal | None,
        attention: str | None,
    ) -> FrameTokens:
        """All blocks in turn; ``shared`` is what they have in common, ``e0`` and positions."""
        graph, parameters = nnx.split(self.blocks)

        def layer(
            x: Array, of_layer: tuple[nnx.State, CrossContext], shared: tuple[Array, RopeTable]
        ) -> tuple[Array, None]:
            parameters, context = of_layer
            block = nnx.merge(graph, parameters)
            return block(
                x, shared[0], context, shared[1], mask=mask, implementation=attention
            ), None

        if self.remat:
            layer = jax.checkpoint(layer, prevent_cse=False)
        return scan_layers(layer, tokens, (parameters, context), shared)[0]

    def embed_time(
        self, t: Timesteps, fps: Int[Array, " B"] | None
    ) -> tuple[Float[Array, "B steps D"], Float[Array, "B steps 6 D"]]:
        """``e`` for the head and ``e0`` for the blocks, per frame or once (``steps`` = F or 1)."""
        config = self.config
        steps = t.reshape(t.shape[0], -1)
        sinusoid = sinusoidal_embedding_1d(config.freq_dim, steps.reshape(-1))
        if jnp.dtype(self.numerics.compute) == jnp.bfloat16:
            # The original rounds here; reduce_precision because XLA may drop a cast and its undo.
            sinusoid = jax.lax.reduce_precision(sinusoid, exponent_bits=8, mantissa_bits=7)
        e = self.time_embedding(sinusoid.reshape(*steps.shape, -1))
        e0 = self.time_projection(silu(e)).reshape(*steps.shape, 6, -1)
        if config.inject_sample_info:
            if fps is None:
                raise ValueError("this model takes fps: 0 for 16 frames a second, 1 otherwise")
            rate = self.fps_projection(self.fps_embedding(fps))
            e0 = e0 + rate.reshape(fps.shape[0], 1, 6, -1)
        return e, e0

    def prepare_context(
        self,
        context: Float[Array, "B S text_dim"],
        clip_fea: Float[Array, "B I image_dim"] | None = None,
    ) -> CrossContext:
        """Keys and values of every layer's cross-attention, once for a prompt (and image).

        Raises:
            ValueError: if the number or width of tokens is not the configuration's.
        """
        check_context(self.config, context, clip_fea)
        text = self.text_embedding(context)
        image = None if clip_fea is None else self.img_emb(clip_fea)
        graph, parameters = nnx.split(self.blocks.cross_attn)

        def layer(_: None, parameters: nnx.State, states: Any) -> tuple[None, CrossContext]:
            return None, nnx.merge(graph, parameters).prepare(*states)

        return scan_layers(layer, None, parameters, (text, image))[1]


def check_video(config: TransformerConfig, x: Array, t: Array, y: Array | None) -> None:
    """Raise ``ValueError`` unless ``x``, ``t`` and ``y`` fit ``config`` and each other."""
    batch, channels, frames, height, width = x.shape
    _, rows, columns = config.patch_size
    if channels != config.latent_dim:
        raise ValueError(f"x has {channels} channels; this model takes {config.latent_dim}")
    if height % rows or width % columns:
        raise ValueError(
            f"latents of {height} x {width} do not divide into patches of {rows} x {columns}"
        )
    if t.shape not in ((batch,), (batch, frames)):
        raise ValueError(f"t has shape {t.shape}; expected {(batch,)} or {(batch, frames)}")
    expected = None
    if config.model_type == "i2v":
        expected = (batch, config.in_dim - channels, frames, height, width)
    if (None if y is None else y.shape) != expected:
        raise ValueError(
            f"y has shape {None if y is None else y.shape}; "
            f"a model of type {config.model_type} takes {expected} with this x"
        )


def check_context(config: TransformerConfig, context: Array, clip_fea: Array | None) -> None:
    """Raise ``ValueError`` unless text and image states have the tokens ``config`` names."""
    text = (context.shape[0], config.text_len, config.text_dim)
    if context.shape != text:
        raise ValueError(f"context has shape {context.shape}; expected {text}, padding included")
    image = None
    if config.model_type == "i2v":
        image = (context.shape[0], config.image_tokens, config.image_dim)
    if (None if clip_fea is None else clip_fea.shape) != image:
        raise ValueError(
            f"clip_fea has shape {None if clip_fea is None else clip_fea.shape}; "
            f"a model of type {config.model_type} takes {image}"
        )


def unpatchify(
    patches: Float[Array, "B F P patch"],
    grid: tuple[int, int],
    patch_size: tuple[int, int, int],
) -> Latents:
    """Tokens' patches, each ordered (row, column, channel), back to latents."""
    batch, frames = patches.shape[:2]
    _, p, q = patch_size
    x = patches.reshape(batch, frames, *grid, p, q, -1).transpose(0, 6, 1, 2, 4, 3, 5)
    return x.reshape(batch, x.shape[1], frames, grid[0] * p, grid[1] * q)
