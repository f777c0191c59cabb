"""A new prompt compiles nothing, in the same process or a later one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fabricate import Checkpoints

pytestmark = pytest.mark.slow

# Runs commands, and says how often anything was compiled by each: anew, or from the cache on disk.
PROGRAM = """
import json, sys
import jax
from skyreels_jax import hub
from skyreels_jax.cli.main import main

hub.MIN_COMPILE_SECONDS = 0
events = {"cache_hits": 0, "cache_misses": 0}

def heard(event, **details):
    name = event.rpartition("/")[2]
    if name in events:
        events[name] += 1

jax.monitoring.register_event_listener(heard)
counts = []
for words in json.loads(sys.argv[1]):
    before = dict(events)
    assert main(words) == 0
    counts.append({name: events[name] - before[name] for name in events})
print(json.dumps(counts))
"""
SMALL = ("--height", "32", "--width", "48", "--num-frames", "5", "--steps", "2", "--overwrite")


def counted(commands: list[list[str]], cache: Path) -> list[dict[str, int]]:
    # The folder that the whole run shares would hold these programs already.
    shared = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environment = {name: value for name, value in os.environ.items() if name not in shared}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        env=environment | {"SKYREELS_JAX_CACHE": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def counts(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory):
    """Of a first process and its second prompt; then of a second process, and another size."""
    folder = tmp_path_factory.mktemp("compile")
    fixed = ["generate", "--model", str(checkpoints("t2v", "original"))]
    fixed += ["--output", str(folder / "x.mp4"), *SMALL]
    first = counted(
        [[*fixed, "--prompt", "a fox"], [*fixed, "--prompt", "two crows in a tree", "--seed", "9"]],
        folder,
    )
    second = counted(
        [[*fixed, "--prompt", "sun"], [*fixed, "--prompt", "sun", "--width", "64"]], folder
    )
    return first + second


def test_the_first_prompt_compiles(counts):
    assert counts[0]["cache_misses"] > 3


def test_another_prompt_compiles_nothing(counts):
    assert counts[1]["cache_misses"] == 0


def test_another_process_compiles_nothing(counts):
    assert counts[2]["cache_misses"] == 0
    assert counts[2]["cache_hits"] > counts[0]["cache_misses"] // 2


def test_another_size_does_compile(counts):
    assert counts[3]["cache_misses"] > 0
