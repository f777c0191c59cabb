"""A whole validation: both sides, each in a process of its own, then the report."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np

from skyreels_jax.errors import SkyReelsError
from skyreels_jax.files import whole_file
from skyreels_jax.media import RgbImage, write_video
from skyreels_jax.parity import plots
from skyreels_jax.parity.plan import Plan, sides_of
from skyreels_jax.parity.recording import arrays
from skyreels_jax.parity.report import write_html
from skyreels_jax.parity.verdict import Judged, judge, report_of, side_by_side, video_name
from skyreels_jax.parity.worker import SIDES, raw, result_file

PACKAGES: Final = ("skyreels-jax", "jax", "jaxlib", "flax", "numpy", "torch", "diffusers")
REPORT: Final = "report.json"


class SideFailed(SkyReelsError):
    """One side could not be run; its own last lines say why."""


def in_a_process(side: str, folder: Path) -> None:
    """Run a side's work apart, so that its memory is its own.

    Raises:
        SideFailed: with the last line it printed.
    """
    command = [sys.executable, "-m", "skyreels_jax.parity.worker", side, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SideFailed(f"the {side} side could not run: {lines[-1]}")


def validate(
    plan: Plan,
    folder: Path,
    *,
    image: RgbImage | None = None,
    only: str | None = None,
    do: Callable[[str, Path], None] = in_a_process,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Carry out a plan and write everything into ``folder``.

    Args:
        plan: settled.
        folder: for results; what an earlier run left there is written over.
        image: of all tests.
        only: ``jax`` or ``torch`` makes videos and times of one side.
        do: does the work of a side.
        say: told what is going on.

    Returns:
        the report, as in ``report.json``.

    Raises:
        SideFailed: one side could not run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan.save(folder / "plan.json")
    (folder / "image.npy").unlink(missing_ok=True)
    if image is not None:
        np.save(folder / "image.npy", image, allow_pickle=False)
    sides = sides_of(plan, only)
    for side in SIDES:  # What an earlier run left would be read as this one's.
        shutil.rmtree(raw(folder, side), ignore_errors=True)
    for side in sides:
        say(f"running the {side} side")
        do(side, folder)
    if only is None:
        say("comparing")
        judged = [judge(plan, folder, test) for test in plan.tests]
        for test in plan.tests:
            both = (arrays(result_file(folder, side, test)) for side in ("reference", "jax"))
            theirs, ours = (values["frames"] for values in both)
            side_by_side(theirs, ours, folder / video_name(test), plan.fps)
    else:
        judged = [Judged(None, None, (), None, ()) for _ in plan.tests]
        for test in plan.tests:
            frames = arrays(result_file(folder, sides[0], test))["frames"]
            write_video(folder / video_name(test, only), frames, fps=plan.fps)
    report = report_of(plan, folder, judged, environment(), only)
    write_report(report, folder)
    return report


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """``report.json``, the plots, and ``report.html`` with both in it."""
    with whole_file(folder / REPORT) as partial:
        partial.write_text(json.dumps(report, indent=1, ensure_ascii=False), "utf-8")
    drawn: dict[str, Path] = {}
    tests = report["tests"]
    layers = tests[0]["layers"]
    if layers:
        by_step = [d for d in layers if d["name"].startswith("latents.")]
        places = [d for d in layers if d not in by_step]
        drawn["Error by layer"] = folder / "layers.png"
        plots.layer_errors(drawn["Error by layer"], places, "Error by layer, test 0")
        drawn["Error over steps"] = folder / "steps.png"
        latents = [{**d, "name": "latents"} for d in by_step]
        plots.errors_over_steps(drawn["Error over steps"], [*places, *latents])
    if any(test["frames"] for test in tests):
        drawn["Quality by frame"] = folder / "frames.png"
        plots.frame_quality(drawn["Quality by frame"], tests)
    if report["timings"]:
        drawn["Times"], drawn["Memory"] = folder / "times.png", folder / "memory.png"
        plots.timings(drawn["Times"], report["timings"])
        plots.memory(drawn["Memory"], report["timings"])
    videos = [folder / test["video"] for test in tests if test["video"]]
    write_html(folder / "report.html", report, drawn, videos)


def environment() -> dict[str, str]:
    """Versions and the machine; no names of people or places."""
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(len(os.sched_getaffinity(0))),
        "jax device": jax.devices()[0].device_kind,
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
