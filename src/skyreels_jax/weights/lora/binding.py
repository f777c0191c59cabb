"""Binds a LoRA file to a transformer: each adapter to one tensor, and every key accounted for.

Nothing is dropped in silence. A key is used, or has no place in this model though it has one in
another of the family (an image model's LoRA in a text model), or is without effect by what the file
says itself; everything else is an error, with all of it at once.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.lora.adapters import (
    ADAPTER_KINDS,
    LORA,
    UP_BIAS,
    Adapter,
    AdapterKind,
    Shape,
    magnitude_axis,
)
from skyreels_jax.weights.lora.file import LoraFile
from skyreels_jax.weights.lora.names import Key, ModelNames, Place, belongs_to, joined, taken_apart
from skyreels_jax.weights.plan import Problems, natural

# Keys that a line of words names before it only counts the rest.
_NAMED: Final = 3


@dataclass(frozen=True)
class Lora:
    """A LoRA file and how much of it is added.

    Attributes:
        path: of the file.
        scale: multiplies what its adapters add; negative takes away.
    """

    path: Path
    scale: float = 1.0

    def __post_init__(self):
        if not math.isfinite(self.scale):
            raise WeightsError(f"LoRA {self.path}: a scale of {self.scale} is no number")


@dataclass(frozen=True)
class BoundLora:
    """A LoRA file of which every adapter has its tensor.

    Attributes:
        file: the file.
        adapters: of the model's tensors.
        elsewhere: keys whose tensors this model lacks and others of the family have.
        without_effect: keys that change nothing, such as an alpha beside no product.
    """

    file: LoraFile
    adapters: tuple[Adapter, ...]
    elsewhere: tuple[str, ...]
    without_effect: tuple[str, ...]

    @cached_property
    def by_tensor(self) -> Mapping[str, Sequence[Adapter]]:
        """The adapters of each tensor of the model's files."""
        found: dict[str, list[Adapter]] = {}
        for adapter in self.adapters:
            found.setdefault(adapter.place.tensor, []).append(adapter)
        return found

    @property
    def used(self) -> int:
        """How many keys of the file have an effect."""
        return len({key for adapter in self.adapters for key in adapter.keys.values()})

    @property
    def kinds(self) -> Mapping[str, int]:
        """How many adapters there are of each kind."""
        return Counter(adapter.label for adapter in self.adapters)

    @property
    def ranks(self) -> Sequence[int]:
        """The ranks that there are."""
        return sorted({a.rank for a in self.adapters if a.rank is not None})

    def summary(self) -> str:
        """One line: what is used, of which kinds, and what is not used."""
        kinds = ", ".join(f"{count} {name}" for name, count in self.kinds.items())
        ranks = f", rank {', '.join(map(str, self.ranks))}" if self.ranks else ""
        total = len(self.file.tensors())
        return (
            f"{self.used} of {total} keys used, on {len(self.by_tensor)} tensors ({kinds}{ranks})"
        )

    def notes(self) -> Iterator[str]:
        """A line for each group of keys, and each mapping, that is not used."""
        for note in self.file.notes:
            yield f"LoRA {self.file.path.name}: {note}"
        for keys, why in (
            (self.elsewhere, "have no place in this model (others of its family have one)"),
            (self.without_effect, "have no effect"),
        ):
            if keys:
                yield f"LoRA {self.file.path.name}: {len(keys)} keys {why}: {_listed(keys)}"


def _listed(keys: Sequence[str]) -> str:
    shown = sorted(keys, key=natural)
    more = f" and {len(shown) - _NAMED} more" if len(shown) > _NAMED else ""
    return ", ".join(f"{key:.120}" for key in shown[:_NAMED]) + more


def bind(file: LoraFile, names: ModelNames) -> BoundLora:
    """Find the tensor of every adapter of a file; reads alphas, and headers else.

    Args:
        file: the LoRA.
        names: of the transformer.

    Raises:
        WeightsError: with all keys that are unknown, of another model, of a kind that is not
            supported, incomplete or misshapen; or nothing of the file is for this transformer.
    """
    return _Binder(file, names).bound()


