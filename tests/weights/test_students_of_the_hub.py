"""Causal students by their Hugging Face id; the hub is a stub, whose files are links to digests."""

import json
from pathlib import Path

import numpy as np
import pytest
from tests.cli.commands import Command
from tests.test_hub_files import StubHub, repository  # noqa: F401
from tests.weights.test_causal_students import (
    Tensors,
    read,
    wan_is_tiny,  # noqa: F401
    weights,  # noqa: F401
    written,
)

from skyreels_jax.causal_presets import CAUSAL_PRESETS
from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.errors import RequestError


@pytest.fixture
def students(tmp_path: Path, weights: Tensors, wan_is_tiny: None) -> dict[str, bytes]:  # noqa: F811
    """Files of four students and of a stage of training, by their place in a repository."""
    names = ("self-forcing", "causal-forcing-chunk", "causal-forcing-frame", "causal-forcing-long")
    places = ["/".join(CAUSAL_PRESETS[name].weights.split("/")[2:]) for name in names]
    files = [written(tmp_path, name, weights).read_bytes() for name in names]
    found = dict(zip(places, files, strict=True))
    return found | {"checkpoints/ode_init.pt": b"x", "README.md": b"x"}


def test_info_opens_a_student_by_its_id(
    students: dict[str, bytes],
    weights: Tensors,  # noqa: F811
    repository,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
):
    names = ("checkpoints/self_forcing_dmd.pt", "checkpoints/ode_init.pt", "README.md")
    stub: StubHub = repository(**{name: students[name] for name in names})
    command, repo = Command(capfd), "gdhe17/Self-Forcing"
    outcome = command("info", repo, "--json")
    assert outcome.code == 0, outcome.err
    causal = json.loads(outcome.out)["causal"]
    assert (causal["preset"], causal["assumed"]) == ("self-forcing", False)
    # By the name of its file, though that is a link to a digest.
    assert causal["reason"] == "the file's name (self_forcing_dmd.pt)"
    assert stub.fetched == [names[0]]
    found = read(Checkpoint.open(repo).folder)
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(found[name], value, name)
    # A stage is opened where it is asked for, and is no student.
    outcome = command("info", f"{repo}/{names[1]}")
    assert outcome.code == 2
    assert stub.fetched == [names[0], names[1]]


def test_of_several_students_the_preset_says_which(
    students: dict[str, bytes],
    repository,  # noqa: F811
):
    repo = "zhuhz22/Causal-Forcing"
    stub: StubHub = repository(**{n: file for n, file in students.items() if "wise/" in n})
    with pytest.raises(RequestError) as caught:
        Checkpoint.open(repo)
    said = str(caught.value)
    for name in ("causal-forcing-chunk", "causal-forcing-frame", "causal-forcing-long"):
        assert CAUSAL_PRESETS[name].weights in said
        made = Checkpoint.open(repo, preset=name)
        assert made.guess.causal is not None
        assert made.guess.causal.preset is CAUSAL_PRESETS[name]
        assert made.repo == repo
        assert f"{repo}/{stub.fetched[-1]}" == CAUSAL_PRESETS[name].weights
    assert "by `preset`" in said
    # Twin: a preset of another repository says nothing of this one.
    with pytest.raises(RequestError, match="nothing says which is meant"):
        Checkpoint.open(repo, preset="self-forcing")
