"""What each video and image holds: looked through once, and remembered while it stays as it is."""

import hashlib
import logging
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final

from skyreels_jax.errors import RequestError
from skyreels_jax.files import open_regular, read_json, write_json
from skyreels_jax.media import RgbImage, read_image, stream_video, survey_video
from skyreels_jax.training.videos.listing import IMAGE_SUFFIXES, FileNote

# Raised when a survey says something else than before.
_FORMAT: Final = 1
_THREADS: Final = 8
_BLOCK: Final = 2**20

_logger = logging.getLogger(__name__)

# Called with how many files are looked through, and how many there are.
OnSurveyed = Callable[[int, int], None]


@dataclass(frozen=True)
class MediaSurvey:
    """What a file holds.

    Attributes:
        content: SHA-256 of the file.
        frames: how many it has; 1 for an image.
        rate: frames a second, as a fraction; the average where it varies.
        seconds: from the first frame's beginning to the last one's end, as a fraction.
        height, width: as it is seen, turned upright.
        varies: whether frames are unevenly apart.
        sound: whether it has sound, which is not used.
        warnings: what a person should know of it.
    """

    content: str
    frames: int
    rate: str
    seconds: str
    height: int
    width: int
    varies: bool
    sound: bool
    warnings: tuple[str, ...]

    def frames_at(self, fps: int, source_fps: Fraction | None) -> int:
        """How many frames :func:`frames_of` gives."""
        seconds = Fraction(self.seconds) if source_fps is None else self.frames / source_fps
        # Moments a frame apart; one that is all but at the end is none.
        count = -((Fraction(1, 4) - seconds * fps) // 1)
        return max(1, int(count))


def is_image(path: Path) -> bool:
    """Whether a file is an image, by its name."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def survey_media(
    paths: Sequence[Path], memory: Path, on_surveyed: OnSurveyed = lambda done, total: None
) -> dict[Path, MediaSurvey | FileNote]:
    """Look through files, several at a time; what cannot be read is found so.

    Args:
        paths: of videos and images.
        memory: folder in which surveys are kept, by name, size and time of change.
        on_surveyed: called after each.
    """
    found: dict[Path, MediaSurvey | FileNote] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        surveyed = pool.map(lambda path: _remembered(path, memory), paths)
        for number, (path, survey) in enumerate(zip(paths, surveyed, strict=True), 1):
            found[path] = survey
            on_surveyed(number, len(paths))
    return found


def _remembered(path: Path, memory: Path) -> MediaSurvey | FileNote:
    try:
        status = path.stat()
        named = f"{_FORMAT}\0{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
        file = memory / f"{hashlib.sha256(named.encode('utf-8', 'surrogateescape')).hexdigest()}"
        file = file.with_suffix(".json")
        with suppress(RequestError, TypeError, KeyError, AttributeError):
            if file.exists():
                known = dict(read_json(file, "survey"))
                return MediaSurvey(**{**known, "warnings": tuple(known["warnings"])})
        survey = _surveyed(path)
    except OSError as error:
        return FileNote(path, f"cannot be read: {error.strerror}")
    except RequestError as error:
        return FileNote(path, _without_name(str(error), path))
    try:
        memory.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(survey))
    except OSError as error:
        _logger.debug("what %s holds is not kept: %s", path, error)
    return survey


def _surveyed(path: Path) -> MediaSurvey:
    digest = hashlib.sha256()
    with open_regular(path, "file") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    content = digest.hexdigest()
    if is_image(path):
        height, width = read_image(path).shape[:2]
        return MediaSurvey(content, 1, "0", "0", height, width, False, False, ())
    info = survey_video(path)
    height, width = info.first.shape[:2]
    return MediaSurvey(
        content=content,
        frames=info.frames,
        rate=str(info.rate),
        seconds=str(info.seconds),
        height=height,
        width=width,
        varies=info.varies,
        sound=info.sound is not None,
        warnings=info.warnings,
    )


def _without_name(message: str, path: Path) -> str:
    """A message that stands behind the path anyway."""
    for kind in ("video", "image", "file"):
        for begin in (f"{kind} {path}: ", f"{kind} {path} "):
            message = message.removeprefix(begin)
    return message


def frames_of(path: Path, fps: int, source_fps: Fraction | None) -> Generator[RgbImage, None, None]:
    """The frames of a video at ``fps``, or an image as one frame.

    Args:
        path: of the file.
        fps: frames a second to give: for each moment the frame that is shown then.
        source_fps: that of the file, where its own times are wrong.

    Raises:
        RequestError: it cannot be read.
    """
    if is_image(path):
        yield read_image(path)
        return
    if source_fps is None:
        with closing(_generator(path, fps)) as frames:
            yield from frames
        return
    tick, end = Fraction(0), Fraction(0)
    with closing(_generator(path, None)) as frames:
        for number, rgb in enumerate(frames):
            end = (number + 1) / source_fps
            while tick < end - Fraction(1, 4) / fps or tick == 0:
                yield rgb
                tick += Fraction(1, fps)


def _generator(path: Path, fps: int | None) -> Generator[RgbImage, None, None]:
    yield from stream_video(path, fps)
