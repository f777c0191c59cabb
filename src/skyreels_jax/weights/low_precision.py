"""Gives the plain floats of files whose weights are stored in 8 or 4 bits with scales beside them.

Read are the layouts of docs/low_precision.md: 8-bit floats without scales, Kijai's
(``X.scale_weight``), ComfyUI's (``X.weight_scale`` and a description of each layer, in the header
or as a tensor), int8 with scales, NVFP4 in both conventions. What is found in a file must fit
together (:func:`_pair`); a scale is never guessed.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import ml_dtypes
import numpy as np

from skyreels_jax.errors import WeightsError
from skyreels_jax.files import parse_json
from skyreels_jax.weights.nvfp4 import BLOCK, dequantize_nvfp4, scales_shape
from skyreels_jax.weights.plan import Problems
from skyreels_jax.weights.safetensors_file import SafetensorsSource, TensorInfo, TensorSource

_E4M3: Final = np.dtype(ml_dtypes.float8_e4m3fn)
_FLOAT8: Final = (_E4M3, np.dtype(ml_dtypes.float8_e5m2))
_UINT8: Final = np.dtype(np.uint8)
_BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)
_FLOAT32: Final = np.dtype(np.float32)
_FLOATS: Final = (_FLOAT32, _BFLOAT16, np.dtype(np.float16))
# Formats that ComfyUI's descriptions name, and what each stores a weight in. Others are refused.
_FORMATS: Final[Mapping[str, np.dtype]] = {
    "float8_e4m3fn": _E4M3,
    "float8_e5m2": _FLOAT8[1],
    "int8_tensorwise": np.dtype(np.int8),
    "nvfp4": _UINT8,
}
_MARKER: Final = "scaled_fp8"
_DESCRIPTION: Final = "comfy_quant"
_LONGEST_DESCRIPTION: Final = 4096
_PREFIXES: Final = ("", "model.diffusion_model.", "diffusion_model.", "model.")
# What belongs to a weight, by the last part of its name.
_SCALES: Final = ("scale_weight", "weight_scale")
_COMPANIONS: Final = (*_SCALES, "weight_scale_2", "scale_input", "input_scale", _DESCRIPTION)
# What belongs to one in LightX2V's NVFP4 only; other files use such names for other things.
_LIGHTX2V: Final = ("alpha", "input_global_scale", "input_absmax", "weight_global_scale")
# Elements that are dequantised at a time; what that takes stays in cache.
_AT_ONCE: Final = 1 << 18


@dataclass(frozen=True)
class _Recipe:
    """How a tensor becomes floats: what it is called in messages, and what reading it gives."""

    what: str
    info: TensorInfo
    read: Callable[[TensorSource], np.ndarray]


class DequantizedSource:
    """The tensors of another source as plain floats, without their scales and markers.

    Attributes:
        notes: those of the source, and what was dequantised.
    """

    def __init__(
        self, source: TensorSource, recipes: Mapping[str, _Recipe], hidden: frozenset[str]
    ):
        self._source, self._recipes = source, recipes
        self._infos = {
            name: recipes[name].info if name in recipes else info
            for name, info in source.tensors().items()
            if name not in hidden
        }
        counts = Counter(recipe.what for recipe in recipes.values())
        found = tuple(
            f"{count} {'tensors' if count > 1 else 'tensor'} in {what}"
            for what, count in sorted(counts.items())
        )
        self.notes: tuple[str, ...] = (*getattr(source, "notes", ()), *found)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, with the dtypes that they are read in."""
        return self._infos

    def read(self, name: str) -> np.ndarray:
        """One tensor, in float32 where it has a scale.

        Raises:
            WeightsError: the scale is not finite.
        """
        if name not in self._recipes:
            return self._source.read(name)
        # What overflows is refused by name, here or where it is rounded.
        with np.errstate(all="ignore"):
            return self._recipes[name].read(self._source)


