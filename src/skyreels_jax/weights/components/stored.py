"""What every component has in common: how it is opened, loaded, verified and written.

In the original format a component is one file whose shapes tell its configuration (the
transformer: ``config.json`` and safetensors); in diffusers' it is a folder with a ``config.json``
and safetensors. Each component of a checkpoint has its own format.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Generic, TypeVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from skyreels_jax.errors import UnsupportedError, WeightsError
from skyreels_jax.weights.engine import (
    Placement,
    TensorStream,
    export,
    load_into,
    on_default_device,
    rename,
    verify,
)
from skyreels_jax.weights.folder_files import read_object, safetensors_of
from skyreels_jax.weights.layout import CONFIG, ComponentName, Layout
from skyreels_jax.weights.model_file import open_component
from skyreels_jax.weights.plan import Format, Rule, Slot, Source, layers_in_file, make_plan
from skyreels_jax.weights.quantized_stream import StoredPrecision, quantized
from skyreels_jax.weights.safetensors_file import TensorSource
from skyreels_jax.weights.writer import MAX_SHARD_BYTES, write_config, write_tensors

# Of lists in configurations: none has more, and no released one has larger values.
_MAX_VALUES: Final = 64
_MAX_VALUE: Final = 1024
# More layers than any model has; each is planned for.
MAX_LAYERS: Final = 1024

ConfigT = TypeVar("ConfigT")
ValueT = TypeVar("ValueT", int, float)
ModelT = TypeVar("ModelT", bound=nnx.Module)


@lru_cache(maxsize=32)
def _split_shapes(
    model: Callable[..., ModelT], config: object, **dtypes: DTypeLike
) -> tuple[nnx.GraphDef[ModelT], nnx.State]:
    """A model's shapes: a sixth of a second for `mini`, and a request asks several times."""
    return nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0), **dtypes)))


