"""The verdict on what both sides left in a folder: distances, a finding, failures, timings."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from skyreels_jax.geometry import latent_shape
from skyreels_jax.media import read_video, write_video
from skyreels_jax.parity.activation_sites import activation_names
from skyreels_jax.parity.compare import (
    BASELINE_FACTOR,
    STAGE_BUDGETS,
    Distance,
    compare_activations,
    compare_stages,
    distance,
)
from skyreels_jax.parity.diagnosis.diagnose import Finding, diagnose_activation, diagnose_stage
from skyreels_jax.parity.diagnosis.hypotheses import CallShape
from skyreels_jax.parity.diagnosis.linear_faults import read_linear_maps
from skyreels_jax.parity.metrics import FrameDistance, compare_frames
from skyreels_jax.parity.plan import ParityPlan, side_names
from skyreels_jax.parity.recording import (
    Arrays,
    JsonObject,
    arrays,
    decoded_file,
    load_call,
    result_file,
    side_folder,
    trace_file,
)
from skyreels_jax.shapes import Frames

_SCHEMA: Final = "skyreels-jax-validation/2"
# Least PSNR in dB and SSIM of videos in float32. Measured 83.2 to 90.3, and 1 - 2e-7 at worst.
LEAST_PSNR: Final = 60.0
LEAST_SSIM: Final = 0.9999
# The difference in the third panel of a video, so many times.
_AMPLIFIED: Final = 10
# Stages before the transformer.
_BEFORE: Final = ("text", "text.negative", "image", "mask", "condition", "timesteps", "sigmas")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is found of one test; ``distances`` are in the order of the work.

    Where one side ran alone there is nothing.
    """

    frames: FrameDistance | None = None
    bf16_baseline: FrameDistance | None = None
    distances: tuple[Distance, ...] = ()
    finding: Finding | None = None
    failures: tuple[str, ...] = ()


def compare_test(plan: ParityPlan, folder: Path, test: int) -> Comparison:
    """Compare what both sides made of a test.

    Args:
        plan: that both carried out.
        folder: with their results.
        test: its number.
    """
    names = _compared_sides(plan)
    ours, theirs, *more = (arrays(result_file(folder, name, test)) for name in names)
    baseline = more[0] if more else None
    stages = list(compare_stages(ours, theirs, baseline))
    found: list[Distance] = [d for d in stages if d.name in _BEFORE]
    for step in plan.traced if plan.layers != "none" and plan.reference != "hybrid" else ():
        traces = [arrays(trace_file(folder, name, test, step)) for name in names]
        found += compare_activations(_names(plan), traces[0], traces[1], step, *traces[2:])
    found += [d for d in stages if d.name not in _BEFORE]
    if decoded_file(folder, test).is_file():
        decoded = arrays(decoded_file(folder, test))["frames"].astype(np.float32)
        reference = theirs["frames"].astype(np.float32)
        found.append(distance("vae", decoded, reference, STAGE_BUDGETS["vae"]))
    frames = compare_frames(ours["frames"], theirs["frames"])
    rounded = compare_frames(baseline["frames"], theirs["frames"]) if baseline else None
    failures = [*_budget_failures(found), *_frame_failures(frames, rounded, plan.dtype)]
    diverged = next((d for d in found if not d.passed), None)
    finding = None
    if diverged is not None:
        finding = _diagnose(diverged, plan, folder, test, ours, theirs)
    elif failures:
        finding = Finding("frames", None, "unknown", "nothing before the frames diverges")
    return Comparison(frames, rounded, tuple(found), finding, tuple(failures))


def _compared_sides(plan: ParityPlan) -> list[str]:
    baseline = "bf16_baseline"
    return ["jax", "reference", *([baseline] if baseline in side_names(plan) else [])]


def _names(plan: ParityPlan) -> list[str]:
    config = plan.checkpoint().config
    return activation_names(
        config.num_layers,
        image=config.model_type == "i2v",
        fps=config.inject_sample_info,
        layers=plan.layers,
    )


