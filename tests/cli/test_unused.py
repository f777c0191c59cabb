"""Flags of the command line that do nothing in a run are said; a prompt is asked for where due."""

import argparse

import pytest

from skyreels_jax.cli.generate import check_prompt, unused_flags
from skyreels_jax.cli.main import build_parser
from skyreels_jax.errors import RequestError


def parsed(*words: str) -> argparse.Namespace:
    return build_parser("generate").parse_args(["generate", *words])


def test_finished_latents_take_nothing_that_makes_a_video():
    latents = ("--resume-latents", "x.latents.safetensors")
    (said,) = unused_flags(parsed(*latents, "--prompt", "a", "--steps", "4", "--job", "d"))
    assert said == (
        "`resume_latents` decodes what is finished: `prompt`, `steps`, `job` do nothing"
    )
    (said,) = unused_flags(parsed(*latents, "--teacache", "--vae-tiling", "on"))
    assert said.endswith(": `cache` does nothing")
    # What decides how they are decoded and written.
    assert not [*unused_flags(parsed(*latents, "--sidecar", "--vae-dtype", "bfloat16"))]


@pytest.mark.parametrize(
    ("flags", "windows", "says"),
    [
        (("--preview",), 1, "`preview`: the video has one window"),
        (("--keep-latents",), 3, "`keep_latents` does nothing: the video has 3 windows"),
    ],
)
def test_what_goes_by_windows_is_said_where_it_does_nothing(flags, windows: int, says: str):
    args = parsed("--prompt", "a", *flags)
    (said,) = unused_flags(args, windows)
    assert said.startswith(says)
    # Negative twin: with one window in place of several, or several of one.
    assert not [*unused_flags(args, 4 - windows)]


@pytest.mark.parametrize(
    "words",
    [("--prompt", "a"), ("--prompt-file", "a.txt"), ("--resume-latents", "a.safetensors")],
)
def test_a_prompt_is_not_asked_for_twice(words: tuple[str, str]):
    check_prompt(parsed(*words))


def test_a_prompt_is_asked_for():
    with pytest.raises(RequestError, match="`prompt` is missing"):
        check_prompt(parsed("--steps", "4"))
