"""What a call of the transformer may be given."""

from jaxtyping import Array

from skyreels_jax.models.transformer_config import TransformerConfig


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


def check_context(
    config: TransformerConfig, context: Array, clip_fea: Array | None, padding: int = 0
) -> None:
    """Raise ``ValueError`` unless text and image states have the tokens ``config`` names.

    ``padding`` rows of the text are not in ``context``.
    """
    text = (context.shape[0], config.text_len - padding, config.text_dim)
    if padding < 0 or context.shape != text:
        raise ValueError(f"context has shape {context.shape}; expected {text}, padding included")
    image = None
    if config.model_type == "i2v":
        image = (context.shape[0], config.image_tokens, config.image_dim)
    if (None if clip_fea is None else clip_fea.shape) != image:
        raise ValueError(
            f"clip_fea has shape {None if clip_fea is None else clip_fea.shape}; "
            f"a model of type {config.model_type} takes {image}"
        )
