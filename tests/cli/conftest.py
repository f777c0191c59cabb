"""The command line in process, with caches of its own."""

from pathlib import Path

import jax
import pytest
from tests.cli.commands import Command


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def own_caches(cache_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Never the caches of whoever runs the tests."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("SKYREELS_JAX_CACHE", str(cache_folder))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for what a command writes."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder
