"""Rows of a file of JSON lines, each a video: read, checked, and cut into shards.

Nothing here needs a model. A row has ``prompt`` and any setting of a call of a pipeline, and may
have an ``id``, which names its files. All that is wrong is found before anything is made.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from skyreels_jax.checkpoints import OPENING
from skyreels_jax.errors import RequestError
from skyreels_jax.files import parse_json, read_text
from skyreels_jax.generation.request.declaration import described, one_line
from skyreels_jax.generation.request.kinds import File, Picture
from skyreels_jax.generation.request.settings import DRAW_SEED, Request, current_names, keywords

# Most bytes of a file of rows.
_MAX_BYTES: Final = 2**30
# Digits of a line's number in an id, and of the hash of what the row says.
_DIGITS, _HASHED = 6, 8
# Most bytes of an id: the longest name that follows from it is ``ID.mp4``.
_MAX_ID_BYTES: Final = 240
# What no name of a file may hold on some system that is common.
_ILLEGAL: Final = re.compile(r"[/\\:*?\"<>|\x00-\x1f\x7f]")
# Settings that say the same thing: a row that has one leaves the others' defaults aside.
_INSTEAD: Final[Mapping[str, tuple[str, ...]]] = {
    "num_frames": ("seconds",),
    "seconds": ("num_frames",),
    "height": ("resolution", "aspect"),
    "width": ("resolution", "aspect"),
    "resolution": ("height", "width"),
    "aspect": ("height", "width"),
    "image": ("video",),
    "video": ("image",),
}
# What no row decides for itself, and what to do instead.
_OF_ALL: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        (
            *("model", *OPENING, "lora", "loras", "dtype", "weights", "offload", "mesh"),
            *("backend", "vae_tiling", "vae_dtype"),
        ),
        "is the same for all rows: it is a flag",
    ),
    "output": "is the `id` of a row with .mp4 behind it",
}


@dataclass(frozen=True)
class BatchRow:
    """One video of a batch.

    Attributes:
        line: its number in the file, from 1.
        id: names its files.
        request: what is asked for, defaults of the batch included; its seed is never open.
    """

    line: int
    id: str
    request: Request

    def __str__(self) -> str:
        return f"line {self.line} ({self.id})"


def read_rows(
    path: Path, defaults: Mapping[str, object], chosen: Mapping[str, object]
) -> tuple[list[BatchRow], dict[int, str]]:
    """Every row of a file, and what is wrong with others, by line; empty lines are none.

    Args:
        path: of the file, JSON Lines in UTF-8. Files that a row names are relative to its folder.
        defaults: settings of rows that do not give them.
        chosen: settings of the pipeline, the same for all.

    Raises:
        RequestError: the file cannot be read.
    """
    rows: list[BatchRow] = []
    problems: dict[int, str] = {}
    lines_of_ids: dict[str, int] = {}
    for line, text in enumerate(read_text(path, "rows", limit=_MAX_BYTES).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = _row(line, text, path.absolute().parent, defaults, chosen)
            # Names that differ in case alone are one on some file systems.
            key = unicodedata.normalize("NFC", row.id).casefold()
            if (first := lines_of_ids.setdefault(key, line)) != line:
                raise RequestError(f"the id {row.id!r} is that of line {first} already")
            rows.append(row)
        except RequestError as error:
            problems[line] = one_line(str(error))
    return rows, problems


def _row(
    line: int, text: str, folder: Path, defaults: Mapping[str, object], chosen: Mapping[str, object]
) -> BatchRow:
    given = parse_json(text, "it")
    if not isinstance(given, dict):
        raise RequestError(f'{described(given)} is no JSON object such as {{"prompt": "a fox"}}')
    row = current_names(given)
    identity = row.pop("id", None)
    content = json.dumps(row, sort_keys=True)
    if identity is None:
        identity = f"{line:0{_DIGITS}d}-{_digest(content)[:_HASHED]}"
    if row.get("prompt") is None:
        raise RequestError("`prompt` is missing: say what the video should show")
    name = _checked_id(identity)
    if wrong := [f"`{key}` {_OF_ALL[key]}" for key in row if key in _OF_ALL]:
        raise RequestError("\n".join(wrong))
    for key in row.keys() & keywords().keys():
        if isinstance(keywords()[key].kind, File | Picture) and isinstance(row[key], str):
            row[key] = str(folder / row[key])
    settings = {**_without(defaults, row), **row}
    if settings.get("seed") in (None, DRAW_SEED):
        settings["seed"] = int(_digest(json.dumps([name, content]))[:8], 16)
    return BatchRow(line, name, Request.of(settings, **chosen))


def _without(defaults: Mapping[str, object], row: Mapping[str, object]) -> dict[str, object]:
    """The defaults but those that a row's own settings stand instead of."""
    aside = {name for key in row if row[key] is not None for name in _INSTEAD.get(key, ())}
    return {name: value for name, value in defaults.items() if name not in aside}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _checked_id(value: object) -> str:
    """An id that is a name of a file everywhere."""
    name = str(value) if type(value) in (str, int) else ""
    if not name:
        raise RequestError(f"`id` {described(value)} must be text that names a file")
    if bad := _ILLEGAL.search(name):
        raise RequestError(f"`id` {described(name)} holds {bad[0]!r}, which no file's name may")
    if name[0] in ".-" or name[-1] in ". " or name != name.strip():
        raise RequestError(
            f"`id` {described(name)} must neither begin with a dot, dash or space nor end with a "
            "dot or space"
        )
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise RequestError(f"`id` {described(name)} must be text in UTF-8") from error
    if size > _MAX_ID_BYTES:
        raise RequestError(f"`id` {described(name)} has {size} bytes; at most {_MAX_ID_BYTES}")
    return name


