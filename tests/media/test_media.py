"""Images in, videos out and back, and no half file whatever happens."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from skyreels_jax import media
from skyreels_jax.errors import RequestError


def moving_picture(frames: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    """Smooth colours that drift, with a hard-edged square: something a codec can be judged by."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(x / 9 + t / 4), np.cos(y / 7 - t / 5), np.sin((x + y) / 11)]
    video = np.stack([127 + 100 * wave for wave in waves], axis=-1).astype(np.uint8)
    video[:, 10:20, 10:20] = (220, 40, 30)
    return video


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


@pytest.mark.parametrize("fps", [16, 24, Fraction(30000, 1001)])
def test_a_video_comes_back_with_its_frames_rate_size_and_settings(tmp_path: Path, fps):
    frames = moving_picture()
    settings = {"prompt": 'a fox — 狐狸 "quoted"\nsecond line', "steps": 30, "shift": 8.0}
    media.write_video(tmp_path / "out.mp4", frames, fps=fps, settings=settings)
    decoded, rate = media.read_video(tmp_path / "out.mp4")
    assert decoded.shape == frames.shape
    assert rate == fps
    assert media.read_settings(tmp_path / "out.mp4") == settings
    assert psnr(decoded, frames) > 30  # measured 32.8: chroma is halved around the hard edges
    assert psnr(decoded, np.roll(frames, 1, axis=0)) < 25  # measured 18.3
    assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"]


def test_plain_colours_come_back_as_they_were(tmp_path: Path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128)]
    frames = np.stack([np.full((32, 32, 3), colour, np.uint8) for colour in colours])
    media.write_video(tmp_path / "out.mp4", frames, fps=24)
    decoded, _ = media.read_video(tmp_path / "out.mp4")
    assert np.abs(decoded.astype(int) - frames).max() <= 2  # measured 1


def test_the_file_is_what_browsers_play(tmp_path: Path):
    media.write_video(tmp_path / "out.mp4", moving_picture(), fps=24)
    data = (tmp_path / "out.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(tmp_path / "out.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert context.name == "h264"
        assert context.pix_fmt == "yuv420p"
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)


def encoded_often(folder: Path, times: int) -> set[bytes]:
    """Files of the same 53 noisy frames."""
    y, x, t = np.ogrid[0:144, 0:240, 0:53]
    waves = 128 + 60 * np.sin((x + 3 * t) / 7) + 40 * np.cos((y - t) / 5)
    noise = np.random.default_rng(0).normal(0, 12, (*waves.shape, 3))
    frames = np.clip(waves[..., None] + noise, 0, 255).astype(np.uint8).transpose(2, 0, 1, 3)
    for number in range(times):
        media.write_video(folder / f"{number}.mp4", frames, fps=24)
    return {(folder / f"{number}.mp4").read_bytes() for number in range(times)}


def test_the_same_frames_give_the_same_file(tmp_path: Path):
    assert len(encoded_often(tmp_path, 12)) == 1


