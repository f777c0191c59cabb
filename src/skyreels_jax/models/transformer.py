"""The SkyReels-V2 transformer: Wan 2.1 with a timestep for every latent frame."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from skyreels_jax.models.block import FrameTokens, WanAttentionBlock
from skyreels_jax.models.layers import (
    NORMAL,
    XAVIER,
    ZEROS,
    CrossContext,
    Embedding,
    Head,
    ImageEmbedding,
    KeyValues,
    Linear,
    Mlp,
    PatchEmbedding,
    gelu_tanh,
    last_counts,
    silu,
)
from skyreels_jax.models.transformer_config import Numerics, TransformerConfig
from skyreels_jax.models.transformer_inputs import check_context, check_video
from skyreels_jax.ops.attention import Earlier
from skyreels_jax.ops.masks import BlockCausal
from skyreels_jax.ops.positions import RopeTable, rope_table
from skyreels_jax.ops.scan_layers import scan_layers
from skyreels_jax.ops.sinusoid import sinusoidal_embedding_1d
from skyreels_jax.shapes import Latents, Timesteps


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


class Before(NamedTuple):
    """Finished frames that come before those of a call, under block-causal attention.

    Attributes:
        frames: how many there are: whole blocks.
        states: their keys and values in every layer, ``[layers, B, S, N, K]``. There may be room
            for more than there are.
    """

    frames: Int[Array, ""]
    states: KeyValues


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
        before: Before | None = None,
    ) -> Passage:
        """What a call does, in parts; arguments and errors are those of a call.

        With ``before`` the frames of ``x`` follow others; they begin with a block of attention.
        """
        check_video(self.config, x, t, y)
        if isinstance(context, CrossContext):
            if clip_fea is not None:
                raise ValueError("clip_fea is part of a prepared context: give it there, not here")
        else:
            context = self.prepare_context(context, clip_fea)
        e, e0 = self.embed_time(t, fps)
        tokens, grid = self.embed_patches(x, y)
        rope = self.positions(grid, before)
        mask = None if block_length is None else BlockCausal(tokens.shape[2], block_length)

        def blocks(tokens: FrameTokens) -> FrameTokens:
            return self.run_blocks(tokens, context, (e0, rope), mask, attention, before)[0]

        def head(tokens: FrameTokens) -> Latents:
            return unpatchify(self.head(tokens, e), grid[1:], self.config.patch_size)

        return Passage(x, e, e0, tokens, blocks, head)

    def keys_values(
        self,
        x: Latents,
        t: Timesteps,
        context: CrossContext,
        y: Float[Array, "B Y F H W"] | None = None,
        fps: Int[Array, " B"] | None = None,
        *,
        attention: str | None = None,
        before: Before | None = None,
    ) -> KeyValues:
        """What later frames see of ``x`` in every layer: ``[layers, B, F * P, N, K]``.

        ``x`` is one block of block-causal attention; arguments are those of :meth:`passage`.
        """
        check_video(self.config, x, t, y)
        _, e0 = self.embed_time(t, fps)
        tokens, grid = self.embed_patches(x, y)
        shared = e0, self.positions(grid, before)
        return self.run_blocks(tokens, context, shared, None, attention, before, keep=True)[1]

    def embed_patches(
        self, x: Latents, y: Float[Array, "B Y F H W"] | None
    ) -> tuple[FrameTokens, tuple[int, int, int]]:
        """Tokens by frame, and how many frames, rows and columns of them there are."""
        tokens = self.patch_embedding(
            x if y is None else jnp.concatenate([x, y.astype(x.dtype)], axis=1)
        )
        batch, frames, rows, columns, dim = tokens.shape
        return tokens.reshape(batch, frames, rows * columns, dim), (frames, rows, columns)

    def positions(self, grid: tuple[int, int, int], before: Before | None) -> RopeTable:
        """Of the tokens of ``grid``, which may follow others."""
        if before is None:
            return rope_table(grid, self.config.head_dim)
        latest = before.states.key.shape[2] // (grid[1] * grid[2])
        return rope_table(grid, self.config.head_dim, first=before.frames, latest=latest)

    def run_blocks(
        self,
        tokens: FrameTokens,
        context: CrossContext,
        shared: tuple[Float[Array, "B steps 6 D"], RopeTable],
        mask: BlockCausal | None,
        attention: str | None,
        before: Before | None = None,
        *,
        keep: bool = False,
    ) -> tuple[FrameTokens, Any]:
        """All blocks in turn; ``shared`` is what they have in common, ``e0`` and positions.

        With ``keep`` the keys and values of each are the second result.
        """
        graph, parameters = nnx.split(self.blocks)
        count = None if before is None else before.frames * tokens.shape[2]
        states = None if before is None else before.states

        def layer(x: Array, of_layer: tuple[Any, ...], shared: tuple[Any, ...]) -> tuple[Any, Any]:
            parameters, context, states = of_layer
            e0, rope, count = shared
            x, own = nnx.merge(graph, parameters).run(
                x,
                e0,
                context,
                rope,
                mask=mask,
                implementation=attention,
                earlier=None if states is None else Earlier(states.key, states.value, count),
            )
            return x, own if keep else None

        if self.remat:
            layer = jax.checkpoint(layer, prevent_cse=False)
        return scan_layers(layer, tokens, (parameters, context, states), (*shared, count))

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
        *,
        padding: int = 0,
    ) -> CrossContext:
        """Keys and values of every layer's cross-attention, once for a prompt (and image).

        ``padding`` rows of zeros follow those of ``context``: they are computed as one, which
        attention counts as so many. The result is the same, for a fraction of the work; in
        bfloat16 their number is rounded.

        Raises:
            ValueError: if the number or width of tokens is not the configuration's.
        """
        check_context(self.config, context, clip_fea, padding)
        if padding:
            context = jnp.pad(context, ((0, 0), (0, 1), (0, 0)))
        text = self.text_embedding(context)
        image = None if clip_fea is None else self.img_emb(clip_fea)
        graph, parameters = nnx.split(self.blocks.cross_attn)

        def layer(_: None, parameters: nnx.State, states: Any) -> tuple[None, CrossContext]:
            return None, nnx.merge(graph, parameters).prepare(*states)

        prepared = scan_layers(layer, None, parameters, (text, image))[1]
        if padding:
            prepared = prepared._replace(text=last_counts(prepared.text, padding))
        return prepared


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
