"""Writes the matrices of blocks in 8 bits: the layouts of docs/low_precision.md."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import ml_dtypes
import numpy as np

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.engine import TensorStream
from skyreels_jax.weights.quantize import quantize, quantize_with, scale_of
from skyreels_jax.weights.safetensors_file import TensorSpec

StoredPrecision = Literal["int8", "fp8", "comfy-fp8"]
_COMFY_PREFIX: Final = "model.diffusion_model."
_FLOAT32: Final = np.dtype(np.float32)
_E4M3: Final = np.dtype(ml_dtypes.float8_e4m3fn)
# Matrices of blocks but tables: the transformer's and UMT5's, in both formats.
_IN_BLOCKS: Final = re.compile(r"(?:encoder\.)?blocks?\.\d+\..*\.weight")
_TABLES: Final = re.compile(r".*(?:embedding|relative_attention_bias)\.")


@dataclass(frozen=True)
class _Layout:
    dtype: np.dtype
    per_channel: bool
    prefix: str = ""


_LAYOUTS: Final[Mapping[StoredPrecision, _Layout]] = {
    "int8": _Layout(np.dtype(np.int8), True),
    "fp8": _Layout(_E4M3, True),
    "comfy-fp8": _Layout(_E4M3, False, _COMFY_PREFIX),
}


def quantized(stream: TensorStream, precision: StoredPrecision) -> TensorStream:
    """The tensors of a model with the matrices of its blocks in 8 bits and scales beside them.

    Args:
        stream: plain floats, under the names of either format.
        precision: ``int8`` and ``fp8`` have a scale per output channel, ``comfy-fp8`` one per
            tensor, ComfyUI's prefix and its description in the header.

    Raises:
        WeightsError: while it is read: a value is not finite.
    """
    layout = _LAYOUTS[precision]
    specs: dict[str, TensorSpec] = {}
    chosen: list[str] = []
    for name, spec in stream.specs.items():
        own = f"{layout.prefix}{name}"
        if not _is_quantized(name, spec):
            specs[own] = spec
            continue
        chosen.append(own.removesuffix(".weight"))
        specs[own] = TensorSpec(spec.shape, layout.dtype)
        scales = spec.shape[:1] if layout.per_channel else ()
        specs[f"{own}_scale"] = TensorSpec(scales, _FLOAT32)
    if layout.per_channel:
        metadata = {"skyreels_jax_weights": precision}
    else:
        layers = {name: {"format": "float8_e4m3fn"} for name in chosen}
        described = {"format_version": "1.0", "layers": layers}
        metadata = {"_quantization_metadata": json.dumps(described, separators=(",", ":"))}
    return TensorStream(specs, _values(stream, layout), {**stream.metadata, **metadata})


def _is_quantized(name: str, spec: TensorSpec) -> bool:
    is_matrix = len(spec.shape) == 2 and _IN_BLOCKS.fullmatch(name) is not None
    return is_matrix and not _TABLES.match(name)


def _values(stream: TensorStream, layout: _Layout) -> Iterator[tuple[str, np.ndarray]]:
    for name, value in stream.values:
        own = f"{layout.prefix}{name}"
        if not _is_quantized(name, stream.specs[name]):
            yield own, value
            continue
        try:
            if layout.per_channel:
                values, scale = quantize(value.T, layout.dtype)
                values = values.T
            else:
                largest = np.asarray(np.abs(value).max(initial=0), _FLOAT32)
                scale = scale_of(largest, layout.dtype)
                values = quantize_with(value, scale, layout.dtype)
        except WeightsError as error:
            raise WeightsError(f"{name}: {error}") from error
        yield own, values
        yield f"{own}_scale", np.asarray(scale, _FLOAT32)