def dequantized(source: TensorSource) -> TensorSource:
    """The tensors of ``source`` as floats; ``source`` itself where nothing is quantised.

    Args:
        source: under the names of the file: descriptions in its header use them.

    Raises:
        WeightsError: scales, weights and descriptions do not fit together, or a description names a
            format that is not read.
    """
    infos = source.tensors()
    problems = Problems()
    described = _descriptions(source, problems)
    markers = {n for n in infos if n == _MARKER or n.endswith(f".{_MARKER}")}
    layers: dict[str, dict[str, TensorInfo]] = {}
    hidden = set(markers)
    for name, info in infos.items():
        base, _, last = name.rpartition(".")
        is_packed = infos.get(f"{base}.weight", info).dtype == _UINT8
        if base and (last in _COMPANIONS or (last in _LIGHTX2V and is_packed)):
            layers.setdefault(base, {})[last] = info
            hidden.add(name)
    low = [n for n, i in infos.items() if n not in hidden and _is_low(n, i)]
    if not (low or layers or markers or described):
        return source
    recipes: dict[str, _Recipe] = {}
    for base in (layers.keys() | described.keys()) - {n.removesuffix(".weight") for n in low}:
        weight = infos.get(f"{base}.weight")
        if weight is None:
            found = ", ".join(sorted(layers.get(base, {}))) or "a description"
            problems.add("scales without their weight", f"{base} ({found})")
        else:
            _check_unquantized(source, base, weight, layers.get(base, {}), described, problems)
    scaled = bool(markers) or any(set(_SCALES) & parts.keys() for parts in layers.values())
    for name in low:
        base = name.removesuffix(".weight")
        parts = layers.get(base, {}) if base != name else {}
        try:
            recipes[name] = _pair(name, infos[name], parts, described.get(base), scaled)
        except WeightsError as error:
            problems.add("weights whose scales do not fit", f"{name}: {error}")
    files = sorted({info.file for info in infos.values()})
    problems.raise_for(files[0] if files else "the file")
    return DequantizedSource(source, recipes, frozenset(hidden))


def _is_low(name: str, info: TensorInfo) -> bool:
    """Whether a tensor is a quantised weight; integers are so by their names."""
    packed = info.dtype in (np.int8, _UINT8) and name.endswith(".weight")
    return packed or info.dtype in _FLOAT8


def _descriptions(source: TensorSource, problems: Problems) -> dict[str, str]:
    """The format that a description gives each layer, by the layer's name in the file."""
    infos = source.tensors()
    found: dict[str, object] = {}
    texts = source.metadata if isinstance(source, SafetensorsSource) else {}
    for text in texts.get("_quantization_metadata", ()):
        file = next((info.file for info in infos.values()), "the file")
        where = f"{file}: the header's _quantization_metadata"
        value = parse_json(text, where, error=WeightsError)
        layers = value.get("layers") if isinstance(value, dict) else None
        if not isinstance(layers, dict):
            raise WeightsError(f"{where} lists no layers")
        for layer, description in layers.items():
            found[_in_file(layer, infos)] = description
    for name, info in infos.items():
        base, _, last = name.rpartition(".")
        if last != _DESCRIPTION:
            continue
        if info.dtype != _UINT8 or len(info.shape) != 1 or info.size > _LONGEST_DESCRIPTION:
            problems.add("descriptions that are no text", f"{name}: {info.dtype} {info.shape}")
            continue
        text = source.read(name).tobytes().decode(errors="replace")
        found[base] = parse_json(text, f"{info.file}: {name}", error=WeightsError)
    formats: dict[str, str] = {}
    for layer, description in found.items():
        format = description.get("format") if isinstance(description, dict) else description
        options = description.get("params") if isinstance(description, dict) else None
        every = (description, options)
        rotated = any(isinstance(one, dict) and one.get("convrot") for one in every)
        if rotated or format not in _FORMATS:
            known = ", ".join(_FORMATS)
            kind = f"layers of a format that is not read (read are {known})"
            problems.add(kind, f"{layer}: {format!r:.80}" + (" with convrot" if rotated else ""))
        else:
            formats[layer] = str(format)
    return formats


