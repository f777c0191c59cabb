"""``skyreels-jax validate``: is the JAX model the PyTorch model, and if not, where not?

Exit codes: 0 it is; 1 it is not; 2 it could not be found out.
"""

import argparse
import tempfile
import traceback
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from skyreels_jax.errors import RequestError, SkyReelsError
from skyreels_jax.outputs import path_of

if TYPE_CHECKING:
    from skyreels_jax.parity.recording import JsonObject

_DIFFERENT: Final = 1
_UNKNOWN: Final = 2
# Who runs the transformer on the other side.
_REFERENCES: Final[Mapping[str, str]] = {
    "diffusers": "PyTorch",
    "original-numerics": "PyTorch",
    "hybrid": "JAX in the hybrid pipeline",
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``validate`` verb."""
    parser = subparsers.add_parser(
        "validate", help="compare the JAX model with PyTorch's, layer by layer and frame by frame"
    )
    _add_flags(parser)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags, under the names of the described script too."""
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--model",
        "--model_id",
        metavar="DIR|ID",
        help="a checkpoint in either format; a small random one is made if none is given",
    )
    what.add_argument("--preset", metavar="NAME", help="the released checkpoint it is")
    what.add_argument("--reference", default="diffusers", help="or original-numerics, or hybrid")
    what.add_argument("--videos", nargs=2, metavar="MP4", type=Path, help="two files alone")
    what.add_argument("--trace", nargs=2, metavar="NPZ", type=Path, help="two traces alone")
    only = what.add_mutually_exclusive_group()
    only.add_argument("--jax-only", "--jax_only", dest="only", action="store_const", const="jax")
    only.add_argument(
        "--torch-only", "--torch_only", dest="only", action="store_const", const="torch"
    )
    size = parser.add_argument_group("videos")
    size.add_argument("--height", type=int, metavar="PIXELS")
    size.add_argument("--width", type=int, metavar="PIXELS")
    size.add_argument("--num-frames", "--num_frames", type=int, metavar="N", help="4 k + 1")
    size.add_argument("--steps", "--num_inference_steps", type=int)
    size.add_argument("--guidance-scale", "--guidance_scale", type=float, metavar="X")
    size.add_argument("--shift", type=float)
    size.add_argument("--seed", type=int, default=0, help="of the first test; the next add one")
    size.add_argument("--prompt", default="a red ball rolls over green grass")
    size.add_argument("--image", metavar="FILE", help="for image-to-video; one is drawn otherwise")
    size.add_argument("--num-tests", "--num_tests", type=int, default=1, metavar="N")
    how = parser.add_argument_group("how")
    how.add_argument("--dtype", default="float32", metavar="float32|bfloat16")
    how.add_argument("--layers", default="all", metavar="all|blocks|none", help="what is recorded")
    how.add_argument("--device", default="cpu", help="of PyTorch: cpu, cuda or auto")
    how.add_argument(
        "--output-dir", "--output_dir", type=Path, default=Path("test_results"), metavar="DIR"
    )


def run(args: argparse.Namespace) -> int:
    """Compare, write and print."""
    try:
        if args.videos:
            return _videos(*args.videos)
        if args.trace:
            return _traces(*args.trace)
        return _pipelines(args)
    except SkyReelsError:
        raise
    except Exception:
        # A bug, like any other traceback; but the exit code 1 would say that the models differ.
        traceback.print_exc()
        return _UNKNOWN


def _videos(a: Path, b: Path) -> int:
    from skyreels_jax.parity.verdict import LEAST_PSNR, LEAST_SSIM, compare_videos

    try:
        found = compare_videos(a, b)
    except ValueError as error:
        raise RequestError(f"--videos: {error}") from error
    print(f"PSNR {found.psnr:.2f} dB, SSIM {found.ssim:.6f}")
    print(f"differences of 255: at most {found.max_difference:g}, 99 % within {found.p99:g}")
    passed = found.psnr >= LEAST_PSNR and found.ssim >= LEAST_SSIM
    print("pass" if passed else f"fail: less than {LEAST_PSNR:g} dB or {LEAST_SSIM:g}")
    return 0 if passed else _DIFFERENT


