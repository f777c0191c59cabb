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
from skyreels_jax.weights.convert import Place, load_into, on_default_device, verify
from skyreels_jax.weights.layout import CONFIG, Layout, read_json, safetensors_of
from skyreels_jax.weights.rules import Dialect, Rule
from skyreels_jax.weights.source import TensorSource
from skyreels_jax.weights.torch_file import PthSource

ConfigT = TypeVar("ConfigT")
ModelT = TypeVar("ModelT", bound=nnx.Module)


@dataclass(frozen=True)
class StoredPart(Generic[ConfigT, ModelT]):
    """A part on disk, whose tensors are still there.

    Attributes:
        model: the class of the model they fill.
        config: of the model.
        source: the tensors.
        dialect: whose names they have.
        rules: the weight table of the model, for both dialects.
        ignored: patterns of names that may be there and are not read.
    """

    model: Callable[..., ModelT]
    config: ConfigT
    source: TensorSource
    dialect: Dialect
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()

    def abstract(self, dtype: DTypeLike = jnp.float32) -> ModelT:
        """The model as shapes only."""
        return nnx.eval_shape(
            lambda: self.model(self.config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
        )

    def verify(self) -> None:
        """Prove that the file holds exactly the model's tensors, reading headers only.

        Raises:
            WeightsError: with everything that is missing, left over or misshapen.
        """
        verify(self.abstract(), self.rules, self.source, self.dialect, ignored=self.ignored)

    def load(self, dtype: DTypeLike, place: Place = on_default_device) -> ModelT:
        """The model with its parameters, one in host memory at a time.

        Args:
            dtype: to store and to compute in.
            place: puts each finished parameter on its device or devices.

        Raises:
            WeightsError: the file and the model do not cover each other, or a value is not finite.
        """
        model = self.abstract(dtype)
        state = load_into(
            model,
            self.rules,
            self.source,
            self.dialect,
            dtype=dtype,
            ignored=self.ignored,
            place=place,
        )
        graph, _ = nnx.split(model)
        return nnx.merge(graph, state)


def stored_vae(layout: Layout) -> StoredPart[VaeConfig, WanVae]:
    """The VAE of a folder; only headers are read.

    Raises:
        WeightsError: the part is missing or unsound.
        UnsupportedError: it is a variant that SkyReels-V2 does not use.
    """
    source, config = _opened(
        layout, layout.part("vae"), vae_rules.config_from_json, vae_rules.config_from_tensors
    )
    return StoredPart(WanVae, config, source, layout.dialect, vae_rules.vae_rules(config))


def stored_text_encoder(layout: Layout) -> StoredPart[Umt5Config, Umt5Encoder]:
    """The UMT5 encoder of a folder; reads and raises as :func:`stored_vae`."""
    source, config = _opened(
        layout,
        layout.part("text_encoder"),
        umt5_rules.config_from_json,
        umt5_rules.config_from_tensors,
    )
    rules, ignored = umt5_rules.UMT5_RULES, umt5_rules.UMT5_IGNORED
    return StoredPart(Umt5Encoder, config, source, layout.dialect, rules, ignored)


def stored_image_encoder(layout: Layout) -> StoredPart[ClipVisionConfig, ClipVision]:
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
    ignored = clip_rules.CLIP_IGNORED
    return StoredPart(ClipVision, config, source, layout.dialect, rules, ignored)


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
