"""The table of contents of a zip file whose members are stored as they are, not compressed.

Format: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.7 (local header), 4.3.12 (central directory),
4.3.14 to 4.3.16 (end records), 4.5.3 (64-bit sizes). PyTorch writes no comments, one disk, and the
end records at the very end; anything else is refused rather than guessed at. Why the standard
library's zipfile does not read it: docs/adr/0006.
"""

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.safetensors_file import Allowance

MAX_MEMBERS: Final = 100_000

_END: Final = struct.Struct("<4s4H2LH")
_LOCATOR: Final = struct.Struct("<4sLQL")
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_LOCAL: Final = struct.Struct("<4s5H3L2H")
_EXTRA: Final = struct.Struct("<2H")
_IN_64_BITS: Final = 0xFFFFFFFF
_ENCRYPTED: Final = 0x1
_SIZES_FOLLOW: Final = 0x8
# Measured: a name, a Member with its integers and a place in a dictionary.
_MEMBER_COST: Final = 300


@dataclass(frozen=True, slots=True)
class Member:
    """Where in the file a member's bytes are, and their CRC-32 as the directory says."""

    offset: int
    size: int
    crc: int


class _Directory(NamedTuple):
    offset: int
    size: int
    entries: int


class _Entry(NamedTuple):
    name: bytes
    header: int
    size: int
    crc: int


def read_directory(file: str, data: memoryview, allowance: Allowance) -> Mapping[str, Member]:
    """All members by name; their places are checked against the file and one another.

    Args:
        file: what errors call it.
        data: the whole file.
        allowance: pays for the result.

    Raises:
        WeightsError: if the file is no such archive, is truncated, or contradicts itself.
    """
    directory = _directory(file, data)
    members: dict[str, Member] = {}
    ranges: list[tuple[int, int]] = []
    position = directory.offset
    for _ in range(directory.entries):
        allowance.spend(_MEMBER_COST)
        entry, position = _entry(file, data, position, directory)
        name = _plain_name(file, entry.name)
        if name in members:
            raise WeightsError(f"{file} is corrupt: it holds {name} twice")
        start = _data_start(file, data, entry, directory)
        members[name] = Member(start, entry.size, entry.crc)
        ranges.append((entry.header, start + entry.size))
    if position != directory.offset + directory.size:
        raise WeightsError(f"{file} is corrupt: its directory has another length than it says")
    ranges.sort()
    if any(end > header for (_, end), (header, _) in zip(ranges, ranges[1:], strict=False)):
        raise WeightsError(f"{file} is corrupt: its members overlap")
    return members


def check_crc(file: str, name: str, member: Member, data: memoryview) -> None:
    """Compare a member's bytes with its checksum.

    Raises:
        WeightsError: if they differ.
    """
    if zlib.crc32(data) != member.crc:
        raise WeightsError(
            f"{file} is corrupt: the checksum of {name} does not match; fetch the file again"
        )


def _directory(file: str, data: memoryview) -> _Directory:
    """Where the central directory is, by the one or two end records."""
    end = len(data) - _END.size
    truncated = WeightsError(f"{file} is truncated: its zip directory is not at the end")
    if end < 0:
        raise truncated
    signature, *disks, here, entries, size, offset, comment = _END.unpack_from(data, end)
    if signature != b"PK\x05\x06":
        raise truncated
    found = _Directory(offset, size, entries)
    if any(disks) or here != entries or comment:
        raise WeightsError(f"{file} is corrupt: its zip end record is not as PyTorch writes it")
    locator = end - _LOCATOR.size
    if locator >= _END64.size and data[locator : locator + 4] == b"PK\x06\x07":
        end = locator - _END64.size
        wide = _directory64(file, data, locator, end)
        limits = (_IN_64_BITS, _IN_64_BITS, 0xFFFF)
        if any(a != min(b, limit) for a, b, limit in zip(found, wide, limits, strict=True)):
            raise WeightsError(f"{file} is corrupt: its two zip end records contradict each other")
        found = wide
    if found.offset + found.size != end:
        raise WeightsError(f"{file} is corrupt: its zip directory does not end at the end record")
    if found.entries > MAX_MEMBERS:
        raise WeightsError(f"{file} has {found.entries} members; at most {MAX_MEMBERS} are read")
    return found


