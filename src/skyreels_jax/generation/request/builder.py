"""A request while it is being resolved: its values, their sources, warnings and problems."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Final, NamedTuple, TypeVar

from skyreels_jax import geometry
from skyreels_jax.checkpoints import Checkpoint, Default
from skyreels_jax.diffusion.cache_settings import CACHE_KINDS, CacheSettings
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request.resolved import GivenVideo
from skyreels_jax.generation.request.settings import FORCING, Request, declared, violation
from skyreels_jax.media import ImageInput, RgbImage, Sound, read_image, survey_video
from skyreels_jax.presets import Preset
from skyreels_jax.prompts import clean
from skyreels_jax.weights.lora.binding import Lora
from skyreels_jax.weights.lora.stack import trained_on

GIVEN: Final = "given"
# Part of an image's height or width: from here on a warning says what is cut off.
_MUCH_CUT: Final = 0.1

_T = TypeVar("_T")


class LongVideo(NamedTuple):
    """Defaults of a video made in several windows."""

    overlap_history: Default[int]
    addnoise_condition: Default[int]
    ar_step: Default[int]
    guidance_scale: Default[float]


class RequestBuilder:
    """Resolves setting by setting, and collects all that is wrong on the way.

    Attributes:
        request: as asked for.
        checkpoint: decides the task and the defaults.
        sources: where each resolved setting is from.
        warnings: for the user.
        length_warnings: those of the number of frames.
        problems: a line each; with any, there will be no video.
    """

    def __init__(self, request: Request, checkpoint: Checkpoint):
        """Check what the task takes; nothing is resolved yet."""
        self.request = request
        self.checkpoint = checkpoint
        self.sources: dict[str, str] = {}
        self.warnings: list[str] = []
        self.length_warnings: list[str] = []
        self.problems: list[str] = []
        if checkpoint.task != "df":
            self.problems.extend(
                f"`{name}`: only diffusion-forcing (DF) checkpoints take it"
                for name, setting in declared().items()
                if setting.group == FORCING and getattr(request, name) is not None
            )

    def choose(self, name: str, default: Default[_T]) -> _T:
        """What was given under ``name``, else the default; notes its source, checks its range."""
        given = getattr(self.request, name)
        self.sources[name] = default.source if given is None else GIVEN
        value = default.value if given is None else given
        if value is not None and (wrong := violation(name, value)):
            self.problems.append(wrong)
        return value  # pyright: ignore[reportReturnType]

    def in_known_words(
        self, negative: str, loras: Sequence[Lora]
    ) -> tuple[Sequence[str] | Mapping[int, str], str]:
        """All prompts and the negative one, in lower case where the model is of moving shapes.

        Warns of words that neither such a model nor its LoRAs learned.
        """
        prompt, preset = self.request.prompt, self.checkpoint.guess.preset
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if preset is None or not preset.only_moving_shapes:
            return prompts, negative
        texts = [*(prompts.values() if isinstance(prompts, Mapping) else prompts), negative]
        if warning := warning_of_words(preset, texts, loras):
            self.warnings.append(warning)
        if isinstance(prompts, Mapping):
            return {frame: text.lower() for frame, text in prompts.items()}, negative.lower()
        return [text.lower() for text in prompts], negative.lower()

    def images(self) -> tuple[RgbImage | None, RgbImage | None]:
        """The first and the last image, read; what the task needs and refuses is checked."""
        task = self.checkpoint.task
        found: list[RgbImage | None] = []
        for name, needed, others in (
            ("image", task in ("i2v", "flf2v"), "an I2V or DF"),
            ("last_image", task == "flf2v", "an FLF2V or DF"),
        ):
            given: ImageInput | None = getattr(self.request, name)
            if given is None and needed:
                self.problems.append(f"`{name}`: {task.upper()} checkpoints need one")
            if given is not None and task not in declared()[name].tasks:
                self.problems.append(
                    f"`{name}`: {task.upper()} checkpoints take none; leave it out, or use "
                    f"{others} checkpoint"
                )
            found.append(None if given is None else self._read(given))
        return found[0], found[1]

    def _read(self, image: ImageInput) -> RgbImage | None:
        try:
            return read_image(image)
        except RequestError as error:
            self.problems.append(str(error))
            return None

    def given_video(self, fps: int | Fraction) -> tuple[GivenVideo | None, RgbImage | None]:
        """The video to continue, looked through, and a frame of it; ``fps`` is the output's."""
        path = self.request.video
        if path is None:
            return None, None
        if self.checkpoint.task != "df":
            self.problems.append(
                f"`video`: {self.checkpoint.task.upper()} checkpoints continue none; use a DF "
                "checkpoint"
            )
        if self.request.image is not None:
            self.problems.append("`image` and `video` exclude each other: both say how it begins")
        try:
            info = survey_video(path)
        except RequestError as error:
            self.problems.append(str(error))
            return None, None
        self.warnings.extend(info.warnings)
        if info.sound is not None:
            kept = (
                "the given part keeps its sound, what is made has none"
                if Sound.fits(info.sound)
                else f"sound in {info.sound} cannot be copied, so the video will have none"
            )
            self.warnings.append(f"{info.path.name} has sound: {kept}")
        frames = info.frames if self.request.reference_exact else info.frames_at(fps)
        given = GivenVideo(info.path, frames, float(info.rate), info.sound)
        return given, info.first

    def warn_of_cut(
        self,
        what: str,
        image: RgbImage | None,
        size: tuple[int, int],
        *,
        stretched: bool = False,
    ) -> None:
        """Warn where fitting the image to ``size`` cuts more than a tenth off, or stretches it."""
        if image is None:
            return
        height, width = image.shape[:2]
        share = (width / height) / (size[1] / size[0])
        if min(share, 1 / share) < 1 - _MUCH_CUT:
            side = "height" if share < 1 else "width"
            shown = f"shows {min(share, 1 / share):.0%} of its {side}"
            if stretched:
                shown = "shows it stretched, as the original does"
            self.warnings.append(
                f"{what} is {width} x {height}: a video of {size[1]} x {size[0]} {shown}; `aspect` "
                "image keeps all"
            )

    def size(self, image: RgbImage | None) -> tuple[int, int]:
        """Height and width; a default or named size is turned to a portrait image."""
        request, default = self.request, self.checkpoint.defaults.resolution
        if request.height is not None or request.width is not None:
            return self._given_size()
        try:
            size = geometry.resolution(request.resolution) if request.resolution else default.value
            shape = None if image is None else image.shape[:2]
            height, width = geometry.with_aspect(size, request.aspect, shape)
        except RequestError as error:
            self.problems.append(str(error))
            return default.value
        if request.aspect is None and image is not None and image.shape[0] > image.shape[1]:
            height, width = max(height, width), min(height, width)
            self.warnings.append(
                f"what is given is upright, so the video is {height} high and {width} wide; "
                "give `height` and `width`, or `aspect`, to have it otherwise"
            )
        source = GIVEN if request.resolution else default.source
        for name, value in (("height", height), ("width", width)):
            self.choose(name, Default(value, source))
        return height, width

    def _given_size(self) -> tuple[int, int]:
        request = self.request
        if request.resolution is not None or request.aspect is not None:
            self.problems.append("`height` and `width` exclude `resolution` and `aspect`")
        height, width = request.height, request.width
        if height is None or width is None:
            given, missing = ("height", "width") if width is None else ("width", "height")
            self.problems.append(f"`{given}` was given without `{missing}`: give both or neither")
            return self.checkpoint.defaults.resolution.value
        return self.choose("height", Default(height, GIVEN)), self.choose(
            "width", Default(width, GIVEN)
        )

    def frames(self, fps: int | Fraction) -> int:
        """The number of frames, possibly from seconds."""
        seconds = self.request.seconds
        if seconds is None:
            return self.choose("num_frames", self.checkpoint.defaults.num_frames)
        if self.request.num_frames is not None:
            self.problems.append("`num_frames` and `seconds` exclude each other: give one")
        self.sources["num_frames"] = f"{seconds:g} seconds at {fps} frames a second"
        if wrong := violation("seconds", seconds):
            self.problems.append(wrong)
            return 1
        frames = geometry.frames_in(seconds, fps)
        if wrong := violation("num_frames", frames):
            self.problems.append(f"`seconds` {seconds:g}: {wrong}")
        return frames

    def long_video(self, num_frames: int) -> LongVideo | None:
        """Defaults of the preset for a video of several windows, where it has any."""
        preset, request = self.checkpoint.guess.preset, self.request
        at_once = request.base_num_frames or self.checkpoint.defaults.num_frames.value
        # The original has no such noise that a seed decides.
        several = num_frames > at_once and not request.reference_exact
        if not several or preset is None or (chosen := preset.long_video) is None:
            return None
        source = f"preset {preset.name}, long videos"
        overlap = max(1, min(chosen.overlap_history, at_once - geometry.FRAMES_PER_LATENT))
        return LongVideo(
            Default(overlap, source),
            Default(chosen.addnoise_condition, source),
            Default(chosen.ar_step, source),
            Default(chosen.guidance_scale, source),
        )

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


