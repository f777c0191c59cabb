"""The VAE, UMT5 and CLIP of a checkpoint folder, in either layout, as JAX modules.

In the original layout a part is one ``.pth`` file whose shapes tell its configuration; in
diffusers' it is a folder with a ``config.json`` and safetensors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from skyreels_jax.models.clip_vision import ClipVision, ClipVisionConfig
from skyreels_jax.models.umt5 import Umt5Config, Umt5Encoder
from skyreels_jax.models.vae import WanVae
from skyreels_jax.models.vae_config import VaeConfig
from skyreels_jax.weights import clip_rules, umt5_rules, vae_rules
from skyreels_jax.weights.convert import Place, load_into, on_default_device
from skyreels_jax.weights.layout import CONFIG, Layout, read_json, safetensors_of
from skyreels_jax.weights.pth import PthSource
from skyreels_jax.weights.rules import Dialect, Rule
from skyreels_jax.weights.source import TensorSource

ConfigT = TypeVar("ConfigT")
ModelT = TypeVar("ModelT", bound=nnx.Module)


@dataclass(frozen=True)
class StoredPart(Generic[ConfigT]):
    """A part on disk, whose tensors are still there.

    Attributes:
        source: its tensors.
        dialect: whose names they have.
        config: of the model they fill.
        rules: the weight table of that model, for both dialects.
        ignored: patterns of names that may be there and are not read.
    """

    source: TensorSource
    dialect: Dialect
    config: ConfigT
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()


def stored_vae(layout: Layout) -> StoredPart[VaeConfig]:
    """The VAE of a folder; only headers are read.

    Raises:
        WeightsError: the part is missing or unsound.
        UnsupportedError: it is a variant that SkyReels-V2 does not use.
    """
    source, config = _opened(
        layout, layout.part("vae"), vae_rules.config_from_json, vae_rules.config_from_tensors
    )
    return StoredPart(source, layout.dialect, config, vae_rules.vae_rules(config))


def stored_text_encoder(layout: Layout) -> StoredPart[Umt5Config]:
    """The UMT5 encoder of a folder; reads and raises as :func:`stored_vae`."""
    source, config = _opened(
        layout,
        layout.part("text_encoder"),
        umt5_rules.config_from_json,
        umt5_rules.config_from_tensors,
    )
    rules, ignored = umt5_rules.UMT5_RULES, umt5_rules.UMT5_IGNORED
    return StoredPart(source, layout.dialect, config, rules, ignored)


def stored_image_encoder(layout: Layout) -> StoredPart[ClipVisionConfig]:
    """The CLIP vision tower of a folder; reads and raises as :func:`stored_vae`."""
    source, config = _opened(
        layout,
        layout.part("image_encoder"),
        clip_rules.config_from_json,
        clip_rules.config_from_tensors,
    )
    prefix = clip_rules.DEFAULT_PREFIX
    if layout.dialect == "diffusers":
        prefix = clip_rules.diffusers_prefix(source.tensors())
    rules = clip_rules.clip_rules(config, prefix=prefix)
    return StoredPart(source, layout.dialect, config, rules, clip_rules.CLIP_IGNORED)


def _opened(
    layout: Layout,
    path: Path,
    from_json: Callable[[Mapping[str, Any]], ConfigT],
    from_tensors: Callable[[Mapping[str, Sequence[int]], Dialect], ConfigT],
) -> tuple[TensorSource, ConfigT]:
    if path.is_dir():
        return safetensors_of(path), from_json(read_json(path / CONFIG))
    source = PthSource(path)
    shapes = {name: info.shape for name, info in source.tensors().items()}
    return source, from_tensors(shapes, layout.dialect)


def load_vae(
    layout: Layout, *, dtype: DTypeLike = jnp.float32, place: Place = on_default_device
) -> WanVae:
    """A folder's VAE.

    Args:
        layout: the folder.
        dtype: to store and to compute in.
        place: puts each finished parameter on its device or devices.

    Raises:
        WeightsError: the part is missing, unsound or incomplete, or a value is not finite.
        UnsupportedError: it is a variant that SkyReels-V2 does not use.
    """
    return _loaded(WanVae, stored_vae(layout), dtype, place)


def load_text_encoder(
    layout: Layout, *, dtype: DTypeLike = jnp.bfloat16, place: Place = on_default_device
) -> Umt5Encoder:
    """A folder's UMT5 encoder; arguments and errors as for :func:`load_vae`."""
    return _loaded(Umt5Encoder, stored_text_encoder(layout), dtype, place)


def load_image_encoder(
    layout: Layout, *, dtype: DTypeLike = jnp.bfloat16, place: Place = on_default_device
) -> ClipVision:
    """A folder's CLIP vision tower; arguments and errors as for :func:`load_vae`."""
    return _loaded(ClipVision, stored_image_encoder(layout), dtype, place)


def _loaded(
    model: Callable[..., ModelT], stored: StoredPart[Any], dtype: DTypeLike, place: Place
) -> ModelT:
    abstract = nnx.eval_shape(
        lambda: model(stored.config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    )
    state = load_into(
        abstract,
        stored.rules,
        stored.source,
        stored.dialect,
        dtype=dtype,
        ignored=stored.ignored,
        place=place,
    )
    graph, _ = nnx.split(abstract)
    return nnx.merge(graph, state)
