"""Faults injected at every write and at many moments: finished work is never lost or half there.

The model is replaced by numbers that follow from the window, so that a run takes no time: what is
tested is everything around it, as it is.
"""

import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from tests.bounded import MOST, memory_below
from tests.cli.commands import Command, Outcome
from tests.fabricate import Checkpoints

from skyreels_jax import media
from skyreels_jax.components.lazy import PromptCache
from skyreels_jax.errors import RequestError, SkyReelsError
from skyreels_jax.generation.job_folder import FolderStore
from skyreels_jax.generation.store import SavedLatents
from skyreels_jax.media import video_writer
from skyreels_jax.pipeline import Pipeline

FRAMES, WINDOWS = 13, 2
SMALL = ("--height", "32", "--width", "48", "--steps", "2", "--seed", "7", "--prompt", "a fox")
LONG = ("--num-frames", "13", "--base-num-frames", "9", "--overlap-history", "5", "--preview")
SHORT = ("--num-frames", "13", "--base-num-frames", "17", "--keep-latents")
MOMENTS = 60


class Numbers(Pipeline):
    """A pipeline without a model; ``made`` counts the windows that were denoised."""

    def __init__(self, real: Pipeline):
        vars(self).update(vars(real))
        self.verify = lambda: None
        self.made: list[int] = []

    def fingerprint(self) -> str:
        return "numbers"

    def frames(self, request, *, store=None, clock=None) -> Iterator[np.ndarray]:
        done = 0
        for window in request.windows:
            latents = store.load(window)
            if latents is None:
                shape = (16, window.frames, *request.latent_shape[1:])
                store.save(window, np.full(shape, window.number, np.float32))
                self.made.append(window.number)
            last = window.number == len(request.windows) - 1
            upto = request.num_frames if last else 4 * (window.start + window.frames) - 3
            for frame in range(done, upto):
                yield np.full((1, request.height, request.width, 3), 16 * frame, np.uint8)
            done = upto


@pytest.fixture(scope="module")
def real(checkpoints: Checkpoints) -> Pipeline:
    return Pipeline.from_pretrained(checkpoints("df", "diffusers"))


@pytest.fixture
def run(command: Command, real: Pipeline, out: Path, tmp_path: Path, monkeypatch):
    """``run()`` generates, ``run(advised)`` does as told; all else on the disk is somebody's."""
    numbers = Numbers(real)
    for verb in ("generate", "resume"):
        monkeypatch.setattr(f"skyreels_jax.cli.{verb}.open_pipeline", lambda _: numbers)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.chdir("/proc")

    def call(advised: list[str] | None = None, flags: tuple[str, ...] = LONG) -> Outcome:
        if advised is not None:
            return command(*advised)
        return command(
            *("generate", "--model", real.checkpoint.folder, *SMALL, *flags, "--sidecar"),
            *("--output", out / "x.mp4"),
        )

    call.numbers = numbers
    (out / "notes.txt").write_text("somebody's")
    return call


def clear(*folders: Path) -> None:
    for folder in folders:
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.name != "notes.txt":
                path.rmdir() if path.is_dir() else path.unlink()


def is_sound(outcome: Outcome, out: Path, elsewhere: Path) -> None:
    """What holds however a run ended."""
    assert "Traceback" not in outcome.err
    assert outcome.code in (0, 2, 130), outcome.err
    assert outcome.code == 0 or len(outcome.errors) == (outcome.code == 2), outcome.err
    assert (out / "notes.txt").read_text() == "somebody's"
    for folder in (out, elsewhere):
        assert not list(folder.rglob(".skyreels-*"))
        assert not list(folder.glob(".lock-*"))
        for path in folder.rglob("*.safetensors"):
            if "window" not in path.name:
                assert SavedLatents.open(path).latents.shape == (16, 4, 4, 6)
        for path in folder.glob("*.png"):
            media.read_image(path)
    if outcome.code == 0 or (out / "x.mp4").exists():
        assert len(media.read_video(out / "x.mp4")[0]) == FRAMES


