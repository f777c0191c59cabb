"""Kinds of adapters: which parts each takes, of what shapes, and what it adds to a weight.

Everything is in float32 and in PyTorch's layout, ``[out, in, *kernel]``. An adapter of scale 1 adds
``change(W)`` to ``W``; a user's scale multiplies that, whatever the kind, and several adapters of
one weight add what each adds to the weight alone. Sources: PEFT 0.21 (LoRA, rsLoRA, DoRA), LyCORIS
3.x and ComfyUI's ``weight_adapter`` (LoCon, LoHa, LoKr, ``diff``, ``set_weight``).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from skyreels_jax.weights.lora.names import Place

Shape = tuple[int, ...]
Parts = Mapping[str, np.ndarray]
# Larger ranks would make more of a file than it is.
_MAX_RANK: Final = 1 << 14


@dataclass(frozen=True)
class AdapterKind:
    """A kind of adapter of one tensor.

    Attributes:
        name: as people know it.
        what: which tensor of a module it is of: ``weight``, ``bias`` or ``modulation``.
        needs: sets of parts of which one must be there, whole.
        takes: parts that may be there too.
        rank: the rank by the shapes of the parts, which alpha is divided by; ``None`` where there
            is none and alpha means nothing.
        fits: says what does not fit a weight of a shape, or nothing.
        delta: what is added to a weight of a shape at factor 1.
    """

    name: str
    what: str
    needs: tuple[frozenset[str], ...]
    takes: frozenset[str]
    rank: Callable[[Mapping[str, Shape]], int | None]
    fits: Callable[[Mapping[str, Shape], Shape], str | None]
    delta: Callable[[Parts, Shape], np.ndarray]

    def chosen(self, there: Sequence[str]) -> frozenset[str] | None:
        """The parts of this kind among those that are there; ``None`` if they are not whole."""
        for needed in self.needs:
            if needed <= set(there):
                return needed | (self.takes & set(there))
        return None


@dataclass(frozen=True)
class Adapter:
    """One adapter of one tensor of a transformer's files.

    Attributes:
        place: the tensor.
        kind: of it.
        keys: part -> key in the LoRA file.
        rank: by its shapes; ``None`` for kinds that have none.
        factor: what its product is multiplied by: alpha / rank, alpha / root of the rank, or 1.
        stated: the alpha that the file gives, if it does.
    """

    place: Place
    kind: AdapterKind
    keys: Mapping[str, str]
    rank: int | None
    factor: float
    stated: float | None = None

    @property
    def is_low_rank(self) -> bool:
        """Whether it is a plain product of two matrices, which can stand beside a weight."""
        return self.kind is LORA and not {"mid", "magnitude"} & self.keys.keys()

    @property
    def label(self) -> str:
        """The kind with what makes it another, for people."""
        if "magnitude" in self.keys:
            return "DoRA" if self.kind is LORA else f"{self.kind.name} with DoRA"
        return f"{self.kind.name} with a middle" if "mid" in self.keys else self.kind.name

    def factors(self, parts: Parts) -> tuple[np.ndarray, np.ndarray]:
        """``down`` [rank, in] and ``up`` [out, rank] of a plain product, its factor in ``up``."""
        up = _matrix(self._own_rows(parts["up"])) * np.float32(self.factor)
        return _matrix(parts["down"]), up

    def _own_rows(self, up: np.ndarray) -> np.ndarray:
        k, n = self.place.rows  # Of a fused linear, some are this tensor's.
        rows = len(up) // n
        return up[k * rows : (k + 1) * rows]

    def change(self, parts: Parts, weight: np.ndarray) -> np.ndarray:
        """What is added to ``weight`` (float32) at scale 1.

        Args:
            parts: values of ``keys``, float32.
            weight: the tensor that the adapter is of, as the checkpoint has it.
        """
        parts = {k: self._own_rows(v) if k == "up" else v for k, v in parts.items()}
        if self.kind is SET_WEIGHT:
            return parts["set_weight"].reshape(weight.shape) - weight
        delta = self.kind.delta(parts, weight.shape) * np.float32(self.factor)
        if "magnitude" in parts:
            return decomposed(weight, delta, parts["magnitude"]) - weight
        return delta


def decomposed(weight: np.ndarray, delta: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """DoRA: ``m * (W + delta) / |W + delta|``, the norm along all axes but the magnitude's.

    Source: arXiv 2402.09353, equation 5; PEFT's norm is of each output, and LyCORIS's of each
    output or each input, which the shape of the magnitude tells (``[out, 1]`` or ``[1, in]``).
    """
    total = weight + delta
    axis = magnitude_axis(magnitude.shape, weight.shape)
    others = tuple(i for i in range(total.ndim) if i != axis)
    norm = np.sqrt(np.sum(np.square(total), axis=others, keepdims=True, dtype=np.float32))
    return total * (magnitude.reshape(norm.shape) / np.maximum(norm, np.finfo(np.float32).tiny))


def magnitude_axis(shape: Shape, weight: Shape) -> int | None:
    """The axis of a weight that DoRA's magnitudes of a shape are along; ``None`` if of neither."""
    size = math.prod(shape)
    if len(shape) == 2 and shape[0] == 1 and shape[1] > 1:
        return 1 if len(weight) == 2 and size == weight[1] else None
    if size == weight[0]:  # PEFT keeps those of a convolution as [1, out, 1, 1, 1].
        return 0
    return 1 if len(shape) > 2 and shape[0] == 1 and size == weight[1] else None


