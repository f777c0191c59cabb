"""LoRAs in a loaded transformer: parameters read anew, and matrices beside 8-bit kernels."""

from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from skyreels_jax.models.layers import Linear
from skyreels_jax.weights.engine import Placement, load_into, on_default_device
from skyreels_jax.weights.lora.source import (
    LoraSource,
    LowRank,
    StoredTransformer,
    quantized_tensors,
)


def exchange(
    model: nnx.Module,
    stored: StoredTransformer,
    tensors: Collection[str],
    dtype: DTypeLike,
    placement: Placement = on_default_device,
    kernel_dtype: DTypeLike | None = None,
) -> None:
    """Have a loaded model hold what its files and these LoRAs make; reads one parameter at a time.

    Args:
        model: of these files.
        stored: the files, with or without LoRAs.
        tensors: names of those in the files that the model's old or new LoRAs touch.
        dtype: to store in.
        placement: puts a finished parameter on its device or devices.
        kernel_dtype: what the blocks' kernels are quantised to, if they are.

    Raises:
        WeightsError: a value is not finite; the parameters before it are new already.
    """
    tensors = set(tensors)
    plan = stored.plan()
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
    put_beside(model, stored, dtype, placement, kernel_dtype)


def put_beside(
    model: nnx.Module,
    stored: StoredTransformer,
    dtype: DTypeLike,
    placement: Placement = on_default_device,
    kernel_dtype: DTypeLike | None = None,
) -> None:
    """Give each linear whose kernel is quantised the LoRAs of its kernel, or take them off.

    Args:
        model: of these files.
        stored: the files, with or without LoRAs.
        dtype: to store in.
        placement: puts the finished matrices on their device or devices.
        kernel_dtype: what the blocks' kernels are quantised to, if they are.

    Raises:
        WeightsError: a value is not finite; nothing is changed.
    """
    for path, pair in _pairs(stored, kernel_dtype).items():
        linear = attrgetter(path)(model)
        assert isinstance(linear, Linear)
        linear.lora_down = linear.lora_up = nnx.static(None)
        if pair is not None:
            down, up = (np.asarray(jnp.asarray(value, dtype)) for value in pair)
            linear.lora_down = nnx.data(nnx.Param(placement(f"{path}.lora_down", down)))
            linear.lora_up = nnx.data(nnx.Param(placement(f"{path}.lora_up", up)))


def _is_of(target: str, path: Sequence[object]) -> bool:
    return ".".join(map(str, path)) in (target, f"{target}_scale")


def _pairs(
    stored: StoredTransformer, kernel_dtype: DTypeLike | None
) -> Mapping[str, LowRank | None]:
    """Find each linear's ``down`` [layers, in, rank] and ``up`` [layers, rank, out], float32."""
    found: dict[str, list[LowRank | None]] = {}
    source = stored.source
    for slot, of_file in quantized_tensors(stored, kernel_dtype):
        own = source.beside(of_file.name) if isinstance(source, LoraSource) else None
        found.setdefault(slot.target.removesuffix(".kernel"), []).append(own)
    return {path: _stacked(layers) for path, layers in found.items()}


def _stacked(layers: Sequence[LowRank | None]) -> LowRank | None:
    """The layers' matrices together, those of lower rank filled up with zeros."""
    there = [pair for pair in layers if pair is not None]
    if not there:
        return None
    rank = max(len(down) for down, _ in there)
    width, out = there[0][0].shape[1], there[0][1].shape[0]
    downs = np.zeros((len(layers), width, rank), np.float32)
    ups = np.zeros((len(layers), rank, out), np.float32)
    for number, pair in enumerate(layers):
        if pair is not None:
            down, up = pair
            downs[number, :, : len(down)] = down.T
            ups[number, : len(down)] = up.T
    return downs, ups