def advised_by(outcome: Outcome) -> list[str] | None:
    """The command that a run names as the way to go on."""
    found = re.search(r"skyreels-jax (resume .*)$", outcome.err, re.MULTILINE)
    return shlex.split(found[1]) if found else None


class Fault:
    """Fails the ``at``-th write and those after it, as a disk does that is full."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, within: Path | None, once: bool):
        self.at, self.within, self.once, self.seen = at, within, once, 0
        for owner, name, place in (
            (os, "link", lambda a: a[1]),
            (os, "replace", lambda a: a[1]),
            (os, "rename", lambda a: a[1]),
            (os, "mkdir", lambda a: a[0]),
            (os, "fsync", lambda a: os.readlink(f"/proc/self/fd/{a[0]}")),
            (Path, "touch", lambda a: a[0]),
            (Path, "write_text", lambda a: a[0]),
            (safetensors.numpy, "save_file", lambda a: a[1]),
            (Image.Image, "save", lambda a: a[1]),
            (media.VideoWriter, "_begin", lambda a: a[1]),
            (media.VideoWriter, "append", lambda a: a[0].path),
            (video_writer.VideoWriter, "_flush", lambda a: a[0].path),
        ):
            patch.setattr(owner, name, self.failing(getattr(owner, name), place))

    def failing(self, true: Callable, place: Callable) -> Callable:
        def call(*given, **named):
            if self.within is None or str(place(given)).startswith(str(self.within)):
                self.seen += 1
                if self.at and (self.seen == self.at or (self.seen > self.at and not self.once)):
                    if true is safetensors.numpy.save_file:
                        raise safetensors.SafetensorError("I/O error: No space left on device")
                    raise OSError(28, "No space left on device")
            return true(*given, **named)

        return call


# Of the writes, and of the moments, every one so many; `make test-all` takes each.
STRIDE = pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])


@STRIDE
@pytest.mark.parametrize("flags", [LONG, SHORT], ids=["long", "short"])
@pytest.mark.parametrize("once", [True, False], ids=["once", "from then on"])
def test_a_write_that_fails_loses_nothing(
    run, out: Path, tmp_path: Path, flags, once: bool, stride: int
):
    """Each write in turn is refused, in the output's folder."""
    elsewhere = tmp_path / "elsewhere"
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, 0, out, once)
        assert run(flags=flags).code == 0
    assert fault.seen >= 15
    for at in range(1 + (once and stride > 1), fault.seen + 1, stride):
        clear(out, elsewhere)
        run.numbers.made.clear()
        with pytest.MonkeyPatch.context() as patch:
            Fault(patch, at, out, once)
            outcome = run(flags=flags)
        is_sound(outcome, out, elsewhere)
        if outcome.code:
            advised = advised_by(outcome)
            if run.numbers.made:
                assert advised is not None, (at, outcome.err)
                assert run(advised).code == 0
            else:
                assert run(flags=flags).code == 0, at
        assert len(run.numbers.made) == (WINDOWS if flags is LONG else 1), at
        is_sound(outcome, out, elsewhere)
        assert len(media.read_video(out / "x.mp4")[0]) == FRAMES
        assert not list(out.glob("*.job"))
        assert not list(elsewhere.glob("*.job"))


