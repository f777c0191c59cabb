"""The table of what the named requests give: made, written, read and compared.

``python -m tests.golden.record`` writes ``table.json``; with ``--check`` it writes nothing and
prints what differs. Names of requests limit it to those.

A row holds SHA-256 sums of the latents and the frames, which are the same only where the same
programs run on the same kind of processor (:func:`environment`), and a few numbers that are nearly
the same anywhere: inner products with fixed pseudo-random vectors.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
from tests.golden.named_requests import BY_NAME, REQUESTS, NamedRequest, Studio

TABLE: Final = Path(__file__).with_name("table.json")
PROJECTIONS: Final = 8
DIGITS: Final = 9
# Whose versions decide the bits: of the programs, of random numbers, of pictures and of files.
PACKAGES: Final = (
    *("av", "diffusers", "flax", "jax", "jaxlib", "numpy", "pillow", "torch", "transformers"),
)

Row = dict[str, Any]


def environment() -> dict[str, Any]:
    """What the SHA-256 sums hold for; elsewhere only the projections are compared."""
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpu = ""
    found = {key: re.search(rf"^{key}\s*:\s*(.*)$", cpu, re.M) for key in ("model name", "flags")}
    model, flags = (match[1] if match else "" for match in found.values())
    return {
        **{name: _version(name) for name in PACKAGES},
        "device": jax.default_backend(),
        "machine": platform.machine(),
        "cpu": model,
        "cpu_flags": hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:16],
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def made(studio: Studio, request: NamedRequest, **changes: Any) -> Row:
    """The row of a request, with ``changes`` of its settings."""
    latents, frames = studio.run(request, **changes)
    row: Row = {}
    if latents is not None:
        if latents.dtype != np.float32:
            raise TypeError(f"{request.name}: latents of {latents.dtype}")
        row["latents"] = _numbers(latents, latents)
    if frames.dtype != np.uint8:
        raise TypeError(f"{request.name}: frames of {frames.dtype}")
    row["frames"] = _numbers(frames, frames / 127.5 - 1)
    row["frames"]["mean"] = [round(value, 4) for value in frames.mean((0, 1, 2)).tolist()]
    return row


def _numbers(array: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    return {
        "sha256": hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest(),
        "shape": list(array.shape),
        "root_mean_square": _rounded(np.sqrt(np.mean(np.square(values, dtype=np.float64)))),
        "projections": [_rounded(value) for value in projections(values)],
    }


def projections(values: np.ndarray) -> np.ndarray:
    """Inner products with normal vectors over the root of their length.

    Each is as large as the values' root mean square, so that a difference of two arrays, whatever
    it looks like, moves them by as much as its own root mean square.
    """
    flat = values.reshape(-1).astype(np.float64)
    vectors = np.random.default_rng(0).standard_normal((PROJECTIONS, flat.size))
    return vectors @ flat / math.sqrt(flat.size)


def _rounded(value: Any) -> float:
    return float(f"{float(value):.{DIGITS}g}")


def deviation(row: Row, recorded: Row) -> dict[str, float]:
    """How far each part of a row is off, in shares of its values' root mean square.

    Means of frames count in shares of 255 levels; NaN and another shape are infinitely far.
    """
    return {part: _off(row.get(part), numbers) for part, numbers in recorded.items()}


def _off(found: Mapping[str, Any] | None, recorded: Mapping[str, Any]) -> float:
    if found is None or found["shape"] != recorded["shape"]:
        return math.inf
    scale = recorded["root_mean_square"]
    off = np.subtract(found["projections"], recorded["projections"]) / scale
    if "mean" in recorded:
        off = np.concatenate([off, np.subtract(found["mean"], recorded["mean"]) / 255])
    share = float(np.max(np.abs(off)))
    return math.inf if math.isnan(share) else share


def differences(request: NamedRequest, row: Row, recorded: Row, *, exactly: bool) -> Sequence[str]:
    """What is wrong with a row, a line each; nothing if it is as recorded."""
    found = []
    for part, off in deviation(row, recorded).items():
        if exactly and row.get(part, {}).get("sha256") != recorded[part]["sha256"]:
            found.append(f"{request.name}: other {part} than recorded, off by {off:.1e}")
        if not exactly and off > (limit := getattr(request, f"{part}_within")):
            found.append(f"{request.name}: {part} are off by {off:.1e}, more than {limit:.0e}")
    return found


def read_table() -> Mapping[str, Any]:
    """The recorded table: ``environment`` and ``requests``."""
    return json.loads(TABLE.read_text())


def write_table(table: Mapping[str, Any]) -> None:
    """Replace the table at once."""
    partial = TABLE.with_suffix(".partial")
    partial.write_text(json.dumps(table, indent=1) + "\n")
    partial.replace(TABLE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line of this module; 1 if a check found something."""
    parser = argparse.ArgumentParser(description="Record the golden table, or check it.")
    parser.add_argument("names", nargs="*", help="of requests; all if none is given")
    parser.add_argument("--check", action="store_true", help="only print what differs")
    args = parser.parse_args(arguments)
    if unknown := set(args.names) - BY_NAME.keys():
        parser.error(f"no such requests: {', '.join(sorted(unknown))}")
    asked = [request for request in REQUESTS if request.name in (args.names or BY_NAME)]
    here = environment()
    table = read_table() if TABLE.exists() else {"environment": here, "requests": {}}
    same = here == table["environment"]
    if args.names and not args.check and not same:
        parser.error("the table is of another environment: record all of it")
    rows: dict[str, Row] = {}
    found = 0
    with tempfile.TemporaryDirectory() as folder:
        studio = Studio(Path(folder))
        for request in asked:
            start = time.perf_counter()
            row = rows[request.name] = made(studio, request)
            recorded = table["requests"].get(request.name)
            told = "new"
            if recorded is not None:
                lines = differences(request, row, recorded, exactly=same)
                found += len(lines)
                told = ", ".join(
                    f"{part} "
                    + (
                        "equal"
                        if row[part]["sha256"] == recorded[part]["sha256"]
                        else f"off by {off:.1e}"
                    )
                    for part, off in deviation(row, recorded).items()
                )
                for line in lines:
                    print(line, file=sys.stderr)
            print(f"{time.perf_counter() - start:6.1f} s  {request.name}: {told}", flush=True)
    if args.check:
        return int(found > 0)
    kept = {**table["requests"], **rows} if args.names else rows
    ordered = {name: kept[name] for name in BY_NAME if name in kept}
    write_table({"environment": here, "requests": ordered})
    return 0


if __name__ == "__main__":
    sys.exit(main())
