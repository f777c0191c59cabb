"""The command line in process, with caches of its own."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from tests.cli.commands import Command


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@contextlib.contextmanager
def jax_settings() -> Iterator[None]:
    """In the end JAX keeps compiled programs where it did before."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def own_caches(cache_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Never the caches of whoever runs the tests."""
    monkeypatch.setenv("SKYREELS_JAX_CACHE", str(cache_folder))
    with jax_settings():
        yield


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for what a command writes."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder
