"""Images as 8-bit RGB: upright, in sRGB, whatever the file keeps them as."""

import io
import logging
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

from skyreels_jax.errors import RequestError
from skyreels_jax.files import open_regular, whole_file
from skyreels_jax.media.kinds import describe_kind, read_head, refuse_as_image, require_file_name
from skyreels_jax.shapes import Frames

RgbImage = UInt8[np.ndarray, "height width 3"]
# What an image may be given as; an array must be an RgbImage, which `read_image` checks.
ImageInput = str | Path | Image.Image | np.ndarray
# Only these decoders run, whatever a file's name says: others start programs or read other files.
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")
# The largest sensors in use have 102 million; decoded, one takes a gigabyte at most.
MAX_PIXELS: Final = 110_000_000

logger = logging.getLogger(__name__)


def read_image(image: object) -> RgbImage:
    """An image as 8-bit sRGB, turned upright by its EXIF tag.

    Colours go through the file's ICC profile; transparent images are laid on white; of 16 bits a
    channel the upper 8 are kept; floats are taken to go from 0 to 1.

    Args:
        image: an :data:`ImageInput`; what is none is refused by name.

    Raises:
        RequestError: the file is missing, is no image of a format that is read, is cut off or is
            unreasonably large, or what is given is neither a path nor an image.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise RequestError(
                f"image: an array of {image.dtype} {image.shape}; arrays must be uint8 "
                "[height, width, 3]"
            )
        return image
    if isinstance(image, Image.Image):
        return _decoded(image, "image")
    if not isinstance(image, str | Path):
        raise RequestError(
            f"image: {type(image).__module__}.{type(image).__name__}; it takes one path, one PIL "
            "image or one NumPy array uint8 [height, width, 3]"
        )
    require_file_name(image, "image")
    with open_regular(image, "image") as file:
        refuse_as_image(image, describe_kind(read_head(file)))
        try:
            opened = Image.open(file, formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise RequestError(f"image {image} is too large to be decoded: {error}") from error
        except Exception as error:  # Decoders raise whatever their libraries do.
            raise RequestError(
                f"image {image} cannot be read ({_in_short(error)}); is it whole, and a "
                f"{', '.join(_FORMATS)}?"
            ) from error
        with opened:
            return _decoded(opened, f"image {image}")


def _in_short(error: Exception) -> str:
    # Pillow names the open file object.
    return str(error).partition(" <_io")[0] or type(error).__name__


def _decoded(image: Image.Image, what: str) -> RgbImage:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise RequestError(
            f"{what} is {width} x {height}: too large, at most {MAX_PIXELS // 10**6} million "
            "pixels are decoded; make it smaller"
        )
    try:
        image.load()
        return _as_rgb(_upright(image), what)
    except RequestError:
        raise
    except Exception as error:  # As above.
        raise RequestError(f"{what} cannot be read ({_in_short(error)}); is it whole?") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # A damaged tag says nothing about the picture.
        logger.warning("EXIF data that cannot be read is left out: %s", error)
        return image


def _as_rgb(image: Image.Image, what: str) -> RgbImage:
    if image.mode.startswith("I") or image.mode == "F":
        return np.repeat(_eight_bits(np.asarray(image), what)[:, :, None], 3, axis=2)
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    profile = image.info.get("icc_profile")
    if image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("RGB")
    image = _in_srgb(image, profile, what)
    if alpha is not None:
        image.putalpha(alpha)
        opaque = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(opaque, image)
    return np.asarray(image.convert("RGB"))


def _eight_bits(values: np.ndarray, what: str) -> UInt8[np.ndarray, "height width"]:
    """Grey values of more than 8 bits: whole ones of 16, or floats from 0 to 1."""
    if values.dtype.kind == "f":
        if not np.all(np.isfinite(values)):
            raise RequestError(f"{what} holds NaN or infinity")
        return (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
    return (np.clip(values, 0, 65535).astype(np.uint16) >> 8).astype(np.uint8)


def _in_srgb(image: Image.Image, profile: bytes | None, what: str) -> Image.Image:
    """The image in sRGB, where it carries a profile of another space that can be understood."""
    if not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image.convert("RGB")
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(
            image, source, target, outputMode="RGB", flags=ImageCms.Flags.NOOPTIMIZE
        )
        assert converted is not None
        return converted
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        logger.warning("%s: its colour profile cannot be used (%s); read as sRGB", what, error)
        return image.convert("RGB")


def fit_image(
    image: RgbImage,
    height: int,
    width: int,
    resampling: Image.Resampling,
    *,
    stretch: bool = False,
) -> UInt8[np.ndarray, "new_height new_width 3"]:
    """Crop an image around its centre to an aspect, or ``stretch`` it, and resize it to 8 bits."""
    box = None if stretch else _centre_box(image, height, width)
    return np.asarray(Image.fromarray(image).crop(box).resize((width, height), resampling))


def _centre_box(image: RgbImage, height: int, width: int) -> tuple[float, float, float, float]:
    """The largest centred box of the target's aspect, in the truncated sizes of the original."""
    rows, columns = image.shape[:2]
    if rows / columns > height / width:
        kept_rows, kept_columns = max(1, int(columns * height / width)), columns
    else:
        kept_rows, kept_columns = rows, max(1, int(rows * width / height))
    left, top = (columns - kept_columns) / 2, (rows - kept_rows) / 2
    return left, top, left + kept_columns, top + kept_rows


def write_image(path: str | Path, image: RgbImage, *, made_by: str | None = None) -> None:
    """Write an image in the format of the path's suffix; a PNG may name what made it."""
    about = None
    if made_by is not None:
        about = PngInfo()
        about.add_text("Software", made_by)
    with whole_file(Path(path)) as temporary:
        Image.fromarray(image).save(temporary, pnginfo=about)


def write_gif(path: str | Path, frames: Frames, *, fps: float | int, enlarge: int = 1) -> None:
    """Write frames as a GIF that plays for ever, in one palette of 256 colours.

    Args:
        path: of the file.
        frames: to show.
        fps: frames a second; a GIF counts hundredths of a second, which are right on average.
        enlarge: how many times as high and wide, with soft edges (Lanczos).
    """
    height, width = (enlarge * side for side in frames.shape[1:3])
    large = [Image.fromarray(f).resize((width, height), Image.Resampling.LANCZOS) for f in frames]
    # One palette for all: of its own for each frame, still areas would flicker.
    together = Image.fromarray(np.concatenate(frames)).quantize(256, Image.Quantize.MEDIANCUT)
    shown = [
        frame.quantize(palette=together, dither=Image.Dither.NONE).convert("P") for frame in large
    ]
    times = np.rint(100 * np.arange(len(frames) + 1) / fps).astype(int)
    with whole_file(Path(path)) as temporary:
        shown[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=shown[1:],
            duration=(10 * np.diff(times)).tolist(),
            loop=0,
        )


def contact_sheet(
    frames: Frames, count: int = 8, columns: int = 4
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """``count`` frames evenly spread over the video, in rows of ``columns``, black where none."""
    chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    rows = -(-len(chosen) // columns)
    _, height, width, _ = frames.shape
    sheet = np.zeros((rows, columns, height, width, 3), np.uint8)
    sheet.reshape(-1, height, width, 3)[: len(chosen)] = frames[chosen]
    return sheet.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
