"""Images and films as phones, cameras, browsers and recorders write them."""

import io
import logging
import os
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageCms
from tests.media.films import DATA, colours, write_film

from skyreels_jax import media
from skyreels_jax.errors import RequestError


@pytest.mark.parametrize(("degrees", "turns"), [(90, -1), (180, 2), (270, 1)])
@pytest.mark.parametrize("size", [(48, 64), (64, 32)])
def test_films_are_turned_as_their_header_says(tmp_path: Path, degrees: int, turns: int, size):
    film = colours(3, *size)
    plain = media.read_video(write_film(tmp_path / "plain.mp4", film))[0]
    path = write_film(tmp_path / "turned.mp4", film, turned=degrees)
    shown = media.survey_video(path).first
    np.testing.assert_array_equal(shown, np.rot90(plain[0], turns))
    assert not np.array_equal(shown, plain[0])
    frames = media.read_video(path)[0]
    np.testing.assert_array_equal(frames, np.rot90(plain, turns, axes=(1, 2)))
    assert all(np.array_equal(a, b) for a, b in zip(media.stream_video(path), frames, strict=True))


def test_a_phone_s_portrait_film_is_upright():
    plain = media.read_video(DATA / "plain.mp4")[0]
    first = media.survey_video(DATA / "portrait.mp4").first
    assert first.shape == (160, 120, 3)
    np.testing.assert_array_equal(first, np.rot90(plain[0], -1))


@pytest.mark.parametrize("aspect", [Fraction(16, 11), Fraction(4, 3), Fraction(8, 9)])
def test_pixels_that_are_not_square_become_square(tmp_path: Path, aspect: Fraction):
    path = write_film(tmp_path / "sar.mp4", colours(2, 48, 64), aspect=aspect)
    first = media.survey_video(path).first
    assert first.shape == (48, round(64 * aspect), 3)
    assert abs(first[10, 5].astype(int) - (220, 30, 30)).max() < 12  # measured 2


@pytest.mark.parametrize("name", ["pq", "hlg"])
def test_hdr_films_have_the_colours_of_standard_ones(name: str):
    plain = media.read_video(DATA / "plain.mp4")[0].astype(int)
    info = media.survey_video(DATA / f"{name}.mp4")
    assert any("HDR" in line for line in info.warnings)
    red = info.first[10, 10]
    assert red[0] > 220  # measured 242 and 245; read as if it were BT.709: 134 and 138
    assert red[1] < 60 and red[2] < 60
    # Measured 11.2 and 9.6; untouched 40 and 39.
    assert np.abs(media.read_video(DATA / f"{name}.mp4")[0] - plain).mean() < 15


