"""Running the command line inside the tests' own process."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from skyreels_jax.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit code and what it wrote to the two streams."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines that say what is wrong."""
        return [line for line in self.err.splitlines() if "error: " in line]


class Command:
    """``skyreels-jax`` as a function."""

    def __init__(self, capfd: pytest.CaptureFixture[str]):
        self._capfd = capfd

    def __call__(self, *arguments: str | Path) -> Outcome:
        self._capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = self._capfd.readouterr()
        return Outcome(code, captured.out, captured.err)


def linked(source: Path, target: Path) -> Path:
    """A copy of a folder in which every file is the same file; write with :func:`rewrite`."""
    return Path(shutil.copytree(source, target, copy_function=os.link))


def rewrite(file: Path, content: bytes) -> None:
    """Give ``file`` other content without touching the file that it was linked to."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)