def _matrix(values: np.ndarray) -> np.ndarray:
    return values.reshape(values.shape[0], -1)


def _tucker(core: np.ndarray, out: np.ndarray, into: np.ndarray) -> np.ndarray:
    """``sum_pq core[p, q, ...] out[o, p] into[q, i]``: ``[out, in, *kernel]``."""
    return np.einsum("pq...,op,qi->oi...", core, out, into, optimize=True)


# LoRA and LoCon


def _lora_rank(shapes: Mapping[str, Shape]) -> int:
    return shapes["down"][0]


def _lora_fits(shapes: Mapping[str, Shape], weight: Shape) -> str | None:
    down, up = shapes["down"], shapes["up"]
    if min(len(down), len(up), len(weight)) < 2:
        return f"down {list(down)} and up {list(up)} are no matrices for a weight {list(weight)}"
    mid = shapes.get("mid")
    if mid is not None:
        expected = (up[1], down[0], *weight[2:])
        if mid != expected:
            return f"middle {list(mid)}, {list(expected)} expected"
        wanted = (down[0], weight[1], *(1,) * (len(down) - 2)), (weight[0], up[1])
    else:
        if down[0] != up[1]:
            return f"down {list(down)} has rank {down[0]}, up {list(up)} has {up[1]}"
        wanted = (down[0], *weight[1:]), (weight[0], up[1])
    hint = "; swapped?" if (up[0], down[1]) == (weight[1], weight[0]) else ""
    if math.prod(down) != math.prod(wanted[0]) or up[0] * up[1] != math.prod(up):
        return f"down {list(down)} and up {list(up)} for a weight {list(weight)}{hint}"
    if (up[0], up[1]) != wanted[1]:
        return f"up {list(up)} for a weight {list(weight)}{hint}"
    return _ranks_fit(down[0], up[1])


def _ranks_fit(*ranks: int) -> str | None:
    wrong = [rank for rank in ranks if not 0 < rank <= _MAX_RANK]
    return f"rank {wrong[0]} is not between 1 and {_MAX_RANK}" if wrong else None


def _lora_delta(parts: Parts, shape: Shape) -> np.ndarray:
    up, down = _matrix(parts["up"]), _matrix(parts["down"])
    if "mid" in parts:
        return _tucker(parts["mid"], up, down).reshape(shape)
    return (up @ down).reshape(shape)


# Embeddings (PEFT): the table is [rows, width], and its factors are [rank, rows], [width, rank].


def _rows_fit(shapes: Mapping[str, Shape], weight: Shape) -> str | None:
    down, up = shapes["rows_down"], shapes["rows_up"]
    if len(weight) == 2 == len(down) and (down, up) == ((down[0], weight[0]), (weight[1], down[0])):
        return _ranks_fit(down[0])
    return f"{list(down)} and {list(up)} for a table {list(weight)}"


# LoKr


def _lokr_rank(shapes: Mapping[str, Shape]) -> int | None:
    """LyCORIS: of what is a product; with two whole factors alpha means nothing."""
    ranks = [shapes[name][0] for name in ("lokr_w2_b", "lokr_w1_b") if name in shapes]
    return ranks[0] if ranks else None


def _factor_shape(shapes: Mapping[str, Shape], name: str) -> Shape | None:
    """The shape of one of the two factors; ``None`` if its own parts do not fit one another."""
    if name in shapes:
        return shapes[name]
    a, b, core = shapes[f"{name}_a"], shapes[f"{name}_b"], shapes.get("lokr_t2")
    if len(a) != 2 or len(b) != 2 or _ranks_fit(a[0], a[1], b[0], b[1]) is not None:
        return None
    if name == "lokr_w2" and core is not None:
        return (a[1], b[1], *core[2:]) if core[:2] == (a[0], b[0]) else None
    return (a[0], b[1]) if a[1] == b[0] else None


