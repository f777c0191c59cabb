"""The command line with a fault in the second window: ``kill``, ``raise`` or ``hang``, then words.

A file ``fault`` beside the output says when it has come; who is to be killed waits for it there.
"""

import sys
import time
from pathlib import Path

from skyreels_jax.cli.main import program
from skyreels_jax.sampling.progress import Clock, IterationReport, StepMonitor


def main(fault: str, words: list[str]) -> None:
    submitted, runs = StepMonitor.submitted, []
    beside = Path(words[words.index("--output") + 1]).parent / "fault"

    def faulty(self: StepMonitor, report: IterationReport) -> None:
        submitted(self, report)
        if len(runs) < 2 or len(self.seconds) < 1:
            return
        beside.touch()
        if fault == "raise":
            raise RuntimeError("a planted fault")
        time.sleep(600)

    stage = Clock.stage

    def counted(self: Clock, name, total=None):
        if name == "denoise":
            runs.append(name)
        return stage(self, name, total)

    StepMonitor.submitted, Clock.stage = faulty, counted
    sys.argv = ["skyreels-jax", *words]
    program()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