def _in_file(layer: str, infos: Mapping[str, TensorInfo]) -> str:
    """A layer's name in the file; one of the header and the file may have a prefix."""
    for prefix in _PREFIXES:
        for name in (f"{prefix}{layer}", layer.removeprefix(prefix)):
            if f"{name}.weight" in infos:
                return name
    return layer


def _check_unquantized(
    source: TensorSource,
    base: str,
    weight: TensorInfo,
    parts: Mapping[str, TensorInfo],
    described: Mapping[str, str],
    problems: Problems,
) -> None:
    """A weight in full precision may have a scale only if that is one."""
    if base in described:
        said = f"{base}.weight is {weight.dtype.name}, said to be {described[base]}"
        problems.add("weights that are not what their description says", said)
    for part in parts.keys() & {*_SCALES, "weight_scale_2"}:
        if parts[part].size != 1 or source.read(f"{base}.{part}").astype(np.float32).item() != 1:
            what = f"{base}.{part} beside {weight.dtype.name}"
            problems.add("scales of weights that are not quantised", what)


def _pair(
    name: str, info: TensorInfo, parts: Mapping[str, TensorInfo], format: str | None, scaled: bool
) -> _Recipe:
    """How a quantised tensor is read with what belongs to it.

    Args:
        name: of the tensor.
        info: of the tensor.
        parts: what belongs to it, by the last part of the name.
        format: that its description gives it.
        scaled: whether the file has scales, or a marker that promises them.

    Raises:
        WeightsError: they do not fit together.
    """
    if format is not None and _FORMATS[format] != info.dtype:
        raise WeightsError(f"it is {info.dtype.name} and said to be {format}")
    if info.dtype == _UINT8:
        return _nvfp4_recipe(name, info, parts, format)
    scales = [part for part in _SCALES if part in parts]
    if len(scales) > 1 or "weight_scale_2" in parts:
        raise WeightsError(f"it has several scales: {', '.join(sorted(parts))}")
    if not scales:
        if info.dtype == np.int8 or format or (scaled and name.endswith(".weight")):
            raise WeightsError(f"its scale is missing ({', '.join(_SCALES)})")
        values = TensorInfo(info.shape, _BFLOAT16, info.file)
        # Exact: neither format of 8 bits has more range or digits than bfloat16.
        return _Recipe(info.dtype.name, values, lambda s: s.read(name).astype(_BFLOAT16))
    scale = parts[scales[0]]
    rows = info.shape[:1]
    per_row = bool(rows) and scale.shape in (rows, (*rows, 1)) and scale.size > 1
    if scale.dtype not in _FLOATS or not (scale.size == 1 or per_row):
        raise WeightsError(
            f"its scale is {scale.dtype.name} {list(scale.shape)}; expected a float, one or "
            f"{info.shape[0] if rows else 1}"
        )
    kind = f"{info.dtype.name} with a scale per {'output channel' if per_row else 'tensor'}"
    scale_name = f"{name.removesuffix('.weight')}.{scales[0]}"
    values = TensorInfo(info.shape, _FLOAT32, info.file)
    return _Recipe(kind, values, partial(_scaled, name=name, scale_name=scale_name))


