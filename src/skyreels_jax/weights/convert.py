"""Moves weights between files and models by a rule table: load, export, rename.

Tensors are read, rearranged and rounded one parameter at a time, so that host memory never holds
more than one parameter beside those already placed. Before any data is read, the table is proved to
cover the file and the model exactly (:mod:`skyreels_jax.weights.plan`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.plan import (
    Plan,
    Slot,
    by_tensor,
    check,
    layers_in_file,
    layers_in_model,
    make_plan,
    source_shape,
)
from skyreels_jax.weights.rounding import copy_into, rounded
from skyreels_jax.weights.rules import Dialect, Rule, Source
from skyreels_jax.weights.source import TensorSource, TensorSpec

# Puts one finished parameter, given its dotted path, where it will live.
Place = Callable[[str, np.ndarray], jax.Array]


def on_default_device(path: str, value: np.ndarray) -> jax.Array:
    """Place every parameter on the default device."""
    del path
    return jax.device_put(value)


def parameters(model: nnx.Module | nnx.State) -> dict[str, nnx.Variable]:
    """All variables of a model (or its state), concrete or abstract, by dotted path."""
    state = model if isinstance(model, nnx.State) else nnx.state(model)
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def verify(
    model: nnx.Module | nnx.State,
    rules: Sequence[Rule],
    source: TensorSource,
    dialect: Dialect,
    *,
    ignored: Sequence[str] = (),
) -> None:
    """Prove that ``source`` holds exactly the model's parameters, without reading their data.

    Args:
        model: the (abstract) model or its state.
        rules: the table.
        source: the tensors.
        dialect: whose names they have.
        ignored: patterns of names that may be there and are not read.

    Raises:
        WeightsError: with every missing, unexpected, doubled or misshapen tensor.
    """
    _verified_plan(_shapes(parameters(model)), rules, source, dialect, ignored)


def load_into(
    model: nnx.Module | nnx.State,
    rules: Sequence[Rule],
    source: TensorSource,
    dialect: Dialect,
    *,
    dtype: DTypeLike,
    ignored: Sequence[str] = (),
    place: Place = on_default_device,
) -> nnx.State:
    """Fill every parameter of an abstract model from ``source``.

    Args:
        model: an abstract model (``nnx.eval_shape``) or its state; only shapes are read.
        rules: the table.
        source: the tensors.
        dialect: whose names they have.
        dtype: of the loaded parameters; values are rounded to nearest, ties to even.
        ignored: patterns of names that may be in the file and are not read.
        place: puts a finished parameter on its device or devices.

    Returns:
        The state to merge or update the model with.

    Raises:
        WeightsError: if the file and the model do not cover each other, or a value is not finite.
    """
    variables = parameters(model)
    shapes = _shapes(variables)
    plan = _verified_plan(shapes, rules, source, dialect, ignored)
    tensors = source.tensors()
    layers: dict[str, list[Slot]] = {}
    for slot in plan:
        layers.setdefault(slot.target, []).append(slot)
    filled: dict[str, nnx.Variable] = {}
    for target, slots in layers.items():
        value = np.empty(shapes[target], dtype)
        for slot in slots:
            name = plan[slot].name
            part = value if slot.layer is None else value[slot.layer, ...]
            values = rounded(_read(source, plan[slot]), dtype, f"{tensors[name].file}: {name}")
            copy_into(part, values)
        # Waiting bounds host memory to one parameter where the device copies asynchronously.
        filled[target] = variables[target].replace(jax.block_until_ready(place(target, value)))
        del value
    state = model if isinstance(model, nnx.State) else nnx.state(model)
    flat = [(path, filled[".".join(map(str, path))]) for path, _ in nnx.to_flat_state(state)]
    return nnx.from_flat_state(flat)


def export(
    state: nnx.Module | nnx.State, rules: Sequence[Rule], dialect: Dialect
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a model under the names and in the layout of ``dialect``, one at a time.

    Args:
        state: the model or its state.
        rules: the table it was loaded by.
        dialect: to write.

    Yields:
        ``(name, values)`` in the dtype of the state; values may be views.
    """
    variables = parameters(state)
    plan = _exported_plan(variables, rules, dialect)
    fetched: tuple[str, np.ndarray] = ("", np.empty(0))
    for name, pieces in by_tensor(plan).items():
        parts = []
        for slot, source in pieces:
            if fetched[0] != slot.target:
                fetched = (slot.target, np.asarray(variables[slot.target].get_value()))
            value = fetched[1] if slot.layer is None else fetched[1][slot.layer, ...]
            parts.append(source.transform.invert(value))
        yield name, _joined(parts)


