"""Weight tables, and the proof that nothing is left over on either side.

A table is a tuple of :class:`Rule`. Each rule names one parameter of the JAX model and where it is
found in the two published formats: ``original`` (Skywork's and Wan's own files) and ``diffusers``.
``{i}`` in a source name is the layer index; when the target has none, the layers are stacked along
a new leading axis. Names are matched whole, never by prefix.

A table is spread over its layers into *slots* (one layer of one parameter); each slot has one
source in a format. Loading, exporting and renaming (:mod:`skyreels_jax.weights.engine`) all walk
this plan, so they cannot disagree.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Final, Literal

import numpy as np

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.safetensors_file import TensorInfo

Format = Literal["original", "diffusers"]
FORMATS: Final[tuple[Format, ...]] = ("original", "diffusers")
# Lines of one kind of problem that an error lists before it only counts the rest.
_LISTED: Final = 12
# A layer index as written in names: no leading zeros.
_INDEX: Final = r"(0|[1-9]\d*)(?=\.|$)"


@dataclass(frozen=True)
class Transform:
    """A named, invertible rearrangement of one tensor; both directions return views.

    ``apply`` goes from the source's layout to ours, ``invert`` back. Values are never changed, so a
    round trip is bit-exact.
    """

    name: str
    apply: Callable[[np.ndarray], np.ndarray]
    invert: Callable[[np.ndarray], np.ndarray]


COPY: Final = Transform("copy", lambda x: x, lambda x: x)
# PyTorch's linear weight is [out, in]; ours [in, out].
LINEAR: Final = Transform("linear", lambda x: x.T, lambda x: x.T)
# PyTorch's convolution weight is [out, in, *kernel]; ours [*kernel, in, out].
CONV: Final = Transform(
    "conv",
    lambda x: np.moveaxis(x, (0, 1), (-1, -2)),
    lambda x: np.moveaxis(x, (-1, -2), (0, 1)),
)


def trailing_ones(count: int) -> Transform:
    """``[c, 1, ..., 1]`` with ``count`` ones (a broadcastable scale) to ``[c]``."""
    return Transform(
        f"trailing_ones_{count}",
        lambda x: x.reshape(x.shape[: x.ndim - count]),
        lambda x: x.reshape(x.shape + (1,) * count),
    )


def leading_ones(count: int) -> Transform:
    """``[1, ..., 1, *rest]`` with ``count`` ones to ``[*rest]``."""
    return Transform(
        f"leading_ones_{count}",
        lambda x: x.reshape(x.shape[count:]),
        lambda x: x.reshape((1,) * count + x.shape),
    )


@dataclass(frozen=True)
class Source:
    """One tensor of a format: its name, its shape there, and which slice of it is meant.

    ``slice = (k, n)`` selects the k-th of n equal slices along the tensor's first axis (a fused
    q|k|v); it is cut before ``transform`` is applied.
    """

    name: str
    transform: Transform = COPY
    slice: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Rule:
    """One parameter: ``target`` is its dotted path in the NNX state; a format may lack it."""

    target: str
    original: Source | None
    diffusers: Source | None

    def source(self, format: Format) -> Source | None:
        """The tensor that holds this parameter in ``format``."""
        return self.original if format == "original" else self.diffusers


def rule(target: str, original: str, diffusers: str, transform: Transform = COPY) -> Rule:
    """The common case: the same transform in both formats."""
    return Rule(target, Source(original, transform), Source(diffusers, transform))


@dataclass(frozen=True)
class Slot:
    """One layer of one parameter; ``layer`` is None where the parameter is not stacked."""

    target: str
    layer: int | None = None


Plan = Mapping[Slot, Source]


def _is_layered(rule: Rule) -> bool:
    """Whether the rule stands for one tensor per layer."""
    return any(s is not None and "{i}" in s.name for s in (rule.original, rule.diffusers))


def _pattern(name: str) -> re.Pattern[str]:
    """Matches ``name`` whole, with any layer index (group 1) in the place of ``{i}``."""
    return re.compile(re.escape(name).replace(r"\{i\}", _INDEX))


def make_plan(
    rules: Sequence[Rule], format: Format, layers: Callable[[Rule], int]
) -> dict[Slot, Source]:
    """Spread ``rules`` over ``layers(rule)`` layers each.

    Raises:
        WeightsError: a parameter that ``format`` has no name for, two rules for one parameter, or
            two rules that take the same slice of one tensor.
    """
    problems = Problems()
    plan: dict[Slot, Source] = {}
    taken: Counter[tuple[str, tuple[int, int]]] = Counter()
    for rule in rules:
        source = rule.source(format)
        if source is None:
            problems.add(f"parameters that the {format} format has no name for", rule.target)
            continue
        for slot, index in _slots(rule, layers):
            if slot in plan:
                problems.add("parameters with two rules", rule.target)
            plan[slot] = replace(source, name=source.name.replace("{i}", index))
            taken[plan[slot].name, source.slice] += 1
    for (name, piece), count in taken.items():
        if count > 1:
            problems.add("tensors with two rules", f"{name} (slice {piece[0] + 1} of {piece[1]})")
    problems.raise_for(f"the {format} weight table")
    return plan


def _slots(rule: Rule, layers: Callable[[Rule], int]) -> Iterable[tuple[Slot, str]]:
    if not _is_layered(rule):
        yield Slot(rule.target), ""
        return
    for i in range(layers(rule)):
        stacked = "{i}" not in rule.target
        yield Slot(rule.target.replace("{i}", str(i)), i if stacked else None), str(i)


def layers_in_model(shapes: Mapping[str, tuple[int, ...]]) -> Callable[[Rule], int]:
    """Depth of a rule's stack by the model: its leading axis, or how many targets ``{i}`` has."""

    def count(rule: Rule) -> int:
        if "{i}" not in rule.target:
            return shapes.get(rule.target, (0,))[0]
        matches = (_pattern(rule.target).fullmatch(name) for name in shapes)
        return max((int(m[1]) + 1 for m in matches if m), default=0)

    return count


