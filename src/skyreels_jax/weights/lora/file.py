"""A LoRA file as it lies on disk: its tensors, and what its header says of their scales."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np

from skyreels_jax.errors import WeightsError
from skyreels_jax.files import open_regular, parse_json
from skyreels_jax.weights.filling import rounded
from skyreels_jax.weights.open_file import first_bytes, is_archive
from skyreels_jax.weights.safetensors_file import SafetensorsSource, TensorInfo, TensorSource
from skyreels_jax.weights.torch_file import PthSource

# Where diffusers keeps PEFT's configuration in a header.
ADAPTER_METADATA: Final = "lora_adapter_metadata"
# Where kohya's trainer keeps how often each tag, a piece of a caption between commas, was seen.
TAGS_METADATA: Final = "ss_tag_frequency"
_PHRASES: Final = ("modelspec.trigger_phrase", "modelspec.tags")
# What a name in a pattern of PEFT's may hold besides letters, digits, `_` and `-`: nothing of a
# regular expression but the dot, which stands for itself in every name of a module.
_PLAIN: Final = frozenset(".-_")


@dataclass(frozen=True)
class PeftScaling:
    """How PEFT's configuration scales adapters: ``alpha / rank``, or by the rank's root (rsLoRA).

    Source: ``LoraConfig`` and ``LoraLayer.update_layer`` of PEFT 0.21.

    Attributes:
        rank: of modules that no pattern names.
        alpha: likewise.
        by_root: whether alpha is divided by the root of the rank.
        ranks: of modules whose name ends with a key.
        alphas: likewise.
    """

    rank: int
    alpha: float
    by_root: bool = False
    ranks: Mapping[str, float] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    def of(self, module: str, rank: int) -> float:
        """The factor of a module's adapter of a rank.

        Raises:
            WeightsError: the configuration says that it has another.
        """
        stated = _matching(self.ranks, module, float(self.rank))
        if stated != rank:
            raise WeightsError(
                f"the header's {ADAPTER_METADATA} says rank {stated:g} of {module}, whose tensors "
                f"have rank {rank}"
            )
        return _matching(self.alphas, module, self.alpha) / (rank**0.5 if self.by_root else rank)


def _matching(patterns: Mapping[str, float], module: str, default: float) -> float:
    found = (
        value for name, value in patterns.items() if module == name or module.endswith("." + name)
    )
    return next(found, default)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file, of which only the header has been read.

    Attributes:
        path: of the file.
        source: its tensors.
        metadata: the texts in its header; empty for a PyTorch archive.
        scaling: of PEFT's configuration, where the header has one.
        notes: which mapping of a file with several was taken, and what was left.
    """

    path: Path
    source: TensorSource
    metadata: Mapping[str, str]
    scaling: PeftScaling | None
    notes: tuple[str, ...] = ()

    def read(self, name: str) -> np.ndarray:
        """One tensor in float32.

        Raises:
            WeightsError: a value is NaN or infinite.
        """
        return rounded(np.asarray(self.source.read(name)), np.float32, f"{self.path}: {name}")

    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, from the header alone."""
        return self.source.tensors()

    def trained_on(self) -> tuple[str, ...]:
        """Return captions, tags and trigger phrases that the header says it was trained on.

        Source: ``trigger_phrase`` and ``tags`` of ModelSpec 1.0.1, and the tags by folder that
        kohya's trainer writes. Words alone: what cannot be read as such is left out.
        """
        found = [self.metadata[key] for key in _PHRASES if key in self.metadata]
        try:
            folders = json.loads(self.metadata.get(TAGS_METADATA, "{}"))
        except (ValueError, RecursionError):
            folders = None
        tables = folders.values() if isinstance(folders, dict) else ()
        return (*found, *(tag for table in tables if isinstance(table, dict) for tag in table))


def open_lora(path: Path) -> LoraFile:
    """Open a LoRA file: safetensors, or a PyTorch archive.

    Raises:
        WeightsError: there is no such file, or it is not sound, or holds no tensors.
    """
    metadata: dict[str, str] = {}
    if is_archive(first_bytes(path)):
        source: TensorSource = PthSource(path)
    else:
        source = SafetensorsSource([path])
        metadata = {key: texts[0] for key, texts in source.metadata.items()}
    tensors = source.tensors()
    if not tensors:
        raise WeightsError(f"{path} holds no tensors: it is no LoRA")
    for name, info in tensors.items():
        if info.dtype.kind not in "fV" and not name.endswith("reshape_weight"):
            if info.dtype.kind in "iu" and info.size == 1:  # An alpha may be written as an integer.
                continue
            raise WeightsError(f"{path}: {name:.200} is {info.dtype.name}, no floating point")
    notes: tuple[str, ...] = getattr(source, "notes", ())
    return LoraFile(path, source, metadata, _scaling(path, metadata), notes)


def _scaling(path: Path, metadata: Mapping[str, str]) -> PeftScaling | None:
    text = metadata.get(ADAPTER_METADATA)
    if text is None:
        return None
    where = f"{path}: the header's {ADAPTER_METADATA}"
    stated = parse_json(text, where, error=WeightsError)
    if not isinstance(stated, dict):
        raise WeightsError(f"{where} is no JSON object")
    own = {k.removeprefix("transformer."): v for k, v in stated.items()}
    # Without a prefix it is the transformer's too: what a transformer writes on its own.
    rank, alpha = own.get("r"), own.get("lora_alpha")
    if rank is None and alpha is None:
        return None
    if type(rank) is not int or not 0 < rank < 1 << 24:
        raise WeightsError(f"{where}: r = {rank!r:.80} must be a positive integer")
    if type(own.get("use_rslora", False)) is not bool:
        raise WeightsError(f"{where}: use_rslora = {own['use_rslora']!r:.80} must be true or false")
    return PeftScaling(
        rank,
        _number(alpha, f"{where}: lora_alpha"),
        own.get("use_rslora", False),
        _patterns(own.get("rank_pattern"), f"{where}: rank_pattern"),
        _patterns(own.get("alpha_pattern"), f"{where}: alpha_pattern"),
    )


def _patterns(value: object, where: str) -> Mapping[str, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise WeightsError(f"{where} is no JSON object")
    found = {}
    for name, number in value.items():
        plain = name.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not all(c.isalnum() or c in _PLAIN for c in plain):
            raise WeightsError(f"{where}: {name!r:.80} is no plain name of a module")
        found[plain] = _number(number, f"{where}: {name:.80}")
    return found


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise WeightsError(f"{where} = {value!r:.80} must be a number")
    return float(value)


def content_hash(path: Path) -> str:
    """SHA-256 of all of a file's bytes; kept for as long as its size and time of change stay.

    Raises:
        WeightsError: it cannot be read.
    """
    with open_regular(path, "LoRA", error=WeightsError):
        state = path.stat()
    return _hash(path, state.st_size, state.st_mtime_ns)


@cache
def _hash(path: Path, size: int, changed: int) -> str:
    del size, changed
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"LoRA {path} cannot be read: {error}") from error
