"""Moves weights between files and models by a rule table: load, export, rename.

Tensors are read, rearranged and rounded one parameter at a time
(:mod:`skyreels_jax.weights.filling`), so that host memory never holds more than one parameter
beside those already placed. Before any data is read, the table is proved to
cover the file and the model exactly (:mod:`skyreels_jax.weights.plan`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.filling import aligned_empty, fill_all, fill_in_pieces, pool, rounded
from skyreels_jax.weights.plan import (
    Format,
    Plan,
    Rule,
    Slot,
    Source,
    by_tensor,
    check,
    layers_in_file,
    layers_in_model,
    make_plan,
    source_shape,
)
from skyreels_jax.weights.quantize import LARGEST_VALUES, quantize_all
from skyreels_jax.weights.safetensors_file import TensorSource, TensorSpec

# Puts one finished parameter, given its dotted path, where it will live.
Placement = Callable[[str, np.ndarray], jax.Array]


@runtime_checkable
class _Parts(Protocol):
    """A parameter of which several processes read a part each, a layer at a time."""

    value: jax.Array | None

    def indices(self) -> list[tuple[slice, ...]]: ...

    def put(self, layer: int | None, parts: list[np.ndarray]) -> None: ...


@runtime_checkable
class _InParts(Protocol):
    """A placement that may want parts instead of a whole parameter."""

    def __call__(self, path: str, value: np.ndarray) -> jax.Array: ...

    def begin(self, path: str, shape: tuple[int, ...], dtype: DTypeLike) -> _Parts | None: ...


@dataclass(frozen=True)
class TensorStream:
    """Named tensors of which one at a time is in memory, and what they will be.

    Attributes:
        specs: shapes and dtypes, known before anything is read, in the order of ``values``.
        values: the tensors, once; they may be views.
        metadata: texts for the header of each file that they are written to.
    """

    specs: Mapping[str, TensorSpec]
    values: Iterator[tuple[str, np.ndarray]]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        return self.values


def on_default_device(path: str, value: np.ndarray) -> jax.Array:
    """Place every parameter on the default device."""
    del path
    return jax.device_put(value)


def parameters(model: nnx.Module | nnx.State) -> dict[str, nnx.Variable]:
    """All variables of a model (or its state), concrete or abstract, by dotted path."""
    state = model if isinstance(model, nnx.State) else nnx.state(model)
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def scales_of(variables: Mapping[str, nnx.Variable]) -> dict[str, str]:
    """The paths of quantised kernels among a model's parameters, and those of their scales."""
    return {
        path: f"{path}_scale"
        for path, variable in variables.items()
        if np.dtype(variable.dtype) in LARGEST_VALUES
    }


def verify(
    model: nnx.Module | nnx.State,
    rules: Sequence[Rule],
    source: TensorSource,
    format: Format,
    *,
    ignored: Sequence[str] = (),
) -> None:
    """Prove that ``source`` holds exactly the model's parameters, without reading their data.

    Args:
        model: the (abstract) model or its state.
        rules: the table.
        source: the tensors.
        format: whose names they have.
        ignored: patterns of names that may be there and are not read.

    Raises:
        WeightsError: with every missing, unexpected, doubled or misshapen tensor.
    """
    _verified_plan(_shapes(parameters(model)), rules, source, format, ignored)


def load_into(
    model: nnx.Module | nnx.State,
    rules: Sequence[Rule],
    source: TensorSource,
    format: Format,
    *,
    dtype: DTypeLike,
    ignored: Sequence[str] = (),
    placement: Placement = on_default_device,
) -> nnx.State:
    """Fill every parameter of an abstract model from ``source``.

    Args:
        model: an abstract model (``nnx.eval_shape``) or its state; read are its shapes, and which
            kernels it stores quantised, whose scales come with them.
        rules: the table.
        source: the tensors.
        format: whose names they have.
        dtype: of the other loaded parameters; values are rounded to nearest, ties to even.
        ignored: patterns of names that may be in the file and are not read.
        placement: puts a finished parameter on its device or devices.

    Returns:
        The state to merge or update the model with.

    Raises:
        WeightsError: if the file and the model do not cover each other, or a value is not finite.
    """
    variables = parameters(model)
    shapes = _shapes(variables)
    plan = _verified_plan(shapes, rules, source, format, ignored)
    tensors = source.tensors()
    layers: dict[str, list[Slot]] = {}
    for slot in plan:
        layers.setdefault(slot.target, []).append(slot)
    scales = scales_of(variables)
    filled: dict[str, nnx.Variable] = {}

    def unfilled(value: np.ndarray, slot: Slot) -> tuple[np.ndarray, Callable[[], np.ndarray], str]:
        found = plan[slot]
        layer = value if slot.layer is None else value[slot.layer, ...]
        where = f"{tensors[found.name].file}: {found.name}"
        return layer, lambda: _slot_of(source.read(found.name), found), where

    begin = placement.begin if isinstance(placement, _InParts) else None
    with pool() as threads:
        for target, slots in layers.items():
            if target not in scales and begin and (parts := begin(target, shapes[target], dtype)):
                for slot in slots:
                    _, read, where = unfilled(np.empty(shapes[target][:1]), slot)
                    whole = read()
                    found = [(whole[index], where) for index in parts.indices()]
                    parts.put(slot.layer, [_filled(threads, *one, dtype) for one in found])
                filled[target] = variables[target].replace(parts.value)
                continue
            if target in scales:
                value = aligned_empty(shapes[target], variables[target].dtype)
                scale = aligned_empty(variables[scales[target]].shape, np.float32)
                quantize_all(threads, (unfilled(value, slot) for slot in slots), scale)
                placed = jax.block_until_ready(placement(scales[target], scale))
                filled[scales[target]] = variables[scales[target]].replace(placed)
            elif len(slots) == 1:
                value = aligned_empty(shapes[target], dtype)
                out, read, where = unfilled(value, slots[0])
                fill_in_pieces(threads, out, read(), where)
                del out  # A view: the values would outlive `del value`.
            else:
                value = aligned_empty(shapes[target], dtype)
                fill_all(threads, (unfilled(value, slot) for slot in slots))
            # Waiting bounds host memory to one parameter where the device copies asynchronously.
            placed = jax.block_until_ready(placement(target, value))
            filled[target] = variables[target].replace(placed)
            del value, placed
    state = model if isinstance(model, nnx.State) else nnx.state(model)
    flat = [(path, filled[".".join(map(str, path))]) for path, _ in nnx.to_flat_state(state)]
    return nnx.from_flat_state(flat)


