import math
import os
from pathlib import Path

import jax
import pytest

from skyreels_jax import hub


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv(hub.ROOT_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_the_root_is_in_the_users_cache_folder(no_settings: Path):
    assert hub.cache_root() == no_settings / "skyreels-jax"


def test_a_variable_moves_the_root(no_settings: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(hub.ROOT_VARIABLE, str(no_settings / "elsewhere"))
    assert hub.cache_root() == no_settings / "elsewhere"


def test_a_setting_of_jax_itself_wins(no_settings: Path):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert hub.compilation_cache_folder() == no_settings / "skyreels-jax" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(no_settings / "chosen"))
        assert hub.enable_compilation_cache() == no_settings / "chosen"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_size_counts_files_below_and_nothing_where_there_is_no_folder(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"12345")
    (tmp_path / "c").write_bytes(b"123")
    assert hub.folder_size(tmp_path) == (2, 8)
    assert hub.folder_size(tmp_path / "nowhere") == (0, 0)


@pytest.fixture
def jax_settings():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    hub._said.clear()
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def unusable(kind: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the place of all caches one of those that containers and clusters have."""
    monkeypatch.delenv(hub.ROOT_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(root))
    if kind == "a file in its place":
        (root / ".cache").touch()
    elif kind == "a home that is a device":
        monkeypatch.setenv("HOME", "/dev/null")
    elif kind == "nobody's home":
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without an entry
    elif kind == "a kernel's folder":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self")
    else:
        (root / "file").touch()
        monkeypatch.setenv(hub.ROOT_VARIABLE, str(root / "file" / "below"))


UNUSABLE = (
    *("a file in its place", "a home that is a device", "nobody's home", "a kernel's folder"),
    "a path through a file",
)


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_folder_that_cannot_be_written_is_done_without_and_said_once(
    kind: str, tmp_path: Path, monkeypatch, jax_settings, caplog
):
    unusable(kind, tmp_path, monkeypatch)
    assert hub.enable_compilation_cache() is None
    assert hub.enable_compilation_cache() is None
    prompts = hub.prompt_cache_folder()
    if prompts is not None:
        hub.warn_unwritable(prompts, "refused")
    assert jax.config.jax_compilation_cache_dir is None
    (said,) = caplog.records
    assert "going on without" in said.message


def test_what_is_in_a_read_only_folder_is_used(tmp_path: Path, monkeypatch, jax_settings, caplog):
    """Programs that an image brought along: looked up, and none is added."""
    monkeypatch.setenv(hub.ROOT_VARIABLE, str(tmp_path))
    (tmp_path / "compiled").mkdir()
    monkeypatch.setattr(hub.tempfile, "TemporaryFile", refuse)  # root may write anywhere
    assert hub.enable_compilation_cache() == tmp_path / "compiled"
    assert jax.config.jax_persistent_cache_min_compile_time_secs == math.inf
    assert len(caplog.records) == 1


def refuse(*_: object, **__: object) -> None:
    raise OSError(30, "Read-only file system")
