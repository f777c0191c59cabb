"""``skyreels-jax live``: a file or a pipe that plays while it grows, and prompts on the way."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
from tests import standins
from tests.cli.commands import Command
from tests.generation.test_live import Decoder, Maker, expected, shown

from skyreels_jax import media
from skyreels_jax.cli import job
from skyreels_jax.cli.live import parsed_line
from skyreels_jax.components.protocols import Components
from skyreels_jax.generation.live import LiveStream
from skyreels_jax.generation.request.live import LiveRequest
from skyreels_jax.generation.request.resolve_live import resolve_live
from skyreels_jax.sampling.denoiser import Denoiser
from skyreels_jax.sampling.progress import Clock

SMALL = ("--height", "32", "--width", "48", "--fps", "24", "--seed", "7", "--block", "2")
LIVE = ("live", "--prompt", "a fox", *SMALL, "--window", "4")


@dataclass
class Studio:
    """Stands in for a pipeline; ``after`` is called after each block was begun."""

    after: dict[int, object]

    def stream_request(self, request: LiveRequest, clock: Clock) -> LiveStream:
        resolved = resolve_live(request, standins.checkpoint("df"), memory=2**40)
        maker = Maker(resolved.schedule)

        def watched(number, latents):
            if number in self.after:
                self.after[number]()
            return latents

        maker.wrong = watched
        parts = Components(standins.Words(), Decoder([]))
        load = lambda: Denoiser(standins.Linear())  # noqa: E731
        return LiveStream(parts, load, resolved, clock=clock, sampler=lambda *_: maker)


@pytest.fixture
def studio(monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    studio = Studio({})
    monkeypatch.setattr(job, "open_pipeline", lambda options, keep: studio)
    yield studio


def test_a_file_of_the_asked_length_that_carries_its_settings(
    command: Command, studio: Studio, out: Path
):
    outcome = command(*LIVE, "--seconds", "2", "--output", out / "x.mp4")
    assert outcome.code == 0, outcome.err
    assert [path.name for path in out.iterdir()] == ["x.mp4"]
    frames, rate = media.read_video(out / "x.mp4")
    assert (frames.shape, rate) == ((49, 32, 48, 3), 24)
    settings = media.read_settings(out / "x.mp4")
    assert (settings["prompt"], settings["seed"]) == ("a fox", 7)
    assert settings["live"]["window"] == 4
    assert f"wrote {out / 'x.mp4'} (49 frames, 24 frames a second)" in outcome.out
    assert "first frame after" in outcome.err
    assert "[given]" in outcome.out
    assert "note: " in outcome.out


def test_a_sidecar_has_times_and_drift(command: Command, studio: Studio, out: Path):
    outcome = command(*LIVE, "--seconds", "1", "--sidecar", "--output", out / "x.mp4")
    assert outcome.code == 0, outcome.err
    settings = json.loads((out / "x.json").read_text())
    assert settings["prompt"] == "a fox"
    assert settings["times"]["frames"] == settings["drift"]["frames"] == 25
    refused = command(*LIVE, "--seconds", "1", "--sidecar", "--output", "-")
    assert refused.code == 2 and "--sidecar goes beside a file" in refused.err


def test_standard_output_has_the_video_and_nothing_else(
    studio: Studio, out: Path, capfdbinary: pytest.CaptureFixture[bytes]
):
    from skyreels_jax.cli.main import main

    for quiet in ((), ("--quiet",)):
        assert main([*LIVE, "--seconds", "1", "--output", "-", *quiet]) == 0
        captured = capfdbinary.readouterr()
        with av.open(io.BytesIO(captured.out)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 25
        assert (b"frames a second" in captured.err) is (not quiet)


def test_what_is_there_stays_unless_somebody_says_otherwise(
    command: Command, studio: Studio, out: Path
):
    (out / "x.mp4").write_text("mine")
    outcome = command(*LIVE, "--seconds", "1", "--output", out / "x.mp4")
    assert outcome.code == 2
    assert "exists: give another --output, or --overwrite" in outcome.err
    assert (out / "x.mp4").read_text() == "mine"

    def fail():
        raise MemoryError("no")

    studio.after = {0: fail}
    words = (*LIVE, "--seconds", "1", "--output", out / "x.mp4", "--overwrite")
    assert command(*words).code == 2
    assert (out / "x.mp4").read_text() == "mine"  # Nothing is replaced by nothing.
    studio.after = {}
    assert command(*words).code == 0
    assert len(media.read_video(out / "x.mp4")[0]) == 25


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_it_with_a_whole_file(
    command: Command, studio: Studio, out: Path, number: signal.Signals
):
    studio.after = {3: lambda: signal.raise_signal(number)}
    outcome = command(*LIVE, "--output", out / "x.mp4")
    assert outcome.code == 128 + number
    frames, _ = media.read_video(out / "x.mp4")
    assert len(frames) == 29  # Block 3, which was being made, is delivered.
    assert "wrote" in outcome.out


def test_what_fails_on_the_way_leaves_what_plays(command: Command, studio: Studio, out: Path):
    def fail():
        raise MemoryError("no more")

    studio.after = {3: fail}
    outcome = command(*LIVE, "--output", out / "x.mp4")
    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert len(media.read_video(out / "x.mp4")[0]) == 21  # All before it.


def test_prompts_of_a_file_hold_from_their_second_on(command: Command, studio: Studio, out: Path):
    (out / "p.txt").write_text("at 0.5s: a whale\n\nat 1 s: a hare\n")
    words = (*LIVE, "--seconds", "1.5", "--prompts", out / "p.txt", "--output", out / "x.mp4")
    assert command(*words).code == 0
    frames, _ = media.read_video(out / "x.mp4")
    # From blocks that begin at frames 13 and 29 on.
    for at, prompt in ((12, "a fox"), (13, "a whale"), (28, "a whale"), (29, "a hare")):
        assert shown(frames[at : at + 1]) == pytest.approx(expected(prompt), abs=4), at


def test_prompts_of_standard_input_hold_as_soon_as_possible(
    command: Command, studio: Studio, out: Path, monkeypatch: pytest.MonkeyPatch
):
    read, write = os.pipe()
    said = os.fdopen(write, "w")
    monkeypatch.setattr("sys.stdin", os.fdopen(read))

    def say():
        said.write("at now: nothing\n  \na whale\n")
        said.close()
        time.sleep(0.3)  # The thread reads it.

    studio.after = {2: say}
    words = (*LIVE, "--seconds", "2", "--prompts", "-", "--output", out / "x.mp4")
    assert command(*words).code == 0
    frames, _ = media.read_video(out / "x.mp4")
    told = [shown(frames[at : at + 1]) for at in (4, 12, 20, 28, 36)]
    assert told[:3] == pytest.approx([expected("a fox")] * 3, abs=4)
    assert told[3:] == pytest.approx([expected("a whale")] * 2, abs=4)


@pytest.mark.parametrize(
    ("line", "says"),
    [("a cat", "line 1: 'a cat'; expected"), ("at 5s:", "line 1"), ("at noon: x", "line 1")],
)
def test_a_bad_line_of_prompts_is_refused(
    command: Command, studio: Studio, out: Path, line: str, says: str
):
    (out / "p.txt").write_text(f"{line}\n")
    outcome = command(*LIVE, "--prompts", out / "p.txt", "--output", out / "x.mp4")
    assert outcome.code == 2
    assert says in outcome.err
    assert not (out / "x.mp4").exists()


def test_lines_with_and_without_a_time():
    assert parsed_line("at 12s: a cat: black\n") == (12.0, "a cat: black")
    assert parsed_line(" at 0.5 : x ") == (0.5, "x")
    assert parsed_line("at noon: x") == (None, "at noon: x")


def test_pace_holds_it_to_the_speed_of_play(command: Command, studio: Studio, out: Path):
    start = time.perf_counter()
    words = (*LIVE, "--seconds", "1.7", "--output", out / "x.mp4")
    assert command(*words, "--pace").code == 0
    assert time.perf_counter() - start >= 0.7  # A second of it may be ahead.


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--output", "x.avi"), "must end in .mp4"),
        (("--steps", "9"), "--steps 9 must be between 1 and 8"),
        (("--cache", "teacache"), "--cache does not exist"),
    ],
)
def test_refusals_name_flags(command: Command, studio: Studio, flags: tuple[str, ...], says: str):
    outcome = command(*LIVE, *flags)
    assert outcome.code == 2
    assert says in outcome.err


@pytest.mark.slow
def test_mini_is_streamed_into_a_pipe_and_stopped(tmp_path: Path):
    """The whole program: what is read from the pipe plays, and Ctrl-C is heard."""
    words = [sys.executable, "-m", "skyreels_jax", "live", "--prompt", "a red star moves right"]
    words += ["--output", "-", "--seed", "1", "--prompts", "-"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        with av.open(process.stdout, "r", format="mp4") as container:
            for number, frame in enumerate(container.decode(video=0)):
                assert frame.to_ndarray(format="rgb24").shape == (64, 64, 3)
                if number == 10:
                    process.stdin.write(b"a blue circle grows\n")
                    process.stdin.flush()
                if number == 100:
                    process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read().decode()
        assert process.wait() == 130, said
    assert "first frame after" in said
    assert np.isfinite(number)
    assert number >= 100