@dataclass(frozen=True)
class Shard:
    """The part of the rows that one process makes: every ``count``-th from ``index`` on.

    ``source`` says who decided it.
    """

    index: int = 0
    count: int = 1
    source: str = "all rows"

    def of(self, rows: Sequence[BatchRow]) -> list[BatchRow]:
        """Its rows; those of all shards together are all, each once."""
        return list(rows[self.index :: self.count])

    def __str__(self) -> str:
        return f"shard {self.index}/{self.count} ({self.source})"


def choose_shard(given: str | None, environment: Mapping[str, str]) -> Shard:
    """What ``--shard`` says, else a job array of Slurm, else an indexed job of Kubernetes.

    Raises:
        RequestError: there is no such shard, or nobody says how many there are.
    """
    if given is not None:
        index, slash, count = given.partition("/")
        return _shard(index, count if slash else "", "--shard", "such as 0/4, the first of four")
    if "SLURM_ARRAY_TASK_ID" in environment:
        return _slurm_shard(environment)
    if "JOB_COMPLETION_INDEX" in environment:
        index, count = environment["JOB_COMPLETION_INDEX"], environment.get("JOB_COMPLETIONS", "")
        advice = (
            "Kubernetes tells a pod its index and not how many there are: set JOB_COMPLETIONS to "
            "the job's `completions`, or give --shard"
        )
        return _shard(index, count, "JOB_COMPLETION_INDEX/JOB_COMPLETIONS", advice)
    return Shard()


def _slurm_shard(environment: Mapping[str, str]) -> Shard:
    advice = "give --shard where an array is no run of numbers at one step"
    names = ("ID", "MIN", "STEP", "COUNT")
    texts = [environment.get(f"SLURM_ARRAY_TASK_{name}", "") for name in names]
    try:
        task, least, step = (int(text or usual) for text, usual in zip(texts, "001", strict=False))
        index, rest = divmod(task - least, step)
    except (ValueError, ZeroDivisionError):
        index, rest = 0, 1
    if rest:
        raise RequestError(f"SLURM_ARRAY_TASK_ID {texts[0]!r} is no task of its array: {advice}")
    return _shard(str(index), texts[3], "SLURM_ARRAY_TASK_ID/COUNT", advice)


def _shard(index: str, count: str, source: str, advice: str) -> Shard:
    if not (_is_number(index) and _is_number(count) and int(index) < int(count)):
        raise RequestError(f"{source} {index}/{count or '?'} is no shard: {advice}")
    return Shard(int(index), int(count), source)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def differing(before: Mapping[str, object], now: Mapping[str, object]) -> Iterator[str]:
    """What a record and today's settings, both as JSON values, do not have in common."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            yield f"{name} {_shown(before.get(name))}, now {_shown(now.get(name))}"


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:39]}…"
