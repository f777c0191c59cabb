"""A transformer's tensors with LoRAs added, one tensor in memory at a time."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.weights.components.stored import StoredComponent
from skyreels_jax.weights.engine import Placement, load_into, on_default_device
from skyreels_jax.weights.lora.binding import BoundLora, Lora, bind
from skyreels_jax.weights.lora.file import open_lora
from skyreels_jax.weights.lora.names import ModelNames
from skyreels_jax.weights.plan import layers_in_file, make_plan
from skyreels_jax.weights.safetensors_file import TensorInfo, TensorSource

StoredTransformer = StoredComponent[TransformerConfig, WanModel]

logger = logging.getLogger(__name__)


class LoraSource:
    """The tensors of a source; those that adapters are of are sums in float32.

    Args:
        source: the transformer's, under the names of its files.
        loras: each with its scale.
        is_rounded: whether the sums are rounded to the dtype that the source has them in.
    """

    def __init__(
        self,
        source: TensorSource,
        loras: Sequence[tuple[BoundLora, float]],
        *,
        is_rounded: bool = False,
    ):
        self._source, self._loras, self._is_rounded = source, loras, is_rounded

    @property
    def touched(self) -> frozenset[str]:
        """The tensors that adapters are of."""
        return frozenset(name for lora, _ in self._loras for name in lora.by_tensor)

    def check_values(self) -> None:
        """Read every value of the LoRAs; raises a WeightsError for one that is not finite."""
        for lora, _ in self._loras:
            for key in {key for adapter in lora.adapters for key in adapter.keys.values()}:
                lora.file.read(key)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, from the headers alone."""
        touched = self.touched if not self._is_rounded else frozenset()
        return {
            name: replace(info, dtype=np.dtype(np.float32)) if name in touched else info
            for name, info in self._source.tensors().items()
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor: as stored, or in float32 with what every LoRA adds to it.

        Raises:
            WeightsError: a LoRA has values that are not finite.
        """
        stored = self._source.read(name)
        changes = list(self._changes(name, stored))
        if not changes:
            return stored
        total = np.array(stored, np.float32)
        for change in changes:
            total += change
        return total.astype(stored.dtype) if self._is_rounded else total

    def _changes(self, name: str, stored: np.ndarray) -> Iterator[np.ndarray]:
        weight = None
        for lora, scale in self._loras:
            for adapter in lora.by_tensor.get(name, ()):
                keys = {part: key for part, key in adapter.keys.items() if part != "alpha"}
                parts = {part: lora.file.read(key) for part, key in keys.items()}
                weight = np.asarray(stored, np.float32) if weight is None else weight
                yield np.float32(scale) * adapter.change(parts, weight)


def bound_to(stored: StoredTransformer, path: Path) -> BoundLora:
    """A LoRA file bound to a transformer; only headers and alphas are read.

    Raises:
        WeightsError: as :func:`~skyreels_jax.weights.lora.binding.bind`.
    """
    names = ModelNames.of(stored.rules, stored.source.tensors(), stored.format)
    return bind(open_lora(path), names)


def proven(stored: StoredTransformer, loras: Sequence[Lora]) -> StoredTransformer:
    """As :func:`with_loras`, and all values of the LoRAs have been read and are finite.

    Raises:
        WeightsError: as :func:`with_loras`, or a value is NaN or infinite.
    """
    merged = with_loras(stored, loras)
    if isinstance(merged.source, LoraSource):
        merged.source.check_values()
    return merged


def reload(
    model: nnx.Module,
    stored: StoredTransformer,
    tensors: Collection[str],
    dtype: DTypeLike,
    placement: Placement = on_default_device,
    kernel_dtype: DTypeLike | None = None,
) -> None:
    """Read the parameters of some tensors anew into a loaded model, one in host memory at a time.

    Args:
        model: of these files; its other parameters stay as they are.
        stored: the files, with or without LoRAs.
        tensors: names of tensors in the files.
        dtype: to store in.
        placement: puts a finished parameter on its device or devices.
        kernel_dtype: what the blocks' kernels are quantised to, if they are.

    Raises:
        WeightsError: a value is not finite; the parameters before it are new already.
    """
    tensors = set(tensors)
    layers = layers_in_file(stored.source.tensors(), stored.format)
    plan = make_plan(stored.rules, stored.format, layers)
    targets = {slot.target for slot, source in plan.items() if source.name in tensors}
    abstract = nnx.to_flat_state(nnx.state(stored.abstract(dtype, dtype, kernel_dtype)))
    for target in targets:
        # Of a quantised kernel its scale too.
        own = [(path, leaf) for path, leaf in abstract if _is_of(target, path)]
        state = load_into(
            nnx.from_flat_state(own),
            [rule for rule in stored.rules if rule.target == target],
            stored.source,
            stored.format,
            dtype=dtype,
            # Only this parameter's tensors are read; the others are no business of this table.
            ignored=(r".*",),
            placement=placement,
        )
        nnx.update(model, state)


def _is_of(target: str, path: Sequence[object]) -> bool:
    return ".".join(map(str, path)) in (target, f"{target}_scale")


def with_loras(
    stored: StoredTransformer, loras: Sequence[Lora], *, is_rounded: bool = False
) -> StoredTransformer:
    """A transformer whose tensors have LoRAs added, in float32, as they are read.

    Args:
        stored: the transformer in its files.
        loras: each adds ``scale`` times what its adapters add to the files' weights alone, so that
            their order does not matter.
        is_rounded: whether each sum is rounded to the dtype of the files, for files to be written.

    Raises:
        WeightsError: a file is unsound or does not fit this transformer; says everything wrong.
    """
    if not loras:
        return stored
    bound = [(bound_to(stored, lora.path), lora.scale) for lora in loras]
    for lora, scale in bound:
        logger.info("LoRA %s, scale %g: %s", lora.file.path, scale, lora.summary())
        for note in lora.notes():
            _warn_once(note)
    return replace(stored, source=LoraSource(stored.source, bound, is_rounded=is_rounded))


def touched(stored: StoredTransformer) -> frozenset[str]:
    """The tensors of a transformer's files that its LoRAs are of."""
    source = stored.source
    return source.touched if isinstance(source, LoraSource) else frozenset()


@cache
def _warn_once(note: str) -> None:
    """Log a warning that several steps of one run would repeat."""
    logger.warning("%s", note)
