"""Several processes that make one video: what they refuse, who stands still, and what they make."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from skyreels_jax.errors import RequestError
from skyreels_jax.parallel.processes import JoinOptions
from skyreels_jax.parallel.standstill import Beat, Standstill

HERE = {"coordinator": "localhost:1234", "num_processes": 2, "process_id": 0}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"process_id": None}, "go together"),
        ({"coordinator": None}, "go together"),
        ({"coordinator": "localhost"}, "HOST:PORT"),
        ({"coordinator": ":1234"}, "HOST:PORT"),
        ({"coordinator": "localhost:99999"}, "HOST:PORT"),
        ({"process_id": 2}, "ids are 0 to 1"),
        ({"process_id": -1}, "ids are 0 to 1"),
        ({"num_processes": 0}, "at least one"),
        ({"stall_limit": -1.0}, "seconds"),
        ({"stall_limit": float("nan")}, "seconds"),
    ],
)
def test_what_does_not_go_together_is_refused(changed: dict, words: str):
    with pytest.raises(RequestError, match=words):
        JoinOptions(**{**HERE, **changed})


def test_what_goes_together_is_taken():
    JoinOptions(**HERE)
    JoinOptions()


def denoising(count: int) -> Beat:
    return Beat(count, "denoise", False)


def test_who_is_behind_for_too_long_is_named():
    watch = Standstill(45.0)
    assert watch.judge({0: denoising(5), 1: denoising(5)}, 0.0) is None
    assert watch.judge({0: denoising(6), 1: denoising(5)}, 1.0) is None
    assert watch.judge({0: denoising(6), 1: denoising(5)}, 44.0) is None
    wrong = watch.judge({0: denoising(6), 1: denoising(5)}, 46.0)
    assert wrong is not None and "process 1" in wrong


def test_who_goes_on_is_left_alone_however_far_behind():
    watch = Standstill(45.0)
    for now in range(0, 1000, 40):
        assert watch.judge({0: denoising(1000), 1: denoising(1 + now)}, float(now)) is None


def test_compiling_may_take_long():
    watch = Standstill(45.0)
    beats = {0: denoising(6), 1: Beat(5, "compile", True)}
    assert watch.judge(beats, 0.0) is None
    assert watch.judge(beats, 45.0 * 39) is None
    assert watch.judge(beats, 45.0 * 41) is not None


def test_all_may_stand_for_as_long_as_ten_steps():
    watch = Standstill(45.0, longest=30.0)
    beats = {0: denoising(6), 1: denoising(6)}
    assert watch.judge(beats, 0.0) is None
    assert watch.judge(beats, 299.0) is None
    assert watch.judge(beats, 301.0) is not None


def test_nobody_is_judged_before_the_first_stage_nor_without_a_limit():
    assert Standstill(45.0).judge({0: Beat(), 1: denoising(1)}, 0.0) is None
    watch = Standstill(45.0)
    watch.judge({0: Beat(), 1: denoising(1)}, 0.0)
    assert watch.judge({0: Beat(), 1: denoising(2)}, 1e6) is None
    unlimited = Standstill(0.0)
    unlimited.judge({0: denoising(1), 1: denoising(2)}, 0.0)
    assert unlimited.judge({0: denoising(1), 1: denoising(2)}, 1e6) is None


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def start(
    count: int, devices: int, words: list[str], folder: Path, fault: str = ""
) -> list[subprocess.Popen]:
    """Processes of the command line, each with so many devices; ``fault`` is the last one's."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["SKYREELS_JAX_CACHE"] = str(folder / "caches")
    port = free_port()
    started = []
    for number in range(count):
        joining = [] if count == 1 else ["--coordinator", f"localhost:{port}"]
        if count > 1:
            joining += ["--num-processes", str(count), "--process-id", str(number)]
        program = ["-m", "skyreels_jax"]
        if fault and number == count - 1:
            program = ["-m", "tests.parallel.faulty_process", fault]
        with (folder / f"{number}.out").open("w") as out, (folder / f"{number}.err").open("w") as e:
            command = [sys.executable, *program, *words, *joining]
            started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=e))
    return started


