"""Batches whose processes are killed at random moments: every video is made, once, as alone."""

import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from tests.cli.commands import Command

KILLS, ROWS = 20, 40
FLAGS = ("--height", "32", "--width", "48", "--num-frames", "5", "--steps", "8")
COLOURS = ("red", "green", "blue", "yellow")
# Rows that fail until somebody moves away what is in their place.
BLOCKED = ("row-05", "row-20")
# Seconds after which a process that does nothing is broken.
PATIENCE = 400.0


@dataclass
class Batch:
    """Processes that share the rows of a file, and all that they said."""

    rows: Path
    out: Path
    engine: tuple[str, ...] = ()
    logs: list[Path] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *flags: str) -> subprocess.Popen[bytes]:
        log = self.out.parent / f"log-{len(self.logs)}.txt"
        self.logs.append(log)
        words = [sys.executable, "-m", "skyreels_jax", "batch", str(self.rows), str(self.out)]
        words += [*FLAGS, *self.engine, *flags]
        with log.open("wb") as said:
            process = subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT)
        self.processes.append(process)
        return process

    @property
    def made(self) -> Counter[str]:
        """How often each row was made."""
        texts = "".join(log.read_text() for log in self.logs)
        return Counter(re.findall(r"^made: line \d+ \(([\w-]+)\)", texts, re.MULTILINE))


def wait_for(what: str, log: Path, process: subprocess.Popen[bytes]) -> bool:
    """Whether a process says something before it ends."""
    end = time.monotonic() + PATIENCE
    while what not in log.read_text():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)
    return True


def row(number: int) -> dict[str, object]:
    prompt = f"a {COLOURS[number % 4]} disc moves right on a black background"
    named = {"id": f"row-{number:02d}", "prompt": prompt}
    return named | ({"seed": number} if number % 2 else {})


@pytest.fixture
def batch(tmp_path: Path, out: Path) -> Iterator[Batch]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row(number)) + "\n" for number in range(ROWS)))
    for name in BLOCKED:
        (out / f"{name}.job").mkdir()
        (out / f"{name}.job" / "notes.txt").write_text("somebody's")
    batch = Batch(file, out)
    yield batch
    for process in batch.processes:
        process.kill()
        process.wait()


def is_whole(batch: Batch, codes: list[int], command: Command, tmp_path: Path) -> None:
    """All but what is blocked is there, made once, and each video is that of a single run."""
    assert all(code == 1 for code in codes), codes
    last = "".join(log.read_text() for log in batch.logs[-len(codes) :])
    for name in BLOCKED:
        assert re.search(rf"failed: line \d+ \({name}\): .* there are files in it", last)
    assert len(set(re.findall(r"^failed: line \d+ \(([\w-]+)\)", last, re.MULTILINE))) == 2
    names = [f"row-{number:02d}" for number in range(ROWS)]
    there = sorted(name for name in names if name not in BLOCKED)
    assert sorted(path.stem for path in batch.out.glob("*.mp4")) == there
    assert sorted(path.stem for path in batch.out.glob("*.json")) == there
    assert sorted(path.stem for path in batch.out.glob("*.job")) == sorted(BLOCKED)
    # A process may be killed between finishing a row and saying so; never is one made twice.
    assert max(batch.made.values()) == 1
    assert set(batch.made) <= set(there)
    states = {path.name: path.stat().st_mtime_ns for path in batch.out.glob("*.mp4")}
    for name in BLOCKED:
        (batch.out / f"{name}.job" / "notes.txt").unlink()
        (batch.out / f"{name}.job").rmdir()
    outcome = command("batch", batch.rows, batch.out, *FLAGS)
    assert outcome.code == 0, outcome.err
    assert f"2 made, {ROWS - 2} were done before, 0 failed" in outcome.out
    assert sorted(path.stem for path in batch.out.glob("*.mp4")) == names
    for name, state in states.items():
        assert (batch.out / name).stat().st_mtime_ns == state
    for number, name in enumerate(names):
        seed = json.loads((batch.out / f"{name}.json").read_text())["seed"]
        words = ("--prompt", row(number)["prompt"], "--seed", str(seed), *FLAGS)
        single = tmp_path / f"{name}.mp4"
        assert command("generate", *map(str, words), "--output", single).code == 0
        assert single.read_bytes() == (batch.out / f"{name}.mp4").read_bytes(), name
    # Negative twin: another row is another video.
    first, second = ((batch.out / f"{name}.mp4").read_bytes() for name in names[:2])
    assert first != second


@pytest.mark.slow
def test_shards_that_are_killed_lose_nothing(batch: Batch, command: Command, tmp_path: Path):
    chance = random.Random(14)
    running = {shard: batch.start("--shard", shard) for shard in ("0/2", "1/2")}
    logs = dict(zip(running, batch.logs, strict=True))
    at_work = 0
    for _ in range(KILLS):
        # A shard that is done has nothing to lose; a fast machine is done with one before the last.
        alive = [shard for shard, process in running.items() if process.poll() is None]
        shard = chance.choice(alive or list(running))
        process = running[shard]
        # While it starts, or in one of its first rows.
        if (begun := chance.choice((0, 1, 1, 2, 2))) and wait_for(
            f"[{begun}/", logs[shard], process
        ):
            at_work += 1
            time.sleep(chance.uniform(0, 0.3))
        else:
            time.sleep(chance.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        running[shard] = batch.start("--shard", shard)
        logs[shard] = batch.logs[-1]
    assert at_work >= KILLS // 2  # the kills fell where there was something to lose
    codes = [process.wait(PATIENCE) for process in running.values()]
    batch.logs = [*(log for log in batch.logs if log not in logs.values()), *logs.values()]
    is_whole(batch, codes, command, tmp_path)


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The workers of the cluster that a process has started."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "_RowServer" in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.mark.slow
def test_workers_of_ray_that_are_killed_lose_nothing(
    batch: Batch, command: Command, tmp_path: Path
):
    chance = random.Random(15)
    batch.engine = ("--engine", "ray", "--workers", "2")
    process = batch.start()
    killed, end = 0, time.monotonic() + PATIENCE
    while killed < KILLS and process.poll() is None:
        assert time.monotonic() < end, batch.logs[-1].read_text()
        time.sleep(chance.uniform(0, 3))
        if workers := workers_of(process):
            chance.choice(workers).kill()
            killed += 1
    code = process.wait(PATIENCE)
    assert killed == KILLS, batch.logs[-1].read_text()
    is_whole(batch, [code], command, tmp_path)