def grey_wedge(transfer: str, path: Path) -> Path:
    """Grey of known light in a film that says it is HDR."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        context = stream.codec_context
        context.colorspace, context.color_primaries = 9, 9
        context.color_trc = {"smpte2084": 16, "arib-std-b67": 18}[transfer]
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p10le"
        frame = av.VideoFrame(64, 64, "yuv420p10le")
        for number, plane in enumerate(frame.planes):
            # PQ and HLG of reference white, which is 58 and 75 % of the signal.
            white = {"smpte2084": 0.58, "arib-std-b67": 0.75}[transfer]
            value = 64 + round(876 * white) if number == 0 else 512
            samples = np.full(plane.buffer_size // 2, value, np.uint16)
            plane.update(samples.tobytes())
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_white_of_hdr_is_white(tmp_path: Path, transfer: str):
    info = media.survey_video(grey_wedge(transfer, tmp_path / "white.mp4"))
    assert info.first.min() > 225  # measured 243 and 252
    assert np.ptp(info.first.reshape(-1, 3), axis=1).max() <= 2  # and grey


@pytest.mark.parametrize("name", ["p3", "adobe"])
def test_colours_go_through_the_profile(name: str):
    truth = media.read_image(DATA / "srgb.png").astype(int)
    # Measured 3 in P3's (91, 196, 60), of which half a level is 3 levels of red in sRGB's shadow,
    # and 1 in Adobe's.
    assert np.abs(media.read_image(DATA / f"{name}.png") - truth).max() <= 3
    stored = np.asarray(Image.open(DATA / f"{name}.png").convert("RGB")).astype(int)
    assert np.abs(stored - truth).max() > 15  # what the numbers say without the profile


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_a_profile_that_cannot_be_used_is_said_and_left_out(tmp_path: Path, caplog, mode: str):
    Image.new("RGB", (8, 8), (200, 60, 40)).convert(mode).save(
        tmp_path / "a.png", icc_profile=b"nonsense" * 40
    )
    with caplog.at_level(logging.WARNING):
        image = media.read_image(tmp_path / "a.png")
    assert "profile" in caplog.text
    assert image.shape == (8, 8, 3)


def test_lab_and_cmyk_pictures_are_read(tmp_path: Path):
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (8, 8), (200, 60, 40)),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert lab is not None
    lab.save(tmp_path / "lab.tif")
    Image.new("CMYK", (8, 8), (0, 200, 200, 30)).save(tmp_path / "cmyk.jpg")
    assert media.read_image(tmp_path / "lab.tif").shape == (8, 8, 3)
    red, green, _ = media.read_image(tmp_path / "cmyk.jpg")[0, 0]
    assert red > 180 and green < 90


def test_deep_pictures_keep_their_upper_bits(tmp_path: Path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "deep.tif")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "float.tif")
    for name in ("deep.png", "deep.tif", "float.tif"):
        read = media.read_image(tmp_path / name)
        assert np.abs(read[..., 0].astype(int) - ramp / 257).max() <= 1.5, name
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(RequestError, match="NaN"):
        media.read_image(tmp_path / "nan.tif")


@pytest.mark.parametrize(
    ("times", "fps", "numbers"),
    [
        ([0, 0.1, 0.2, 0.3, 0.7, 1.1], 10, [0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5]),
        ([0, 1, 2], 2, [0, 0, 1, 1, 2]),
    ],
)
def test_frames_at_uneven_times_are_shown_when_they_were_taken(tmp_path, times, fps, numbers):
    film = np.stack([np.full((32, 32, 3), 30 * i + 10, np.uint8) for i in range(len(times))])
    path = write_film(tmp_path / "vfr.mkv", film, rate=10, times=times)
    read = [round((int(frame[5, 5, 0]) - 10) / 30) for frame in media.stream_video(path, fps)]
    assert read[: len(numbers)] == numbers
    info = media.survey_video(path)
    assert info.frames_at(fps) == len(read)
    if len(set(np.diff(times).round(3))) > 1:
        assert info.varies
        assert any("varies" in line for line in info.warnings)


def test_a_recording_of_a_screen_is_said_to_vary():
    info = media.survey_video(DATA / "vfr.mp4")
    assert info.varies and any("vari" in line for line in info.warnings)


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(30000, 1001), Fraction(25)])
def test_even_rates_are_exact_and_a_film_at_its_own_rate_keeps_each_frame(tmp_path: Path, rate):
    media.write_video(tmp_path / "a.mp4", colours(20), fps=rate)
    info = media.survey_video(tmp_path / "a.mp4")
    assert (info.rate, info.varies, info.frames, info.warnings) == (rate, False, 20, ())
    assert info.frames_at(rate) == 20
    plain, found = media.read_video(tmp_path / "a.mp4")
    assert found == rate
    np.testing.assert_array_equal(
        np.stack(list(media.stream_video(tmp_path / "a.mp4", rate))), plain
    )
    half = list(media.stream_video(tmp_path / "a.mp4", rate / 2))
    assert len(half) == info.frames_at(rate / 2) == 10


@pytest.mark.parametrize(("codec", "suffix"), [("aac", ".mp4"), ("pcm_s16le", ".mkv")])
def test_sound_is_copied_where_mp4_can_hold_it(tmp_path: Path, codec: str, suffix: str):
    source = write_film(tmp_path / f"in{suffix}", colours(16), sound=codec)
    info = media.survey_video(source)
    assert info.sound == codec
    assert media.Sound.fits(codec) == (codec == "aac")
    if not media.Sound.fits(codec):
        return
    sound = media.Sound(source, seconds=0.5)
    media.write_video(tmp_path / "out.mp4", colours(16), fps=16, sound=sound)
    with av.open(str(tmp_path / "out.mp4")) as container:
        (audio,) = container.streams.audio
        seconds = sum(frame.samples for frame in container.decode(audio)) / 16000
    assert 0.4 < seconds < 0.65
    assert len(media.read_video(tmp_path / "out.mp4")[0]) == 16


@pytest.mark.parametrize("film", [True, False])
def test_a_cover_picture_is_not_the_film(tmp_path: Path, film: bool):
    path = write_film(tmp_path / "plain.mp4", colours(5), sound="aac")
    with av.open(str(tmp_path / "cover.mp4"), "w") as out, av.open(str(path)) as source:
        kept = [source.streams.video[0]] if film else [source.streams.audio[0]]
        copied = {stream.index: out.add_stream_from_template(stream) for stream in kept}
        cover = out.add_stream("png", rate=1)
        cover.width = cover.height = 200
        cover.pix_fmt = "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((200, 200, 3), np.uint8), format="rgb24")
        out.mux(cover.encode(picture))
        for packet in source.demux(kept):
            if packet.dts is not None:
                packet.stream = copied[packet.stream.index]
                out.mux(packet)
    with av.open(str(tmp_path / "cover.mp4")) as container:
        attached = av.stream.Disposition.attached_pic
        assert any(stream.disposition & attached for stream in container.streams.video)
    if film:
        assert media.survey_video(tmp_path / "cover.mp4").first.shape == (48, 64, 3)
    else:
        assert "no picture" in refusal(media.survey_video, tmp_path / "cover.mp4")


@pytest.mark.parametrize("share", [0.6, 0.85])
def test_a_film_whose_end_is_missing_is_said_so(tmp_path: Path, share: float):
    path = write_film(tmp_path / "whole.mkv", colours(64))
    assert media.survey_video(path).warnings == ()
    data = path.read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: int(len(data) * share)])
    try:
        info = media.survey_video(tmp_path / "cut.mkv")
    except RequestError:
        return  # Refusing is right as well.
    assert any("missing" in line for line in info.warnings)
    assert info.frames < 64


def test_the_interrupted_recording_of_the_field_is_said_so():
    info = media.survey_video(DATA / "cut.mkv")
    assert info.frames == 20 and any("missing" in line for line in info.warnings)


def test_titles_in_an_old_encoding_do_not_matter():
    assert media.read_video(DATA / "latin1-metadata.mp4")[0].shape == (5, 32, 32, 3)


@pytest.mark.parametrize("name", ["a:b.mp4", "13:30.mp4", "concat:x.mp4", "影 %d 'x'.mp4"])
def test_every_legal_name_is_written_and_read(tmp_path: Path, monkeypatch, name: str):
    monkeypatch.chdir(tmp_path)
    media.write_video(name, colours(3), fps=16)
    assert len(media.read_video(name)[0]) == 3
    assert os.listdir(tmp_path) == [name]


def refusal(read, *arguments) -> str:
    start = time.monotonic()
    with pytest.raises(RequestError) as refused:
        read(*arguments)
    assert time.monotonic() - start < 2
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_is_no_picture_is_named(tmp_path: Path):
    assert "HEIC" in refusal(media.read_image, DATA / "photo.heic")
    assert "`video`" in refusal(media.read_image, DATA / "plain.mp4")
    assert "download" in refusal(media.read_image, "https://example.org/cat.png")
    assert "download" in refusal(media.read_image, Path("ftp://example.org/cat.png"))
    for name, text, words in (
        ("page.png", b"<!DOCTYPE html><html>", "web page"),
        ("eps.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "EPS"),
        ("eps.jpg", b"\xc5\xd0\xd3\xc6" + bytes(30), "EPS"),
        ("drawing.svg", b"<?xml version='1.0'?><svg/>", "SVG"),
        ("paper.jpg", b"%PDF-1.7", "PDF"),
        ("text.png", b"hello", "cannot be read"),
        ("empty.png", b"", "cannot be read"),
    ):
        (tmp_path / name).write_bytes(text)
        assert words in refusal(media.read_image, tmp_path / name)
    refusal(media.read_image, DATA / "damaged.avif.png")


def test_what_is_no_film_is_named(tmp_path: Path):
    frames = [Image.new("RGB", (8, 8), (i * 40, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "anim.webp", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.mp4", "PNG")
    (tmp_path / "page.mp4").write_bytes(b"<html>")
    assert "WebP" in refusal(media.survey_video, tmp_path / "anim.webp")
    assert "`image`" in refusal(media.survey_video, tmp_path / "still.mp4")
    assert "web page" in refusal(media.survey_video, tmp_path / "page.mp4")
    assert "download" in refusal(media.survey_video, "https://example.org/a.mp4")
    assert "size" in refusal(media.survey_video, DATA / "size-changes.mp4")


@pytest.mark.parametrize("wanted", ["list.mp4", "list.m3u8", "list.txt"])
def test_a_list_of_files_opens_none_of_them(tmp_path: Path, wanted: str):
    write_film(tmp_path / "other.mp4", colours(2))
    lists = {
        "list.mp4": "ffconcat version 1.0\nfile other.mp4\n",
        "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nother.mp4\n#EXT-X-ENDLIST\n",
        "list.txt": f"<?xml version='1.0'?><MPD><BaseURL>{tmp_path}/other.mp4</BaseURL></MPD>",
    }
    (tmp_path / wanted).write_text(lists[wanted])
    refusal(media.survey_video, tmp_path / wanted)


@pytest.mark.parametrize("read", [media.read_image, media.survey_video])
def test_only_regular_files_are_opened(tmp_path: Path, read):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "endless.mp4").symlink_to("/dev/zero")
    for name in ("pipe.mp4", "endless.mp4", "missing.mp4"):
        refusal(read, tmp_path / name)
    refusal(read, tmp_path)


@pytest.mark.parametrize("size", [(13_000, 13_000), (60_000, 2_000)])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path, size):
    Image.new("1", size).save(tmp_path / "huge.png")
    assert "too large" in refusal(media.read_image, tmp_path / "huge.png")


@pytest.mark.parametrize("given", [[np.zeros((4, 4, 3), np.uint8)], b"png", io.BytesIO(b"png"), 7])
def test_inputs_of_other_kinds_are_refused_by_name(given):
    assert "image: " in refusal(media.read_image, given)