def test_where_nothing_can_be_written_there_is_one_line(run, out: Path, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    for at in range(1, 40):
        clear(out, elsewhere)
        with pytest.MonkeyPatch.context() as patch:
            Fault(patch, at, None, once=False)
            outcome = run()
        is_sound(outcome, out, elsewhere)


class Interruption:
    """Sends SIGINT when the ``at``-th function of the package is called."""

    def __init__(self, at: int):
        self.at, self.seen = at, 0

    def __call__(self, frame, event: str, argument: object) -> None:
        name = frame.f_code.co_filename
        # The tests' own checks of types are around the outermost function, too.
        if event == "call" and "skyreels_jax" in name and not name.startswith("<"):
            self.seen += 1
            if self.seen == self.at:
                signal.raise_signal(signal.SIGINT)


@STRIDE
@pytest.mark.parametrize("flags", [LONG, SHORT], ids=["long", "short"])
def test_a_signal_at_any_moment_loses_nothing(run, out: Path, tmp_path: Path, flags, stride: int):
    """From the job's beginning to the end: store, decode, flush, rename and what follows."""
    elsewhere = tmp_path / "elsewhere"
    true = FolderStore.create

    def interrupted(at: int) -> tuple[Outcome, int]:
        interruption = Interruption(at)

        def create(*given) -> FolderStore:
            sys.setprofile(interruption)
            return true(*given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FolderStore, "create", create)
            try:
                return run(flags=flags), interruption.seen
            finally:
                sys.setprofile(None)

    outcome, calls = interrupted(0)
    assert outcome.code == 0
    for at in np.linspace(1, calls, MOMENTS // 2).round().astype(int)[::stride]:
        clear(out, elsewhere)
        run.numbers.made.clear()
        outcome, _ = interrupted(int(at))
        is_sound(outcome, out, elsewhere)
        if outcome.code == 0:  # It was asked when all was done, or between the last two steps.
            continue
        made = len(run.numbers.made)
        advised = advised_by(outcome)
        assert made == 0 or advised is not None or (out / "x.mp4").exists(), (at, outcome.err)
        if advised is not None and Path(advised[1]).exists():
            after = run(advised)
            assert after.code == 0, (at, after.err)
            is_sound(after, out, elsewhere)
            assert len(run.numbers.made) <= (WINDOWS if flags is LONG else 1), at


def changed(content: bytes, random: random.Random) -> bytes:
    """Some bytes of a file are others, missing or there twice."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(len(changed))
        kind = random.randrange(4)
        if kind == 0:
            changed[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            del changed[at : at + random.choice((1, 4, 100))]
        elif kind == 2:
            changed[at:at] = changed[at : at + random.choice((1, 16, 300))]
        else:
            changed[at] = random.choice(b'0123456789-{}[]",:.eE\x00\xff')
        if not changed:
            return b""
    return bytes(changed)


COUNTS = (100, pytest.param(1000, marks=pytest.mark.slow))


@pytest.mark.parametrize("count", COUNTS)
def test_changed_records_are_refused_or_understood(
    command: Command, run, out: Path, monkeypatch, count: int
):
    """One error of ours within two seconds, or a job that is as whole as before."""
    monkeypatch.setattr("skyreels_jax.cli.job.place_video", full)
    advised = advised_by(run())
    assert advised is not None
    job = Path(advised[1])
    record, moments = job / "job.json", random.Random(1)
    content = record.read_bytes()
    monkeypatch.setattr("skyreels_jax.cli.resume.open_pipeline", far_enough)
    for _ in range(count):
        record.write_bytes(changed(content, moments))
        begin = time.monotonic()
        with memory_below(4 * len(content) + MOST):
            outcome = command("resume", job)
        assert time.monotonic() - begin < 2
        assert (outcome.code, len(outcome.errors)) == (2, 1), outcome.err
    assert (out / "notes.txt").read_text() == "somebody's"
    assert sorted(path.name for path in out.glob("*.mp4")) == []


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def far_enough(*_: object) -> None:
    raise RequestError("the record was understood")


@pytest.mark.parametrize("count", COUNTS)
def test_changed_latents_are_refused(tmp_path: Path, count: int):
    path, moments = tmp_path / "a.latents.safetensors", random.Random(2)
    latents = np.arange(16 * 2 * 4 * 6, dtype=np.float32).reshape(16, 2, 4, 6)
    SavedLatents(latents, {"fps": 24, "prompt": "a fox"}).save(path)
    content = path.read_bytes()
    for _ in range(count):
        path.write_bytes(damaged := changed(content, moments))
        begin = time.monotonic()
        try:
            with memory_below(4 * len(content) + MOST):
                found = SavedLatents.open(path)
        except SkyReelsError:
            pass
        else:
            # Only what says that there is a checksum can have changed.
            assert damaged == content or b"sha256" not in damaged
            assert found.latents.ndim == 4
        assert time.monotonic() - begin < 2


@pytest.mark.parametrize("count", COUNTS)
def test_changed_cache_entries_are_made_anew(tmp_path: Path, count: int):
    states = np.arange(16 * 4, dtype=np.float32).reshape(1, 16, 4)

    class Encoder:
        def encode(self, prompts):
            return states

    cache, moments = PromptCache(tmp_path, "w"), random.Random(3)
    cache.encode(["abc"], Encoder)
    path = cache.path_of("abc")
    content = path.read_bytes()
    for _ in range(count):
        path.write_bytes(changed(content, moments))
        begin = time.monotonic()
        with memory_below(4 * len(content) + MOST):
            np.testing.assert_array_equal(cache.encode(["abc"], Encoder), states)
        assert time.monotonic() - begin < 2


def test_memory_is_counted_from_where_the_body_begins():
    np.ones(10**8, np.uint8)
    with memory_below(5 * 10**7):
        pass
    with pytest.raises(AssertionError), memory_below(5 * 10**7):
        np.ones(10**8, np.uint8)


def start(arguments: list[str | Path], **more) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "skyreels_jax", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(program, **pipes, **more)


@pytest.mark.slow
def test_two_processes_on_one_output(checkpoints: Checkpoints, out: Path):
    words = ["generate", "--model", checkpoints("t2v", "original"), *SMALL, "--num-frames", "5"]
    both = [start([*words, "--output", out / "x.mp4"]) for _ in range(2)]
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in both]
    assert sorted(code for _, code in ends) == [0, 2], ends
    refused = next(err for err, code in ends if code == 2)
    assert "another process" in refused or "exists" in refused
    assert [path.name for path in out.iterdir()] == ["x.mp4"]
    assert len(media.read_video(out / "x.mp4")[0]) == 5


@pytest.mark.slow
def test_two_processes_on_one_job(checkpoints: Checkpoints, out: Path):
    """One makes the video, the other is refused in a line; nothing of the job is lost to either."""
    words = ["generate", "--model", checkpoints("df", "original"), *SMALL, *LONG[:-1]]
    _, err = start([*words, "--keep-job", "--output", out / "x.mp4"]).communicate(timeout=300)
    assert len(media.read_video(out / "x.mp4")[0]) == FRAMES, err
    (out / "x.mp4").unlink()
    windows = {path.name: path.read_bytes() for path in (out / "x.job").rglob("*.safetensors")}
    assert len(windows) == WINDOWS
    both = [start(["resume", out / "x.job"]) for _ in range(2)]
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in both]
    assert sorted(code for _, code in ends) == [0, 2], ends
    refused = next(err for err, code in ends if code == 2)
    assert "another process" in refused or "exists" in refused, refused
    assert "Traceback" not in "".join(err for err, _ in ends)
    assert len(media.read_video(out / "x.mp4")[0]) == FRAMES
    kept = {path.name: path.read_bytes() for path in (out / "x.job").rglob("*.safetensors")}
    assert kept == windows


@pytest.mark.slow
@pytest.mark.parametrize("limit", [100, 1000, 2000, 4000, 8000, 16000])
def test_a_limit_of_files_leaves_nothing_half_written(
    checkpoints: Checkpoints, out: Path, limit: int, tmp_path: Path
):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = ["generate", "--model", checkpoints("t2v", "original"), *SMALL, "--num-frames", "5"]
    process = start(
        [*words, "--output", out / "x.mp4"],
        preexec_fn=limited,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode in (0, 2), err
    assert "Traceback" not in err
    assert not list(out.rglob(".*"))
    if (out / "x.mp4").exists():
        assert len(media.read_video(out / "x.mp4")[0]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("seconds", np.linspace(0.2, 9, 12))
def test_a_real_signal_at_any_moment(checkpoints: Checkpoints, out: Path, seconds: float):
    words = ["generate", "--model", checkpoints("df", "original"), *SMALL, *LONG[:-1]]
    process = start([*words, "--output", out / "x.mp4"])
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode in (0, 130, -signal.SIGINT), err
    assert not list(out.rglob(".skyreels-*"))
    if (job := out / "x.job").exists():
        process = start(["resume", job])
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    if (out / "x.mp4").exists():
        assert len(media.read_video(out / "x.mp4")[0]) == FRAMES
