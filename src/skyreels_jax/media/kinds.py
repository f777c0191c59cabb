"""What kind of file something is, from its first bytes, and what to say where it does not fit."""

import re
from pathlib import Path
from typing import BinaryIO, Final

from skyreels_jax.errors import RequestError

# Enough for a signature; a file type box names its brands within the first bytes.
HEAD_BYTES: Final = 4096
_ADDRESS: Final = re.compile(r"[a-z][a-z0-9+.-]+:/+[^/]", re.IGNORECASE)
_HEIC_BRANDS: Final = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_STILL: Final = (
    (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"BM", "a BMP picture"),
    (b"II*\0", "a TIFF picture"),
    (b"MM\0*", "a TIFF picture"),
)
_DOCUMENTS: Final = (
    (b"%!PS", "an EPS or PostScript drawing"),
    (b"\xc5\xd0\xd3\xc6", "an EPS or PostScript drawing"),
    (b"%PDF", "a PDF document"),
    (b"<svg", "an SVG drawing"),
)


def require_file_name(path: str | Path, argument: str) -> None:
    """Refuse an address, of which a path was made or is about to be.

    Raises:
        RequestError: it is one.
    """
    if _ADDRESS.match(str(path)):
        raise RequestError(f"{argument} {path} is an address: download it first, and give the file")


def describe_kind(head: bytes) -> str:
    """What the first bytes of a file say it is: ``video``, ``image``, or words for a message."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page (HTML)"
    if text.startswith(b"<?xml") and b"<svg" in text:
        return "an SVG drawing"
    for magic, name in _DOCUMENTS:
        if text.startswith(magic.lower()) or head.startswith(magic):
            return name
    if head[4:8] == b"ftyp":
        brands = {head[8:12], *(head[i : i + 4] for i in range(16, 64, 4))}
        if head[8:12] in _HEIC_BRANDS:
            return "a HEIC picture"
        return "an AVIF picture" if brands & {b"avif", b"avis"} else "video"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        animated = head[12:16] == b"VP8X" and len(head) > 20 and bool(head[20] & 2)
        return "an animated WebP" if animated else "a WebP picture"
    if head.startswith(b"\x1aE\xdf\xa3") or (head.startswith(b"RIFF") and head[8:12] == b"AVI "):
        return "video"
    if head[:1] == b"G" and head[188:189] == b"G":
        return "video"
    return next((name for magic, name in _STILL if head.startswith(magic)), "")


def read_head(file: BinaryIO) -> bytes:
    """The first bytes; the file stands at its beginning again."""
    head = file.read(HEAD_BYTES)
    file.seek(0)
    return head


def refuse_as_image(path: str | Path, kind: str) -> None:
    """Raise a RequestError where a file of ``kind`` is no image that is read."""
    if kind == "video":
        raise RequestError(f"image {path} is a video: give it as `video`")
    if kind == "a HEIC picture":
        raise RequestError(f"image {path}: HEIC is not supported; convert it to JPEG or PNG")
    if kind.startswith(("a web page", "an EPS", "a PDF", "an SVG")):
        raise RequestError(f"image {path} is {kind}, not a picture; give a PNG or JPEG")


def refuse_as_video(path: str | Path, kind: str) -> None:
    """Raise a RequestError where a file of ``kind`` is no video that is read."""
    if kind == "an animated WebP":
        raise RequestError(
            f"video {path}: an animated WebP cannot be read; convert it to MP4, for example with "
            "an image program"
        )
    if kind.endswith("picture"):
        raise RequestError(f"video {path} is {kind}: give it as `image`")
    if kind not in ("", "video"):
        raise RequestError(f"video {path} is {kind}, not a video")
