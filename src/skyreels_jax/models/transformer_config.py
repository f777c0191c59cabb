"""What shape a transformer has, the released shapes, and which dtypes it computes in."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from skyreels_jax.errors import UnsupportedError

# CLIP ViT-H/14 at 224 pixels: 16 x 16 patches and the class token.
_IMAGE_TOKENS: Final = 257
# Image-to-video models see 16 noise, 4 mask and 16 image channels.
CONDITION_CHANNELS: Final = 20


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape of one SkyReels-V2 transformer; field names are those of the published configs.

    Attributes:
        model_type: ``t2v`` (also diffusion forcing) or ``i2v`` (also first-last-frame).
        dim: model width, ``num_heads`` times an even head width.
        ffn_dim: hidden width of the feed-forward.
        num_heads: attention heads.
        num_layers: transformer blocks.
        in_dim: latent channels the patch embedding takes (16; 36 with an image condition).
        out_dim: latent channels predicted.
        freq_dim: width of the sinusoidal time embedding.
        text_dim: width of the text encoder's states.
        text_len: text tokens; padding included, since the models attend to it.
        patch_size: latent frames, rows and columns of one token.
        eps: of every norm but the image embedder's.
        inject_sample_info: whether a frame-rate embedding is added to the time modulation.
        image_dim: width of the image encoder's states; exactly the i2v models have one.
        pos_embed_seq_len: image tokens with a learned position (514 for two images); ``None`` for
            one image without positions.
    """

    model_type: Literal["t2v", "i2v"]
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    inject_sample_info: bool = False
    image_dim: int | None = None
    pos_embed_seq_len: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value <= 0:
                raise ValueError(f"{field.name} = {value} must be positive")
        if self.dim % self.num_heads or self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"dim = {self.dim} over num_heads = {self.num_heads} must give heads of an even "
                "width of at least 6: rotary positions take pairs on three axes"
            )
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim = {self.freq_dim} must be even: cosines, then sines")
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size = {self.patch_size}: timesteps are per latent frame")
        if (self.image_dim is not None) != (self.model_type == "i2v"):
            raise ValueError(
                f"model_type = {self.model_type!r} with image_dim = {self.image_dim}: i2v models "
                "have an image embedder and t2v models have none"
            )
        if self.model_type == "t2v" and self.pos_embed_seq_len is not None:
            raise ValueError(f"pos_embed_seq_len = {self.pos_embed_seq_len} needs model_type 'i2v'")
        if self.model_type == "i2v" and self.in_dim <= CONDITION_CHANNELS:
            raise ValueError(
                f"in_dim = {self.in_dim}: i2v models add {CONDITION_CHANNELS} condition channels"
            )

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.dim // self.num_heads

    @property
    def latent_dim(self) -> int:
        """Channels of ``x``: the input without the image condition."""
        return self.in_dim - (CONDITION_CHANNELS if self.model_type == "i2v" else 0)

    @property
    def image_tokens(self) -> int:
        """Image tokens that cross-attention sees; 0 without an image."""
        if self.model_type == "t2v":
            return 0
        return self.pos_embed_seq_len or _IMAGE_TOKENS

    def patches(self, rows: int, columns: int) -> int:
        """Tokens of a latent frame of so many rows and columns."""
        _, patch_rows, patch_columns = self.patch_size
        return (rows // patch_rows) * (columns // patch_columns)

    def check_video(self, x: Array, t: Array, y: Array | None) -> None:
        """Raise ``ValueError`` unless latents, timesteps and image condition fit each other."""
        batch, channels, frames, height, width = x.shape
        _, rows, columns = self.patch_size
        if channels != self.latent_dim:
            raise ValueError(f"x has {channels} channels; this model takes {self.latent_dim}")
        if height % rows or width % columns:
            raise ValueError(
                f"latents of {height} x {width} do not divide into patches of {rows} x {columns}"
            )
        if t.shape not in ((batch,), (batch, frames)):
            raise ValueError(f"t has shape {t.shape}; expected {(batch,)} or {(batch, frames)}")
        expected = None
        if self.model_type == "i2v":
            expected = (batch, self.in_dim - channels, frames, height, width)
        if (None if y is None else y.shape) != expected:
            raise ValueError(
                f"y has shape {None if y is None else y.shape}; "
                f"a model of type {self.model_type} takes {expected} with this x"
            )

    def check_context(self, context: Array, clip_fea: Array | None, padding: int = 0) -> None:
        """Raise ``ValueError`` unless text and image states have the tokens that this model takes.

        ``padding`` rows of the text are not in ``context``.
        """
        text = (context.shape[0], self.text_len - padding, self.text_dim)
        if padding < 0 or context.shape != text:
            raise ValueError(
                f"context has shape {context.shape}; expected {text}, padding included"
            )
        image = None
        if self.model_type == "i2v":
            image = (context.shape[0], self.image_tokens, self.image_dim)
        if (None if clip_fea is None else clip_fea.shape) != image:
            raise ValueError(
                f"clip_fea has shape {None if clip_fea is None else clip_fea.shape}; "
                f"a model of type {self.model_type} takes {image}"
            )


T2V_1_3B: Final = TransformerConfig(
    model_type="t2v", dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16
)
T2V_14B: Final = TransformerConfig(
    model_type="t2v", dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=16
)
DF_1_3B: Final = dataclasses.replace(T2V_1_3B, inject_sample_info=True)
DF_14B: Final = T2V_14B
I2V_1_3B: Final = dataclasses.replace(T2V_1_3B, model_type="i2v", in_dim=36, image_dim=1280)
I2V_14B: Final = dataclasses.replace(T2V_14B, model_type="i2v", in_dim=36, image_dim=1280)
FLF2V_1_3B: Final = dataclasses.replace(I2V_1_3B, pos_embed_seq_len=2 * _IMAGE_TOKENS)
FLF2V_14B: Final = dataclasses.replace(I2V_14B, pos_embed_seq_len=2 * _IMAGE_TOKENS)


# What kernels can be stored in besides the dtypes of all parameters, by the names that users type.
QUANTIZED_DTYPES: Final[Mapping[str, jnp.dtype]] = {
    "int8": jnp.dtype(jnp.int8),
    "fp8": jnp.dtype(jnp.float8_e4m3fn),
}


@dataclass(frozen=True)
class Numerics:
    """Which dtypes a model computes and stores in.

    ``compute`` is float32 (everything at full precision, for parity) or bfloat16 (as the original
    runs: matrix products on bfloat16 operands with float32 sums; norms, rotary positions, time
    path, residual within a block and head in float32; block outputs rounded). ``params`` is what
    the parameters are stored in. ``kernels`` is what the kernels of linears are stored in where
    that is something else: int8 or float8_e4m3fn, each with a float32 scale per output channel.
    ``docs/numerics.md`` has every deviation and its size.
    """

    compute: DTypeLike = jnp.bfloat16
    params: DTypeLike = jnp.bfloat16
    kernels: DTypeLike | None = None

    def __post_init__(self) -> None:
        for name, value in (("dtype", self.compute), ("param_dtype", self.params)):
            if jnp.dtype(value) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
                raise UnsupportedError(
                    f"{name} = {jnp.dtype(value).name}: the transformer runs in float32 or bfloat16"
                )
        if self.kernels is not None and jnp.dtype(self.kernels) not in QUANTIZED_DTYPES.values():
            raise UnsupportedError(
                f"kernels = {jnp.dtype(self.kernels).name}: they are quantised to "
                + " or ".join(dtype.name for dtype in QUANTIZED_DTYPES.values())
            )

    def in_float32(self) -> "Numerics":
        """The same storage, computing in float32: the time path, the frame rate and the head."""
        return Numerics(jnp.float32, self.params)

    def unquantized(self) -> "Numerics":
        """The same with every kernel in ``params``: all that is not in a block."""
        return dataclasses.replace(self, kernels=None)