def _directory64(file: str, data: memoryview, locator: int, end: int) -> _Directory:
    _, first_disk, place, disk_count = _LOCATOR.unpack_from(data, locator)
    signature, length, _, _, *disks, here, entries, size, offset = _END64.unpack_from(data, end)
    sound = (
        signature == b"PK\x06\x06"
        and length == _END64.size - 12
        and place == end
        and here == entries
        and not any(disks)
        and first_disk == 0
        and disk_count == 1
    )
    if not sound:
        raise WeightsError(f"{file} is corrupt: its 64-bit zip end record is unsound")
    return _Directory(offset, size, entries)


def _entry(file: str, data: memoryview, position: int, directory: _Directory) -> tuple[_Entry, int]:
    """One entry of the directory and where the next one begins."""
    limit = directory.offset + directory.size
    corrupt = WeightsError(f"{file} is corrupt: an entry of its zip directory is unsound")
    if position + _CENTRAL.size > limit:
        raise corrupt
    fields = _CENTRAL.unpack_from(data, position)
    signature, flags, method, crc, packed, size = (fields[i] for i in (0, 3, 4, 7, 8, 9))
    name_length, extra_length, comment_length, disk = fields[10:14]
    header = fields[16]
    name_at = position + _CENTRAL.size
    extra_at = name_at + name_length
    after = extra_at + extra_length + comment_length
    if signature != b"PK\x01\x02" or after > limit or disk:
        raise corrupt
    name = bytes(data[name_at:extra_at])
    wide = (size, packed, header)
    size, packed, header = _widened(wide, data[extra_at : extra_at + extra_length], corrupt)
    if method or flags & _ENCRYPTED or size != packed:
        raise WeightsError(
            f"{file} has a compressed or encrypted member ({name[:80]!r}), as TorchScript archives "
            "and repacked ones do: load it with torch and save the state_dict()"
        )
    return _Entry(name, header, size, crc), after


def _widened(
    values: tuple[int, int, int], extra: memoryview, corrupt: WeightsError
) -> tuple[int, ...]:
    """Size, packed size and offset; those that did not fit stand in extra field 1 in this order."""
    missing = values.count(_IN_64_BITS)
    if not missing:
        return values
    position = 0
    while position + _EXTRA.size <= len(extra):
        kind, length = _EXTRA.unpack_from(extra, position)
        position += _EXTRA.size
        if kind == 1 and length >= 8 * missing and position + length <= len(extra):
            found = iter(struct.unpack_from(f"<{missing}Q", extra, position))
            return tuple(next(found) if value == _IN_64_BITS else value for value in values)
        position += length
    raise corrupt


def _plain_name(file: str, raw: bytes) -> str:
    """A member's name, which must be a relative path without detours."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise WeightsError(f"{file} is corrupt: a member's name is no text ({error})") from error
    if "\\" in name or "\0" in name or any(step in ("", ".", "..") for step in name.split("/")):
        raise WeightsError(f"{file} is not to be trusted: it has a member named {name[:80]!r}")
    return name


def _data_start(file: str, data: memoryview, entry: _Entry, directory: _Directory) -> int:
    """Where a member's bytes begin, by its local header, which must agree with the directory."""
    corrupt = WeightsError(
        f"{file} is corrupt: the header of {entry.name[:80]!r} contradicts the zip directory"
    )
    name_at = entry.header + _LOCAL.size
    if name_at > directory.offset:
        raise corrupt
    signature, _, flags, method, *_, packed, size, name_length, extra_length = _LOCAL.unpack_from(
        data, entry.header
    )
    start = name_at + name_length + extra_length
    # The sizes may stand after the data instead, or in an extra field.
    agree = flags & _SIZES_FOLLOW or all(
        value in (entry.size, _IN_64_BITS) for value in (packed, size)
    )
    sound = (
        signature == b"PK\x03\x04"
        and method == 0
        and not flags & _ENCRYPTED
        and data[name_at : name_at + name_length] == entry.name
        and agree
        and start + entry.size <= directory.offset
    )
    if not sound:
        raise corrupt
    return start