def resolve_cache(
    name: str | None,
    threshold: float | None,
    checkpoint: Checkpoint,
    *,
    use_ret_steps: bool = False,
    original_counter: bool = False,
) -> CacheSettings:
    """Settings of a step cache with everything decided.

    Raises:
        RequestError: an unknown cache, a bad threshold, or a cache for a checkpoint that it was
            never fitted to.
    """
    name = name or "none"
    if wrong := violation("cache", name):
        raise RequestError(wrong)
    if name == "none" and threshold is not None:
        raise RequestError(
            f"`cache_threshold` {threshold} without `cache`: name one of {', '.join(CACHE_KINDS)}"
        )
    if use_ret_steps and name != "teacache":
        raise RequestError("`use_ret_steps` is a setting of the cache teacache")
    if name == "none":
        return CacheSettings()
    kind = CACHE_KINDS[name]
    threshold = kind.threshold if threshold is None else threshold
    if wrong := violation("cache_threshold", threshold):
        raise RequestError(wrong)
    if not kind.fitted:
        return CacheSettings(name, threshold)
    preset = checkpoint.guess.preset
    if preset is None or preset.cache is None:
        raise RequestError(
            f"`cache` {name}: its coefficients are fitted to mini and the released checkpoints; "
            "this is none of them: use easycache, or say by `preset` whose weights it has"
        )
    tables = preset.cache
    coefficients = tables.retained if use_ret_steps else tables.plain
    return CacheSettings(name, threshold, use_ret_steps, coefficients, original_counter)


def warning_of_words(preset: Preset, texts: Sequence[str], loras: Sequence[Lora]) -> str | None:
    """What is to be said of words that neither a model of moving shapes nor its LoRAs learned."""
    from skyreels_jax.moving_shapes.captions import known_things, unknown_words

    unknown = unknown_words(" ".join(map(clean, texts)))
    if unknown and loras:
        learned = unknown_words(" ".join(trained_on(loras)))
        unknown = tuple(word for word in unknown if word not in learned)
    if not unknown:
        return None
    return (
        f"{preset.name} was trained on moving shapes and never learned "
        f"{', '.join(map(repr, unknown))}, so the video will not show what is meant; it knows "
        f"{known_things()}"
    )
