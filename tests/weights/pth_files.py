"""PyTorch archives made by hand, so that tests decide every byte of them."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

MAGIC = b"\x80\x02"
FLOAT_PID = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOOKS = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def tensor(
    offset: bytes = b"K\0",
    shape: bytes = b"K\x02K\x03\x86",
    strides: bytes = b"K\x03K\x01\x86",
    *,
    pid: bytes = FLOAT_PID,
    grad: bytes = b"\x89",
    hooks: bytes = HOOKS,
    rebuild: bytes = REBUILD,
) -> bytes:
    """Opcodes that leave a tensor on the stack: of storage 0 with six floats, if not said."""
    return rebuild + b"(" + pid + offset + shape + strides + grad + hooks + b"tR"


def mapping(value: bytes, name: str = "w") -> bytes:
    """A whole pickle: a dictionary with one entry."""
    return MAGIC + b"}" + text(name) + value + b"s."


def storage_bytes(count: int = 6) -> bytes:
    return struct.pack(f"<{count}f", *range(count))


def archive(pickle: bytes, storages: Sequence[bytes] = (), **records: bytes) -> bytes:
    """The bytes of a whole file, as PyTorch lays it out (without its padding)."""
    members = {"x/data.pkl": pickle, "x/byteorder": b"little"}
    members |= {f"x/data/{i}": data for i, data in enumerate(storages)}
    members |= {f"x/{name}": data for name, data in records.items()}
    return zipped(members)


def zipped(
    members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], *, method: int = 0, flags: int = 0
) -> bytes:
    """A zip file; names may repeat if the members are pairs."""
    pairs = list(members.items()) if isinstance(members, Mapping) else list(members)
    body, directory = b"", b""
    for name, data in pairs:
        raw, crc = name.encode(), zlib.crc32(data)
        common = struct.pack("<3H3L", method, 0, 0, crc, len(data), len(data))
        directory += b"PK\x01\x02" + struct.pack("<3H", 20, 20, flags) + common
        directory += struct.pack("<5H2L", len(raw), 0, 0, 0, 0, 0, len(body)) + raw
        body += b"PK\x03\x04" + struct.pack("<2H", 20, flags) + common
        body += struct.pack("<2H", len(raw), 0) + raw + data
    end = struct.pack("<4H2LH", 0, 0, len(pairs), len(pairs), len(directory), len(body), 0)
    return body + directory + b"PK\x05\x06" + end


def write(folder: Path, content: bytes, name: str = "x.pth") -> Path:
    file = folder / name
    file.write_bytes(content)
    return file
