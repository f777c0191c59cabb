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
