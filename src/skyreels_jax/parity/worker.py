"""The work of one side, in a process of its own: videos, then traces, into a folder.

``python -m skyreels_jax.parity.worker SIDE FOLDER`` reads ``FOLDER/plan.json``. What a side made
lies in ``FOLDER/raw/SIDE``; the reference's comes first, since the others are traced on its inputs.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from skyreels_jax.parity.plan import Plan
from skyreels_jax.parity.recording import arrays, save_call, writing
from skyreels_jax.parity.sides import JaxSide, Made, Side, TorchSide, image_of


def _hybrid(plan: Plan) -> Side:
    return JaxSide(plan, hybrid=True)


# The name of a side, and how it is loaded.
SIDES: Final[Mapping[str, Callable[[Plan], Side]]] = {
    "reference": lambda plan: _hybrid(plan) if plan.reference == "hybrid" else TorchSide(plan),
    "yardstick": lambda plan: (
        TorchSide(plan, "float32", encoders="bfloat16", numerics="original-numerics")
        if plan.reference == "original-numerics"
        else TorchSide(plan, "bfloat16")
    ),
    "jax": JaxSide,
}
MIB: Final = 2**20


def raw(folder: Path, side: str) -> Path:
    """Where a side's results are."""
    return folder / "raw" / side


def result_file(folder: Path, side: str, test: int) -> Path:
    """Frames, stages and calls of a test."""
    return raw(folder, side) / f"test-{test}.npz"


def trace_file(folder: Path, side: str, test: int, step: int) -> Path:
    """Places of one call of the transformer."""
    return raw(folder, side) / f"trace-{test}-{step}.npz"


def do(side: str, folder: Path, load: Callable[[Plan], Side] | None = None) -> None:
    """All of a side's work.

    Args:
        side: a name in :data:`SIDES`.
        folder: with the plan, and the reference's results where the side is another.
        load: makes the side; by default as :data:`SIDES` says.
    """
    plan = Plan.load(folder / "plan.json")
    raw(folder, side).mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    implementation = (load or SIDES[side])(plan)
    timings: dict[str, Any] = {"load": time.perf_counter() - start, "tests": []}
    for test in plan.tests:
        made = implementation.generate(test, image_of(plan, test, folder))
        keep(made, result_file(folder, side, test))
        timings["tests"].append(made.seconds)
    timings["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
    (raw(folder, side) / "timings.json").write_text(json.dumps(timings), "utf-8")
    source = result_file(folder, "reference", 0)
    if not source.is_file() or plan.reference == "hybrid":
        return
    for test in plan.tests:
        results = arrays(result_file(folder, "reference", test))
        if side == "jax":
            path = raw(folder, side) / f"decoded-{test}.npz"
            with writing(path) as note:
                note("frames", implementation.decode(results[f"latents.{plan.steps}"]))
        for step in plan.traced if plan.layers != "none" else ():
            with writing(trace_file(folder, side, test, step)) as note:
                implementation.trace(results, step, note)


def keep(made: Made, path: Path) -> None:
    """Write what a side made."""
    with writing(path) as note:
        note("frames", made.frames)
        for name, values in made.stages.items():
            note(name, np.asarray(values))
        for step, call in made.calls.items():
            save_call(note, step, call)


def main() -> None:
    """One side, as a process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    do(arguments.side, arguments.folder)


if __name__ == "__main__":
    sys.exit(main())