def _lokr_fits(shapes: Mapping[str, Shape], weight: Shape) -> str | None:
    first, second = _factor_shape(shapes, "lokr_w1"), _factor_shape(shapes, "lokr_w2")
    if first is None or second is None or len(first) != 2 or len(second) < 2 or len(weight) < 2:
        return "its factors do not fit one another"
    rest = math.prod(second[1:])
    if first[0] * second[0] != weight[0] or first[1] * rest != math.prod(weight[1:]):
        return f"factors {list(first)} and {list(second)} for a weight {list(weight)}"
    return None


def _lokr_delta(parts: Parts, shape: Shape) -> np.ndarray:
    first = parts.get("lokr_w1")
    if first is None:
        first = parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    second = parts.get("lokr_w2")
    if second is None and "lokr_t2" in parts:
        second = _tucker(parts["lokr_t2"], parts["lokr_w2_a"].T, parts["lokr_w2_b"])
    elif second is None:
        second = parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    first = first.reshape(first.shape + (1,) * (second.ndim - 2))
    return np.kron(first, second).reshape(shape)


# LoHa


def _loha_rank(shapes: Mapping[str, Shape]) -> int:
    return shapes["hada_w1_b"][0]


def _loha_fits(shapes: Mapping[str, Shape], weight: Shape) -> str | None:
    for number in ("1", "2"):
        a, b = shapes[f"hada_w{number}_a"], shapes[f"hada_w{number}_b"]
        core = shapes.get(f"hada_t{number}")
        if len(a) != 2 or len(b) != 2 or len(weight) < 2:
            return f"factors {list(a)} and {list(b)} are no matrices"
        if core is None:
            fits = a[1] == b[0] and (a[0], b[1]) == (weight[0], math.prod(weight[1:]))
        else:
            fits = core == (a[0], b[0], *weight[2:]) and (a[1], b[1]) == weight[:2]
        if not fits:
            return f"factors {list(a)} and {list(b)} for a weight {list(weight)}"
        if wrong := _ranks_fit(a[1] if core is None else a[0], b[0]):
            return wrong
    return None


def _loha_delta(parts: Parts, shape: Shape) -> np.ndarray:
    def factor(number: int) -> np.ndarray:
        a, b = parts[f"hada_w{number}_a"], parts[f"hada_w{number}_b"]
        core = parts.get(f"hada_t{number}")
        return (a @ b if core is None else _tucker(core, a.T, b)).reshape(shape)

    return factor(1) * factor(2)


# Whole tensors


def _same(part: str) -> Callable[[Mapping[str, Shape], Shape], str | None]:
    def fits(shapes: Mapping[str, Shape], weight: Shape) -> str | None:
        def own(shape: Shape) -> Shape:
            return tuple(size for size in shape if size != 1)

        if own(shapes[part]) == own(weight):
            return None
        return f"{list(shapes[part])} for a tensor {list(weight)}"

    return fits


def _whole(name: str, what: str, part: str) -> AdapterKind:
    return AdapterKind(
        name,
        what,
        (frozenset({part}),),
        frozenset(),
        lambda shapes: None,
        _same(part),
        lambda parts, shape: parts[part].reshape(shape),
    )


_TIMES: Final = tuple(
    frozenset({*first, *second})
    for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
    for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
)
LORA: Final = AdapterKind(
    "LoRA",
    "weight",
    (frozenset({"down", "up"}),),
    frozenset({"mid", "magnitude", "alpha"}),
    _lora_rank,
    _lora_fits,
    _lora_delta,
)
SET_WEIGHT: Final = _whole("set_weight", "weight", "set_weight")
ADAPTER_KINDS: Final[tuple[AdapterKind, ...]] = (
    LORA,
    AdapterKind(
        "LoRA of a table",
        "weight",
        (frozenset({"rows_down", "rows_up"}),),
        frozenset({"alpha"}),
        lambda shapes: shapes["rows_down"][0],
        _rows_fit,
        lambda parts, shape: (parts["rows_up"] @ parts["rows_down"]).T.reshape(shape),
    ),
    AdapterKind(
        "LoKr",
        "weight",
        _TIMES,
        frozenset({"lokr_t2", "magnitude", "alpha"}),
        _lokr_rank,
        _lokr_fits,
        _lokr_delta,
    ),
    AdapterKind(
        "LoHa",
        "weight",
        (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),),
        frozenset({"hada_t1", "hada_t2", "magnitude", "alpha"}),
        _loha_rank,
        _loha_fits,
        _loha_delta,
    ),
    _whole("diff", "weight", "diff"),
    SET_WEIGHT,
    _whole("bias", "bias", "diff_b"),
    _whole("modulation", "modulation", "diff_m"),
)
# The bias of PEFT's second matrix, which is scaled as its product is.
UP_BIAS: Final = _whole("bias of LoRA", "bias", "up_bias")
