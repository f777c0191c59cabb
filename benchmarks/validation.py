"""Validation of a 1.3B-shaped model with random weights: one step, blocks recorded, peak memory.

The transformer has the released shape but for its text width; encoders and VAE are small. It takes
6 GB of disk while it runs.
"""

import argparse
import dataclasses
import resource
import shutil
import tempfile
import time
from pathlib import Path

from benchmarks.measure import head, row, versions

from skyreels_jax.models.transformer_config import T2V_1_3B
from skyreels_jax.parity.plan import plan_comparison
from skyreels_jax.parity.run import validate
from skyreels_jax.testing.random_checkpoint import TEXT_DIM, make_checkpoint, write_random
from skyreels_jax.weights.components.transformer import TRANSFORMER

WHO = {"either side": resource.RUSAGE_CHILDREN, "comparison": resource.RUSAGE_SELF}
CONFIG_1_3B = dataclasses.replace(T2V_1_3B, text_dim=TEXT_DIM)


def make(folder: Path) -> Path:
    """A small checkpoint with a large transformer."""
    make_checkpoint(folder, "t2v")
    shutil.rmtree(folder / "transformer")
    write_random(folder / "transformer", TRANSFORMER, CONFIG_1_3B)
    return folder


def main() -> None:
    """Print a table for docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", default="blocks")
    options = parser.parse_args()
    print(versions())
    with tempfile.TemporaryDirectory() as temporary:
        folder = make(Path(temporary) / "model")
        size = {"height": 272, "width": 480, "num_frames": 17, "steps": 1, "guidance_scale": 1.0}
        plan = plan_comparison(folder, layers=options.layers, **size)
        out = Path(temporary) / "out"
        start = time.perf_counter()
        report = validate(plan, out, log=print)
        seconds = time.perf_counter() - start
        traces = sum(file.stat().st_size for file in out.rglob("trace-*.npz"))
    worst = max(report["tests"][0]["layers"], key=lambda layer: layer["relative_l2"])
    head("side", "load s", "step s", "peak GiB")
    for side in ("torch", "jax"):
        told = report["timings"][side]
        row(
            *(side, f"{told['load']:.0f}", f"{told['median']:.1f}"),
            f"{told['peak_mib'] / 1024:.2f}",
        )
    print(f"\n{report['verdict']}; worst layer {worst['name']}: {worst['relative_l2']:.1e}")
    # With tracing; the table's are those of the videos alone.
    peaks = (resource.getrusage(who).ru_maxrss for who in WHO.values())
    told = ", ".join(f"{name} {peak / 2**20:.2f}" for name, peak in zip(WHO, peaks, strict=True))
    print(f"{seconds:.0f} s in all, {traces / 2**20:.0f} MiB of traces; peaks, GiB: {told}")


if __name__ == "__main__":
    main()
