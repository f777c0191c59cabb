"""What is said while a video is made: bars on a terminal, else lines."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress as RichProgress

from skyreels_jax.cli import report
from skyreels_jax.cli.report import QUIET_SECONDS, Bars, Lines, console_progress


class Watch:
    """A clock that tests set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(report.time, "perf_counter", lambda: self.now)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


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
        watch.now += 0.4 * QUIET_SECONDS
        lines.advance("denoise", step)
        said.append(capsys.readouterr().err)
    assert [bool(line) for line in said] == [False, False, True, False, False]
    assert said[2] == "denoise: 3/50, 4.00 s each, 188 s left\n"


def test_bars_fill_and_tell_the_pace(watch: Watch):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with RichProgress(console=console) as rich:
        bars = Bars(rich)
        bars.begin("load")
        bars.end("load", 2.0)
        bars.begin("denoise", 4)
        watch.now += 3
        bars.advance("denoise", 2)
        load, denoise = rich.tasks
        assert (load.completed, load.total, load.fields["pace"]) == (1, 1, "2.0 s")
        assert (denoise.completed, denoise.total) == (2, 4)
        assert denoise.fields["pace"] == "1.50 s/step"
        bars.begin("decode", 9)
        watch.now += 1
        bars.advance("decode", 4)
        assert rich.tasks[2].fields["pace"] == "0.25 s/frame"
        bars.end("denoise", 6.0)
        assert denoise.finished


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch):
    with console_progress() as progress:
        assert isinstance(progress, Lines)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with console_progress() as progress:
        assert isinstance(progress, Bars)
