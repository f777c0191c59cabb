"""The drift meter, on planted drift: each measure sees its own and not the others."""

import json
import tracemalloc
import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tests.cli.commands import Command

from skyreels_jax.evaluation.drift import DISTANCES, Drift, DriftMeter
from skyreels_jax.evaluation.drift_plot import drift_svg
from skyreels_jax.media import write_video

FPS, COUNT, SIZE = 8, 80, (48, 72)
F = np.float32
LUMA = np.array([0.2126, 0.7152, 0.0722])


@cache
def picture() -> np.ndarray:
    """Smooth shapes and fine grain in the middle of the range, in colour: [48, 72, 3]."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    wave = np.stack([np.sin(x / (5 + k) + k) + np.cos(y / (7 - k) + x / 19) for k in range(3)], -1)
    return 128 + 18 * wave + rng.normal(0, 6, wave.shape)


def moved(frame: np.ndarray, share: float) -> np.ndarray:
    return frame


def brighter(frame: np.ndarray, share: float) -> np.ndarray:
    return frame + 40 * share


def redder(frame: np.ndarray, share: float) -> np.ndarray:
    """Red up and blue down, so that luma stays; green with it is left alone."""
    return frame + 25 * share * np.array([1.0, 0.0, -LUMA[0] / LUMA[2]])


def blurred(frame: np.ndarray, share: float) -> np.ndarray:
    soft = frame.copy()
    for axis in (0, 1):
        soft = (np.roll(soft, 1, axis) + 2 * soft + np.roll(soft, -1, axis)) / 4
    return (1 - share) * frame + share * soft


def mirrored(frame: np.ndarray, share: float) -> np.ndarray:
    return frame[:, ::-1] if share > 0.5 else frame


PLANTED: dict[str, tuple[Callable[[np.ndarray, float], np.ndarray], tuple[str, ...]]] = {
    "still": (moved, ()),
    "a brightness ramp": (brighter, ("brightness",)),
    "a slow colour shift": (redder, ("colour",)),
    "growing blur": (blurred, ("sharpness",)),
    "a jump": (mirrored, ("jump",)),
}


def video(change: Callable[[np.ndarray, float], np.ndarray], count: int = COUNT) -> np.ndarray:
    frames = [change(picture(), k / (count - 1)) for k in range(count)]
    return np.rint(np.clip(frames, 0, 255)).astype(np.uint8)


def measured(frames: np.ndarray, pieces: int = 5) -> Drift:
    meter = DriftMeter(FPS)
    passed = list(meter.passing(iter(np.array_split(frames, pieces))))
    assert sum(map(len, passed)) == len(frames)
    return meter.report()


@pytest.mark.parametrize("name", PLANTED)
def test_each_measure_sees_its_own_and_not_the_others(name: str):
    change, expected = PLANTED[name]
    assert measured(video(change)).seen == expected


def test_the_changes_are_those_that_were_planted():
    # The ends are the means of the first and the last fifth: four fifths of the whole ramp.
    ramp = measured(video(brighter)).changes
    assert ramp["brightness"] == pytest.approx(0.8 * 40 / 255, abs=2e-3)
    assert abs(ramp["colour"]) < 1e-3
    shift = measured(video(redder)).changes
    planted = 0.8 * 25 / 255 * np.hypot(LUMA[0] / LUMA[2] / 1.8556, 1 / 1.5748)
    assert shift["colour"] == pytest.approx(planted, rel=0.03)
    assert abs(shift["brightness"]) < 1e-3
    still = measured(video(moved))
    assert still.changes == {"brightness": 0.0, "colour": 0.0, "sharpness": 0.0}
    assert [still.mean(d) for d in DISTANCES] == pytest.approx([1] * 5, abs=1e-6)


def test_similarity_is_the_formula_and_a_jump_has_its_second():
    frames = video(mirrored)
    found = measured(frames)
    # Frames 40 to 79 are mirrored: the first pair 2 apart that differs ends at frame 40.
    least, at = found.least[2]
    assert at == 40 / FPS
    size = 2  # 72 pixels are more than 64 squares of one.
    a, b = (
        (frames[k] / 255 @ LUMA).reshape(24, size, 36, size).mean(axis=(1, 3)) for k in (38, 40)
    )
    assert least == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], abs=1e-5)
    assert found.least[50][1] == 50 / FPS
    assert found.series["similarity_50"][0] is None


def test_pieces_make_no_difference():
    frames = video(blurred)
    whole, single = measured(frames, 1), measured(frames, COUNT)
    assert whole.least.keys() == single.least.keys() == set(DISTANCES)
    for name, values in whole.series.items():
        assert values == pytest.approx(single.series[name], abs=1e-6), name


def test_short_and_flat_videos_have_a_report():
    grey = np.full((3, 20, 30, 3), 90, np.uint8)
    found = measured(grey, 1)
    assert found.seen == () and set(found.least) == {2} and found.least[2][0] == 1
    black_then_picture = np.concatenate([grey[:, :16, :16], video(moved, 4)[:, :16, :16]])
    assert measured(black_then_picture).least[2][0] == 0
    with pytest.raises(ValueError, match="no frame"):
        DriftMeter(FPS).report()


def test_memory_is_bounded_and_spans_double(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("skyreels_jax.evaluation.drift._MOST_SPANS", 8)
    meter, frames = DriftMeter(2), video(moved, 20)[:, :8, :8]
    tracemalloc.start()
    for _ in range(10):
        meter.add(frames)
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(32):
        meter.add(frames)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 4096
    report = meter.report()
    assert report.span == 64 and len(report.series["brightness"]) == 7  # 420 s
    assert report.series["brightness"] == pytest.approx([report.ends("brightness")[0]] * 7)


def test_the_drawing_is_svg_with_every_series():
    root = ET.fromstring(drift_svg(measured(video(brighter)), "a <b> & c"))
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a <b> & c" in texts
    lines = list(root.iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == len(DISTANCES) + 1 + 3 + 1
    points = [float(p.split(",")[1]) for p in lines[5].attrib["points"].split()]
    assert points == sorted(points, reverse=True)  # Upwards is less in SVG: brightness rises.


def test_the_verb_measures_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    command, file, plot = Command(capfd), tmp_path / "a.mp4", tmp_path / "a.svg"
    write_video(file, video(brighter), fps=FPS)
    outcome = command("drift", file, "--plot", plot, "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["seen"] == ["brightness"] and report["frames"] == COUNT
    assert plot.read_text().startswith("<svg")
    refused = command("drift", file, "--plot", plot)
    assert refused.code == 2 and "exists" in refused.err
    lines = command("drift", file).out.splitlines()
    assert lines[0] == "80 frames, 8 a second, 10.0 s" and lines[-1] == "drift      brightness"
    assert command("drift", file, "--plot", tmp_path / "a.png").code == 2
