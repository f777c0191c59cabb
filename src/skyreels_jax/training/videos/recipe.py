"""The table ``data`` of a recipe that trains the transformer on one's own videos and images."""

import dataclasses
from dataclasses import dataclass, field
from typing import Final, Literal

from skyreels_jax.errors import RequestError
from skyreels_jax.geometry import FRAMES_PER_LATENT, SIZE_MULTIPLE, frame_rate, nearest_multiples
from skyreels_jax.moving_shapes.clips import FRAME_RATES
from skyreels_jax.training.config import check_at_least, check_choice

# Frames and pixels of a side that no clip exceeds.
_MOST_FRAMES: Final = 2001
_MOST_SIDE: Final = 4096
_SOURCES: Final = ("video_directory", "image_directory", "video_jsonl_file", "image_jsonl_file")

FrameExtraction = Literal["head", "chunk", "slide", "uniform", "full"]


@dataclass(frozen=True, kw_only=True)
class VideoData:
    """What data of every source has.

    Attributes:
        vae: folder with a ``vae``, ``mini`` or a Hugging Face id; the next two likewise.
        text: folder with ``tokenizer`` and ``text_encoder``.
        image: folder with ``image_encoder``, for i2v.
        encoded: folder in which encoded clips are kept (musubi's name: ``cache_directory``).
        batch: clips a step (musubi's name: ``batch_size``).
    """

    vae: str
    text: str
    encoded: str = field(metadata={"alias": "cache_directory"})
    image: str | None = None
    batch: int = field(default=1, metadata={"alias": "batch_size"})

    def batches(self) -> tuple[int, ...]:
        """Every number of clips that a step may have."""
        return (self.batch,)