def _filled(
    threads: ThreadPoolExecutor, values: np.ndarray, where: str, dtype: DTypeLike
) -> np.ndarray:
    """A part of a tensor, rounded and proved finite."""
    out = aligned_empty(values.shape, dtype)
    fill_in_pieces(threads, out, values, where)
    return out


def export(
    state: nnx.Module | nnx.State,
    rules: Sequence[Rule],
    format: Format,
    *,
    dtype: DTypeLike | None = None,
) -> TensorStream:
    """The tensors of a model under the names and with the shapes of ``format``.

    Args:
        state: the (abstract, if only the specs are used) model or its state.
        rules: the table it was loaded by.
        format: to write.
        dtype: to round to; None keeps the state's.

    Raises:
        WeightsError: the table and the model differ, or its kernels are quantised; while it is
            read: a value is not finite.
    """
    variables = parameters(state)
    if scales_of(variables):
        raise WeightsError(
            "the model's kernels are quantised: write the checkpoint that it was loaded from, or "
            "load it without `weights`"
        )
    shapes = _shapes(variables)
    plan = make_plan(rules, format, layers_in_model(shapes))
    covered = {slot.target for slot in plan}
    if covered != shapes.keys():
        raise WeightsError(
            f"the {format} weight table and the model differ: no rule for "
            f"{sorted(shapes.keys() - covered)}, no parameter for {sorted(covered - shapes.keys())}"
        )
    tensors = by_tensor(plan)

    def spec(slot: Slot, source: Source) -> TensorSpec:
        shape = shapes[slot.target]
        stored = np.dtype(variables[slot.target].dtype if dtype is None else dtype)
        return TensorSpec(source_shape(source, shape if slot.layer is None else shape[1:]), stored)

    def values() -> Iterator[tuple[str, np.ndarray]]:
        fetched: tuple[str, np.ndarray] = ("", np.empty(0))
        for name, pieces in tensors.items():
            parts = []
            for slot, source in pieces:
                if fetched[0] != slot.target:
                    fetched = (slot.target, np.asarray(variables[slot.target].get_value()))
                value = fetched[1] if slot.layer is None else fetched[1][slot.layer, ...]
                parts.append(source.transform.invert(value))
            yield name, rounded(_joined(parts), dtype, f"the model: {name}")

    return TensorStream({name: spec(*pieces[0]) for name, pieces in tensors.items()}, values())


def rename(
    rules: Sequence[Rule],
    source: TensorSource,
    from_format: Format,
    to_format: Format,
    *,
    ignored: Sequence[str] = (),
    dtype: DTypeLike | None = None,
) -> TensorStream:
    """Give the tensors of one format the names and shapes of the other, one at a time.

    Args:
        rules: the table.
        source: tensors of ``from_format``.
        from_format: whose names they have.
        to_format: whose names to give them.
        ignored: patterns of names that may be in the file and are left out.
        dtype: to round to; None keeps the file's.

    Raises:
        WeightsError: the table and the file do not cover each other; while it is read: a value is
            not finite.
    """
    tensors = source.tensors()
    layers = layers_in_file(tensors, from_format)
    origin = make_plan(rules, from_format, layers)
    check(origin, tensors, ignored)
    goal = by_tensor(make_plan(rules, to_format, layers))

    def spec(slot: Slot, to: Source) -> TensorSpec:
        found = origin[slot]
        info = tensors[found.name]
        dummy = np.broadcast_to(np.zeros((), np.bool_), info.shape)
        stored = info.dtype if dtype is None else np.dtype(dtype)
        return TensorSpec(source_shape(to, _slot_of(dummy, found).shape), stored)

    def read(slot: Slot) -> np.ndarray:
        found = origin[slot]
        where = f"{tensors[found.name].file}: {found.name}"
        return _slot_of(rounded(source.read(found.name), dtype, where), found)

    values = (
        (name, _joined([to.transform.invert(read(slot)) for slot, to in pieces]))
        for name, pieces in goal.items()
    )
    return TensorStream({name: spec(*pieces[0]) for name, pieces in goal.items()}, values)


def _verified_plan(
    shapes: Mapping[str, tuple[int, ...]],
    rules: Sequence[Rule],
    source: TensorSource,
    format: Format,
    ignored: Sequence[str],
) -> Plan:
    plan = make_plan(rules, format, layers_in_model(shapes))
    check(plan, source.tensors(), ignored, shapes=shapes)
    return plan


def _shapes(variables: Mapping[str, nnx.Variable]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that a file has; scales are made here."""
    made = set(scales_of(variables).values())
    return {path: tuple(leaf.shape) for path, leaf in variables.items() if path not in made}


def _slot_of(tensor: np.ndarray, source: Source) -> np.ndarray:
    """One slot's values in our layout, as a view of a tensor of the file."""
    k, n = source.slice
    rows = tensor.shape[0] // n if n > 1 else 0
    return source.transform.apply(tensor[k * rows : (k + 1) * rows] if n > 1 else tensor)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
