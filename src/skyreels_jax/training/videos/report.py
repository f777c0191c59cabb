"""What becomes of one's data: said in lines, as JSON, and shown on a contact sheet."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from skyreels_jax.errors import RequestError
from skyreels_jax.media import RgbImage, fit_image
from skyreels_jax.prompts import TEXT_LEN
from skyreels_jax.training.videos.buckets import Bucket
from skyreels_jax.training.videos.listing import FileNote
from skyreels_jax.training.videos.plan import DataPlan, PlannedClip
from skyreels_jax.training.videos.survey import frames_of

# Lines of one kind; all are in the JSON.
_MOST_LINES: Final = 20
# Of a contact sheet: tiles, tiles in a row, and the larger side of a picture.
_TILES: Final = 64
_COLUMNS: Final = 8
_TILE: Final = 128
_LABEL: Final = 14
# From here on more is said of a bucket.
_MUCH_CROPPED: Final = 0.25
_MUCH_ENLARGED: Final = 1.5


def report_of(plan: DataPlan) -> dict[str, object]:
    """All of it, as JSON has it."""
    clips = plan.clips
    held = [clip for clip in clips if clip.held]
    return {
        "files": len(plan.surveys),
        "clips": len(clips),
        "held_clips": len(held),
        "steps_per_epoch": sum(_steps(plan, bucket) for bucket in plan.buckets),
        "buckets": [_bucket_row(plan, bucket) for bucket in plan.buckets],
        "captions": {"different": len(plan.captions), "longest_tokens": plan.tokens},
        "problems": _rows(plan.problems),
        "dropped": _rows(plan.dropped),
        "notes": _rows(plan.notes),
    }


def _rows(findings: Sequence[FileNote]) -> list[dict[str, str]]:
    return [{"path": str(finding.path), "reason": finding.reason} for finding in findings]


def _seen(plan: DataPlan, bucket: Bucket) -> int:
    return sum(plan.clips[index].repeats for index in plan.buckets[bucket])


def _steps(plan: DataPlan, bucket: Bucket) -> int:
    return -(-_seen(plan, bucket) // bucket.batch)


def _bucket_row(plan: DataPlan, bucket: Bucket) -> dict[str, object]:
    clips = [plan.clips[index] for index in plan.buckets[bucket]]
    rates = Counter(clip.fps for clip in clips)
    return {
        "width": bucket.width,
        "height": bucket.height,
        "frames": bucket.frames,
        "batch": bucket.batch,
        "clips": len(clips),
        "files": len({clip.file.path for clip in clips}),
        "with_repeats": _seen(plan, bucket),
        "steps_per_epoch": _steps(plan, bucket),
        "filled_up": _steps(plan, bucket) * bucket.batch - _seen(plan, bucket),
        "fps": {str(fps): count for fps, count in sorted(rates.items())},
        "most_cropped": round(max(clip.cropped for clip in clips), 3),
        "most_enlarged": round(max(clip.enlarged for clip in clips), 2),
    }


def report_lines(plan: DataPlan) -> Iterator[str]:
    """The report in lines."""
    held = sum(clip.held for clip in plan.clips)
    steps = sum(_steps(plan, bucket) for bucket in plan.buckets)
    yield (
        f"{_counted(len(plan.surveys), 'file')}, {_counted(len(plan.clips), 'clip')} ({held} held "
        f"out), {_counted(steps, 'step')} an epoch, {_counted(len(plan.buckets), 'bucket')}, for "
        "each of which a step is compiled"
    )
    for bucket in plan.buckets:
        yield "  " + _bucket_line(_bucket_row(plan, bucket))
    yield (
        f"{_counted(len(plan.captions), 'different caption')}, the longest of {plan.tokens} of "
        f"{TEXT_LEN} tokens"
    )
    kinds: Mapping[str, Sequence[FileNote]] = {
        "wrong": plan.problems,
        "dropped": plan.dropped,
        "to know": plan.notes,
    }
    for kind, findings in kinds.items():
        if findings:
            yield f"{kind} ({len(findings)}):"
        yield from (f"  {finding}" for finding in findings[:_MOST_LINES])
        if len(findings) > _MOST_LINES:
            yield f"  and {len(findings) - _MOST_LINES} more; --json lists all"


def _bucket_line(row: Mapping[str, object]) -> str:
    rates = row["fps"]
    assert isinstance(rates, Mapping)
    said = [
        f"{row['width']} x {row['height']}, {row['frames']} frames at {' and '.join(rates)} fps",
        f"{_counted(row['clips'], 'clip')} of {_counted(row['files'], 'file')}",
    ]
    if row["with_repeats"] != row["clips"]:
        said.append(f"{row['with_repeats']} with repeats")
    said.append(f"{_counted(row['steps_per_epoch'], 'step')} of {row['batch']}")
    if row["filled_up"]:
        said.append(f"the last filled up with {row['filled_up']} of the same")
    cropped, enlarged = float(str(row["most_cropped"])), float(str(row["most_enlarged"]))
    if cropped >= _MUCH_CROPPED:
        said.append(f"up to {cropped:.0%} of a picture is cut away")
    if enlarged >= _MUCH_ENLARGED:
        said.append(f"enlarged up to {enlarged:g} times; bucket_no_upscale = true leaves it")
    return "; ".join(said)


def _counted(number: object, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def draw_sheet(plan: DataPlan) -> UInt8[np.ndarray, "height width 3"]:
    """The first frame of some files as the model gets it, by bucket, with size and caption.

    Raises:
        RequestError: there is no clip.
    """
    by_file: dict[tuple[Path, Bucket], PlannedClip] = {}
    for clip in sorted(plan.clips, key=lambda clip: clip.bucket):
        by_file.setdefault((clip.file.path, clip.bucket), clip)
    chosen = list(by_file.values())
    if not chosen:
        raise RequestError("there is no clip that a sheet could show")
    if len(chosen) > _TILES:
        spread = np.linspace(0, len(chosen) - 1, _TILES).round().astype(int)
        chosen = [chosen[number] for number in spread]
    high, wide = _TILE + 2 * _LABEL, _TILE + 4
    rows = -(-len(chosen) // _COLUMNS)
    sheet = Image.new("RGB", (min(len(chosen), _COLUMNS) * wide, rows * high), "white")
    draw = ImageDraw.Draw(sheet)
    for number, clip in enumerate(chosen):
        left, top = number % _COLUMNS * wide, number // _COLUMNS * high
        picture = Image.fromarray(_first_frame(clip))
        picture.thumbnail((_TILE, _TILE))
        sheet.paste(picture, (left, top + 2 * _LABEL))
        # The built-in font has Latin letters only.
        caption = clip.file.captions[0].encode("ascii", "replace").decode()
        draw.text((left, top), str(clip.bucket), "black")
        draw.text((left, top + _LABEL), caption[: _TILE // 6], "black")
    return np.asarray(sheet)


def _first_frame(clip: PlannedClip) -> RgbImage:
    size = (clip.bucket.height, clip.bucket.width)
    with closing(frames_of(clip.file.path, clip.fps, clip.source_fps)) as frames:
        for number, rgb in enumerate(frames):
            if number == clip.start:
                return fit_image(rgb, *size, Image.Resampling.BICUBIC)
    raise RequestError(f"{clip.file.path} was changed while it was looked at")
