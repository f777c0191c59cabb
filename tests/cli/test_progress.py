"""What is said while a video is made: one bar on a terminal, else lines; nothing if asked for."""

import argparse
import io
import logging
from collections.abc import Callable

import pytest
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from tests.cli.commands import Command

from skyreels_jax.cli import report
from skyreels_jax.cli.flags import quietly
from skyreels_jax.cli.report import LINE_SECONDS, Bars, Lines, clock_time, console_progress
from skyreels_jax.errors import RequestError
from skyreels_jax.sampling.progress import NoProgress, Progress


class Watch:
    """A clock that tests set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(report.time, "perf_counter", lambda: self.now)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def make_windows(progress: Progress, watch: Watch, count: int, stop: Callable[[int, int], bool]):
    """Denoise windows of 4 steps of 2 s with 10 s of loading, and decode 5 frames of each."""
    for window in range(1, count + 1):
        progress.begin("load")
        watch.now += 10
        progress.end("load", 10.0)
        progress.begin("denoise", 4)
        for step in range(1, 5):
            watch.now += 2
            progress.advance("denoise", step)
            if stop(window, step):
                return
        progress.end("denoise", 8.0)
        if window == 1:
            progress.begin("decode", 5 * count)
        for frame in range(1, 6):
            watch.now += 0.5
            progress.advance("decode", 5 * (window - 1) + frame)
    progress.end("decode", 2.5 * count)


def test_a_line_when_a_stage_ends(capsys, watch: Watch):
    lines = Lines()
    lines.begin("text")
    assert capsys.readouterr().err == ""
    lines.end("text", 1.25)
    assert capsys.readouterr().err == "text: done in 1.2 s\n"


def test_a_line_now_and_then_in_a_long_stage(capsys, watch: Watch):
    lines = Lines()
    lines.begin("denoise", 50)
    said = []
    for step in range(1, 6):
        watch.now += 0.4 * LINE_SECONDS
        lines.advance("denoise", step)
        said.append(capsys.readouterr().err)
    assert [bool(line) for line in said] == [False, False, True, False, False]
    assert said[2] == "denoise  3/50  24.00 s each  18:48 left\n"


def test_one_line_a_stage_and_the_window_where_there_are_several(capsys, watch: Watch):
    make_windows(Lines(windows=3), watch, 3, lambda window, step: False)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "load: done in 10.0 s",
        "denoise: done in 8.0 s (window 1 of 3, 0:16 left)",
        "load: done in 10.0 s",
        "denoise: done in 8.0 s (window 2 of 3, 0:13 left)",
        "load: done in 10.0 s",
        "denoise: done in 8.0 s (window 3 of 3, 0:02 left)",
        "decode: done in 7.5 s",
    ]


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        ((1, 2), "window 1 of 3  denoise  2/4  2.00 s each  0:20 left"),
        ((2, 3), "window 2 of 3  denoise  3/4  2.00 s each  0:15 left"),
        ((3, 1), "window 3 of 3  denoise  1/4  2.00 s each  0:08 left"),
    ],
)
def test_time_left_counts_neither_loading_nor_other_windows(watch: Watch, stop, words: str):
    lines = Lines(windows=3)
    make_windows(lines, watch, 3, lambda window, step: (window, step) == stop)
    assert lines.words("denoise", 100) == words
    # Negative twin: by the clock alone, what is left would be much more.
    elapsed = watch.now - 100
    assert elapsed / lines.share - elapsed > 1.3 * (lines.left or 0)


def test_windows_that_were_finished_before_are_counted(watch: Watch):
    lines = Lines(windows=9, finished=2)
    make_windows(lines, watch, 7, lambda window, step: (window, step) == (1, 3))
    assert lines.words("denoise", 100) == "window 3 of 9  denoise  3/4  2.00 s each  0:50 left"
    assert 0.95 * 2 / 9 < lines.share < 0.95 * 3 / 9


def drawn(width: int, watch: Watch, stop: tuple[int, int]) -> list[str]:
    """What a terminal of so many columns shows when the windows have come to ``stop``."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    columns = TextColumn("{task.fields[words]}"), BarColumn(bar_width=None)
    shares = TextColumn("{task.percentage:>3.0f}%")
    rich = RichProgress(*columns, shares, console=console, expand=True, auto_refresh=False)
    bars = Bars(rich, windows=9)
    shown = []
    make_windows(bars, watch, 9, lambda window, step: (window, step) == stop)
    assert len(rich.tasks) == 1
    console.print(rich.get_renderable())
    shown += screen.getvalue().splitlines()
    return shown


@pytest.mark.parametrize("width", [40, 60, 100])
def test_one_bar_that_fits_the_terminal(watch: Watch, width: int):
    (line,) = drawn(width, watch, (3, 2))
    assert len(line) <= width
    assert ("window 3 of 9" if width == 100 else "3/9") in line
    assert "denoise" in line
    assert "2/4" in line
    assert "1:10 left" in line
    assert "━" in line
    assert "28%" in line


def test_bars_are_for_terminals_and_nothing_for_who_asks(monkeypatch: pytest.MonkeyPatch):
    with console_progress() as progress:
        assert isinstance(progress, Lines)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with console_progress() as progress:
        assert isinstance(progress, Bars)
    with quietly(), console_progress() as progress:
        assert isinstance(progress, NoProgress)


@pytest.mark.parametrize(("seconds", "text"), [(8.4, "0:08"), (188.0, "3:08"), (3788.0, "1:03:08")])
def test_times_as_clocks_show_them(seconds: float, text: str):
    assert clock_time(seconds) == text


def test_quiet_says_nothing_but_errors(command: Command, monkeypatch: pytest.MonkeyPatch):
    def run(args: argparse.Namespace) -> int:
        print("written")
        logging.getLogger("skyreels_jax").warning("odd")
        if args.source == "bad":
            raise RequestError("it is bad")
        return 0

    monkeypatch.setattr("skyreels_jax.cli.convert.run", run)
    words = ("convert", "good", "new", "--format", "diffusers")
    outcome = command(*words, "--quiet")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    outcome = command("convert", "bad", *words[2:], "--quiet")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "skyreels-jax: error: it is bad\n"
    # Negative twin.
    assert command(*words).out == "written\n"
    assert command(*words, "--quiet", "--verbose").code == 2


@pytest.mark.parametrize("verb", ["info", "doctor", "validate"])
def test_what_only_says_something_has_no_quiet(command: Command, verb: str):
    assert command(verb, "--quiet").code == 2
