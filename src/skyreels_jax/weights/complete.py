"""Whether a checkpoint folder holds all that a generation takes, by headers alone.

What this refuses would otherwise come up after minutes of encoding and denoising.
"""

from skyreels_jax.errors import WeightsError
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.weights.layout import Layout, Part
from skyreels_jax.weights.parts import stored_image_encoder, stored_text_encoder, stored_vae
from skyreels_jax.weights.transformer_folder import verify_transformer


def verify_checkpoint(layout: Layout, config: TransformerConfig) -> None:
    """Prove that the transformer, the VAE and the encoders are complete and fit one another.

    Raises:
        WeightsError: a part is missing, unsound or incomplete, or gives what the transformer does
            not take.
        UnsupportedError: the VAE is a variant that SkyReels-V2 does not use.
    """
    verify_transformer(layout, config)
    text = stored_text_encoder(layout)
    text.verify()
    _check_width(layout, "text_encoder", text.config.dim, config.text_dim)
    if config.image_dim is not None:
        image = stored_image_encoder(layout)
        image.verify()
        _check_width(layout, "image_encoder", image.config.dim, config.image_dim)
    stored_vae(layout).verify()


def _check_width(layout: Layout, part: Part, given: int, taken: int) -> None:
    if given != taken:
        raise WeightsError(
            f"{layout.part(part)} gives {given} features and {layout.config_file} takes {taken}: "
            "they belong to different checkpoints"
        )