def exported(
    state: nnx.Module | nnx.State, rules: Sequence[Rule], dialect: Dialect
) -> dict[str, TensorSpec]:
    """Shapes and dtypes of what :func:`export` yields, in its order; reads no data."""
    variables = parameters(state)
    specs: dict[str, TensorSpec] = {}
    for name, pieces in by_tensor(_exported_plan(variables, rules, dialect)).items():
        slot, source = pieces[0]
        variable = variables[slot.target]
        shape = variable.shape if slot.layer is None else variable.shape[1:]
        specs[name] = TensorSpec(source_shape(source, tuple(shape)), np.dtype(variable.dtype))
    return specs


def rename(
    rules: Sequence[Rule],
    source: TensorSource,
    from_dialect: Dialect,
    to_dialect: Dialect,
    *,
    ignored: Sequence[str] = (),
) -> Iterator[tuple[str, np.ndarray]]:
    """Give the tensors of one dialect the names and layouts of the other, one at a time.

    Args:
        rules: the table.
        source: tensors of ``from_dialect``.
        from_dialect: whose names they have.
        to_dialect: whose names to give them.
        ignored: patterns of names that may be in the file and are left out.

    Yields:
        ``(name, values)`` in the dtype of the file; values may be memory-mapped views.

    Raises:
        WeightsError: if the table and the file do not cover each other, before anything is yielded.
    """
    origin, goal = _renaming(rules, source, from_dialect, to_dialect, ignored)
    return (
        (name, _joined([to.transform.invert(_read(source, origin[slot])) for slot, to in pieces]))
        for name, pieces in by_tensor(goal).items()
    )


def renamed(
    rules: Sequence[Rule],
    source: TensorSource,
    from_dialect: Dialect,
    to_dialect: Dialect,
    *,
    ignored: Sequence[str] = (),
) -> dict[str, TensorSpec]:
    """Shapes and dtypes of what :func:`rename` yields, in its order; reads no data."""
    origin, goal = _renaming(rules, source, from_dialect, to_dialect, ignored)
    tensors = source.tensors()
    specs: dict[str, TensorSpec] = {}
    for name, pieces in by_tensor(goal).items():
        slot, to = pieces[0]
        info, place = tensors[origin[slot].name], origin[slot]
        dummy = np.broadcast_to(np.zeros((), np.bool_), info.shape)
        specs[name] = TensorSpec(source_shape(to, _slot_of(dummy, place).shape), info.dtype)
    return specs


def _renaming(
    rules: Sequence[Rule],
    source: TensorSource,
    from_dialect: Dialect,
    to_dialect: Dialect,
    ignored: Sequence[str],
) -> tuple[Plan, Plan]:
    tensors = source.tensors()
    layers = layers_in_file(tensors, from_dialect)
    origin = make_plan(rules, from_dialect, layers)
    check(origin, tensors, ignored)
    return origin, make_plan(rules, to_dialect, layers)


def _verified_plan(
    shapes: Mapping[str, tuple[int, ...]],
    rules: Sequence[Rule],
    source: TensorSource,
    dialect: Dialect,
    ignored: Sequence[str],
) -> Plan:
    plan = make_plan(rules, dialect, layers_in_model(shapes))
    check(plan, source.tensors(), ignored, shapes=shapes)
    return plan


def _exported_plan(
    variables: Mapping[str, nnx.Variable], rules: Sequence[Rule], dialect: Dialect
) -> Plan:
    shapes = _shapes(variables)
    plan = make_plan(rules, dialect, layers_in_model(shapes))
    covered = {slot.target for slot in plan}
    if covered != shapes.keys():
        raise WeightsError(
            f"the {dialect} weight table and the model differ: no rule for "
            f"{sorted(shapes.keys() - covered)}, no parameter for {sorted(covered - shapes.keys())}"
        )
    return plan


def _shapes(variables: Mapping[str, nnx.Variable]) -> dict[str, tuple[int, ...]]:
    return {path: tuple(variable.shape) for path, variable in variables.items()}


def _read(source: TensorSource, place: Source) -> np.ndarray:
    """One slot's values in our layout, as a view of the file."""
    return _slot_of(source.read(place.name), place)


def _slot_of(tensor: np.ndarray, place: Source) -> np.ndarray:
    k, n = place.part
    rows = tensor.shape[0] // n if n > 1 else 0
    return place.transform.apply(tensor[k * rows : (k + 1) * rows] if n > 1 else tensor)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
