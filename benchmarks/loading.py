"""Loading UMT5-XXL (11.4 GB of bfloat16) beside reading the same bytes into memory.

Each in a process of its own, in turn, with the file in the page cache as far as that holds it. It
exits with 1 where loading takes more than 2.5 times reading.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.measure import head, middle, peak_gib, row, timed, versions
from benchmarks.real_size import write

from skyreels_jax.models.umt5 import UMT5_XXL
from skyreels_jax.weights.components.umt5 import UMT5, stored_text_encoder
from skyreels_jax.weights.layout import Layout

MOST = 2.5
PIECE = 1 << 24


def read(folder: Path) -> None:
    """Every byte of the files, once, into memory that holds all of them."""
    held = []
    for file in sorted(folder.glob("*.safetensors")):
        held.append(into := np.empty(file.stat().st_size, np.uint8))
        with file.open("rb", buffering=0) as source:
            done = 0
            while count := source.readinto(memoryview(into[done : done + PIECE])):
                done += count
        assert done == into.size


def load(folder: Path) -> None:
    """As a generation does."""
    layout = Layout(folder, "diffusers", folder, {}, {"text_encoder": folder})
    model = stored_text_encoder(layout).load(jnp.bfloat16)
    jax.block_until_ready(jax.tree.leaves(model))


def measured(what: str, folder: Path) -> None:
    """In this process: print seconds and the peak."""
    jax.device_put(np.zeros(1)).block_until_ready()
    taken = timed(lambda: {"read": read, "load": load}[what](folder))[1]
    print(taken.clock, peak_gib())


def main() -> None:
    """Make the folder, compare, remove it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make it (a temporary place)")
    parser.add_argument("--only", choices=("read", "load"), help="internal: do that")
    options = parser.parse_args()
    if options.only:
        measured(options.only, options.folder)
        return
    found: dict[str, list[tuple[float, float]]] = {"read": [], "load": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write(Path(folder), UMT5, UMT5_XXL, jnp.bfloat16)
        for _ in range(options.rounds):
            for what, times in found.items():
                words = ["-m", "benchmarks.loading", "--only", what, "--folder", folder]
                out = subprocess.run([sys.executable, *words], capture_output=True, check=True)
                clock, peak = map(float, out.stdout.split())
                times.append((clock, peak))
                print(what, f"{clock:.1f} s, peak {peak:.2f} GiB", flush=True)
    print(versions())
    head("what", "seconds, median", "of reading", "peak GiB")
    clock = {what: middle([one[0] for one in times]) for what, times in found.items()}
    for what, times in found.items():
        ratio = clock[what] / clock["read"]
        row(what, f"{clock[what]:.1f}", f"{ratio:.2f}", f"{max(one[1] for one in times):.2f}")
    sys.exit(clock["load"] > MOST * clock["read"])


if __name__ == "__main__":
    main()