def layers_in_file(names: Iterable[str], format: Format) -> Callable[[Rule], int]:
    """Depth of a rule's stack by the file: one past the highest index under the same prefix.

    An index past the number of tensors cannot belong to a stack without gaps; it is left for
    :func:`check` to refuse, rather than planned for.
    """
    names = tuple(names)
    depths: dict[str, int] = {}

    def count(rule: Rule) -> int:
        source = rule.source(format)
        prefix = source.name.partition("{i}")[0] if source else ""
        if prefix not in depths:
            heads = (re.match(re.escape(prefix) + _INDEX, name) for name in names)
            indices = (int(m[1]) for m in heads if m)
            depths[prefix] = max((i + 1 for i in indices if i < len(names)), default=0)
        return depths[prefix]

    return count


def source_shape(source: Source, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the tensor in the file, from the shape of one slot of the parameter."""
    dummy = np.broadcast_to(np.zeros((), np.bool_), shape)
    inverted = source.transform.invert(dummy).shape
    return (inverted[0] * source.slice[1], *inverted[1:]) if source.slice[1] > 1 else inverted


def by_tensor(plan: Plan) -> dict[str, list[tuple[Slot, Source]]]:
    """The plan from the file's side: the slots each tensor fills, in the order of its slices."""
    tensors: dict[str, list[tuple[Slot, Source]]] = {}
    for slot, source in plan.items():
        tensors.setdefault(source.name, []).append((slot, source))
    for pieces in tensors.values():
        pieces.sort(key=lambda piece: piece[1].slice)
    return tensors


def check(
    plan: Plan,
    tensors: Mapping[str, TensorInfo],
    ignored: Sequence[str],
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Prove that ``tensors`` and the plan cover each other, name by name and shape by shape.

    Args:
        plan: of the format that the file is in.
        tensors: what the file holds.
        ignored: patterns of names (matched whole) that the file may hold and no rule reads.
        shapes: of the model's parameters; None where there is no model and names are enough.

    Raises:
        WeightsError: with all problems at once.
    """
    problems = Problems()
    wanted = by_tensor(plan)
    _check_model(plan, shapes, problems)
    skip = [re.compile(p) for p in ignored]
    for name, info in tensors.items():
        if name not in wanted and not any(p.fullmatch(name) for p in skip):
            problems.add("tensors that the model has no place for", f"{name} ({_base(info.file)})")
        _check_dtype(name, info, name in wanted, problems)
    for name, pieces in wanted.items():
        info = tensors.get(name)
        if info is None:
            problems.add("tensors that the file lacks", name)
        elif shapes is not None:
            _check_shape(name, info, pieces, shapes, problems)
        if [s.slice[0] for _, s in pieces] != list(range(pieces[0][1].slice[1])):
            problems.add("tensors of which a slice has no rule", name)
    problems.raise_for(_place(tensors))


def _check_model(
    plan: Plan, shapes: Mapping[str, tuple[int, ...]] | None, problems: "Problems"
) -> None:
    if shapes is None:
        return
    targets = {slot.target for slot in plan}
    for target in shapes.keys() - targets:
        problems.add("parameters that no rule fills", f"{target} {list(shapes[target])}")
    for target in targets - shapes.keys():
        problems.add("rules whose parameter the model lacks", target)


def _check_shape(
    name: str,
    info: TensorInfo,
    pieces: Sequence[tuple[Slot, Source]],
    shapes: Mapping[str, tuple[int, ...]],
    problems: "Problems",
) -> None:
    slot, source = pieces[0]
    if slot.target not in shapes:
        return
    shape = shapes[slot.target]
    expected = source_shape(source, shape if slot.layer is None else shape[1:])
    if info.shape != expected:
        problems.add(
            "tensors of a wrong shape",
            f"{name}: {list(info.shape)} in {_base(info.file)}, {list(expected)} expected",
        )


def _check_dtype(name: str, info: TensorInfo, wanted: bool, problems: "Problems") -> None:
    if not wanted or info.dtype.name in ("float32", "bfloat16", "float16", "float64"):
        return
    kind = "tensors that are not floating point of 16 bits or more"
    problems.add(kind, f"{name}: {info.dtype.name} in {_base(info.file)}")


def _base(file: str) -> str:
    return PurePath(file).name


def _place(tensors: Mapping[str, TensorInfo]) -> str:
    """The file, or the folder of several."""
    files = sorted({info.file for info in tensors.values()})
    if not files:
        return "the file (it holds no tensors)"
    return files[0] if len(files) == 1 else str(PurePath(files[0]).parent)


@dataclass
class Problems:
    """Everything that is wrong with some weights, by kind, for one error at the end."""

    _found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, what: str) -> None:
        """Note one problem."""
        self._found.setdefault(kind, []).append(what)

    def raise_for(self, place: str) -> None:
        """Raise what was found about ``place``, if anything was.

        Raises:
            WeightsError: listing each kind with its count, sorted by layer and name.
        """
        if not self._found:
            return
        lines = [f"{place}: the weights do not fit:"]
        for kind, found in sorted(self._found.items()):
            unique = sorted(set(found), key=natural)
            lines.append(f"  {len(unique)} {kind}:")
            lines += [f"    {what}" for what in unique[:_LISTED]]
            if len(unique) > _LISTED:
                lines.append(f"    and {len(unique) - _LISTED} more")
        raise WeightsError("\n".join(lines))


def natural(name: str) -> list[str | int]:
    """A sort key by which layer 2 stands before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
