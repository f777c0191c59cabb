"""The SkyReels-V2 transformer: Wan 2.1 with a timestep for every latent frame."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from skyreels_jax.diffusion.step_cache import StagedForward
from skyreels_jax.models.layers import (
    NORMAL,
    XAVIER,
    ZEROS,
    Embedding,
    Linear,
    Mlp,
    gelu_tanh,
    silu,
)
from skyreels_jax.models.parallelism import (
    SINGLE_DEVICE,
    LayerInputs,
    Parallelism,
    Remat,
    SharedInputs,
    rematerialized,
)
from skyreels_jax.models.transformer_attention import (
    AttentionFunction,
    CrossContext,
    FrameKeyValues,
    PastFrames,
    PastTokens,
    last_counts,
)
from skyreels_jax.models.transformer_config import Numerics, TransformerConfig
from skyreels_jax.models.transformer_layers import (
    FrameTokens,
    Head,
    ImageEmbedding,
    PatchEmbedding,
    WanAttentionBlock,
)
from skyreels_jax.ops.attention import PastKeyValues
from skyreels_jax.ops.masks import BlockCausal, Mask
from skyreels_jax.ops.positions import RopeTable, rope_table, sinusoidal_embedding_1d
from skyreels_jax.shapes import Latents, Timesteps


class WanModel(nnx.Module):
    """Predicts the flow's velocity ``noise - data`` of video latents.

    The blocks' parameters are stacked along a leading layer axis and run by ``lax.scan``, so that
    compile time does not grow with depth (docs/adr/0001-scan-over-layers.md).

    Attributes:
        parallelism: on what devices it runs; whoever runs it may set another.
    """

    parallelism: Parallelism = SINGLE_DEVICE

    def __init__(
        self,
        config: TransformerConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.bfloat16,
        kernel_dtype: DTypeLike | None = None,
        remat: Remat | bool = False,
    ):
        """Parameters as the original initialises them for training from scratch.

        ``dtype`` computes and ``param_dtype`` stores (see :class:`Numerics`); with ``kernel_dtype``
        the kernels of the blocks' linears are zeros in int8 or float8, to be loaded. ``remat``
        is what of the blocks the backward pass computes again (:data:`.Remat`; True is ``full``).
        """
        in_blocks = Numerics(dtype, param_dtype, kernel_dtype)
        numerics = in_blocks.unquantized()
        exact = numerics.in_float32()
        dim = config.dim
        self.config = config
        self.numerics = numerics
        self.remat: Remat | None = "full" if remat is True else remat or None
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
            return WanAttentionBlock(config, numerics=in_blocks, rngs=rngs)

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
        if not isinstance(context, CrossContext):
            context = self.prepare_context(context, clip_fea)
        elif clip_fea is not None:
            raise ValueError("clip_fea is part of a prepared context: give it there, not here")
        staged = self.staged(x, t, context, y, fps, block_length=block_length, attention=attention)
        return staged.head(staged.blocks(staged.tokens))

    def staged(
        self,
        x: Latents,
        t: Timesteps,
        context: CrossContext,
        y: Float[Array, "B Y F H W"] | None = None,
        fps: Int[Array, " B"] | None = None,
        *,
        block_length: int | None = None,
        attention: str | None = None,
        past: PastFrames | None = None,
    ) -> StagedForward:
        """Cut a call into stages, between which a step cache may come.

        Arguments and errors are those of a call, with a prepared context. With ``past`` the frames
        of ``x`` follow others, of which it has the keys and values; both are whole blocks of
        block-causal attention, but for the video's last.
        """
        self.config.check_video(x, t, y)
        e, e0 = self.parallelism.share(self.embed_time(t, fps))
        tokens, grid = self.embed_patches(x, y)
        mask = None if block_length is None else BlockCausal(tokens.shape[2], block_length)
        count = None if past is None else past.count
        past_rope = None
        if past is not None and past.places is not None:
            slots = (len(past.places), *grid[1:])
            past_rope = rope_table(slots, self.config.head_dim, frames=past.places)
        shared = SharedInputs(e0, self.positions(grid, past), count, past_rope)
        given = (context, shared, mask, attention, past)

        def key_values() -> FrameKeyValues:
            states = self.run_blocks(tokens, *given, keep_key_values=True)[1]
            assert states is not None
            return states

        def head(tokens: FrameTokens) -> Latents:
            patches = self.parallelism.join(self.head(tokens, e), grid[1] * grid[2])
            return unpatchify(patches, grid[1:], self.config.patch_size)

        return StagedForward(
            x,
            e,
            e0,
            tokens,
            blocks=lambda tokens: self.run_blocks(tokens, *given)[0],
            head=head,
            key_values=key_values,
        )

    def embed_patches(
        self, x: Latents, y: Float[Array, "B Y F H W"] | None
    ) -> tuple[FrameTokens, tuple[int, int, int]]:
        """Tokens by frame, and how many frames, rows and columns of them there are."""
        patches = self.patch_embedding.patches(
            x if y is None else jnp.concatenate([x, y.astype(x.dtype)], axis=1)
        )
        batch, frames, rows, columns, width = patches.shape
        patches = self.parallelism.cut(patches.reshape(batch, frames, rows * columns, width))
        return self.patch_embedding(patches), (frames, rows, columns)

    def positions(self, grid: tuple[int, int, int], past: PastFrames | None = None) -> RopeTable:
        """Rotary angles of the tokens of ``grid``, which may follow those of ``past``."""
        if past is None:
            return rope_table(grid, self.config.head_dim)
        first = past.count if past.first is None else past.first
        return rope_table(grid, self.config.head_dim, frames=first + jnp.arange(grid[0]))

    def run_blocks(
        self,
        tokens: FrameTokens,
        context: CrossContext,
        shared: SharedInputs,
        mask: Mask | None,
        attention: str | None,
        past: PastFrames | None = None,
        *,
        keep_key_values: bool = False,
    ) -> tuple[FrameTokens, FrameKeyValues | None]:
        """Run all blocks in turn; with ``keep_key_values`` those of each are the second result."""
        graph, parameters = nnx.split(self.blocks)
        stacked = None if past is None else FrameKeyValues(past.key, past.value)

        def layer(
            x: FrameTokens,
            given: LayerInputs,
            shared: SharedInputs,
            attend: AttentionFunction | None = None,
        ) -> tuple[FrameTokens, FrameKeyValues | None]:
            past = None
            if given.past is not None and shared.past_frames is not None:
                row = _in_a_row(given.past, shared.past_frames)
                past = PastTokens(row, shared.past_rope)
            block = nnx.merge(graph, given.parameters)
            options = {"mask": mask, "implementation": attention, "past": past}
            x, own = block(x, shared.e0, given.context, shared.rope, attend=attend, **options)
            if not keep_key_values:
                return x, None
            by_frame = (*x.shape[:3], *own.key.shape[2:])
            return x, FrameKeyValues(own.key.reshape(by_frame), own.value.reshape(by_frame))

        layers = LayerInputs(parameters, context, stacked)
        run = rematerialized(layer, self.remat)
        return self.parallelism.run_layers(run, tokens, layers, shared)

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
        self.config.check_context(context, clip_fea, padding)
        if padding:
            context = jnp.pad(context, ((0, 0), (0, 1), (0, 0)))
        text = self.text_embedding(context)
        image = None if clip_fea is None else self.img_emb(clip_fea)
        graph, parameters = nnx.split(self.blocks.cross_attn)

        def layer(parameters: nnx.State, states: tuple[Array, Array | None]) -> CrossContext:
            return nnx.merge(graph, parameters).prepare(*states)

        prepared = self.parallelism.map_layers(
            layer, parameters, (text, image), "blocks.cross_attn."
        )
        if padding:
            prepared = prepared._replace(text=last_counts(prepared.text, padding))
        return prepared


def _in_a_row(past: FrameKeyValues, count: Int[Array, ""]) -> PastKeyValues:
    """One layer's keys and values of frames as attention takes them: token by token."""
    batch, _, patches, *heads = past.key.shape
    key, value = (states.reshape(batch, -1, *heads) for states in past)
    return PastKeyValues(key, value, count * patches)


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
