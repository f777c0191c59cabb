"""A repository that holds PyTorch's files alone is opened by its id, where one of them is meant."""

import fnmatch
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled

from skyreels_jax import hub
from skyreels_jax.errors import RequestError

ID = "gdhe17/Self-Forcing"
STUDENT = "checkpoints/self_forcing_dmd.pt"
OTHERS = ("checkpoints/ode_init.pt", "README.md", "Wan2.1_VAE.pth")


@dataclass
class StubHub:
    """A repository of the hub with these files, and what was fetched of it into a cache.

    As the hub's own client does, files are links to others that are called by a digest.
    """

    root: Path
    files: dict[str, bytes]
    is_there: bool = True
    fetched: list[str] = field(default_factory=list)
    revisions: set[str | None] = field(default_factory=set)

    @property
    def folder(self) -> Path:
        return self.root / "snapshots" / "0a1b"

    def snapshot_download(self, repo, *, revision, allow_patterns, ignore_patterns):
        self.revisions.add(revision)
        if self.is_there:
            for name in self.files:
                if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                    self.hf_hub_download(repo, name, revision=revision)
        return str(self.folder)

    def list_repo_files(self, repo, *, revision):
        if not self.is_there:
            raise OfflineModeIsEnabled("offline")
        return list(self.files)

    def hf_hub_download(self, repo, name, *, revision):
        self.revisions.add(revision)
        link = self.folder / name
        if name not in self.files:
            raise EntryNotFoundError.__new__(EntryNotFoundError, "?")
        if not link.exists():
            self.fetched.append(name)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob = self.root / "blobs" / f"{len(self.fetched):08x}"
            blob.parent.mkdir(exist_ok=True)
            blob.write_bytes(self.files[name])
            link.symlink_to(os.path.relpath(blob, link.parent))
        return str(link)


Repository = Callable[..., StubHub]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    def make(*names: str, **files: bytes) -> StubHub:
        stub = StubHub(tmp_path / "cache", dict.fromkeys(names, b"x") | files)
        for call in ("snapshot_download", "list_repo_files", "hf_hub_download"):
            monkeypatch.setattr(huggingface_hub, call, getattr(stub, call))
        return stub

    return make


def test_the_file_that_is_known_is_fetched_and_no_other(repository: Repository):
    stub = repository(STUDENT, *OTHERS)
    found = hub.locate(ID, "v1", known=[f"{ID}/{STUDENT}", f"other/name/{OTHERS[0]}"])
    assert found == hub.Location(stub.folder / STUDENT, ID)
    assert stub.fetched == ["Wan2.1_VAE.pth", STUDENT]
    assert stub.revisions == {"v1"}


def test_the_only_one_needs_not_be_known(repository: Repository):
    stub = repository("model.ckpt", "README.md", "Wan2.1_VAE.pth")
    assert hub.locate(ID, known=[]).folder == stub.folder / "model.ckpt"


@pytest.mark.parametrize(
    ("known", "says"),
    [
        ([], rf"{ID}/checkpoints/ode_init\.pt, {ID}/{STUDENT}$"),
        ([f"{ID}/{STUDENT}", f"{ID}/checkpoints/ode_init.pt"], f"{ID}/{STUDENT}; .* by `preset`$"),
        ([f"{ID}/elsewhere.pt"], rf"2 files of PyTorch's, .*{ID}/{STUDENT}$"),
    ],
    ids=["none known", "two known", "another known"],
)
def test_several_are_named(repository: Repository, known: list[str], says: str):
    stub = repository(STUDENT, *OTHERS)
    with pytest.raises(RequestError, match=says):
        hub.locate(ID, known=known)
    assert stub.fetched == ["Wan2.1_VAE.pth"]


def test_a_file_may_be_named_itself(repository: Repository):
    stub = repository(STUDENT, *OTHERS)
    given = f"{ID}/{OTHERS[0]}"
    assert hub.locate(given, "v1", known=[]) == hub.Location(stub.folder / OTHERS[0], ID)
    assert stub.fetched == [OTHERS[0]]
    with pytest.raises(RequestError, match=rf"{ID}/checkpoints/no\.pt: there is no such file"):
        hub.locate(f"{ID}/checkpoints/no.pt", known=[])
    with pytest.raises(RequestError, match="neither a folder here"):
        hub.locate(given)  # Twin: where a folder is wanted, a file is none.


def test_without_the_hub_what_was_fetched_before_is_found(repository: Repository):
    stub = repository(STUDENT, *OTHERS)
    known = [f"{ID}/{STUDENT}"]
    hub.locate(ID, known=known)
    stub.is_there = False
    assert hub.locate(ID, known=known).folder == stub.folder / STUDENT
    assert stub.fetched.count(STUDENT) == 1


def test_a_repository_without_weights_is_its_folder(repository: Repository):
    stub = repository("README.md")
    assert hub.locate(ID, known=[]) == hub.Location(stub.folder, ID)


@pytest.mark.parametrize("known", [None, []], ids=["folders alone", "files too"])
def test_a_repository_with_safetensors_is_its_folder(repository: Repository, known):
    stub = repository("config.json", "model.safetensors", "optimizer.pt")
    stub.list_repo_files = None  # It is not asked for.
    assert hub.locate(ID, known=known) == hub.Location(stub.folder, ID)
    assert "optimizer.pt" not in stub.fetched