@dataclass(frozen=True, kw_only=True)
class FolderDataset:
    """A folder of videos or images, or a file that lists them; a table of ``data.datasets``.

    Attributes:
        video_directory: a folder of videos, each with its caption beside it, or named with it by
            ``metadata.csv`` or ``metadata.jsonl`` there; not searched deeper.
        image_directory: likewise, of images.
        video_jsonl_file: lines of ``{"video_path": …, "caption": …}``; paths are relative to it.
        image_jsonl_file: lines of ``{"image_path": …, "caption": …}``.
        caption_extension: of the text file beside a video or image.
        resolution: width and height, or the side of a square: the area that clips have at most.
        target_frames: lengths of clips, ``4 k + 1`` each; every one is cut from every video that
            has as many frames.
        frame_extraction: where from: ``head`` the beginning; ``chunk`` one after the other;
            ``slide`` every ``frame_stride`` frames; ``uniform`` ``frame_sample`` evenly spread;
            ``full`` one clip of all frames, at most ``max_frames``, whatever ``target_frames``.
        frame_stride, frame_sample, max_frames: see there.
        source_fps: frames a second of the files, where the times in them are wrong.
        fps: frames a second of clips, 16 or 24: frames are taken by time.
        num_repeats: how often each clip is seen while others are once.
        enable_bucket: clips keep their aspect, nearly; else all have that of ``resolution``.
        bucket_no_upscale: what is smaller than ``resolution`` stays so.
        batch_size: clips a step.
    """

    video_directory: str | None = None
    image_directory: str | None = None
    video_jsonl_file: str | None = None
    image_jsonl_file: str | None = None
    caption_extension: str | None = None
    resolution: int | tuple[int, int] | None = None
    target_frames: tuple[int, ...] = ()
    frame_extraction: FrameExtraction = "head"
    frame_stride: int = 10
    frame_sample: int = 1
    max_frames: int = 129
    source_fps: float | None = None
    fps: int | None = None
    num_repeats: int = 1
    enable_bucket: bool | None = None
    bucket_no_upscale: bool | None = None
    batch_size: int | None = None

    def __post_init__(self):
        given = [name for name in _SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(given) or "none"
            raise ValueError(f"one of {', '.join(_SOURCES)} should be given, not {said}")
        if not self.source.strip() or "\0" in self.source:
            raise ValueError(f"{given[0]} = {self.source!r} should be a path")
        check_at_least(self, 1, "frame_stride", "frame_sample", "max_frames", most=_MOST_FRAMES)
        check_at_least(self, 1, "num_repeats", most=10_000)
        if self.batch_size is not None:
            check_at_least(self, 1, "batch_size", most=10_000)
        _check_general(self)
        self._check_frames()
        if self.source_fps is not None:
            try:
                frame_rate(self.source_fps)
            except RequestError as error:
                raise ValueError(f"source_{error}") from error

    def _check_frames(self) -> None:
        moving = ("target_frames", "source_fps")
        if not self.is_video:
            for name in moving:
                if getattr(self, name):
                    raise ValueError(f"{name} = {getattr(self, name)} is of videos, not of images")
        elif self.frame_extraction == "full":
            if self.target_frames:
                raise ValueError("target_frames does not go with frame_extraction = 'full'")
        elif not self.target_frames:
            raise ValueError("target_frames must be given, such as [17] or [49, 97]")
        for frames in self.target_frames:
            if frames % FRAMES_PER_LATENT != 1 or not 1 <= frames <= _MOST_FRAMES:
                near = nearest_multiples(min(frames, _MOST_FRAMES), FRAMES_PER_LATENT, 1)
                raise ValueError(
                    f"target_frames = {list(self.target_frames)}: {frames} should be 4 k + 1, from "
                    f"1 to {_MOST_FRAMES}; nearest: {' or '.join(map(str, near))}"
                )
        if len(set(self.target_frames)) != len(self.target_frames):
            raise ValueError(f"target_frames = {list(self.target_frames)} names a length twice")

    @property
    def is_video(self) -> bool:
        """Whether it is of videos."""
        return self.video_directory is not None or self.video_jsonl_file is not None

    @property
    def source(self) -> str:
        """The folder or file."""
        return next(value for name in _SOURCES if (value := getattr(self, name)) is not None)

    @property
    def is_listed(self) -> bool:
        """Whether a file of JSON lines says what there is."""
        return self.video_jsonl_file is not None or self.image_jsonl_file is not None


@dataclass(frozen=True, kw_only=True)
class FolderData(VideoData):
    """One's own videos and images.

    Attributes:
        source: ``folder``.
        datasets: where they are, and how clips are cut.
        resolution, caption_extension, fps, enable_bucket, bucket_no_upscale: of all datasets that
            do not say it themselves, as ``batch`` is; 24 frames a second unless given.
        validation_split: share of files that are never trained on, for the held-out loss.
        skip_broken: go on without files that cannot be used; else they are refused.
        text_dtype: in which the text encoder computes.
        vae_tiling: whether frames are encoded in tiles: ``on``, ``off``, or ``auto`` for those that
            would take more than half of the memory that there is in all.
    """

    source: Literal["folder"]
    datasets: tuple[FolderDataset, ...]
    resolution: int | tuple[int, int] | None = None
    caption_extension: str = ".txt"
    fps: int = 24
    enable_bucket: bool = True
    bucket_no_upscale: bool = False
    validation_split: float = 0.0
    skip_broken: bool = False
    text_dtype: Literal["float32", "bfloat16"] = "float32"
    vae_tiling: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self):
        check_at_least(self, 1, "batch", most=10_000)
        _check_general(self)
        if not self.datasets:
            raise ValueError("datasets is empty; give a table [[data.datasets]] for each folder")
        if self.resolution is None and any(dataset.resolution is None for dataset in self.datasets):
            raise ValueError("resolution must be given, [width, height], such as [960, 544]")
        if not 0 <= self.validation_split <= 0.5:
            raise ValueError(
                f"validation_split = {self.validation_split} should be a share from 0 to 0.5"
            )

    def batches(self) -> tuple[int, ...]:
        """Every number of clips that a step may have."""
        return tuple(sorted({dataset.batch_size or self.batch for dataset in self.datasets}))

    def filled(self, dataset: FolderDataset) -> FolderDataset:
        """A dataset with what it leaves to the table."""
        names = ("resolution", "caption_extension", "fps", "enable_bucket", "bucket_no_upscale")
        own = {name: getattr(dataset, name) for name in names}
        left = {name: getattr(self, name) for name in names if own[name] is None}
        return dataclasses.replace(dataset, **left, batch_size=dataset.batch_size or self.batch)


def sides_of(resolution: int | tuple[int, int]) -> tuple[int, int]:
    """Width and height."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def _check_general(table: FolderData | FolderDataset) -> None:
    """Rules of what both tables may have; raises ValueError."""
    extension = table.caption_extension
    if extension is not None and (not extension.startswith(".") or not extension[1:].isalnum()):
        raise ValueError(f"caption_extension = {extension!r} should be like '.txt'")
    if table.fps is not None:
        check_choice(table, "fps", sorted(FRAME_RATES), "16 or 24")
    if table.resolution is None:
        return
    for side in sides_of(table.resolution):
        if side % SIZE_MULTIPLE or not SIZE_MULTIPLE <= side <= _MOST_SIDE:
            near = round(min(max(side, SIZE_MULTIPLE), _MOST_SIDE) / SIZE_MULTIPLE) * SIZE_MULTIPLE
            raise ValueError(
                f"resolution = {table.resolution}: {side} should be a multiple of {SIZE_MULTIPLE} "
                f"from {SIZE_MULTIPLE} to {_MOST_SIDE}; nearest: {near}"
            )
