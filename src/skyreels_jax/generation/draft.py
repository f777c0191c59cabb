"""The settings of a request while they are being decided, and what is found on the way."""

import math
from fractions import Fraction
from typing import Final, TypeVar

from skyreels_jax import geometry
from skyreels_jax.checkpoints import Checkpoint, Default
from skyreels_jax.diffusion.cache_settings import CacheSettings
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.caching import resolve_cache
from skyreels_jax.generation.request import GivenVideo, Request
from skyreels_jax.media import ImageInput, RgbImage, Sound, read_image, survey_video

GIVEN: Final = "given"
# Of an image's height or width: from here on a notice says what is cut off.
MUCH_CUT: Final = 0.1

T = TypeVar("T")


class Draft:
    """Collects sources, notices and problems while the settings are being decided."""

    def __init__(self, request: Request, checkpoint: Checkpoint):
        self.request = request
        self.checkpoint = checkpoint
        self.sources: dict[str, str] = {}
        self.notices: list[str] = []
        self.problems: list[str] = []

    def choose(self, name: str, default: Default[T]) -> T:
        """What was given under ``name``, else the default; its source is noted."""
        given = getattr(self.request, name)
        self.sources[name] = default.source if given is None else GIVEN
        return default.value if given is None else given

    def images(self) -> tuple[RgbImage | None, RgbImage | None]:
        """Both images, read; what the task needs and refuses is checked."""
        task = self.checkpoint.task
        found: list[RgbImage | None] = []
        for name, needed, taken in (
            ("image", task in ("i2v", "flf2v"), task != "t2v"),
            ("last_image", task == "flf2v", task in ("flf2v", "df")),
        ):
            given: ImageInput | None = getattr(self.request, name)
            what = f"{name.replace('_', ' ')} (--{name.replace('_', '-')})"
            if given is None and needed:
                self.problems.append(f"{what}: {task.upper()} checkpoints need one")
            if given is not None and not taken:
                self.problems.append(
                    f"{what}: {task.upper()} checkpoints take none; leave it out, or use "
                    f"{'an I2V or DF' if name == 'image' else 'an FLF2V or DF'} checkpoint"
                )
            found.append(None if given is None else self._read(given))
        return found[0], found[1]

    def _read(self, image: ImageInput) -> RgbImage | None:
        try:
            return read_image(image)
        except RequestError as error:
            self.problems.append(str(error))
            return None

    def fps(self) -> int | Fraction:
        """Frames a second."""
        default = self.checkpoint.defaults.fps
        given = self.choose("fps", default)
        try:
            return geometry.frame_rate(given)
        except RequestError as error:
            self.problems.append(f"--{error}")
            return default.value

    def given_video(self, fps: int | Fraction) -> tuple[GivenVideo | None, RgbImage | None]:
        """The video to continue, looked through, and a frame of it; ``fps`` is the output's."""
        path = self.request.video
        if path is None:
            return None, None
        if self.checkpoint.task != "df":
            self.problems.append(
                f"video (--video): {self.checkpoint.task.upper()} checkpoints continue none; use a "
                "DF checkpoint"
            )
        if self.request.image is not None:
            self.problems.append("--image and --video exclude each other: both say how it begins")
        try:
            info = survey_video(path)
        except RequestError as error:
            self.problems.append(str(error))
            return None, None
        self.notices.extend(info.warnings)
        if info.sound is not None:
            kept = (
                "the given part keeps its sound, what is made has none"
                if Sound.fits(info.sound)
                else f"sound in {info.sound} cannot be copied, so the video will have none"
            )
            self.notices.append(f"{info.path.name} has sound: {kept}")
        given = GivenVideo(info.path, info.frames_at(fps), float(info.rate), info.sound)
        return given, info.first

    def say_what_is_cut(self, what: str, image: RgbImage | None, size: tuple[int, int]) -> None:
        """A notice where fitting the image to ``size`` cuts more than a tenth of it off."""
        if image is None:
            return
        height, width = image.shape[:2]
        share = (width / height) / (size[1] / size[0])
        if min(share, 1 / share) < 1 - MUCH_CUT:
            side = "height" if share < 1 else "width"
            self.notices.append(
                f"{what} is {width} x {height}: a video of {size[1]} x {size[0]} shows "
                f"{min(share, 1 / share):.0%} of its {side}; --aspect image keeps all"
            )

    def size(self, image: RgbImage | None) -> tuple[int, int]:
        """Height and width; a default or named size is turned to a portrait image."""
        request, default = self.request, self.checkpoint.defaults.resolution
        named = request.resolution is not None or request.aspect is not None
        if request.height is not None or request.width is not None:
            return self._given_size(named)
        source = GIVEN if request.resolution else default.source
        try:
            height, width = geometry.with_aspect(
                geometry.resolution(request.resolution) if request.resolution else default.value,
                request.aspect,
                None if image is None else image.shape[:2],
            )
        except RequestError as error:
            self.problems.append(str(error))
            return default.value
        if request.aspect is None and image is not None and image.shape[0] > image.shape[1]:
            height, width = max(height, width), min(height, width)
            self.notices.append(
                f"what is given is upright, so the video is {height} high and {width} wide; "
                "give --height and --width, or --aspect, to have it otherwise"
            )
        self.sources["height"] = self.sources["width"] = source
        return height, width

    def _given_size(self, named: bool) -> tuple[int, int]:
        height, width = self.request.height, self.request.width
        self.sources["height"] = self.sources["width"] = GIVEN
        if named:
            self.problems.append(
                "height and width (--height, --width) exclude --resolution and --aspect"
            )
        if height is None or width is None:
            given, missing = ("height", "width") if width is None else ("width", "height")
            self.problems.append(f"--{given} was given without --{missing}: give both or neither")
            return self.checkpoint.defaults.resolution.value
        return height, width

    def cache(self) -> CacheSettings:
        """The step cache."""
        request = self.request
        try:
            return resolve_cache(
                request.cache,
                request.cache_threshold,
                self.checkpoint,
                use_ret_steps=request.use_ret_steps,
                original_counter=request.reference_exact,
            )
        except RequestError as error:
            self.problems.append(str(error))
            return CacheSettings()

    def frames(self, fps: int | Fraction) -> int:
        """The number of frames, possibly from seconds."""
        request = self.request
        if request.seconds is None:
            return self.choose("num_frames", self.checkpoint.defaults.num_frames)
        if request.num_frames is not None:
            self.problems.append("--num-frames and --seconds exclude each other: give one")
        self.sources["num_frames"] = f"{request.seconds:g} seconds at {fps} frames a second"
        if not (math.isfinite(request.seconds) and request.seconds > 0):
            self.problems.append(f"--seconds {request.seconds} must be a number above 0")
            return 1
        return geometry.frames_in(request.seconds, fps)
