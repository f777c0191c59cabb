"""Matrices stored in the layouts of other tools, and what each stands for by its definition.

Written without the package and without the code under test: 4-bit floats by hand, tiles by the
formula of each byte's place.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

F = np.float32
E4M3 = ml_dtypes.float8_e4m3fn
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass
class Stored:
    """Tensors by their names after the layer's, what they stand for, and ComfyUI's description."""

    tensors: dict[str, np.ndarray]
    value: np.ndarray
    description: dict[str, object] | None = None


def fp8(weight: np.ndarray, dtype=E4M3) -> Stored:
    stored = weight.astype(dtype)
    return Stored({"weight": stored}, stored.astype(F))


def _per_tensor(weight: np.ndarray, name: str) -> Stored:
    scale = np.abs(weight).max() / F(448)
    stored = (weight / scale).astype(E4M3)
    return Stored({"weight": stored, name: np.array(scale, F)}, stored.astype(F) * F(scale))


def kijai(weight: np.ndarray) -> Stored:
    return _per_tensor(weight, "scale_weight")


def comfy_fp8(weight: np.ndarray) -> Stored:
    stored = _per_tensor(weight, "weight_scale")
    stored.tensors["input_scale"] = np.array(0.25, F)
    stored.description = {"format": "float8_e4m3fn"}
    return stored


def int8(weight: np.ndarray, column: bool = False) -> Stored:
    scale = np.abs(weight).max(axis=1, keepdims=True) / F(127)
    stored = np.rint(weight / scale).astype(np.int8)
    held = scale if column else scale[:, 0]
    return Stored({"weight": stored, "weight_scale": held}, stored.astype(F) * scale)


def comfy_int8(weight: np.ndarray) -> Stored:
    stored = int8(weight, column=True)
    stored.description = {"format": "int8_tensorwise"}
    return stored


def _codes(scaled: np.ndarray) -> np.ndarray:
    """The nearest 4-bit floats, as the integers that stand for them."""
    nearest = np.abs(np.abs(scaled)[..., None] - np.array(E2M1, F)).argmin(-1)
    return (nearest + 8 * (scaled < 0)).astype(np.uint8)


def tiles(scales: np.ndarray) -> np.ndarray:
    """Block scales where the tensor cores look for them (CUTLASS: 128 x 4, rows 32 apart)."""
    rows, columns = scales.shape
    across, down = -(-columns // 4), -(-rows // 128)
    flat = np.zeros(across * down * 512, scales.dtype)
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128) * across + c // 4
            flat[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] = scales[r, c]
    return flat.reshape(down * 128, across * 4)


@dataclass
class _Blocks:
    """A matrix in blocks of 16: pairs as bytes, 4-bit values, their scales, and the tensor's."""

    packed: np.ndarray
    numbers: np.ndarray
    scales: np.ndarray
    tensor_scale: F

    def value(self, tensor_scale: F) -> np.ndarray:
        whole = self.scales.astype(F) * tensor_scale
        return (self.numbers * whole[..., None]).reshape(len(self.numbers), -1)


def _nvfp4(weight: np.ndarray, high_first: bool) -> _Blocks:
    tensor_scale = F(np.abs(weight).max() / (6 * 448))
    blocks = weight.reshape(len(weight), -1, 16)
    scales = (np.abs(blocks).max(-1) / 6 / tensor_scale).astype(E4M3)
    whole = np.maximum(scales.astype(F) * tensor_scale, F(1e-30))
    codes = _codes(blocks / whole[..., None])
    first, second = codes[..., 0::2].astype(int), codes[..., 1::2].astype(int)
    packed = first * 16 + second if high_first else first + second * 16
    numbers = np.array([*E2M1, *(-x for x in E2M1)], F)[codes]
    packed = packed.astype(np.uint8).reshape(len(weight), -1)
    return _Blocks(packed, numbers, scales, tensor_scale)


def comfy_nvfp4(weight: np.ndarray) -> Stored:
    blocks = _nvfp4(weight, high_first=True)
    parts = {"weight": blocks.packed, "weight_scale": tiles(blocks.scales)}
    parts["weight_scale_2"] = np.array(blocks.tensor_scale)
    return Stored(parts, blocks.value(blocks.tensor_scale), {"format": "nvfp4"})


def lightx2v_nvfp4(weight: np.ndarray) -> Stored:
    blocks = _nvfp4(weight, high_first=False)
    of_input, alpha = F(7), blocks.tensor_scale / F(7)
    parts = {"weight": blocks.packed, "weight_scale": tiles(blocks.scales)}
    parts |= {"input_global_scale": np.array([of_input]), "alpha": np.array([alpha])}
    return Stored(parts, blocks.value(alpha * of_input))


def calibrated_nvfp4(weight: np.ndarray) -> Stored:
    """LightX2V's as its converter writes it, with the inverse of the tensor's scale."""
    blocks = _nvfp4(weight, high_first=False)
    inverse = F(1) / blocks.tensor_scale
    parts = {"weight": blocks.packed, "weight_scale": tiles(blocks.scales)}
    parts |= {"weight_global_scale": np.array(inverse), "input_absmax": np.array(3, F)}
    return Stored(parts, blocks.value(F(1) / inverse))


LAYOUTS = {
    "fp8": fp8,
    "fp8, five bits of exponent": lambda weight: fp8(weight, ml_dtypes.float8_e5m2),
    "Kijai's fp8": kijai,
    "ComfyUI's fp8": comfy_fp8,
    "int8": int8,
    "ComfyUI's int8": comfy_int8,
    "ComfyUI's NVFP4": comfy_nvfp4,
    "LightX2V's NVFP4": lightx2v_nvfp4,
    "LightX2V's NVFP4 before calibration": calibrated_nvfp4,
}


def save(
    file: Path,
    layers: Mapping[str, Stored],
    others: Mapping[str, np.ndarray] | None = None,
    *,
    in_header: bool = True,
) -> Path:
    """A safetensors file of layers by name; descriptions in the header or as tensors."""
    tensors = {f"{n}.{part}": v for n, s in layers.items() for part, v in s.tensors.items()}
    tensors |= dict(others or {})
    described = {name: s.description for name, s in layers.items() if s.description}
    metadata = {"format": "pt"}
    if described and in_header:
        metadata["_quantization_metadata"] = json.dumps(
            {"format_version": "1.0", "layers": described}
        )
    for name, description in ({} if in_header else described).items():
        raw = json.dumps(description).encode()
        tensors[f"{name}.comfy_quant"] = np.frombuffer(raw, np.uint8)
    save_file({name: np.ascontiguousarray(v) for name, v in tensors.items()}, file, metadata)
    return file
