"""A whole validation: both sides, each in a process of its own, then the report."""

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import jax
import numpy as np

from skyreels_jax.errors import SkyReelsError
from skyreels_jax.files import write_text
from skyreels_jax.media import RgbImage, write_video
from skyreels_jax.outputs import make_folder
from skyreels_jax.parity import plots
from skyreels_jax.parity.plan import SIDE_NAMES, ParityPlan, side_names
from skyreels_jax.parity.recording import JsonObject, arrays, result_file, side_folder
from skyreels_jax.parity.report import write_html
from skyreels_jax.parity.verdict import (
    Comparison,
    build_report,
    compare_test,
    video_name,
    write_side_by_side,
)
from skyreels_jax.torch_side.modules import torch_device
from skyreels_jax.weights.filling import usable_cores

_PACKAGES: Final = ("skyreels-jax", "jax", "jaxlib", "flax", "numpy", "torch", "diffusers")


class SideFailed(SkyReelsError):
    """One side could not be run; its own last lines say why."""


def _run_in_process(side: str, folder: Path) -> None:
    """Do a side's work in a process, so that its memory is its own.

    Raises:
        SideFailed: with the last line it printed.
    """
    command = [sys.executable, "-m", "skyreels_jax.parity.sides", side, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SideFailed(f"the {side} side could not run: {lines[-1]}")


def validate(
    plan: ParityPlan,
    folder: Path,
    *,
    image: RgbImage | None = None,
    only: str | None = None,
    run_side: Callable[[str, Path], None] = _run_in_process,
    log: Callable[[str], None] = lambda line: None,
) -> JsonObject:
    """Carry out a plan and write everything into ``folder``.

    Args:
        plan: of :func:`~skyreels_jax.parity.plan.plan_comparison`.
        folder: for results; what an earlier run left there is written over.
        image: of all tests.
        only: ``jax`` or ``torch`` makes videos and times of one side.
        run_side: does the work of a side; by default in a process of its own.
        log: takes lines about the progress.

    Returns:
        the report, as in ``report.json``.

    Raises:
        SideFailed: one side could not run.
        UnsupportedError: PyTorch sees no such device.
        RequestError: it knows none of that name.
    """
    sides = side_names(plan, only)
    if "reference" in sides and plan.device not in ("cpu", "auto"):
        torch_device(plan.device)  # Refused while what an earlier run left is still there.
    make_folder(folder, "output folder")
    plan.save(folder / "plan.json")
    (folder / "image.npy").unlink(missing_ok=True)
    if image is not None:
        np.save(folder / "image.npy", image, allow_pickle=False)
    for side in SIDE_NAMES:  # What an earlier run left would be read as this one's.
        shutil.rmtree(side_folder(folder, side), ignore_errors=True)
    for side in sides:
        log(f"running the {side} side")
        run_side(side, folder)
    if only is None:
        log("comparing")
        comparisons = [compare_test(plan, folder, test) for test in plan.tests]
    else:
        comparisons = [Comparison() for _ in plan.tests]
    for test in plan.tests:
        frames = {side: arrays(result_file(folder, side, test))["frames"] for side in sides}
        path = folder / video_name(test, only)
        if only is None:
            write_side_by_side(frames["reference"], frames["jax"], path, plan.fps)
        else:
            write_video(path, frames[sides[0]], fps=plan.fps)
    report = build_report(plan, folder, comparisons, _environment(), only)
    _write_report(report, folder)
    return report


def _write_report(report: JsonObject, folder: Path) -> None:
    """Write ``report.json``, the plots, and ``report.html`` with both in it."""
    write_text(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    drawn: dict[str, Path] = {}

    def draw(caption: str, name: str, plot: Callable[..., None], *values: object) -> None:
        drawn[caption] = folder / name
        plot(drawn[caption], *values)

    tests, times = report["tests"], report["timings"]
    if layers := tests[0]["layers"]:
        latents = [d for d in layers if d["name"].startswith("latents.")]
        others = [d for d in layers if d not in latents]
        by_step = [*others, *({**d, "name": "latents"} for d in latents)]
        title = "Error by layer, test 0"
        draw("Error by layer", "layers.png", plots.layer_errors, others, title)
        draw("Error over steps", "steps.png", plots.errors_over_steps, by_step)
    if any(test["frames"] for test in tests):
        draw("Quality by frame", "frames.png", plots.frame_quality, tests)
    if times:
        draw("Times", "times.png", plots.timings, times)
        draw("Memory", "memory.png", plots.memory, times)
    videos = [folder / test["video"] for test in tests if test["video"]]
    write_html(folder / "report.html", report, drawn, videos)


def _environment() -> dict[str, str]:
    """Return versions and the machine; no names of people or files."""
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(usable_cores()),
        "jax device": jax.devices()[0].device_kind,
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