def finish(started: list[subprocess.Popen], folder: Path, seconds: float = 600) -> list[int]:
    """Their exit codes; nobody is left behind."""
    try:
        return [process.wait(seconds) for process in started]
    except subprocess.TimeoutExpired:
        said = [file.read_text()[-2000:] for file in sorted(folder.glob("*.err"))]
        pytest.fail(f"not done after {seconds} s: {said}")
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()


def generate(output: Path, *more: str) -> list[str]:
    return [
        *("generate", "--model", "mini", "--prompt", "a red star", "--seed", "3", "--steps", "3"),
        *("--output", str(output), *more),
    ]


MESH = ("--mesh", "fsdp=2,ulysses=2", "--num-frames", "9", "--keep-latents")


def test_bad_flags_are_refused_before_anything_is_joined(capsys: pytest.CaptureFixture[str]):
    from skyreels_jax.cli.main import main

    prompt = ["generate", "--prompt", "a red star"]
    for words, expected in (
        (["--coordinator", "localhost:1"], "go together"),
        (["--distributed"], "--mesh"),
        (["--stall-limit", "3"], "several processes"),
        (["--distributed", "--mesh", "auto", "--backend", "hybrid"], "--backend hybrid"),
        (["--distributed", "--mesh", "auto", "--dry-run"], "--dry-run"),
    ):
        assert main([*prompt, *words]) == 2
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_processes_make_what_one_makes(count: int, devices: int, tmp_path: Path):
    videos = []
    for name, processes, each in (
        ("one", 1, 4),
        ("some", count, devices),
        ("again", count, devices),
    ):
        folder = tmp_path / name
        folder.mkdir()
        started = start(processes, each, generate(folder / "a.mp4", *MESH), folder)
        assert finish(started, folder) == [0] * processes
        videos.append((folder / "a.mp4").read_bytes())
        for other in range(1, processes):
            said = (folder / f"{other}.out").read_text() + (folder / f"{other}.err").read_text()
            assert [line for line in said.splitlines() if "[Gloo]" not in line] == []
    assert videos[1] == videos[2]
    assert videos[0] == videos[1]


LONG = ("--seconds", "3", "--base-num-frames", "17", "--overlap-history", "1", "--mesh", "auto")


def windows(job: Path) -> int:
    return len(list(job.glob("window-*.safetensors")))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], bytes]:
    """The video of one process that has so many devices."""

    @cache
    def made(devices: int) -> bytes:
        folder = tmp_path_factory.mktemp("undisturbed")
        assert finish(start(1, devices, generate(folder / "a.mp4", *LONG), folder), folder) == [0]
        return (folder / "a.mp4").read_bytes()

    return made


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    ("fault", "seconds", "words"),
    [
        ("kill", 45, ("closed by peer", "is gone", "distributed", "coordination")),
        ("raise", 45, ("planted fault",)),
        ("hang", 60, ("process {last} has stood still",)),
    ],
)
def test_the_others_end_and_resume_makes_the_same_video(
    fault: str,
    seconds: float,
    words: tuple[str, ...],
    count: int,
    undisturbed: Callable[[int], bytes],
    tmp_path: Path,
):
    output, job = tmp_path / "a.mp4", tmp_path / "a.job"
    *others, last = start(count, 1, generate(output, *LONG), tmp_path, fault)
    try:
        began = tmp_path / "fault"
        while not began.exists():
            assert others[0].poll() is None, (tmp_path / "0.err").read_text()[-2000:]
            time.sleep(0.1)
        assert windows(job) >= 1
        came = time.monotonic()
        if fault == "kill":
            last.send_signal(signal.SIGKILL)
        codes = [process.wait(300) for process in others]
        took = time.monotonic() - came
    finally:
        for process in (*others, last):
            process.kill()
    print(fault, count, "ended after", took)
    assert took < seconds
    assert 0 not in codes
    said = (tmp_path / "0.err").read_text()
    assert any(word.format(last=count - 1) in said for word in words), said[-3000:]
    last.wait(60)
    started = start(count, 1, ["resume", str(job)], tmp_path)
    assert finish(started, tmp_path) == [0] * count
    assert output.read_bytes() == undisturbed(count)
