"""Twenty films and captions, one recipe, one command; killed fifteen times, the same to the bit."""

import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from tests.killing import kill_after, logged_step
from tests.training.videos.made_films import FILMS, make_films, write_lora_recipe

KILLS = 15
STEPS = 30
pytestmark = pytest.mark.slow


def started(recipe: Path, cache: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "skyreels_jax.cli.main", "train", str(recipe)]
    log = (recipe.parent / "stderr.txt").open("ab")
    environment = os.environ | {"SKYREELS_JAX_CACHE": str(cache)}
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def progress(folder: Path) -> int:
    """Files that are encoded, steps that are logged, and folders that are written."""
    encoded = len(list((folder / "encoded").glob("*/[!.]*.safetensors")))
    return (
        encoded
        + logged_step(folder / "out")
        + len(list(folder.glob("out/samples/[!.]*")))
        + len(list(folder.glob("out/model")))
    )


def _has_come_to(folder: Path, moment: int) -> bool:
    return progress(folder) >= moment


def results(folder: Path) -> dict[str, bytes]:
    """The LoRA and what it makes, by path."""
    out = folder / "out"
    found = [*out.glob("model/*"), *out.glob("samples/*/*")]
    return {str(file.relative_to(out)): file.read_bytes() for file in found if file.is_file()}


def test_killed_at_fifteen_moments_it_ends_the_same(tmp_path: Path):
    films = make_films(tmp_path / "films")
    cache = tmp_path / "cache"
    begun = time.monotonic()
    whole = write_lora_recipe(tmp_path / "whole", films)
    assert started(whole, cache).wait(3600) == 0, (whole.parent / "stderr.txt").read_text()[-3000:]
    undisturbed = time.monotonic() - begun
    wanted = results(whole.parent)
    names = {Path(name).name for name in wanted}
    assert {"pytorch_lora_weights.safetensors", "comfyui.safetensors", "0.mp4", "1.mp4"} <= names
    assert len([name for name in wanted if name.startswith("samples/")]) == 2 * 7
    total = progress(whole.parent)
    clips = len(list((whole.parent / "encoded" / "clips").iterdir()))
    assert clips >= FILMS

    chance = random.Random(15)
    killed = write_lora_recipe(tmp_path / "killed", films)
    moments = sorted(chance.sample(range(total), KILLS))
    assert moments[0] < clips < moments[-1]  # Some while data are encoded, some in training.
    happened = []
    for moment in moments:
        process = started(killed, cache)
        reached = partial(_has_come_to, killed.parent, moment)
        happened.append(kill_after(process, reached, chance, within=0.5))
    # None was over before.
    assert all(happened)
    assert started(killed, cache).wait(3600) == 0, (killed.parent / "stderr.txt").read_text()[
        -3000:
    ]
    found = results(killed.parent)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    taken = time.monotonic() - begun
    print(f"\nundisturbed {undisturbed:.0f} s, with {KILLS} kills {taken:.0f} s in all")
