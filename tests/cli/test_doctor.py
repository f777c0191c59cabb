"""``skyreels-jax doctor``: what belongs in a bug report, and nothing else."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import jax
import pytest
from tests.cli.commands import Command

from skyreels_jax import hub
from skyreels_jax.cli import doctor


def report(command: Command) -> dict[str, str]:
    outcome = command("doctor", "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_versions_are_those_installed(command: Command):
    told = report(command)
    assert told["python"] == platform.python_version()
    for package in ("skyreels-jax", "jax", "flax", "torch", "av"):
        assert told[package] == version(package)


def test_what_is_not_installed_is_said_and_nothing_of_torch_imported(
    command: Command, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(doctor, "PACKAGES", ("jax", "no-such-package"))
    told = report(command)
    assert told["no-such-package"] == "not installed"
    assert told["jax"] == jax.__version__


def test_lines_say_what_json_says(command: Command):
    told = report(command)
    lines = command("doctor").out.splitlines()
    assert len(lines) == len(told)
    for line, (name, value) in zip(lines, told.items(), strict=True):
        assert line.startswith(f"{name} ")
        # Other processes fill these.
        if "memory" not in name and "cache" not in name:
            assert line.endswith(value)


def test_devices_and_memory(command: Command):
    told = report(command)
    assert told["backend"] == "cpu"
    assert told["device 0"] == jax.devices()[0].device_kind
    total, free = (float(word.split()[0]) for word in told["host memory"].split("GiB, "))
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert total == pytest.approx(pages / 2**30, abs=0.06)
    assert 0 < free <= total


class Accelerator:
    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": 3 * 2**30, "bytes_in_use": 2**30}


def test_an_accelerator_says_what_is_free():
    assert doctor.device_memory(Accelerator()) == ", 3.0 GiB usable, 2.0 free"
    assert doctor.device_memory(object()) == ""


def test_caches_are_measured_where_they_are(command: Command, cache_folder: Path):
    jax.config.update("jax_compilation_cache_dir", None)  # not the one of the tests' run
    before = hub.folder_size(cache_folder / "compiled")[0]
    (cache_folder / "compiled").mkdir(exist_ok=True)
    (cache_folder / "compiled" / "program").write_bytes(bytes(2_000_000))
    told = report(command)
    (cache_folder / "compiled" / "program").unlink()
    assert told["cache root"] == str(cache_folder)
    assert told["compilation cache"].startswith(f"{cache_folder / 'compiled'} ({before + 1} files")
    assert float(told["compilation cache"].split()[-2]) >= 2


def test_no_secret_is_told(command: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in command("doctor").out
