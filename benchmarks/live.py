"""Live: time to the first frame, frames a second and memory of a stream, by its length.

A stream of a model is taken as fast as it is made, in memory and, with --write, into a fragmented
MP4. Each quarter of the frames after the first blocks has a row: time a frame and memory should be
flat. Processor time is that of the whole process, so that a busy machine shows.
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from benchmarks.measure import head, row, versions

from skyreels_jax.hub import enable_compilation_cache
from skyreels_jax.media import GrowingVideo
from skyreels_jax.pipeline import Pipeline

# Blocks before the first quarter: programs are compiled in them.
WARM = 4


def resident() -> float:
    """MiB of this process's memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    """Print a table for docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--prompt", default="a red star moves right on a black background")
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--block", type=int)
    parser.add_argument("--window", type=int)
    parser.add_argument("--sink", type=int)
    parser.add_argument("--write", action="store_true", help="into a file of no name too")
    options = parser.parse_args()
    enable_compilation_cache()
    pipe = Pipeline.from_pretrained(options.model, dtype=options.dtype)
    stream = pipe.stream(
        options.prompt,
        seed=1,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        causal_block_size=options.block,
        window=options.window,
        sink=options.sink,
    )
    at: list[tuple[int, float, float, float]] = []
    with tempfile.TemporaryFile() as file, stream:
        video = GrowingVideo(file, fps=stream.request.fps, size=stream.request.size)
        with video if options.write else tempfile.TemporaryDirectory():
            for frames in stream:
                if options.write:
                    video.append(frames)
                cpu = sum(os.times()[:2])
                at.append((stream.times.frames, time.perf_counter(), cpu, resident()))
                if stream.times.frames >= options.frames:
                    break
    times, fps = stream.times, float(stream.request.fps)
    print(versions(), stream.request.values())
    print(f"first frame after {times.first_frame:.2f} s; largest lag {times.largest_lag:.2f} s")
    head(
        *("frames", "frames a second", f"times play ({fps:g})", "ms of the middle block"),
        *("CPU ms a frame", "MiB at its end"),
    )
    marks = np.linspace(min(WARM, len(at) - 2), len(at) - 1, 5).astype(int)
    speeds, middle = [], []
    for a, b in zip(marks, marks[1:], strict=False):
        (first, start, before, _), (last, end, after, memory) = at[a], at[b]
        speeds.append((last - first) / (end - start))
        # What else the machine does takes some blocks long, and hardly moves the middle one.
        middle.append(1000 * float(np.median(np.diff([when for _, when, _, _ in at[a : b + 1]]))))
        cpu = 1000 * (after - before) / (last - first)
        row(
            f"{first}-{last}",
            f"{speeds[-1]:.1f}",
            f"{speeds[-1] / fps:.2f}",
            f"{middle[-1]:.1f}",
            f"{cpu:.1f}",
            f"{memory:.0f}",
        )
    growth = at[-1][3] - at[marks[1]][3]
    print(
        f"slowest quarter {min(speeds) / max(speeds):.1%} of the fastest, by its middle block "
        f"{min(middle) / max(middle):.1%}; the last {speeds[-1] / speeds[0]:.1%} of the first; "
        f"memory {growth:+.1f} MiB"
    )


if __name__ == "__main__":
    main()
