"""What a training run writes down: lines of JSON, and TensorBoard's files."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from skyreels_jax.errors import UnsupportedError
from skyreels_jax.files import read_text, write_text

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

LOG_FILE: Final = "log.jsonl"
# No run writes as much.
_MAX_LOG_BYTES: Final = 2**30

# Called after each logged step with its number and metrics.
OnLog = Callable[[int, dict[str, float]], None]
_logger = logging.getLogger(__name__)


class TrainingLog:
    """Lines of JSON; what an interrupted run wrote past its last checkpoint is dropped.

    Attributes:
        latest: the last value of every metric.
    """

    def __init__(
        self, output: Path, step: int, on_log: OnLog, *, tensorboard: bool, writes: bool = True
    ):
        """Go on after ``step``; one of several processes ``writes``."""
        self._writes = writes
        self._board = _tensorboard(output / "tensorboard", step) if tensorboard and writes else None
        self._file, self._on_log = output / LOG_FILE, on_log
        lines = [line for line in _read(self._file) if line["step"] <= step]
        if writes:
            write_text(self._file, "".join(f"{json.dumps(line)}\n" for line in lines))
        self._evaluated = {line["step"] for line in lines if "loss" not in line}
        self._started = time.monotonic() - (lines[-1]["seconds"] if lines else 0.0)
        self.latest: dict[str, float] = {}

    def is_evaluated(self, step: int) -> bool:
        """Whether an evaluation is logged at a step: a line without a loss."""
        return step in self._evaluated

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a line, and call ``on_log``."""
        seconds = round(time.monotonic() - self._started, 2)
        self.latest |= metrics
        if not self._writes:
            return
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, "seconds": seconds, **metrics}) + "\n")
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        self._on_log(step, dict(metrics))


def _read(file: Path) -> list[dict[str, float | int]]:
    """The lines that can be read; a run that was killed may have left half of one."""
    if not file.exists():
        return []
    found = []
    lines = read_text(file, "log", limit=_MAX_LOG_BYTES).splitlines()
    for line in lines:
        try:
            value = json.loads(line)
            found.append(dict(value) | {"step": int(value["step"])})
        except (ValueError, KeyError, TypeError):
            _logger.warning("%s: cut off what is no whole line: %.60s", file, line)
    return found


def _tensorboard(folder: Path, step: int) -> "SummaryWriter":
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "run.tensorboard = true takes tensorboardX: pip install 'skyreels-jax[train]'"
        ) from error
    # What an interrupted run wrote past its last checkpoint is hidden.
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