@dataclass(frozen=True)
class ComponentSpec(Generic[ConfigT, ModelT]):
    """A kind of component: its model, its weight table and the JSON beside its tensors.

    Attributes:
        model: the class of the model.
        rules: the weight table of a model of some configuration, for both formats.
        config_json: the ``config.json`` of a configuration in a format.
        stem: of the names of its files in diffusers' format.
        ignored: patterns of names that may be in a file and are not read.
    """

    model: Callable[..., ModelT]
    rules: Callable[[ConfigT], tuple[Rule, ...]]
    config_json: Callable[[ConfigT, Format], dict[str, object]]
    # What diffusers calls the files of its own models, and transformers of its.
    stem: str = "diffusion_pytorch_model"
    ignored: tuple[str, ...] = ()

    def abstract(
        self,
        config: ConfigT,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        kernel_dtype: DTypeLike | None = None,
    ) -> ModelT:
        """The model as shapes only, which takes no memory and no random numbers.

        Args:
            config: of the model.
            dtype: to compute in.
            param_dtype: to store in; None stores in ``dtype``.
            kernel_dtype: int8 or float8_e4m3fn, of the blocks' kernels of a model that can have
                it; None stores them as all else.
        """
        stored = dtype if param_dtype is None else param_dtype
        kernels = {} if kernel_dtype is None else {"kernel_dtype": kernel_dtype}
        shapes = _split_shapes(self.model, config, dtype=dtype, param_dtype=stored, **kernels)
        return nnx.merge(*shapes, copy=True)

    def save(
        self,
        folder: Path,
        model: nnx.Module | nnx.State,
        config: ConfigT,
        *,
        format: Format = "diffusers",
        dtype: DTypeLike | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> list[Path]:
        """Write a model as :meth:`write` does, rounded to ``dtype`` (None keeps its own).

        Raises:
            WeightsError: a value is not finite.
        """
        tensors = export(model, self.rules(config), format, dtype=dtype)
        return self.write(folder, config, tensors, format=format, max_shard_bytes=max_shard_bytes)

    def write(
        self,
        folder: Path,
        config: ConfigT,
        tensors: TensorStream,
        *,
        format: Format = "diffusers",
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> list[Path]:
        """Write ``config.json`` and safetensors, with an index if there are several files.

        The files are written in place, so ``folder`` is usually one that
        :func:`skyreels_jax.weights.writer.new_folder` keeps out of sight; it is made if need be.

        Returns:
            The files, ``config.json`` first.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config_file = folder / CONFIG
        write_config(config_file, self.config_json(config, format))
        stem = "model" if format == "original" else self.stem
        return [
            config_file,
            *write_tensors(folder, stem, tensors, max_shard_bytes=max_shard_bytes),
        ]


@dataclass(frozen=True)
class StoredComponent(Generic[ConfigT, ModelT]):
    """A component on disk, whose tensors are still there.

    Attributes:
        spec: what kind of component it is.
        config: of its model.
        source: the tensors.
        format: whose names they have.
        rules: the weight table for these files.
    """

    spec: ComponentSpec[ConfigT, ModelT]
    config: ConfigT
    source: TensorSource
    format: Format
    rules: tuple[Rule, ...]

    def plan(self, format: Format | None = None) -> dict[Slot, Source]:
        """The tensor of each layer of each parameter, by the names of ``format`` or of the files.

        Raises:
            WeightsError: a parameter that ``format`` has no name for.
        """
        layers = layers_in_file(self.source.tensors(), self.format)
        return make_plan(self.rules, format or self.format, layers)

    def abstract(
        self,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        kernel_dtype: DTypeLike | None = None,
    ) -> ModelT:
        """The model as :meth:`ComponentSpec.abstract` gives it."""
        return self.spec.abstract(self.config, dtype, param_dtype, kernel_dtype)

    def verify(self) -> None:
        """Prove that the files hold exactly the model's tensors, reading headers only.

        Raises:
            WeightsError: with everything that is missing, left over or misshapen.
        """
        verify(self.abstract(), self.rules, self.source, self.format, ignored=self.spec.ignored)

    def load_state(self, dtype: DTypeLike, placement: Placement = on_default_device) -> nnx.State:
        """The parameters as the state of a model, one in host memory at a time.

        Args:
            dtype: to store in.
            placement: puts each finished parameter on its device or devices.

        Raises:
            WeightsError: the files and the model do not cover each other, or a value is not finite.
        """
        return load_into(
            self.abstract(),
            self.rules,
            self.source,
            self.format,
            dtype=dtype,
            ignored=self.spec.ignored,
            placement=placement,
        )

    def load(
        self,
        dtype: DTypeLike,
        placement: Placement = on_default_device,
        *,
        param_dtype: DTypeLike | None = None,
        kernel_dtype: DTypeLike | None = None,
    ) -> ModelT:
        """The model with its parameters, one in host memory at a time.

        Args:
            dtype: to compute in.
            placement: puts each finished parameter on its device or devices.
            param_dtype: to store in; None stores in ``dtype``.
            kernel_dtype: int8 or float8_e4m3fn, which the blocks' kernels are quantised to.

        Raises:
            WeightsError: the files and the model do not cover each other, or a value is not finite.
        """
        stored = dtype if param_dtype is None else param_dtype
        model = self.abstract(dtype, stored, kernel_dtype)
        state = load_into(
            model,
            self.rules,
            self.source,
            self.format,
            dtype=stored,
            ignored=self.spec.ignored,
            placement=placement,
        )
        return nnx.merge(nnx.graphdef(model), state)

    def tensors(self, format: Format, *, dtype: DTypeLike | None = None) -> TensorStream:
        """All tensors under the names of ``format``, read one at a time and proved finite.

        Args:
            format: to give them names and shapes of.
            dtype: to round to; None keeps each tensor's.

        Raises:
            WeightsError: the table and the files do not cover each other.
        """
        return rename(
            self.rules, self.source, self.format, format, ignored=self.spec.ignored, dtype=dtype
        )

    def write(
        self,
        folder: Path,
        format: Format,
        *,
        dtype: DTypeLike | None = None,
        weights: StoredPrecision | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> list[Path]:
        """Translate into ``folder`` as :meth:`ComponentSpec.write`, a tensor in memory at a time.

        Raises:
            WeightsError: the files are incomplete, or a value is not finite.
        """
        self.verify()
        tensors = self.tensors(format, dtype=dtype)
        if weights is not None:
            tensors = quantized(tensors, weights)
        if weights == "comfy-fp8":
            # ComfyUI opens one file.
            max_shard_bytes = sys.maxsize
        return self.spec.write(
            folder, self.config, tensors, format=format, max_shard_bytes=max_shard_bytes
        )


class JsonFields:
    """The values of a component's ``config.json``, each checked as it is asked for.

    Args:
        json: the parsed file.
        what: whose it is, for the messages.
    """

    def __init__(self, json: Mapping[str, object], what: str):
        self._json, self._what = json, what

    def require(self, expected: Mapping[str, object]) -> None:
        """Raise UnsupportedError for a key whose value is there and is not the expected one."""
        for key, value in expected.items():
            if self._json.get(key, value) != value:
                raise UnsupportedError(
                    f"{self._what} with {key} {self._json[key]!r:.80}; only {value!r}"
                )

    def size(self, key: str, default: int | None = None, *, most: int = 1 << 20) -> int:
        """A positive integer; raises WeightsError as all that follow."""
        value = self._json.get(key, default)
        if value is None and key not in self._json:
            raise WeightsError(f"the {self._what}'s config.json lacks {key!r}")
        if type(value) is not int or not 0 < value <= most:
            raise self._unsound(key, f"must be an integer between 1 and {most}")
        return value

    def small(self, key: str, default: float) -> float:
        """An epsilon: a number between 0 and 1."""
        value = self._json.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise self._unsound(key, "must be a number between 0 and 1")
        return float(value)

    def values(self, key: str, default: Sequence[ValueT]) -> tuple[ValueT, ...]:
        """A list of as many values at most as the tables have, of the types of ``default``."""
        value = self._json.get(key, default)
        types = {type(one) for one in default}
        types |= {int} if float in types else set()
        if not isinstance(value, list | tuple) or {type(one) for one in value} - types:
            raise self._unsound(key, f"must be a list like {list(default)[:4]}")
        if len(value) > _MAX_VALUES or any(abs(one) > _MAX_VALUE for one in value):
            raise self._unsound(key, "is out of range")
        return tuple(type(default[0])(one) for one in value)

    def _unsound(self, key: str, why: str) -> WeightsError:
        value = f"{self._json.get(key)!r:.80}"
        return WeightsError(f"the {self._what}'s config.json is unsound: {key} = {value} {why}")


def open_files(
    layout: Layout,
    name: ComponentName,
    from_json: Callable[[Mapping[str, object]], ConfigT],
    from_tensors: Callable[[Mapping[str, Sequence[int]], Format], ConfigT],
) -> tuple[TensorSource, ConfigT, Format]:
    """The tensors and the configuration of a component but the transformer, and whose names it has.

    Args:
        layout: the checkpoint.
        name: of the component.
        from_json: reads the configuration from ``config.json``.
        from_tensors: reads it from names and shapes, where there is no such file.

    Raises:
        WeightsError: the component is missing, unsound, or is another one.
    """
    path = layout.component(name)
    if path.is_dir():
        return safetensors_of(path), from_json(read_object(path / CONFIG)), "diffusers"
    source, format = open_component(path, name)
    shapes = {tensor: info.shape for tensor, info in source.tensors().items()}
    return source, from_tensors(shapes, format), format