class _Binder:
    """The state of binding one file: what was found, and what is wrong."""

    def __init__(self, file: LoraFile, names: ModelNames):
        self._file, self._names = file, names
        self._shapes = {name: info.shape for name, info in file.tensors().items()}
        self._problems = Problems()
        self._adapters: list[Adapter] = []
        self._elsewhere: list[str] = []
        self._without_effect: list[str] = []

    def bound(self) -> BoundLora:
        for module, parts in self._by_module().items():
            self._bind_module(module, parts)
        kinds = Counter((adapter.place.tensor, adapter.kind.name) for adapter in self._adapters)
        for (tensor, kind), count in kinds.items():
            if count > 1:
                self._problems.add("tensors with several adapters of a kind", f"{tensor}: {kind}")
        self._problems.raise_for(str(self._file.path))
        if not self._adapters:
            raise WeightsError(
                f"{self._file.path}: none of its {len(self._shapes)} keys is for this transformer: "
                + _listed(list(self._shapes))
            )
        return BoundLora(
            self._file, tuple(self._adapters), tuple(self._elsewhere), tuple(self._without_effect)
        )

    def _by_module(self) -> Mapping[str, Mapping[str, Key]]:
        """The keys of each module by their part; others are noted as what they are."""
        found: dict[str, dict[str, Key]] = {}
        for name in self._shapes:
            owner = belongs_to(name)
            if owner != "transformer":
                what = {
                    "text encoder": "keys of a text encoder, whose LoRA is not supported",
                    "second expert": "keys of a second transformer, which only Wan 2.2 has",
                }[owner]
                self._problems.add(what, f"{name:.200}")
                continue
            key = taken_apart(name)
            part = "up_bias" if (key.part, key.leaf) == ("up", "bias") else key.part
            if key.unsupported is not None:
                self._problems.add(f"keys of {key.unsupported}, which is not supported", name[:200])
            elif part is None and self._names.places(key.module, ""):
                self._problems.add("whole tensors of a model, which are no adapters", name[:200])
            elif part is None or (key.leaf == "bias" and part != "up_bias"):
                self._problems.add("keys that are unknown", f"{name:.200}")
            elif (other := found.setdefault(joined(key.module), {}).setdefault(part, key)) != key:
                self._problems.add(
                    "keys that say the same of one module", f"{other.name:.200} and {name:.200}"
                )
        return found

    def _bind_module(self, module: str, parts: Mapping[str, Key]) -> None:
        left = dict(parts)
        dotted = next(iter(parts.values())).module
        alpha = left.pop("alpha", None)
        if (wanted := left.pop("reshape_weight", None)) is not None:
            self._check_reshape(dotted, wanted)
        scaled = False
        for kind in ADAPTER_KINDS:
            chosen = kind.chosen(list(left))
            if chosen is None:
                continue
            keys = {part: left.pop(part).name for part in chosen if part in left}
            if "alpha" in kind.takes:
                scaled = self._bind(dotted, kind, keys, alpha) or scaled
                if kind is LORA and (bias := left.pop("up_bias", None)) is not None:
                    keys = {"up_bias": bias.name, "down": keys["down"]}
                    self._bind(dotted, UP_BIAS, keys, alpha)
            else:
                self._bind(dotted, kind, keys, None)
        for part, key in left.items():
            self._problems.add("keys that lack what belongs to them", f"{key.name} ({part})")
        if alpha is not None and not scaled and not left:
            place = self._names.places(dotted, "weight")
            self._without_effect.append(alpha.name) if place else self._elsewhere_or(alpha)

    def _elsewhere_or(self, key: Key) -> None:
        if self._names.is_elsewhere(key.module, "weight"):
            self._elsewhere.append(key.name)
        else:
            self._problems.add("keys of tensors that this model lacks", f"{key.name:.200}")

    def _bind(
        self, module: str, kind: AdapterKind, keys: Mapping[str, str], alpha: Key | None
    ) -> bool:
        """Add an adapter, or note why not; whether alpha belongs to it."""
        own = {**keys} if alpha is None else {**keys, "alpha": alpha.name}
        places = self._names.places(module, kind.what)
        if not places:
            if self._names.is_elsewhere(module, kind.what):
                self._elsewhere.extend(own.values())
            else:
                for key in own.values():
                    self._problems.add("keys of tensors that this model lacks", f"{key:.200}")
            return True
        shapes = {part: self._shapes[key] for part, key in keys.items()}
        wrong = self._misfit(kind, shapes, places)
        if wrong is not None:
            self._problems.add("adapters that do not fit", f"{next(iter(keys.values()))}: {wrong}")
            return True
        rank = _rank_of(kind, shapes)
        factor, stated = self._factor(module, rank, alpha)
        if kind is UP_BIAS:
            own.pop("down")
        if rank is None:
            own.pop("alpha", None)
        self._adapters += [Adapter(place, kind, own, rank, factor, stated) for place in places]
        return rank is not None

    def _misfit(
        self, kind: AdapterKind, shapes: Mapping[str, Shape], places: Sequence[Place]
    ) -> str | None:
        """What of an adapter does not fit its tensor, or nothing."""
        count = len(places)
        if count > 1 and (kind is not LORA or len(shapes) > 2):
            return "of a fused linear only a plain LoRA can be taken apart"
        weight = self._names.shapes.get(places[0].tensor)
        if weight is None:  # No model is at hand to hold it against.
            return None if all(shapes.values()) else "a part of it is a single number"
        if wrong := kind.fits(shapes, (weight[0] * count, *weight[1:])):
            return wrong
        magnitude = shapes.get("magnitude")
        if magnitude is not None and magnitude_axis(magnitude, weight) is None:
            return f"magnitude {list(magnitude)} for a weight {list(weight)}"
        return None

    def _factor(
        self, module: str, rank: int | None, alpha: Key | None
    ) -> tuple[float, float | None]:
        """What a product is multiplied by, and the alpha that is stated."""
        if rank is None:
            return 1.0, None
        try:
            scaling = self._file.scaling
            by_header = None if scaling is None else scaling.of(module, rank)
            if alpha is None:
                return (1.0, None) if by_header is None else (by_header, None)
            if math.prod(self._shapes[alpha.name]) != 1:
                raise WeightsError(f"{list(self._shapes[alpha.name])} values, one expected")
            value = float(self._file.read(alpha.name).reshape(()))
        except WeightsError as error:
            self._problems.add("scales that are unsound", f"{module}: {error}")
            return 1.0, None
        if by_header is not None and not math.isclose(by_header, value / rank, rel_tol=1e-6):
            self._problems.add(
                "scales on which the header and the tensors differ",
                f"{module}: {by_header:g} in the header, alpha {value:g} by rank {rank}",
            )
        return value / rank, value

    def _check_reshape(self, module: str, key: Key) -> None:
        """Let a ``reshape_weight`` pass that asks for the shape that there is."""
        places = self._names.places(module, "weight")
        if not places:
            self._elsewhere_or(key)
            return
        shape = self._names.shapes.get(places[0].tensor, ())
        size = math.prod(self._shapes[key.name])
        wanted: Shape = ()
        if size == len(shape):
            wanted = tuple(int(v) for v in self._file.source.read(key.name).reshape(-1))
        if wanted == shape:
            self._without_effect.append(key.name)
        else:
            self._problems.add(
                "keys of a weight of another shape (reshape_weight), which is not supported",
                f"{key.name}: {list(wanted) or f'{size} sizes'}, the model's is {list(shape)}",
            )


def _rank_of(kind: AdapterKind, shapes: Mapping[str, Shape]) -> int | None:
    return shapes["down"][0] if kind is UP_BIAS else kind.rank(shapes)
