"""From what both sides left in a folder to a report: distances, findings, timings, a verdict."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from skyreels_jax.geometry import latent_shape
from skyreels_jax.media import read_video, write_video
from skyreels_jax.parity.compare import (
    YARDSTICK,
    Distance,
    compare_places,
    compare_stages,
    distance,
)
from skyreels_jax.parity.diagnosis.diagnose import (
    Finding,
    diagnose_place,
    diagnose_stage,
    first_departure,
)
from skyreels_jax.parity.diagnosis.hypotheses import Shape
from skyreels_jax.parity.diagnosis.linear_faults import kernels_of
from skyreels_jax.parity.diagnosis.places import places
from skyreels_jax.parity.metrics import FrameDistance, compare_frames
from skyreels_jax.parity.plan import Plan, sides_of
from skyreels_jax.parity.recording import arrays, load_call
from skyreels_jax.parity.worker import raw, result_file, trace_file
from skyreels_jax.shapes import Frames

SCHEMA: Final = "skyreels-jax-validation/1"
# Of videos in float32. Measured 83.2 to 90.3 dB, and 1 - 2e-7 at worst.
LEAST_PSNR: Final = 60.0
LEAST_SSIM: Final = 0.9999
VAE_BUDGET: Final = 5e-3
# The difference in the third panel of a video, so many times.
AMPLIFIED: Final = 10
BEFORE: Final = ("text", "text.negative", "image", "mask", "condition", "timesteps", "sigmas")

Values = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Judged:
    """One test: distances in the order of the work, and what is made of them."""

    frames: FrameDistance | None
    yardstick: FrameDistance | None
    distances: tuple[Distance, ...]
    finding: Finding | None
    failures: tuple[str, ...]


def judge(plan: Plan, folder: Path, test: int) -> Judged:
    """Compare what both sides made of a test.

    Args:
        plan: that both carried out.
        folder: with their results.
        test: its number.
    """
    rounded = "yardstick" in sides_of(plan)
    names = ["jax", "reference", *(["yardstick"] if rounded else [])]
    ours, theirs, *more = (arrays(result_file(folder, name, test)) for name in names)
    yardstick = more[0] if more else None
    stages = list(compare_stages(ours, theirs, yardstick))
    found: list[Distance] = [d for d in stages if d.name in BEFORE]
    for step in plan.traced if plan.layers != "none" and plan.reference != "hybrid" else ():
        found += _traced(plan, folder, test, step, rounded)
    found += [d for d in stages if d.name not in BEFORE]
    decoded = raw(folder, "jax") / f"decoded-{test}.npz"
    if decoded.is_file():
        frames = arrays(decoded)["frames"].astype(np.float32)
        found.append(distance("vae", frames, theirs["frames"].astype(np.float32), VAE_BUDGET))
    seen = compare_frames(ours["frames"], theirs["frames"])
    measure = compare_frames(yardstick["frames"], theirs["frames"]) if yardstick else None
    departed = first_departure(found)
    failures = [*_place_failures(found), *_frame_failures(seen, measure, plan.dtype)]
    finding = None
    if departed is not None:
        finding = _diagnosed(departed, plan, folder, test, ours, theirs)
    elif failures:
        finding = Finding("frames", None, "unknown", "nothing before the pictures departs")
    return Judged(seen, measure, tuple(found), finding, tuple(failures))


def _traced(plan: Plan, folder: Path, test: int, step: int, rounded: bool) -> Iterator[Distance]:
    names = ["jax", "reference", *(["yardstick"] if rounded else [])]
    traces = [arrays(trace_file(folder, name, test, step)) for name in names]
    yield from compare_places(_names(plan), traces[0], traces[1], step, *traces[2:])


def _names(plan: Plan) -> list[str]:
    config = plan.checkpoint().config
    return places(
        config.num_layers,
        image=config.model_type == "i2v",
        fps=config.inject_sample_info,
        layers=plan.layers,
    )


def _diagnosed(
    departed: Distance, plan: Plan, folder: Path, test: int, ours: Values, theirs: Values
) -> Finding:
    if departed.name == "vae":
        given = dict(theirs) | {"vae": np.moveaxis(theirs["frames"], -1, 0)[None]}
        frames = arrays(raw(folder, "jax") / f"decoded-{test}.npz")["frames"]
        made = dict(ours) | {"vae": np.moveaxis(frames, -1, 0)[None]}
        return diagnose_stage(departed, made, given, plan.steps)
    if departed.name in BEFORE or departed.name.startswith("latents"):
        return diagnose_stage(departed, ours, theirs, plan.steps)
    assert departed.step is not None
    config = plan.checkpoint().config
    frames, rows, columns = latent_shape(plan.num_frames, plan.height, plan.width)
    _, p, q = config.patch_size
    text = load_call(theirs, departed.step)["encoder_hidden_states"]
    mine, right = (
        arrays(trace_file(folder, side, test, departed.step)) for side in ("jax", "reference")
    )
    shape = Shape((frames, rows // p, columns // q), config.num_heads, config.eps)
    kernels = kernels_of(plan.checkpoint(), departed.name)
    lengths = np.any(text != 0, axis=-1).sum(-1)
    return diagnose_place(departed, mine, right, _names(plan), shape, lengths, kernels)


def _place_failures(found: Sequence[Distance]) -> Iterator[str]:
    bad = [d for d in found if not d.passed]
    if bad:
        worst = max(bad, key=lambda d: d.relative_l2 / d.budget if d.budget else math.inf)
        yield (
            f"{len(bad)} of {len(found)} places are out of their budgets, the first at "
            f"{_where(bad[0])}, the farthest at {_where(worst)} ({worst.relative_l2:.1e} against "
            f"{worst.budget:.1e})"
        )


def _where(found: Distance) -> str:
    return found.name if found.step is None else f"{found.name} in step {found.step}"


def _frame_failures(
    seen: FrameDistance, yardstick: FrameDistance | None, dtype: str
) -> Iterator[str]:
    if dtype == "float32":
        if seen.psnr < LEAST_PSNR:
            yield f"PSNR is {seen.psnr:.2f} dB, less than {LEAST_PSNR:g}"
        if seen.ssim < LEAST_SSIM:
            yield f"SSIM is {seen.ssim:.6f}, less than {LEAST_SSIM:g}"
    elif yardstick is not None:
        ratio = 10 ** ((yardstick.psnr - seen.psnr) / 20)
        if ratio > YARDSTICK:
            yield f"the error of the frames is {ratio:.2f} times PyTorch's own in {dtype}"


def timings_of(folder: Path, side: str) -> dict[str, Any] | None:
    """Seconds and MiB of a side, as in a report: a run is its median step, times their number."""
    path = raw(folder, side) / "timings.json"
    if not path.is_file():
        return None
    told = json.loads(path.read_text("utf-8"))
    # A first step warms up (PyTorch's took up to 20 times as long as the others): no sums.
    runs = [statistics.median(test["steps"]) * len(test["steps"]) for test in told["tests"]]
    return {
        "load": told["load"],
        "compile": sum(test["compile"] for test in told["tests"]),
        "runs": runs,
        "median": statistics.median(runs),
        "peak_mib": told["peak_mib"],
    }


def video_name(test: int, only: str | None = None) -> str:
    """Of a test's video: side by side, or of one side ``only``."""
    return f"test_{test}.mp4" if only is None else f"test_{test}_{only}.mp4"


