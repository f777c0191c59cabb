"""A transformer's tensors with LoRAs added, one tensor in memory at a time."""

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.weights.components.stored import StoredComponent
from skyreels_jax.weights.engine import parameters, scales_of
from skyreels_jax.weights.lora.adapters import Adapter
from skyreels_jax.weights.lora.binding import BoundLora, Lora, bind
from skyreels_jax.weights.lora.file import open_lora
from skyreels_jax.weights.lora.names import ModelNames
from skyreels_jax.weights.plan import Slot, Source
from skyreels_jax.weights.safetensors_file import TensorInfo, TensorSource

StoredTransformer = StoredComponent[TransformerConfig, WanModel]
LowRank = tuple[np.ndarray, np.ndarray]

logger = logging.getLogger(__name__)


class LoraSource:
    """The tensors of a source; those that adapters are of are sums in float32.

    Args:
        source: the transformer's, under the names of its files.
        loras: each with its scale.
        is_rounded: whether the sums are rounded to the dtype that the source has them in.
        quantized: tensors that will be; what can stand beside them is not added.
    """

    def __init__(
        self,
        source: TensorSource,
        loras: Sequence[tuple[BoundLora, float]],
        *,
        is_rounded: bool = False,
        quantized: Collection[str] = (),
    ):
        self._source, self._loras, self._is_rounded = source, loras, is_rounded
        self._quantized = frozenset(quantized)

    @property
    def touched(self) -> frozenset[str]:
        """The tensors to which something is added."""
        there = {name for lora, _ in self._loras for name in lora.by_tensor}
        return frozenset(name for name in there if any(self._adapters(name, are_beside=False)))

    def beside(self, name: str) -> LowRank | None:
        """What stands beside a tensor that will be quantised, of all LoRAs together.

        Returns:
            ``down`` [rank, in] and ``up`` [out, rank], float32, scales and alphas within.

        Raises:
            WeightsError: a LoRA has values that are not finite.
        """
        pairs = []
        for lora, scale, adapter in self._adapters(name, are_beside=True):
            parts = {part: lora.file.read(adapter.keys[part]) for part in ("down", "up")}
            down, up = adapter.factors(parts)
            pairs.append((down, np.float32(scale) * up))
        if not pairs:
            return None
        downs, ups = zip(*pairs, strict=True)
        return np.concatenate(downs), np.concatenate(ups, axis=1)

    def _adapters(
        self, name: str, *, are_beside: bool
    ) -> Iterator[tuple[BoundLora, float, Adapter]]:
        for lora, scale in self._loras:
            for adapter in lora.by_tensor.get(name, ()):
                if (adapter.is_low_rank and name in self._quantized) == are_beside:
                    yield lora, scale, adapter

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
        for lora, scale, adapter in self._adapters(name, are_beside=False):
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


def proven(
    stored: StoredTransformer, loras: Sequence[Lora], kernel_dtype: DTypeLike | None = None
) -> StoredTransformer:
    """As :func:`with_loras`, and all values of the LoRAs have been read and are finite.

    Raises:
        WeightsError: as :func:`with_loras`, or a value is NaN or infinite.
    """
    merged = with_loras(stored, loras, kernel_dtype=kernel_dtype)
    if isinstance(merged.source, LoraSource):
        merged.source.check_values()
    return merged


def with_loras(
    stored: StoredTransformer,
    loras: Sequence[Lora],
    *,
    is_rounded: bool = False,
    kernel_dtype: DTypeLike | None = None,
) -> StoredTransformer:
    """A transformer whose tensors have LoRAs added, in float32, as they are read.

    To tensors that will be quantised only what is no product of two matrices is added (DoRA, LoKr,
    whole differences). Products would lose what lies below half a step of a channel's scale; they
    are for :func:`skyreels_jax.weights.lora.beside.put_beside`.

    Args:
        stored: the transformer in its files.
        loras: each adds ``scale`` times what its adapters add to the files' weights alone, so that
            their order does not matter.
        is_rounded: whether each sum is rounded to the dtype of the files, for files to be written.
        kernel_dtype: what the blocks' kernels will be quantised to, if they will.

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
    quantized = {source.name for _, source in quantized_tensors(stored, kernel_dtype)}
    for lora, _ in bound:
        there = (a for a in lora.adapters if a.place.tensor in quantized and not a.is_low_rank)
        kinds = Counter(adapter.label for adapter in there)
        if named := ", ".join(f"{count} {label}" for label, count in kinds.items()):
            _warn_once(
                f"LoRA {lora.file.path.name}: {named} cannot stand beside 8-bit weights and are "
                "added before these are quantised"
            )
    source = LoraSource(stored.source, bound, is_rounded=is_rounded, quantized=quantized)
    return replace(stored, source=source)


def quantized_tensors(
    stored: StoredTransformer, kernel_dtype: DTypeLike | None
) -> Iterator[tuple[Slot, Source]]:
    """Where a transformer has quantised kernels, and of which tensors of its files they are."""
    if kernel_dtype is None:
        return
    kept = scales_of(parameters(stored.abstract(kernel_dtype=kernel_dtype)))
    yield from ((slot, source) for slot, source in stored.plan().items() if slot.target in kept)


def touched(stored: StoredTransformer) -> frozenset[str]:
    """The tensors of a transformer's files that its LoRAs are of."""
    source = stored.source
    return source.touched if isinstance(source, LoraSource) else frozenset()


@cache
def _warn_once(note: str) -> None:
    """Log a warning that several steps of one run would repeat."""
    logger.warning("%s", note)
