"""How far a newcomer has to read: files, functions and stack depths of one video on ``mini``.

``python -m benchmarks.journey [--files]`` makes the same short video with the command line (in this
process) and with ``pipe(...)``, each in a process of its own, and counts what is entered of the
package. A depth is the number of the package's own frames on the stack where the encoder is called,
where attention is traced first and where a tensor is read from a file first; comprehensions and
libraries' frames do not count. No timing: the machine need not be quiet.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import CodeType, FrameType

import skyreels_jax

PACKAGE = Path(skyreels_jax.__file__).parent
PROMPT = "a red star moves slowly to the right on a black background"
STEPS = 2
# Code that is no step a reader takes: comprehensions, and a module or class body.
NO_FUNCTION = {"<module>", "<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>", "<lambda>"}
# The end of each way whose depth is measured, as a pattern of `file:qualified name`.
ENDS = {
    "prompt to encoder": re.compile(r"models/umt5\.py:Umt5Encoder\.__call__"),
    "noise to attention": re.compile(r"ops/attention\.py:attention"),
    "tensor to model": re.compile(r"weights/(safetensors|torch)_file\.py:\w+\.read"),
}
# The aims: files, and the depth of each end.
FILES_TARGET = {"generate": 50, "pipe": 40}
DEPTH_TARGET = {"prompt to encoder": 7, "noise to attention": 12, "tensor to model": 8}


@dataclass
class Journey:
    """What one way of making a video entered.

    Attributes:
        functions: ``file:qualified name`` of every function that was called.
        stacks: the package's frames where each end was reached first, the outermost first.
    """

    functions: set[str] = field(default_factory=set)
    stacks: dict[str, list[str]] = field(default_factory=dict)

    @property
    def files(self) -> list[str]:
        """The files of the package whose functions were called."""
        return sorted({name.partition(":")[0] for name in self.functions})


def place(code: CodeType) -> str | None:
    """``file:qualified name`` of code of the package; ``None`` for all other code."""
    file = code.co_filename
    if not file.startswith(str(PACKAGE)) or code.co_name in NO_FUNCTION:
        return None
    if code.co_qualname == code.co_name and not code.co_flags & 0x02:  # a class's body
        return None
    return f"{Path(file).relative_to(PACKAGE)}:{code.co_qualname}"


def stack(frame: FrameType | None) -> list[str]:
    """The package's functions on the stack of ``frame``, the outermost first."""
    found: list[str] = []
    while frame is not None:
        if name := place(frame.f_code):
            found.append(name)
        frame = frame.f_back
    return found[::-1]


class Watch:
    """Notes every call of the package's functions while it is entered."""

    def __init__(self):
        self.journey = Journey()

    def __enter__(self) -> Journey:
        sys.setprofile(self._called)
        return self.journey

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _called(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or (name := place(frame.f_code)) is None:
            return
        if name in self.journey.functions:
            return
        self.journey.functions.add(name)
        for end, pattern in ENDS.items():
            if pattern.fullmatch(name):
                self.journey.stacks[end] = stack(frame)


def by_command_line(output: Path) -> Journey:
    """``skyreels-jax generate`` in this process."""
    from skyreels_jax.cli.main import main

    arguments = ["generate", "--prompt", PROMPT, "--steps", str(STEPS), "--output", str(output)]
    with Watch() as journey, contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    assert code == 0, f"generate ended with {code}"
    return journey


def by_python(output: Path) -> Journey:
    """``Pipeline.from_pretrained("mini")``, one call, and saving."""
    from skyreels_jax import Pipeline

    with Watch() as journey:
        pipe = Pipeline.from_pretrained("mini")
        pipe(PROMPT, steps=STEPS).save(output)
    return journey


WAYS = {"generate": by_command_line, "pipe": by_python}


def measure(way: str) -> Journey:
    """One way, in a process of its own: imports and caches of the other would hide calls."""
    command = [sys.executable, "-m", "benchmarks.journey", "--one", way]
    with tempfile.TemporaryDirectory() as empty:
        environment = os.environ | {"SKYREELS_JAX_CACHE": empty}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{way} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Journey(set(found["functions"]), found["stacks"])


def report(way: str, journey: Journey, *, lists: bool) -> None:
    """Print one way's figures beside their targets."""
    target = FILES_TARGET[way]
    print(f"{way}: {len(journey.files)} files (target {target}), ", end="")
    print(f"{len(journey.functions)} functions")
    for end, most in DEPTH_TARGET.items():
        frames = journey.stacks.get(end, [])
        print(f"  {end}: {len(frames) or 'not reached'} (target {most})")
        if lists:
            print("".join(f"    {name}\n" for name in frames), end="")
    if lists:
        print("  files, and how many of their functions:")
        for file in journey.files:
            count = sum(name.startswith(f"{file}:") for name in journey.functions)
            print(f"    {count:4d} {file}")


def main() -> None:
    """Print the figures of both ways."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.journey", description=__doc__)
    parser.add_argument("--files", action="store_true", help="list files and stacks")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            journey = WAYS[options.one](Path(folder) / "video.mp4")
        print(json.dumps(asdict(journey) | {"functions": sorted(journey.functions)}))
        return
    for way in WAYS:
        report(way, measure(way), lists=options.files)


if __name__ == "__main__":
    main()