def report_of(
    plan: Plan,
    folder: Path,
    judged: Sequence[Judged],
    environment: Mapping[str, str],
    only: str | None = None,
) -> dict[str, Any]:
    """What ``report.json`` holds; docs/validation.md describes it."""
    failures = [
        f"test {number}: {failure}" for number, j in enumerate(judged) for failure in j.failures
    ]
    # In the same dtype: the same work.
    alike = "yardstick" if "yardstick" in sides_of(plan, only) else "reference"
    torch, ours = (timings_of(folder, side) for side in (alike, "jax"))
    both = torch and ours and torch["median"]
    ratio = ours["median"] / torch["median"] if both and ours and torch else None
    settings = dataclasses.asdict(plan)
    return {
        "schema": SCHEMA,
        "verdict": "not compared" if only else "fail" if failures else "pass",
        "failures": failures,
        "settings": settings | {"model": Path(plan.model).name},
        "environment": dict(environment),
        "model": {
            "name": Path(plan.model).name,
            "task": plan.task,
            "dtype": plan.dtype,
            "reference": plan.reference,
        },
        "tests": [
            {
                "seed": plan.seeds[number],
                "prompt": plan.prompts[number],
                "frames": frames_json(j.frames),
                "yardstick": frames_json(j.yardstick),
                "layers": [distance_json(d) for d in j.distances],
                "finding": None if j.finding is None else dataclasses.asdict(j.finding),
                "video": video_name(number, only),
            }
            for number, j in enumerate(judged)
        ],
        "timings": {"torch": torch, "jax": ours, "ratio": ratio} if torch or ours else None,
    }


def frames_json(found: FrameDistance | None) -> dict[str, Any] | None:
    """JSON has no infinity: equal frames have a PSNR of null."""
    if found is None:
        return None
    values = dataclasses.asdict(found)
    values["psnr"] = _finite(found.psnr)
    values["psnr_by_frame"] = [_finite(x) for x in found.psnr_by_frame]
    values["ssim_by_frame"] = list(found.ssim_by_frame)
    return values


def distance_json(found: Distance) -> dict[str, Any]:
    """A distance; what is infinite is the largest float."""
    values = dataclasses.asdict(found) | {"passed": found.passed}
    largest = float(np.finfo(np.float64).max)
    return {
        key: largest if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def side_by_side(theirs: Frames, ours: Frames, path: Path, fps: int) -> None:
    """A video of three panels: the reference, ours, and ten times their difference."""
    gap = np.abs(theirs.astype(np.int16) - ours.astype(np.int16)) * AMPLIFIED
    panels = [theirs, ours, np.minimum(gap, 255).astype(np.uint8)]
    write_video(path, np.concatenate(panels, axis=2), fps=fps)


def compare_videos(a: Path, b: Path) -> FrameDistance:
    """Two video files, frame by frame.

    Raises:
        RequestError: one of them is no video.
        ValueError: they have different sizes or lengths.
    """
    return compare_frames(read_video(a)[0], read_video(b)[0])
