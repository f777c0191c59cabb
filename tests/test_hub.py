import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from skyreels_jax import hub
from skyreels_jax.errors import RequestError

ID = "Skywork/SkyReels-V2-I2V-1.3B-540P"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The calls that would have gone to the network; they answer with a folder."""
    calls = []

    def answer(repo, **kwargs):
        calls.append((repo, kwargs))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    return calls


def failing(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)


def test_a_local_folder_is_taken_as_it_is_without_network(tmp_path, asked):
    for given in (tmp_path, str(tmp_path), f"{tmp_path}/"):
        assert hub.locate(given) == hub.Location(tmp_path)
    assert asked == []


def test_a_relative_folder_goes_before_an_id(tmp_path, asked, monkeypatch):
    (tmp_path / "Skywork" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.locate("Skywork/model").repo is None
    assert asked == []


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert hub.locate("~/model").folder == tmp_path / "model"


def test_an_id_is_fetched_at_its_revision(asked, tmp_path):
    assert hub.locate(ID, "abc123") == hub.Location(tmp_path / "snapshot", ID)
    [(repo, kwargs)] = asked
    assert (repo, kwargs["revision"]) == (ID, "abc123")


def test_only_needed_files_are_fetched(asked):
    hub.locate(ID)
    [(_, kwargs)] = asked

    def fetched(name: str) -> bool:
        def matches(patterns: str) -> bool:
            return any(fnmatch.fnmatch(name, p) for p in kwargs[patterns])

        return matches("allow_patterns") and not matches("ignore_patterns")

    for name in (
        *("config.json", "model-00001-of-00014.safetensors", "model.safetensors.index.json"),
        *("Wan2.1_VAE.pth", "google/umt5-xxl/spiece.model", "google/umt5-xxl/tokenizer.json"),
        *("models_t5_umt5-xxl-enc-bf16.pth", "model_index.json", "tokenizer/spiece.model"),
        *("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "scheduler/x_config.json"),
        *("transformer/diffusion_pytorch_model-00001-of-00007.safetensors", "vae/config.json"),
    ):
        assert fetched(name), name
    for name in (
        *("assets/demo.mp4", "README.md", "other.pth", "pytorch_model.bin"),
        *("xlm-roberta-large/tokenizer.json", "optimizer.pt"),
    ):
        assert not fetched(name), name


@pytest.mark.parametrize(
    "given",
    [
        *("./model", "/no/such/folder", "model", "a/b/c", "owner/name/", "own er/name", "a//b"),
        *("../no such folder", "https://huggingface.co/Skywork/x", Path("Skywork/x")),
    ],
)
def test_what_is_neither_a_folder_nor_an_id_is_refused_without_network(given, asked):
    with pytest.raises(RequestError, match="neither a folder here") as error:
        hub.locate(given)
    assert str(given) in str(error.value)
    assert asked == []


def test_a_mistyped_folder_is_answered_with_the_one_that_is_there(tmp_path):
    (tmp_path / "SkyReels-I2V").mkdir()
    with pytest.raises(RequestError, match=r"there is .*SkyReels-I2V"):
        hub.locate(str(tmp_path / "SkyReels-T2V"))


def test_a_file_is_found_as_it_is_and_has_no_revision(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    file = tmp_path / "model.safetensors"
    assert hub.locate(file) == hub.Location(file)
    with pytest.raises(RequestError, match="is a local file"):
        hub.locate(file, "main")


def test_a_revision_of_a_local_folder_is_refused(tmp_path):
    with pytest.raises(RequestError, match="local folder"):
        hub.locate(tmp_path, "main")


def of_the_hub(kind: type[Exception]) -> Exception:
    """Its constructor takes a response of whichever HTTP library the hub's own client has."""
    return kind.__new__(kind, "?")


def test_an_empty_string_does_not_mean_the_current_folder(asked):
    with pytest.raises(RequestError, match="no checkpoint was given"):
        hub.locate(" ")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (of_the_hub(RepositoryNotFoundError), "neither a folder here.*nor a public"),
        (of_the_hub(RevisionNotFoundError), "has no revision 'v9'"),
        (of_the_hub(GatedRepoError), "is gated"),
        (LocalEntryNotFoundError("?"), "nor in the Hugging Face cache.*HF_HUB_OFFLINE"),
        (ConnectionError("no route"), "could not be fetched.*no route"),
        (OSError(28, "No space left on device"), "could not be fetched.*No space left"),
    ],
)
def test_failures_of_the_hub_say_what_was_asked_for(monkeypatch, error, words):
    failing(monkeypatch, error)
    with pytest.raises(RequestError, match=words) as raised:
        hub.locate(ID, "v9")
    assert ID in str(raised.value)


def test_offline_an_id_that_is_not_cached_is_an_error_without_network(tmp_path):
    import os
    import subprocess
    import sys

    code = (
        "from skyreels_jax import hub, errors\n"
        f"try: hub.locate({ID!r})\n"
        "except errors.RequestError as e: print(e)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "HF_HUB_OFFLINE" in done.stdout


def test_a_built_in_model_that_is_not_there_says_how_it_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "ASSETS", tmp_path)
    with pytest.raises(RequestError, match="make mini"):
        hub.locate("mini")
    (tmp_path / "mini").mkdir()
    assert hub.locate("mini").folder == tmp_path / "mini"
