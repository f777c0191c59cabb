"""``skyreels-jax live``: a video that plays while it is made."""

import argparse
import dataclasses
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

from skyreels_jax.built_in import LIVE_MODEL
from skyreels_jax.cli.flags import (
    DEFAULT_OUTPUT,
    QUIET,
    add_checkpoint_flags,
    add_running_flags,
    add_setting,
)
from skyreels_jax.errors import RequestError, SkyReelsError
from skyreels_jax.files import read_text, reason_of
from skyreels_jax.generation.request.declaration import GROUPS, LIVE, SHOWN, in_flags
from skyreels_jax.generation.request.live import LiveRequest, live_declared

if TYPE_CHECKING:
    from skyreels_jax.evaluation.drift import DriftMeter
    from skyreels_jax.generation.live import LiveStream
    from skyreels_jax.generation.live_times import LiveTimes
    from skyreels_jax.media import GrowingVideo
    from skyreels_jax.sampling.progress import Progress

# Names standard output, and standard input.
_STANDARD: Final = "-"
# Seconds between two lines where nobody watches, and how far ahead of play `--pace` lets it run.
_LINE_SECONDS: Final = 10.0
_AHEAD: Final = 1.0
_AT: Final = re.compile(r"at\s+(\d+(?:\.\d+)?)\s*s?\s*:\s*(.*)")
_EXAMPLES: Final = """\
examples:
  skyreels-jax live --prompt "a red star moves right" --seconds 10 --output star.mp4
  skyreels-jax live --prompt "a red star moves right" --pace --prompts - --output - | ffplay -

With --prompts - each line of standard input is another prompt; `at 12s: TEXT` is one from second
12 of the video on. Ctrl-C ends it; what was made plays. docs/live.md has more.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``live`` verb."""
    parser = subparsers.add_parser(
        "live",
        help="make a video that plays while it is made; another prompt at any time",
        description="Make a video block by block that plays while it is made, of any length.",
        usage="%(prog)s --prompt TEXT [--model DIR_OR_ID] [--output FILE.mp4|-] [flags below]",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint_flags(parser.add_argument_group("checkpoint"), LIVE_MODEL)
    groups = {name: parser.add_argument_group(name) for name in (*GROUPS[:-1], LIVE, GROUPS[-1])}
    shown, output = groups[SHOWN], groups[GROUPS[-1]]
    shown.add_argument("--prompt", required=True, metavar="TEXT", help="what it shows first")
    shown.add_argument(
        "--prompts",
        metavar="FILE|-",
        help="lines of `at 12s: TEXT`, what it shows from then on; - reads standard input, where a "
        "line without a time holds at once",
    )
    for setting in live_declared().values():
        group = LIVE if setting.name in ("steps", "causal_block_size") else setting.group
        group = SHOWN if setting.name == "overlap_history" else group
        add_setting(groups[group], setting)
    add_running_flags(groups["running"])
    output.add_argument(
        "--output",
        default=str(DEFAULT_OUTPUT),
        metavar="FILE.mp4|-",
        help=f"file that plays while it grows (default: {DEFAULT_OUTPUT}); - is standard output",
    )
    output.add_argument(
        "--overwrite", action="store_true", help="replace the output file if there is one"
    )
    output.add_argument(
        "--pace",
        action="store_true",
        help="make it no faster than it plays, at most a second ahead: for prompts that are typed",
    )
    output.add_argument(
        "--sidecar", action="store_true", help="write settings, times and drift as .json at the end"
    )
    output.add_argument(
        "--no-metadata", action="store_true", help="leave the settings out of the video"
    )


def run(args: argparse.Namespace) -> int:
    """Make the stream; 0 at its end, or what a shell returns for the signal that ended it."""
    from skyreels_jax.cli.job import open_pipeline
    from skyreels_jax.cli.products import Products
    from skyreels_jax.evaluation.drift import DriftMeter
    from skyreels_jax.interrupt import stop_requested
    from skyreels_jax.outputs import locked
    from skyreels_jax.sampling.progress import Clock

    piped = args.output == _STANDARD
    if piped and args.sidecar:
        raise RequestError("`sidecar` goes beside a file: with `output` - there is none")
    if piped and os.isatty(1):
        raise RequestError("`output` -: a terminal plays no video; pipe it into a player")
    planned = read_prompts(args.prompts) if args.prompts not in (None, _STANDARD) else []
    request = _request(args)
    with ExitStack() as held:
        if not piped:
            products = Products(Path(args.output), None, has_settings=args.sidecar)
            products.check(overwrite=args.overwrite)
            held.enter_context(locked(products.output, "output"))
            # Again: who held the lock may have written since.
            products.check(overwrite=args.overwrite)
        ticker = _Ticker(piped=piped)
        pipeline = open_pipeline(vars(args), keep="auto")
        stream = held.enter_context(pipeline.stream_request(request, Clock(ticker.stages())))
        ticker.describe(stream)
        for at, prompt in planned:
            stream.change(prompt, at=at)
        if args.prompts == _STANDARD:
            threading.Thread(target=_follow, args=(stream, ticker), daemon=True).start()
        stop = held.enter_context(stop_requested(stream.stop))
        meter = DriftMeter(stream.request.fps) if args.sidecar else None
        try:
            with _opened(args, stream) as video:
                _play(stream, video, ticker, args.pace, meter)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise SkyReelsError(f"{args.output} cannot be written: {reason_of(error)}") from error
        finally:
            ticker.finish(args.output, stream)
            if meter is not None and stream.times.frames:
                _write_sidecar(Path(args.output), stream, meter)
        return stop.exit_code if stop.is_set() else 0


def read_prompts(file: str) -> list[tuple[float, str]]:
    """The prompts of a file, each with the second from which on it holds.

    Raises:
        RequestError: a line is none; says which.
    """
    prompts: list[tuple[float, str]] = []
    for number, line in enumerate(read_text(Path(file), "--prompts").splitlines(), 1):
        if line.strip():
            at, prompt = parsed_line(line)
            if at is None or not prompt:
                raise RequestError(
                    f"--prompts {file}, line {number}: {line!r:.80}; expected `at SECONDSs: TEXT`, "
                    "for example `at 12s: a cat wakes up`"
                )
            prompts.append((at, prompt))
    return prompts


def parsed_line(line: str) -> tuple[float | None, str]:
    """A second of the video, if the line names one, and a prompt."""
    timed = _AT.fullmatch(line.strip())
    return (float(timed[1]), timed[2].strip()) if timed else (None, line.strip())


def _request(args: argparse.Namespace) -> LiveRequest:
    given = {name: getattr(args, name) for name, one in live_declared().items() if one.keyword}
    others = {"dtype": args.dtype, "weights": args.weights, "offload": bool(args.offload)}
    return LiveRequest.of({"prompt": args.prompt, **given}, **others)


@contextmanager
def _opened(args: argparse.Namespace, stream: "LiveStream") -> Iterator["GrowingVideo"]:
    """Where the frames go; the file is made when the first ones are there."""
    from skyreels_jax.media import GrowingVideo

    file = _LateFile(args.output, args.overwrite)
    try:
        with GrowingVideo(
            file,
            fps=stream.request.fps,
            size=stream.request.size,
            settings=None if args.no_metadata else _settings(stream),
        ) as video:
            yield video
    finally:
        file.close()


class _LateFile:
    """A file, or standard output, that is opened at the first byte.

    Until then a file that is to be replaced is what it was.
    """

    def __init__(self, output: str, overwrite: bool):
        self._output, self._overwrite = output, overwrite
        self._file: FileIO | None = None

    def write(self, data: bytes | memoryview, /) -> int | None:
        """As files do; a RequestError where one has come to be there."""
        if self._file is None:
            self._file = self._open()
        return self._file.write(data)

    def flush(self) -> None:
        """Nothing: there is no buffer."""

    def close(self) -> None:
        """Close what is open."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _open(self) -> FileIO:
        if self._output == _STANDARD:
            # Not `sys.stdout`, which `--quiet` leads elsewhere.
            return FileIO(os.dup(1), "wb")
        try:
            return FileIO(self._output, "wb" if self._overwrite else "xb")
        except FileExistsError as error:
            raise RequestError(
                f"output {self._output} has come to be there; name another, or say --overwrite"
            ) from error


def _write_sidecar(output: Path, stream: "LiveStream", meter: "DriftMeter") -> None:
    """Settings, times, and what drifted, beside the video."""
    from skyreels_jax.cli.products import write_derived
    from skyreels_jax.media import write_settings

    settings = _settings(stream) | {
        "times": dataclasses.asdict(stream.times),
        "drift": meter.report().as_json(),
    }
    write_derived(output.with_suffix(".json"), lambda path: write_settings(path, settings))


def _settings(stream: "LiveStream") -> dict[str, object]:
    import skyreels_jax
    from skyreels_jax.cli.products import PROGRAM

    return stream.request.settings() | {"generator": f"{PROGRAM} {skyreels_jax.__version__}"}


def _play(
    stream: "LiveStream",
    video: "GrowingVideo",
    ticker: "_Ticker",
    has_pace: bool,
    meter: "DriftMeter | None",
) -> None:
    """Write frames as they come."""
    begun: float | None = None
    for frames in stream:
        begun = begun or time.perf_counter()
        video.append(frames)
        if meter is not None:
            meter.add(frames)
        ticker.tick(stream)
        if has_pace:
            ahead = float(video.written / stream.request.fps) - (time.perf_counter() - begun)
            stream.wait(ahead - _AHEAD)


def _follow(stream: "LiveStream", ticker: "_Ticker") -> None:
    """Prompts of standard input, until it ends."""
    for line in sys.stdin:
        at, prompt = parsed_line(line)
        if prompt:
            try:
                stream.change(prompt, at=at)
            except SkyReelsError as error:
                ticker.show(f"note: {in_flags(str(error))}")


class _Ticker:
    """What is said of a stream: before it, a line that changes while it runs, and at its end."""

    def __init__(self, *, piped: bool):
        self._out = sys.stderr if piped else sys.stdout
        self._said, self._width = 0.0, 0

    def stages(self) -> "Progress":
        """Told of loading and compiling."""
        from skyreels_jax.cli.report import Lines
        from skyreels_jax.sampling.progress import NoProgress

        return NoProgress() if QUIET.get() else Lines()

    def describe(self, stream: "LiveStream") -> None:
        """Every setting with where it came from, and warnings."""
        from skyreels_jax.cli.report import shortened

        request = stream.request
        self._print(f"stream of {request.video.model}: {shortened(stream.prompt)}")
        values = request.video.settings() | request.values()
        for name, source in request.sources.items():
            if (value := values.get(name)) is not None:
                shown = shortened(str(value)) if name == "negative_prompt" else value
                self._print(f"  {name.replace('_', '-'):<18} {shown}  [{source}]")
        for warning in request.warnings:
            self._print(in_flags(f"note: {warning}"))

    def tick(self, stream: "LiveStream") -> None:
        """After a delivery."""
        times = stream.times
        line = f"{float(times.frames / stream.request.fps):7.1f} s  {_in_words(times)}"
        if sys.stderr.isatty():
            line = f"{line}  {stream.prompt!r:.40}"
            self.show(f"\r{line:<{self._width}}", end="")
            self._width = len(line)
        elif time.perf_counter() - self._said >= _LINE_SECONDS or times.rate is None:
            self._said = time.perf_counter()
            self.show(line)

    def finish(self, output: str, stream: "LiveStream") -> None:
        """At the end, however it came."""
        times = stream.times
        if self._width:
            self.show("")
        if times.frames:
            where = "standard output" if output == _STANDARD else output
            self._print(f"  {_in_words(times)}")
            fps = stream.request.fps
            self._print(f"wrote {where} ({times.frames} frames, {fps} frames a second)")

    def show(self, line: str, end: str = "\n") -> None:
        """A line on standard error, unless nothing is to be said."""
        if not QUIET.get():
            with suppress(OSError):
                print(line, end=end, file=sys.stderr, flush=True)

    def _print(self, line: str) -> None:
        with suppress(OSError):
            if not QUIET.get():
                print(line, file=self._out, flush=True)


def _in_words(times: "LiveTimes") -> str:
    parts = [f"first frame after {times.first_frame or 0:.2f} s"]
    if times.rate is not None:
        lag = f"{abs(times.lag):.1f} s {'behind' if times.lag > 0 else 'ahead'}"
        parts += [f"{times.rate:.1f} frames a second", lag]
    return ", ".join(parts)
