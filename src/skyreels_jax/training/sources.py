"""The folders that a recipe names: found, and held against the model that it describes."""

from dataclasses import dataclass, replace

from skyreels_jax.errors import RequestError
from skyreels_jax.hub import locate
from skyreels_jax.models.transformer_config import CONDITION_CHANNELS, TransformerConfig
from skyreels_jax.training.lora import lora_targets
from skyreels_jax.training.transformer_recipe import VideoTraining
from skyreels_jax.weights.components.clip import stored_image_encoder
from skyreels_jax.weights.components.transformer import stored_transformer
from skyreels_jax.weights.components.umt5 import stored_text_encoder
from skyreels_jax.weights.components.vae import stored_vae
from skyreels_jax.weights.layout import CONFIG, Layout, components_of, read_layout


@dataclass(frozen=True)
class TrainingSources:
    """The folders a recipe names, found, and the model that it describes; nothing is loaded."""

    vae: Layout
    text: Layout
    image: Layout | None
    start: Layout | None
    begun: TransformerConfig | None
    config: TransformerConfig


def find_sources(training: VideoTraining) -> TrainingSources:
    """Find what a recipe names, and hold it against the model; only headers are read.

    Raises:
        RequestError: something cannot be found, or does not fit.
        WeightsError: a folder is unsound.
    """
    data, shape = training.data, training.model
    vae, text = layout_of("data.vae", data.vae), layout_of("data.text", data.text)
    image = None
    if shape.model_type == "i2v" and data.image is not None:
        image = layout_of("data.image", data.image)
    start = None if shape.start is None else read_layout(locate(shape.start).folder)
    begun = None if start is None else stored_transformer(start).config
    config = _config_of(training, begun)
    pairs = [("text_dim", config.text_dim, "data.text", stored_text_encoder(text).config.dim)]
    if image is not None:
        width = stored_image_encoder(image).config.dim
        pairs.append(("image_dim", config.image_dim or 0, "data.image", width))
    pairs.append(("latent channels", config.out_dim, "data.vae", stored_vae(vae).config.z_dim))
    for name, wanted, where, has in pairs:
        if wanted != has:
            raise RequestError(
                f"model.{name} = {wanted} does not fit {where}, which gives {has}; nearest: {has}"
            )
    if training.lora is not None:
        if begun is not None and begun.model_type != config.model_type:
            raise RequestError(
                f"lora: model.start = {shape.start!r} is {begun.model_type}, and a LoRA cannot "
                f"make it {config.model_type}; begin with a model that is"
            )
        lora_targets(config, training.lora)
    return TrainingSources(vae, text, image, start, begun, config)


def layout_of(name: str, path_or_id: str) -> Layout:
    """A checkpoint that a setting names, which may lack a transformer.

    Raises:
        RequestError: it is neither a folder, nor a model of this package, nor an id.
        WeightsError: it holds no part of a checkpoint.
    """
    try:
        folder = locate(path_or_id).folder
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from error
    return read_layout(folder) if (folder / CONFIG).is_file() else components_of(folder)


def _config_of(training: VideoTraining, begun: TransformerConfig | None) -> TransformerConfig:
    shape = training.model
    own = {"image_dim": shape.image_dim, "inject_sample_info": shape.inject_sample_info}
    if begun is None:
        names = ("model_type", "dim", "ffn_dim", "num_heads", "num_layers", "text_dim")
        channels = 16 + (CONDITION_CHANNELS if shape.model_type == "i2v" else 0)
        values = {name: getattr(shape, name) for name in names}
        return TransformerConfig(**values, **own, in_dim=channels)
    if begun.model_type == shape.model_type:
        return begun
    if shape.model_type == "t2v":
        raise RequestError(
            f"model.start = {shape.start!r} is i2v and model.model_type is 't2v'; give 'i2v', or "
            "begin with a t2v one"
        )
    if shape.image_dim is None:
        raise RequestError(
            f"model.image_dim must be given: model.start = {shape.start!r} is t2v and has none"
        )
    channels = begun.in_dim + CONDITION_CHANNELS
    return replace(begun, model_type="i2v", in_dim=channels, **own)
