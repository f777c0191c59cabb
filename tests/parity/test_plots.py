"""Every drawing is written whole, whatever is missing, infinite or many."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from skyreels_jax.parity import plots


def layer(name: str, step: int | None, error: float | None, **changed: object) -> dict:
    values = {"name": name, "step": step, "max_abs": 1e-3, "normalised": 1e-4, "cosine": 1.0}
    measured = {"relative_l2": error, "budget": 1e-3, "bf16_baseline": 3e-3, "passed": True}
    return values | measured | changed


def many(blocks: int = 30, steps: int = 3) -> list[dict]:
    """Ten layers a block, every block, every step, with some of every kind of trouble."""
    random = np.random.default_rng(0)
    parts = [f"self_attn.{part}" for part in ("q", "k", "v", "heads", "o")]
    parts += ["norm1", "cross_attn.o", "ffn.fc1", "ffn", "out"]
    names = ["patch_embedding", *(f"blocks.{b}.{p}" for b in range(blocks) for p in parts)]
    names += ["head", "velocity", "latents"]
    found = [
        layer(name, step, float(random.lognormal(-11 + index / 150, 0.6)))
        for step in range(steps)
        for index, name in enumerate(names)
    ]
    found[7] |= {"relative_l2": 0.0, "bf16_baseline": None}
    found[50] |= {"relative_l2": math.inf, "passed": False}
    found[90] |= {"relative_l2": 5e-3, "passed": False}
    return found


def quality(psnr: list[float | None]) -> dict:
    return {
        "psnr": None,
        "ssim": 0.99,
        "psnr_by_frame": psnr,
        "max_difference": 3.0,
        "ssim_by_frame": [0.99 + 0.001 * (i % 7) for i in range(len(psnr))],
        "p95": 1.0,
        "p99": 2.0,
    }


SIDE = {"load": 12.5, "compile": 40.0, "runs": [3.1, 3.0, 3.3], "median": 3.1, "peak_mib": 5120.0}


def check(path: Path) -> np.ndarray:
    """A PNG wide enough for a page, with more than the frame of an empty drawing on it."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] == 1350
    assert 400 <= pixels.shape[0] <= 1200
    assert 5_000 < path.stat().st_size < 600_000
    assert (pixels != 255).mean() > 0.005
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return pixels


def has(pixels: np.ndarray, colour: str) -> bool:
    """Whether a line or sign has the colour; edges of letters alone come to fewer pixels."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((pixels == wanted).all(axis=-1).sum() > 40)


@pytest.mark.parametrize("steps", [1, 3, 30])
def test_many_layers_are_drawn(tmp_path: Path, steps: int):
    plots.layer_errors(tmp_path / "a.png", many(steps=steps), "T2V 1.3B, test 0")
    pixels = check(tmp_path / "a.png")
    assert has(pixels, plots._VERMILLION)
    assert has(pixels, plots._GREEN)  # the sign of an exact zero


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [layer("head", None, 1e-4, bf16_baseline=None)],
        [layer("head", None, None, bf16_baseline=None, passed=False)],
        [layer("head", 0, 0.0, budget=0.0, bf16_baseline=0.0), layer("velocity", 0, math.nan)],
    ],
    ids=["none", "one", "broken", "zero and nan"],
)
def test_few_and_broken_layers_are_drawn(tmp_path: Path, layers: list[dict]):
    for draw in (
        lambda path: plots.layer_errors(path, layers, "few"),
        lambda path: plots.errors_over_steps(path, layers),
    ):
        draw(tmp_path / "a.png")
        check(tmp_path / "a.png")


def test_names_along_the_axis_are_thinned_to_starts_of_blocks():
    few = [f"layer{i}" for i in range(plots._MOST_TICKS)]
    assert plots._ticks(few) == list(enumerate(few))
    names = list(dict.fromkeys(row["name"] for row in many(blocks=40)))
    ticks = plots._ticks(names)
    assert 13 <= len(ticks) <= plots._MOST_TICKS + 1
    assert all(names[index].startswith(label) for index, label in ticks)
    gaps = np.diff([index for index, _ in ticks])
    assert gaps.min() >= len(names) / plots._MOST_TICKS
    # One block alone has no starts to be labelled by.
    alone = [f"blocks.0.part{i}" for i in range(60)]
    assert 13 <= len(plots._ticks(alone)) <= plots._MOST_TICKS + 1


def test_errors_over_steps_are_those_of_velocity_and_latents(tmp_path: Path):
    plots.errors_over_steps(tmp_path / "a.png", many(blocks=2, steps=12))
    pixels = check(tmp_path / "a.png")
    assert has(pixels, plots._BLUE)
    assert has(pixels, plots._ORANGE)


def test_frame_quality_shows_equal_frames_and_baselines(tmp_path: Path):
    some = quality([None if i % 9 == 0 else 40 + i / 10 for i in range(97)])
    tests = [
        {"frames": some, "bf16_baseline": quality([36.0] * 97)},
        {"frames": quality([None, math.inf, None]), "bf16_baseline": None},
        {"frames": None, "bf16_baseline": None},
    ]
    plots.frame_quality(tmp_path / "a.png", tests)
    pixels = check(tmp_path / "a.png")
    assert has(pixels, plots._GREY)  # the line of equal frames
    plots.frame_quality(tmp_path / "a.png", [tests[0] | {"frames": tests[0]["bf16_baseline"]}])
    assert not has(check(tmp_path / "a.png"), plots._GREY)


@pytest.mark.parametrize("tests", [[], [{"frames": None, "bf16_baseline": None}]])
def test_no_frames_are_said_so(tmp_path: Path, tests: list[dict]):
    plots.frame_quality(tmp_path / "a.png", tests)
    check(tmp_path / "a.png")


@pytest.mark.parametrize(
    "timings",
    [
        {"torch": SIDE, "jax": SIDE | {"compile": 0.0, "peak_mib": 2.0}, "ratio": 1.1},
        {"torch": None, "jax": SIDE, "ratio": None},
        {"torch": SIDE | {"runs": [], "peak_mib": None}, "jax": None, "ratio": None},
        {"torch": None, "jax": None, "ratio": None},
        None,
    ],
    ids=["both", "jax", "torch", "neither", "none"],
)
def test_timings_and_memory_are_drawn(tmp_path: Path, timings: dict | None):
    for draw in (plots.timings, plots.memory):
        draw(tmp_path / "a.png", timings)
        check(tmp_path / "a.png")


def test_drawing_leaves_no_global_state(tmp_path: Path):
    plots.memory(tmp_path / "a.png", None)
    assert "matplotlib.pyplot" not in sys.modules