def test_pieces_give_the_same_file_as_the_whole(tmp_path: Path):
    frames = moving_picture()
    media.write_video(tmp_path / "whole.mp4", frames, fps=24)
    with media.VideoWriter(tmp_path / "pieces.mp4", fps=24, size=(48, 64)) as writer:
        for piece in (frames[:1], frames[1:5], frames[5:]):
            writer.append(piece)
    assert writer.written == 9
    assert (tmp_path / "pieces.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interruption_leaves_no_file_and_keeps_an_old_one(tmp_path: Path, failure):
    old = tmp_path / "old.mp4"
    old.write_bytes(b"as it was")
    for path in (tmp_path / "new.mp4", old):
        with (
            pytest.raises(failure),
            media.VideoWriter(path, fps=24, size=(48, 64)) as writer,
        ):
            writer.append(moving_picture())
            raise failure
    assert [file.name for file in tmp_path.iterdir()] == ["old.mp4"]
    assert old.read_bytes() == b"as it was"


def test_frames_of_another_size_are_refused_and_leave_no_file(tmp_path: Path):
    with (
        pytest.raises(ValueError, match="frames of"),
        media.VideoWriter(tmp_path / "out.mp4", fps=24, size=(48, 64)) as writer,
    ):
        writer.append(moving_picture(height=32))
    assert list(tmp_path.iterdir()) == []


def test_odd_sizes_are_refused(tmp_path: Path):
    with pytest.raises(RequestError, match="even"):
        media.write_video(tmp_path / "out.mp4", moving_picture(width=63), fps=24)


def bad_outputs(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    (tmp_path / "folder.mp4").mkdir()
    return {
        "suffix": (tmp_path / "out.avi", r"must end in \.mp4"),
        "no suffix": (tmp_path / "out", r"for example out\.mp4"),
        "a folder": (tmp_path / "folder.mp4", "is a folder"),
        "no folder": (tmp_path / "nowhere" / "out.mp4", "does not exist"),
        "a file as folder": (Path(__file__) / "out.mp4", "does not exist"),
    }


@pytest.mark.parametrize(
    "kind", ["suffix", "no suffix", "a folder", "no folder", "a file as folder"]
)
def test_impossible_outputs_are_refused_before_anything_is_made(tmp_path: Path, kind: str):
    path, message = bad_outputs(tmp_path)[kind]
    with pytest.raises(RequestError, match=message):
        media.check_output(path)


def test_settings_go_to_a_file_of_their_own(tmp_path: Path):
    media.write_settings(tmp_path / "out.json", {"prompt": "狐狸"})
    assert (tmp_path / "out.json").read_text("utf-8") == '{\n  "prompt": "狐狸"\n}\n'


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path: Path):
    media.write_settings(tmp_path / "ours.json", {})
    (tmp_path / "theirs.json").touch()
    modes = [(tmp_path / name).stat().st_mode for name in ("ours.json", "theirs.json")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("content", [b"", b"not a video", None])
def test_what_is_no_video_is_refused_by_name(tmp_path: Path, content: bytes | None):
    path = tmp_path / "in.mp4"
    if content is not None:
        path.write_bytes(content)
    for read in (media.read_video, media.read_settings):
        with pytest.raises(RequestError, match=r"in\.mp4"):
            read(path)


def test_a_video_without_settings_says_so(tmp_path: Path):
    media.write_video(tmp_path / "out.mp4", moving_picture(), fps=24)
    with pytest.raises(RequestError, match="carries no settings"):
        media.read_settings(tmp_path / "out.mp4")


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(moving_picture(frames=1)[0]).convert(mode)


def test_images_of_all_kinds_of_origin_are_read_alike(tmp_path: Path):
    expected = moving_picture(frames=1)[0]
    picture().save(tmp_path / "in.png")
    for given in (tmp_path / "in.png", str(tmp_path / "in.png"), picture(), expected):
        np.testing.assert_array_equal(media.read_image(given), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "RGBA"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str):
    image = media.read_image(picture(mode))
    assert image.shape == (48, 64, 3)
    np.testing.assert_array_equal(image, np.asarray(picture(mode).convert("RGB")))


def test_transparent_pixels_are_laid_on_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    assert media.read_image(image).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_sixteen_bits_are_scaled_not_clipped():
    image = Image.fromarray(np.array([[0, 0x1234, 0xFFFF]], np.uint16))
    assert media.read_image(image)[0, :, 0].tolist() == [0, 0x12, 255]


def test_exif_turns_the_image_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    picture().save(tmp_path / "in.jpg", exif=exif)
    assert media.read_image(tmp_path / "in.jpg").shape == (64, 48, 3)


def cut_off() -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    return buffer.getvalue()[:-400]


@pytest.mark.parametrize("content", [b"", b"not an image", cut_off(), None])
def test_what_is_no_image_is_refused_by_name(tmp_path: Path, content: bytes | None):
    path = tmp_path / "in.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError, match=r"in\.png"):
        media.read_image(path)


def test_an_image_that_would_fill_memory_is_refused(tmp_path: Path, monkeypatch):
    picture().save(tmp_path / "in.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(RequestError, match="too large"):
        media.read_image(tmp_path / "in.png")


def test_a_contact_sheet_shows_frames_in_rows():
    frames = np.stack([np.full((4, 6, 3), value, np.uint8) for value in range(10)])
    sheet = media.contact_sheet(frames, count=4, columns=3)
    assert sheet.shape == (8, 18, 3)
    assert sheet[0, ::6, 0].tolist() == [0, 3, 6]
    assert sheet[4, ::6, 0].tolist() == [9, 0, 0]


def test_an_image_is_written_and_read_back(tmp_path: Path):
    expected = moving_picture(frames=1)[0]
    media.write_image(tmp_path / "sheet.png", expected)
    np.testing.assert_array_equal(media.read_image(tmp_path / "sheet.png"), expected)


@pytest.mark.parametrize("fps", [16, 24, 29.97])
def test_a_gif_shows_the_frames_enlarged_at_their_rate_and_for_ever(tmp_path: Path, fps: float):
    frames = moving_picture()
    media.write_gif(tmp_path / "out.gif", frames, fps=fps, enlarge=3)
    with Image.open(tmp_path / "out.gif") as gif:
        assert (gif.size, gif.n_frames, gif.info["loop"]) == ((192, 144), len(frames), 0)
        shown, milliseconds = [], 0
        for number in range(gif.n_frames):
            gif.seek(number)
            milliseconds += gif.info["duration"]
            shown.append(np.asarray(gif.convert("RGB").resize((64, 48), Image.Resampling.BOX)))
    assert milliseconds == pytest.approx(1000 * len(frames) / fps, abs=5)
    assert psnr(np.stack(shown), frames) > 27  # measured 27.8: 256 colours for all frames
    assert psnr(np.stack(shown), np.roll(frames, 1, axis=0)) < 25
