"""Long videos: memory and time per frame by length, on a small random checkpoint.

Each length runs the command line in a process of its own, after one that fills the compilation
cache. Memory is the process's peak; time per frame is that of denoising and decoding, compilation
apart, over the frames made.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import versions

from skyreels_jax.testing.random_checkpoint import make_checkpoint

LENGTHS = (97, 737)
SIZE = ("--height", "128", "--width", "128", "--steps", "4", "--seed", "1", "--dtype", "float32")
STAGES = ("denoise", "decode")


def child(words: list[str]) -> None:
    """Run the command line here and print the peak of this process's memory."""
    from skyreels_jax.cli.main import main

    assert main(words) == 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak}))


def run(
    model: Path, out: Path, frames: int, mode: tuple[str, ...]
) -> tuple[float, dict[str, float]]:
    """Peak in MiB, and seconds by stage."""
    words = ["generate", "--model", str(model), "--prompt", "a fox", "--num-frames", str(frames)]
    words += [*SIZE, *mode, "--output", str(out / "x.mp4"), "--overwrite", "--no-prompt-cache"]
    words += ["--base-num-frames", "97", "--overlap-history", "17"]
    program = [sys.executable, "-m", "benchmarks.long_video", "--child", *words]
    environment = os.environ | {"SKYREELS_JAX_CACHE": str(out / "cache")}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=True)
    lines = done.stdout.splitlines()
    seconds = {
        parts[0]: float(parts[1])
        for parts in (line.split() for line in lines)
        if len(parts) > 2 and parts[0] in (*STAGES, "compile") and parts[2] == "s"
    }
    return json.loads(lines[-1])["peak"] / 2**20, seconds


def main() -> None:
    """Print a table for docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    options = parser.parse_args()
    print(versions())
    print("| hand-over | mode | frames | peak MiB | denoise ms/frame | decode ms/frame |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        make_checkpoint(out / "df", "df", "diffusers")
        for hand_over in ("latents", "pixels"):
            for name, ar_step in (("synchronous", "0"), ("asynchronous", "1")):
                mode = ("--hand-over", hand_over, "--ar-step", ar_step)
                for warm in (True, False):
                    for frames in options.lengths:
                        if warm and frames != max(options.lengths):
                            continue
                        peak, seconds = run(out / "df", out, frames, mode)
                        if warm:
                            continue
                        each = " | ".join(f"{1000 * seconds[s] / frames:.1f}" for s in STAGES)
                        print(
                            f"| {hand_over} | {name} | {frames} | {peak:.0f} | {each} |", flush=True
                        )


if __name__ == "__main__":
    if "--child" in sys.argv[1:2]:
        child(sys.argv[2:])
    else:
        main()
