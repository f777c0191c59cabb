"""Reading and writing images and video, as plain NumPy arrays of 8-bit RGB."""

from skyreels_jax.media.growing_video import GrowingVideo
from skyreels_jax.media.images import (
    ImageInput,
    RgbImage,
    contact_sheet,
    fit_image,
    read_image,
    write_gif,
    write_image,
)
from skyreels_jax.media.video_reader import (
    VideoInfo,
    read_settings,
    read_video,
    stream_video,
    survey_video,
)
from skyreels_jax.media.video_writer import (
    Sound,
    VideoWriter,
    check_output,
    write_settings,
    write_video,
)

__all__ = [
    "GrowingVideo",
    "ImageInput",
    "RgbImage",
    "Sound",
    "VideoInfo",
    "VideoWriter",
    "check_output",
    "contact_sheet",
    "fit_image",
    "read_image",
    "read_settings",
    "read_video",
    "stream_video",
    "survey_video",
    "write_gif",
    "write_image",
    "write_settings",
    "write_video",
]
