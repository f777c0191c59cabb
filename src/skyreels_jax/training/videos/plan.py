"""Which clips are cut from which file, and into which bucket they go; nothing is loaded."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Final

from skyreels_jax.errors import RequestError
from skyreels_jax.geometry import frame_rate
from skyreels_jax.outputs import path_of
from skyreels_jax.prompts import TEXT_LEN, Tokenizer
from skyreels_jax.training.videos.buckets import (
    Bucket,
    bucket_size,
    cropped_share,
    extractions,
    shortest,
)
from skyreels_jax.training.videos.listing import FileNote, MediaFile, list_media
from skyreels_jax.training.videos.recipe import FolderData, FolderDataset
from skyreels_jax.training.videos.survey import MediaSurvey, OnSurveyed, survey_media

# Raised when the same settings cut or resize otherwise.
_FORMAT: Final = 1
# Padded lengths of text states, so that few captions more do not change every shape.
_TEXT_MULTIPLE: Final = 16
# Captions that are cut into tokens at once.
_COUNTED: Final = 256


@dataclass(frozen=True)
class PlannedClip:
    """A clip that is cut from a file.

    Attributes:
        file: it is of.
        content: SHA-256 of that.
        start: its first frame, at ``fps``.
        fps: frames a second, 16 or 24.
        source_fps: of the file, where its own times are not taken.
        bucket: its shape.
        repeats: how often it is seen while others are once.
        held: whether it is never trained on.
        cropped: share of the picture that is cut away.
        enlarged: how many times as large the picture becomes; below 1 it shrinks.
    """

    file: MediaFile
    content: str
    start: int
    fps: int
    source_fps: Fraction | None
    bucket: Bucket
    repeats: int
    held: bool
    cropped: float
    enlarged: float

    @property
    def identity(self) -> str:
        """A digest of what its frames depend on: content, times and size."""
        size = (self.bucket.frames, self.bucket.height, self.bucket.width)
        made = (_FORMAT, self.content, self.start, self.fps, str(self.source_fps), *size)
        return hashlib.sha256(repr(made).encode()).hexdigest()


@dataclass(frozen=True)
class DataPlan:
    """Clips, and what became of files that give none.

    Attributes:
        clips: by dataset and name.
        surveys: of every file that could be read.
        problems: what is wrong.
        dropped: files without a clip, and why.
        notes: what a person should know.
        tokens: of the longest caption.
    """

    clips: list[PlannedClip] = field(default_factory=list)
    surveys: dict[Path, MediaSurvey] = field(default_factory=dict)
    problems: list[FileNote] = field(default_factory=list)
    dropped: list[FileNote] = field(default_factory=list)
    notes: list[FileNote] = field(default_factory=list)
    tokens: int = 0

    @cached_property
    def buckets(self) -> Mapping[Bucket, list[int]]:
        """Indices of the clips that are trained on, by bucket."""
        found: dict[Bucket, list[int]] = {}
        for index, clip in enumerate(self.clips):
            if not clip.held:
                found.setdefault(clip.bucket, []).append(index)
        return dict(sorted(found.items()))

    @property
    def captions(self) -> list[str]:
        """All captions, each once."""
        return sorted({text for clip in self.clips for text in clip.file.captions})

    @property
    def text_length(self) -> int:
        """Rows of text states that hold the longest caption."""
        return min(TEXT_LEN, -(-max(self.tokens, 1) // _TEXT_MULTIPLE) * _TEXT_MULTIPLE)

    def digests(self) -> dict[str, str]:
        """What decides a run, by name: which clips in which buckets, and their captions."""
        clips = [(c.identity, c.bucket.batch, c.repeats, c.held) for c in self.clips]
        texts = [clip.file.captions for clip in self.clips]
        return {
            f"data.{name} digest": hashlib.sha256(repr(value).encode()).hexdigest()[:12]
            for name, value in (("clips", clips), ("captions", texts))
        }


def plan_clips(
    data: FolderData,
    tokenizer: Tokenizer,
    on_surveyed: OnSurveyed = lambda done, total: None,
) -> DataPlan:
    """List and survey what a recipe names, and cut it into clips.

    Raises:
        RequestError: a folder that the recipe names is not there.
    """
    listing = list_media(data)
    plan = DataPlan(problems=listing.problems, notes=listing.notes)
    paths = sorted({file.path for file in listing.files})
    surveys = survey_media(paths, path_of(data.encoded, "data.encoded") / "surveys", on_surveyed)
    lengths = _token_counts(listing.files, tokenizer)
    usable: list[tuple[MediaFile, MediaSurvey]] = []
    for path, survey in surveys.items():
        if isinstance(survey, FileNote):
            plan.problems.append(survey)
            continue
        plan.surveys[path] = survey
        plan.notes.extend(FileNote(path, text) for text in survey.warnings)
    for file in listing.files:
        longest = max(lengths[text] for text in file.captions)
        if longest > TEXT_LEN:
            reason = f"its caption has {longest} tokens; at most {TEXT_LEN} are used"
            plan.problems.append(FileNote(file.path, reason))
        elif file.path in plan.surveys:
            usable.append((file, plan.surveys[file.path]))
    held = _held_contents({survey.content for _, survey in usable}, data.validation_split)
    datasets = [data.filled(dataset) for dataset in data.datasets]
    for file, survey in usable:
        _cut(plan, file, survey, datasets[file.dataset], survey.content in held)
    kept = [lengths[text] for text in plan.captions]
    if usable and not plan.buckets:
        reason = "no clip is left to train on; see what is dropped and why"
        plan.problems.append(FileNote(Path(data.datasets[0].source), reason))
    _note_twins(plan)
    return DataPlan(
        plan.clips, plan.surveys, plan.problems, plan.dropped, plan.notes, max(kept, default=0)
    )


def _cut(
    plan: DataPlan, file: MediaFile, survey: MediaSurvey, dataset: FolderDataset, held: bool
) -> None:
    """Add the clips of a file."""
    assert dataset.fps is not None
    assert dataset.batch_size is not None
    source_fps = None
    if dataset.source_fps is not None:
        source_fps = Fraction(frame_rate(dataset.source_fps))
    total = survey.frames_at(dataset.fps, source_fps)
    cuts = extractions(total, dataset)
    if not cuts:
        holds = f"{total} frames at {dataset.fps} a second"
        reason = f"holds {holds}, and the shortest clip takes {shortest(dataset)}"
        plan.dropped.append(FileNote(file.path, reason))
    height, width = bucket_size(survey.height, survey.width, dataset)
    for start, frames in cuts:
        bucket = Bucket(frames, height, width, dataset.batch_size)
        enlarged = max(height / survey.height, width / survey.width)
        plan.clips.append(
            PlannedClip(
                file=file,
                content=survey.content,
                start=start,
                fps=dataset.fps,
                source_fps=source_fps,
                bucket=bucket,
                repeats=dataset.num_repeats,
                held=held,
                cropped=cropped_share(survey.height, survey.width, bucket),
                enlarged=enlarged,
            )
        )


def _token_counts(files: list[MediaFile], tokenizer: Tokenizer) -> dict[str, int]:
    texts = sorted({text for file in files for text in file.captions})
    lengths: list[int] = []
    for start in range(0, len(texts), _COUNTED):
        lengths += tokenizer.encode(texts[start : start + _COUNTED]).lengths
    return dict(zip(texts, lengths, strict=True))


def _held_contents(contents: set[str], share: float) -> set[str]:
    """Those that are never trained on: by digest, so that a new file leaves most where they are."""
    if not share or len(contents) < 2:
        return set()
    return set(sorted(contents)[: max(1, round(share * len(contents)))])


def _note_twins(plan: DataPlan) -> None:
    first: dict[str, Path] = {}
    for path, survey in plan.surveys.items():
        other = first.setdefault(survey.content, path)
        if other != path:
            plan.notes.append(FileNote(path, f"is the same file as {other}"))


def require_sound(plan: DataPlan, skip_broken: bool) -> None:
    """Refuse data with problems, or with none that is left.

    Raises:
        RequestError: names the first problem, and how many there are.
    """
    if plan.problems and not (skip_broken and plan.buckets):
        more = f" (and {len(plan.problems) - 1} more problems)" if len(plan.problems) > 1 else ""
        raise RequestError(
            f"data: {plan.problems[0]}{more}; `skyreels-jax data check` lists all that is wrong"
            + ("" if skip_broken else ", data.skip_broken = true goes on without such files")
        )