def _traces(a: Path, b: Path) -> int:
    from skyreels_jax.parity.compare import LAYER_BUDGET, distance
    from skyreels_jax.parity.recording import arrays

    try:
        ours, theirs = arrays(a), arrays(b)
        names = [name for name in theirs if name in ours]
        worst = [distance(name, ours[name], theirs[name], LAYER_BUDGET) for name in names]
        alone = sorted(set(ours) ^ set(theirs))
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise RequestError(f"--trace: {a.name} or {b.name} is no trace: {error}") from error
    if not names:
        raise RequestError(f"--trace: {a.name} and {b.name} have no activation in common")
    for found in worst:
        mark = " " if found.passed else "!"
        print(f"{mark} {found.name:<32} {found.relative_l2:.2e}  max {found.max_abs:.2e}")
    for name in alone:
        print(f"? {name:<32} only in one of them")
    bad = [found for found in worst if not found.passed]
    print("pass" if not bad else f"fail: first at {bad[0].name}")
    return _DIFFERENT if bad or alone else 0


def _pipelines(args: argparse.Namespace) -> int:
    from skyreels_jax.hub import locate
    from skyreels_jax.media import read_image
    from skyreels_jax.parity.plan import plan_comparison
    from skyreels_jax.parity.run import validate
    from skyreels_jax.torch_side.modules import require_torch

    require_torch()
    output = path_of(args.output_dir, "--output-dir")
    names = ("height", "width", "num_frames", "steps", "guidance_scale", "shift")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    image = None if args.image is None else read_image(args.image)
    with _model(args.model) as folder:
        plan = plan_comparison(
            folder if args.model is None else locate(args.model).folder,
            num_tests=args.num_tests,
            seed=args.seed,
            prompt=args.prompt,
            image=image,
            reference=args.reference,
            dtype=args.dtype,
            layers=args.layers,
            device=args.device,
            preset=args.preset,
            **({"height": 64, "width": 96, "num_frames": 9, "steps": 8} | settings)
            if args.model is None
            else settings,
        )
        report = validate(plan, output, image=image, only=args.only, log=print)
    for line in _summary(report):
        print(line)
    print(f"report: {output / 'report.html'}")
    return _DIFFERENT if report["verdict"] == "fail" else 0


@contextmanager
def _model(given: str | None) -> Iterator[Path]:
    """Yield the folder of the model, or of a small random one that is gone afterwards."""
    if given is not None:
        yield Path(given)
        return
    from skyreels_jax.testing.random_checkpoint import make_checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        yield make_checkpoint(Path(temporary) / "random-i2v", "i2v")


def _summary(report: "JsonObject") -> Iterator[str]:
    """Yield the lines of a short table and the verdict."""
    yield f"{'test':>4} {'PSNR dB':>9} {'SSIM':>9} {'max':>5} {'worst layer':<34} {'error':>8}"
    for number, test in enumerate(report["tests"]):
        frames = test["frames"]
        if frames is None:
            continue
        psnr = "equal" if frames["psnr"] is None else f"{frames['psnr']:.2f}"
        layers = test["layers"]
        worst = max(layers, key=lambda d: d["relative_l2"]) if layers else None
        layer = "" if worst is None else f"{worst['name']:<34} {worst['relative_l2']:.1e}"
        yield (
            f"{number:>4} {psnr:>9} {frames['ssim']:>9.6f} {frames['max_difference']:>5g} {layer}"
        )
        if test["bf16_baseline"] is not None:
            own = test["bf16_baseline"]
            value = "equal" if own["psnr"] is None else f"{own['psnr']:.2f}"
            yield f"     {value:>8} {own['ssim']:>9.6f}       PyTorch in the same dtype"
    timings = report["timings"]
    if timings and timings["ratio"] is not None:
        other = _REFERENCES[report["model"]["reference"]]
        yield (
            f"denoising: JAX {timings['jax']['median']:.2f} s, {other} "
            f"{timings['torch']['median']:.2f} s: {timings['ratio']:.2f}"
        )
    for number, test in enumerate(report["tests"]):
        if finding := test["finding"]:
            step = "" if finding["step"] is None else f", step {finding['step']}"
            yield f"test {number} diverges first at {finding['name']}{step}: {finding['kind']}"
            yield f"  {finding['detail']}"
    yield f"verdict: {report['verdict']}"
    for failure in report["failures"]:
        yield f"  {failure}"