def _diagnose(
    diverged: Distance, plan: ParityPlan, folder: Path, test: int, ours: Arrays, theirs: Arrays
) -> Finding:
    if diverged.name == "vae":
        decoded = arrays(decoded_file(folder, test))["frames"]
        ours, theirs = (
            dict(values) | {"vae": np.moveaxis(frames, -1, 0)[None]}
            for values, frames in ((ours, decoded), (theirs, theirs["frames"]))
        )
    if diverged.name.partition(".")[0] in STAGE_BUDGETS:
        return diagnose_stage(diverged, ours, theirs, plan.steps)
    assert diverged.step is not None
    config = plan.checkpoint().config
    frames, rows, columns = latent_shape(plan.num_frames, plan.height, plan.width)
    _, p, q = config.patch_size
    text = load_call(theirs, diverged.step)["encoder_hidden_states"]
    mine, right = (
        arrays(trace_file(folder, side, test, diverged.step)) for side in ("jax", "reference")
    )
    shape = CallShape((frames, rows // p, columns // q), config.num_heads, config.eps)
    maps = read_linear_maps(plan.checkpoint(), diverged.name)
    lengths = np.any(text != 0, axis=-1).sum(-1)
    return diagnose_activation(diverged, mine, right, shape, lengths, maps)


def _budget_failures(found: Sequence[Distance]) -> Iterator[str]:
    def where(one: Distance) -> str:
        return one.name if one.step is None else f"{one.name} in step {one.step}"

    bad = [d for d in found if not d.passed]
    if bad:
        worst = max(bad, key=lambda d: d.relative_l2 / d.budget if d.budget else math.inf)
        yield (
            f"{len(bad)} of {len(found)} activations and stages are out of their budgets, the "
            f"first at {where(bad[0])}, the farthest at {where(worst)} ({worst.relative_l2:.1e} "
            f"against {worst.budget:.1e})"
        )


def _frame_failures(
    found: FrameDistance, bf16_baseline: FrameDistance | None, dtype: str
) -> Iterator[str]:
    if dtype == "float32":
        if found.psnr < LEAST_PSNR:
            yield f"PSNR is {found.psnr:.2f} dB, less than {LEAST_PSNR:g}"
        if found.ssim < LEAST_SSIM:
            yield f"SSIM is {found.ssim:.6f}, less than {LEAST_SSIM:g}"
    elif bf16_baseline is not None:
        ratio = 10 ** ((bf16_baseline.psnr - found.psnr) / 20)
        if ratio > BASELINE_FACTOR:
            yield f"the error of the frames is {ratio:.2f} times PyTorch's own in {dtype}"


def _timings(folder: Path, side: str) -> JsonObject | None:
    """Return seconds and MiB of a side; a run is its median step, times their number."""
    path = side_folder(folder, side) / "timings.json"
    if not path.is_file():
        return None
    measured = json.loads(path.read_text("utf-8"))
    # A first step warms up (PyTorch's took up to 20 times as long as the others): no sums.
    runs = [statistics.median(test["steps"]) * len(test["steps"]) for test in measured["tests"]]
    return {
        "load": measured["load"],
        "compile": sum(test["compile"] for test in measured["tests"]),
        "runs": runs,
        "median": statistics.median(runs),
        "peak_mib": measured["peak_mib"],
    }


def video_name(test: int, only: str | None = None) -> str:
    """Return the name of a test's video: side by side, or of one side ``only``."""
    return f"test_{test}.mp4" if only is None else f"test_{test}_{only}.mp4"


def build_report(
    plan: ParityPlan,
    folder: Path,
    comparisons: Sequence[Comparison],
    environment: Mapping[str, str],
    only: str | None = None,
) -> JsonObject:
    """Return what ``report.json`` holds; docs/validation.md describes it."""
    failures = [
        f"test {number}: {failure}"
        for number, comparison in enumerate(comparisons)
        for failure in comparison.failures
    ]
    # In the same dtype: the same work.
    baseline = "bf16_baseline"
    torch = _timings(folder, baseline if baseline in side_names(plan, only) else "reference")
    jax = _timings(folder, "jax")
    ratio = jax["median"] / torch["median"] if jax and torch and torch["median"] else None
    name = Path(plan.model).name
    return {
        "schema": _SCHEMA,
        "verdict": "not compared" if only else "fail" if failures else "pass",
        "failures": failures,
        "settings": dataclasses.asdict(plan) | {"model": name},
        "environment": dict(environment),
        "model": {
            "name": name,
            "task": plan.task,
            "dtype": plan.dtype,
            "reference": plan.reference,
        },
        "tests": [
            {
                "seed": plan.seeds[number],
                "prompt": plan.prompts[number],
                "frames": _frames_json(comparison.frames),
                "bf16_baseline": _frames_json(comparison.bf16_baseline),
                "layers": [distance_json(d) for d in comparison.distances],
                "finding": comparison.finding and dataclasses.asdict(comparison.finding),
                "video": video_name(number, only),
            }
            for number, comparison in enumerate(comparisons)
        ],
        "timings": {"torch": torch, "jax": jax, "ratio": ratio} if torch or jax else None,
    }


def _frames_json(found: FrameDistance | None) -> JsonObject | None:
    """Return the distance of frames; JSON has no infinity: the PSNR of equal frames is null."""
    if found is None:
        return None

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    by_frame = [finite(value) for value in found.psnr_by_frame]
    return dataclasses.asdict(found) | {"psnr": finite(found.psnr), "psnr_by_frame": by_frame}


def distance_json(found: Distance) -> JsonObject:
    """Return a distance for JSON; what is infinite is the largest float."""
    largest = float(np.finfo(np.float64).max)
    return {
        key: largest if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in (dataclasses.asdict(found) | {"passed": found.passed}).items()
    }


def write_side_by_side(theirs: Frames, ours: Frames, path: Path, fps: int) -> None:
    """Write a video of three panels: the reference, ours, and ten times their difference."""
    gap = np.abs(theirs.astype(np.int16) - ours.astype(np.int16)) * _AMPLIFIED
    panels = [theirs, ours, np.minimum(gap, 255).astype(np.uint8)]
    write_video(path, np.concatenate(panels, axis=2), fps=fps)


def compare_videos(a: Path, b: Path) -> FrameDistance:
    """Compare two video files, frame by frame.

    Raises:
        RequestError: one of them is no video.
        ValueError: they have different sizes or lengths.
    """
    return compare_frames(read_video(a)[0], read_video(b)[0])
