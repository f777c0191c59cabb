"""A program that is killed when it has come so far, at a moment that chance decides."""

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def kill_after(
    process: subprocess.Popen[bytes],
    is_reached: Callable[[], bool],
    chance: random.Random,
    *,
    within: float,
    seconds: float = 1200,
) -> bool:
    """Send SIGKILL within so many seconds of when it is reached; whether the process died of it.

    Args:
        process: that runs.
        is_reached: asked a thousand times a second.
        chance: decides the moment.
        within: seconds after it is reached, at most.
        seconds: that it may take.
    """
    deadline = time.monotonic() + seconds
    while not is_reached() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(chance.random() * within)
    process.send_signal(signal.SIGKILL)
    return process.wait(60) == -signal.SIGKILL


def logged_step(output: Path) -> int:
    """The last step that a training run has logged in its folder; 0 before the first."""
    log, step = output / "log.jsonl", 0
    if log.exists():
        for line in log.read_text().splitlines():
            try:
                step = max(step, json.loads(line)["step"])
            except ValueError:  # being written
                continue
    return step
