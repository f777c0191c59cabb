"""Which videos and images a recipe names, and their captions; no picture is decoded."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from skyreels_jax.errors import RequestError
from skyreels_jax.files import TEMPORARY_PREFIX, parse_json, read_text
from skyreels_jax.outputs import path_of
from skyreels_jax.training.videos.recipe import FolderData, FolderDataset

VIDEO_SUFFIXES: Final = frozenset(
    (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".gif")
)
IMAGE_SUFFIXES: Final = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff")
)
_TABLES: Final = ("metadata.csv", "metadata.jsonl")
# Names of columns and keys, the first the usual one.
_CAPTION_KEYS: Final = ("caption", "prompt", "text")
_VIDEO_KEYS: Final = ("video_path", "video", "file_name", "file", "path")
_IMAGE_KEYS: Final = ("image_path", "image", "file_name", "file", "path")
_MOST_CAPTION_BYTES: Final = 2**20
_MOST_TABLE_BYTES: Final = 2**30


@dataclass(frozen=True)
class MediaFile:
    """A video or image with its captions.

    Attributes:
        path: of the file.
        dataset: which of the recipe's.
        captions: one is chosen each time a clip of it is seen.
    """

    path: Path
    dataset: int
    captions: tuple[str, ...]


@dataclass(frozen=True)
class FileNote:
    """Something that a person should know of a file."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass
class Listing:
    """What was found.

    Attributes:
        files: those that can be looked at.
        problems: what is wrong.
        notes: what is left aside.
    """

    files: list[MediaFile] = field(default_factory=list)
    problems: list[FileNote] = field(default_factory=list)
    notes: list[FileNote] = field(default_factory=list)


def list_media(data: FolderData) -> Listing:
    """Files and captions of all datasets, by name within each.

    Raises:
        RequestError: a folder or file that the recipe names is not there.
    """
    found = Listing()
    for number, dataset in enumerate(map(data.filled, data.datasets)):
        before = len(found.files)
        where = f"data.datasets[{number}]"
        source = path_of(dataset.source, where)
        if dataset.is_listed:
            _from_table(source, f"{where}: {source}", number, dataset, found)
        elif not source.is_dir():
            kind = "a file" if source.exists() else "not there"
            raise RequestError(f"{where}: {source} is {kind}; name a folder")
        else:
            _from_folder(source, number, dataset, found)
        if len(found.files) == before:
            kind = "video" if dataset.is_video else "image"
            found.problems.append(FileNote(source, f"gives no {kind} that can be used"))
    return found


def _from_folder(folder: Path, number: int, dataset: FolderDataset, found: Listing) -> None:
    wanted, other = VIDEO_SUFFIXES, IMAGE_SUFFIXES
    if not dataset.is_video:
        wanted, other = other, wanted
    captions: dict[str, tuple[str, ...]] = {}
    for table in _TABLES:
        if (folder / table).is_file():
            captions |= _captions_by_name(folder / table, dataset, found)
    seen: set[str] = set()
    paths = sorted(folder.iterdir(), key=lambda path: path.name)
    for path in paths:
        suffix = path.suffix.lower()
        if path.name.startswith((".", TEMPORARY_PREFIX)):
            continue
        if suffix in other:
            kind = "a video" if suffix in VIDEO_SUFFIXES else "an image"
            found.notes.append(FileNote(path, f"is {kind}; left aside here"))
        if suffix not in wanted:
            continue
        seen.add(path.name)
        beside = path.with_suffix(dataset.caption_extension or ".txt")
        if beside.is_file():
            _add(path, number, _read_caption(beside, found, path), found)
        elif path.name in captions:
            _add(path, number, captions[path.name], found)
        else:
            found.problems.append(FileNote(path, f"has no caption: {beside.name} is not there"))
    for name in sorted(captions.keys() - seen):
        found.problems.append(FileNote(folder / name, "is named with a caption and not there"))
    stems = {Path(name).stem for name in seen}
    for path in paths:
        if path.suffix == dataset.caption_extension and path.stem not in stems:
            found.notes.append(FileNote(path, "is a caption of nothing here"))


def _from_table(
    file: Path, where: str, number: int, dataset: FolderDataset, found: Listing
) -> None:
    keys = _VIDEO_KEYS if dataset.is_video else _IMAGE_KEYS
    for line, row in _rows(file, where, found):
        name = _text_of(row, keys)
        if name is None:
            found.problems.append(FileNote(file, f"line {line} has no {keys[0]}"))
            continue
        try:
            path = path_of(file.parent / path_of(name, "file"), "file")
        except RequestError as error:
            found.problems.append(FileNote(file, f"line {line}: {error}"))
            continue
        if not path.exists() and Path(name).exists():
            path = Path(name)
        if not path.is_file():
            found.problems.append(FileNote(path, f"is not there (line {line} of {file.name})"))
        elif (captions := _captions_of(row)) is None:
            found.problems.append(FileNote(path, f"line {line} of {file.name} has no caption"))
        else:
            _add(path, number, captions, found)


def _captions_by_name(
    file: Path, dataset: FolderDataset, found: Listing
) -> dict[str, tuple[str, ...]]:
    keys, named = _VIDEO_KEYS if dataset.is_video else _IMAGE_KEYS, {}
    for line, row in _rows(file, str(file), found):
        name, captions = _text_of(row, keys), _captions_of(row)
        if name is None or captions is None:
            lacks = keys[0] if name is None else _CAPTION_KEYS[0]
            found.problems.append(FileNote(file, f"line {line} has no {lacks}"))
        else:
            named[name] = captions
    return named


def _rows(file: Path, where: str, found: Listing) -> Iterator[tuple[int, Mapping[str, object]]]:
    """The rows of a table with their lines; those that cannot be read are problems."""
    text = read_text(file, "list", limit=_MOST_TABLE_BYTES)
    if file.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            for row in reader:
                yield reader.line_num, {key: value for key, value in row.items() if key}
        except csv.Error as error:
            found.problems.append(FileNote(file, f"line {reader.line_num} is no CSV: {error}"))
        return
    for line, content in enumerate(text.splitlines(), 1):
        if not content.strip():
            continue
        try:
            row = parse_json(content, f"{where}, line {line},")
        except RequestError as error:
            found.problems.append(FileNote(file, f"line {line} is no JSON: {error.__cause__}"))
            continue
        if isinstance(row, Mapping):
            yield line, row
        else:
            found.problems.append(FileNote(file, f"line {line} is no JSON object"))


def _text_of(row: Mapping[str, object], keys: Sequence[str]) -> str | None:
    values = (row[key] for key in keys if row.get(key))
    value = next(values, None)
    return value if isinstance(value, str) and "\0" not in value else None


def _captions_of(row: Mapping[str, object]) -> tuple[str, ...] | None:
    """One caption, or the several of a list."""
    value = next((row[key] for key in _CAPTION_KEYS if key in row), None)
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        texts = tuple(text for text in value if isinstance(text, str))
        return texts if len(texts) == len(value) else None
    return None


def _read_caption(file: Path, found: Listing, path: Path) -> tuple[str, ...] | None:
    try:
        return (read_text(file, "caption", limit=_MOST_CAPTION_BYTES),)
    except RequestError as error:
        found.problems.append(FileNote(path, str(error)))
        return None


def _add(path: Path, number: int, captions: tuple[str, ...] | None, found: Listing) -> None:
    if captions is None:
        return
    texts = tuple(" ".join(text.split()) for text in captions)
    if not all(texts):
        found.problems.append(FileNote(path, "its caption is empty"))
    else:
        found.files.append(MediaFile(path, number, texts))