def _nvfp4_recipe(
    name: str, info: TensorInfo, parts: Mapping[str, TensorInfo], format: str | None
) -> _Recipe:
    base = name.removesuffix(".weight")
    theirs = sorted(parts.keys() & set(_LIGHTX2V))
    if format is not None and theirs:
        raise WeightsError(
            f"it is described as ComfyUI's nvfp4 and has LightX2V's {', '.join(theirs)}: the order "
            "of its pairs is not known"
        )
    block_scale = parts.get("weight_scale")
    if block_scale is None:
        raise WeightsError("its block scales are missing (weight_scale)")
    shape = (info.shape[0], info.shape[1] * 2) if len(info.shape) == 2 else (0, 0)
    if not shape[0] or not shape[1] or shape[1] % BLOCK:
        raise WeightsError(f"pairs of a matrix are expected, not {list(info.shape)}")
    if block_scale.dtype not in (_E4M3, _UINT8) or block_scale.shape != scales_shape(shape):
        raise WeightsError(
            f"its block scales are {block_scale.dtype.name} {list(block_scale.shape)}; expected "
            f"float8_e4m3fn {list(scales_shape(shape))}"
        )
    if format is not None:
        needed: tuple[str, ...] = ("weight_scale_2",)
    elif "weight_global_scale" in parts:
        needed = ("weight_global_scale",)
    elif theirs:
        needed = ("alpha", "input_global_scale")
    else:
        raise WeightsError(
            "nothing tells the order of its pairs: neither ComfyUI's description (nvfp4) nor "
            "LightX2V's alpha and input_global_scale"
        )
    for part in needed:
        if part not in parts:
            raise WeightsError(f"its {part} is missing")
        if parts[part].size != 1 or parts[part].dtype not in _FLOATS:
            raise WeightsError(f"its {part} is {parts[part].dtype} {list(parts[part].shape)}")
    whose = "ComfyUI's" if format is not None else "LightX2V's"
    values = TensorInfo(shape, _FLOAT32, info.file)
    doubled = "weight_scale_2" in parts and "weight_scale_2" not in needed
    read = partial(_nvfp4, base=base, needed=needed, file=info.file, doubled=doubled)
    return _Recipe(f"NVFP4 ({whose} order)", values, read)


def _scaled(source: TensorSource, *, name: str, scale_name: str) -> np.ndarray:
    """The product of values and scales in float32."""
    stored = source.read(name)
    scale = _finite(source, scale_name).reshape(-1, *(1,) * (stored.ndim - 1))
    values = np.empty(stored.shape, np.float32)
    if not stored.ndim:
        return values + stored.astype(np.float32) * scale.reshape(())
    rows = max(1, _AT_ONCE // max(1, stored[:1].size))
    for start in range(0, len(stored), rows):
        some = slice(start, start + rows)
        found = stored[some].astype(np.float32)
        np.multiply(found, scale[some] if len(scale) > 1 else scale, out=values[some])
    return values


def _nvfp4(
    source: TensorSource, *, base: str, needed: tuple[str, ...], file: str, doubled: bool
) -> np.ndarray:
    scales = [_finite(source, f"{base}.{part}").reshape(()) for part in needed]
    tensor_scale = np.float32(scales[0] * scales[1] if len(scales) == 2 else scales[0])
    if needed == ("weight_global_scale",):
        tensor_scale = np.float32(1) / tensor_scale
    if doubled:
        stored = _finite(source, f"{base}.weight_scale_2").reshape(-1)
        if stored.size != 1 or not np.isclose(stored[0], tensor_scale, rtol=1e-3):
            raise WeightsError(
                f"{file}: {base}.weight_scale_2 contradicts {' and '.join(needed)}: "
                f"{stored[0]:.6g} and {tensor_scale:.6g}"
            )
    block_scales = source.read(f"{base}.weight_scale").view(_E4M3)
    if not np.isfinite(tensor_scale) or not np.isfinite(block_scales).all():
        raise WeightsError(f"{file}: the scales of {base}.weight are not all finite")
    packed = source.read(f"{base}.weight")
    comfy = needed == ("weight_scale_2",)
    return dequantize_nvfp4(packed, block_scales, tensor_scale, high_first=comfy)


def _finite(source: TensorSource, name: str) -> np.ndarray:
    """A scale in float32.

    Raises:
        WeightsError: it is not finite.
    """
    value = source.read(name).astype(np.float32)
    if not np.isfinite(value).all():
        raise WeightsError(f"{source.tensors()[name].file}: {name} is NaN or infinite")
    return value
