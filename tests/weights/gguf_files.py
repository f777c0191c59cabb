"""GGUF files written byte by byte, and the definitions of some of their blocks."""

import struct
from pathlib import Path

import numpy as np

# Numbers of types, and elements and bytes of a block (ggml's ggml.h).
TYPES = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q5_0": (6, 32, 22),
    "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "BF16": (30, 1, 2),
}
# Where a block has 16-bit floats, so that random bytes can be given sound ones.
_HALVES = {"Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}

Tensor = tuple[str, tuple[int, ...], bytes]


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def architecture(name: str) -> bytes:
    return key("general.architecture", 8, text(name))


def sizes(name: str, shape: tuple[int, ...]) -> bytes:
    raw = struct.pack(f"<IQ{len(shape)}i", 5, len(shape), *shape)
    return key(f"comfy.gguf.orig_shape.{name}", 9, raw)


def gguf(tensors: dict[str, Tensor], keys: tuple[bytes, ...] = (architecture("wan"),)) -> bytes:
    """A file of tensors: by name the type, the shape as models have it, and the data."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys)
    data = b""
    for name, (kind, shape, content) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", TYPES[kind][0], len(data))
        data += content + bytes(-len(content) % 32)
    return head + bytes(-len(head) % 32) + data


def write(file: Path, tensors: dict[str, Tensor], *keys: bytes) -> Path:
    file.write_bytes(gguf(tensors, keys or (architecture("wan"),)))
    return file


def random_blocks(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """Blocks of random bytes whose scales are those of weights."""
    _, block, nbytes = TYPES[kind]
    raw = rng.integers(0, 256, (int(np.prod(shape)) // block, nbytes), np.uint8)
    for at in _HALVES[kind]:
        scales = rng.uniform(0.001, 0.01, (len(raw), 1)).astype(np.float16)
        raw[:, at : at + 2] = scales.view(np.uint8)
    return kind, shape, raw.tobytes()


def plain(values: np.ndarray, kind: str = "F32") -> Tensor:
    return kind, values.shape, values.tobytes()


# The definitions, as ggml-quants.c has them, in float32.


def defined(tensor: Tensor) -> np.ndarray:
    """What a tensor of blocks is."""
    kind, shape, content = tensor
    blocks = np.frombuffer(content, np.uint8).reshape(-1, TYPES[kind][2])
    return np.stack([DEFINITIONS[kind](block) for block in blocks]).reshape(shape)


def _half(block: np.ndarray, at: int) -> np.float32:
    return block[at : at + 2].view(np.float16)[0].astype(np.float32)


def _q8_0(block: np.ndarray) -> np.ndarray:
    return _half(block, 0) * block[2:].view(np.int8).astype(np.float32)


def _q4_0(block: np.ndarray) -> np.ndarray:
    values = np.concatenate([block[2:] & 15, block[2:] >> 4]).astype(np.float32) - 8
    return _half(block, 0) * values


def _q5_0(block: np.ndarray) -> np.ndarray:
    high = int(block[2:6].view("<u4")[0])
    low = np.concatenate([block[6:] & 15, block[6:] >> 4]).astype(int)
    values = [(q | (high >> i & 1) << 4) - 16 for i, q in enumerate(low)]
    return _half(block, 0) * np.array(values, np.float32)


def _scale_and_least(packed: np.ndarray, j: int) -> tuple[int, int]:
    q = [int(x) for x in packed]
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return q[j + 4] & 15 | q[j - 4] >> 6 << 4, q[j + 4] >> 4 | q[j] >> 6 << 4


def _q45_k(block: np.ndarray, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    d, least = _half(block, 0), _half(block, 2)
    out = []
    for j in range(8):
        scale, offset = _scale_and_least(block[4:16], j)
        q = low[j // 2 * 32 : j // 2 * 32 + 32] >> (4 * (j % 2)) & 15
        q = q.astype(int) + 16 * (high >> j & 1)
        out.append(d * np.float32(scale) * q.astype(np.float32) - least * np.float32(offset))
    return np.concatenate(out)


def _q4_k(block: np.ndarray) -> np.ndarray:
    return _q45_k(block, np.zeros(32, int), block[16:])


def _q5_k(block: np.ndarray) -> np.ndarray:
    return _q45_k(block, block[16:48].astype(int), block[48:])


def _q6_k(block: np.ndarray) -> np.ndarray:
    low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
    d = _half(block, 208)
    out = np.empty(256, np.float32)
    for half in range(2):
        for part in range(4):
            for i in range(32):
                four = int(low[64 * half + 32 * (part % 2) + i]) >> (4 * (part // 2)) & 15
                two = int(high[32 * half + i]) >> (2 * part) & 3
                scale = np.float32(scales[8 * half + 2 * part + i // 16])
                out[128 * half + 32 * part + i] = d * scale * np.float32((four | two << 4) - 32)
    return out


DEFINITIONS = {
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
