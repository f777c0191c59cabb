"""Two sides of a comparison, each in a process of its own, timed in turn."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.measure import Taken, peak_gib, timed

Calls = dict[str, Callable[[], Any]]


def serve(calls: Calls, seconds: Mapping[str, float], is_finite: Callable[[Any], bool]) -> None:
    """In a side's process: time one call for each name read, report as JSON lines."""
    weights = peak_gib()
    print(json.dumps({"calls": list(calls), "seconds": seconds, "weights": weights}), flush=True)
    for line in sys.stdin:
        result, taken = timed(calls[line.strip()])
        answer = {"taken": taken, "peak": peak_gib(), "finite": is_finite(result)}
        print(json.dumps(answer), flush=True)


class Side:
    """The parent's end of one process; it runs ``python -m`` with ``command``."""

    def __init__(self, name: str, command: Sequence[str]):
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.name = name
        self.ready = self.answer()
        self.peak = 0.0

    def answer(self) -> dict[str, Any]:
        """The next line of the process."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def time(self, call: str) -> Taken:
        """What one call takes."""
        assert self.process.stdin is not None
        print(call, file=self.process.stdin, flush=True)
        answer = self.answer()
        assert answer["finite"], f"{self.name}: {call} is not finite"
        self.peak = max(self.peak, answer["peak"])
        return Taken(*answer["taken"])


def in_turn(sides: Sequence[Side], rounds: int) -> dict[tuple[str, str], list[Taken]]:
    """Every call of every side in each round, after one unmeasured round."""
    calls = [(side, call) for side in sides for call in side.ready["calls"]]
    for side, call in calls:
        side.time(call)
    taken: dict[tuple[str, str], list[Taken]] = {(side.name, call): [] for side, call in calls}
    for _ in range(rounds):
        for side, call in calls:
            taken[side.name, call].append(side.time(call))
    return taken
