"""The command line as a whole: help, versions, misspelt words, exit codes."""

import importlib
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
from tests.cli.commands import Command

from skyreels_jax import interrupt
from skyreels_jax.cli.main import ELSEWHERE, VERBS, build_parser

# The original's flags (generate_video.py) that are ours under another name, with what they take.
ALIASES = {
    "--model_id": "--model",
    "--inference_steps": "--steps",
    "--num_inference_steps": "--steps",
    "--num_frames": "--num-frames",
    "--guidance_scale": "--guidance-scale",
    "--negative_prompt": "--negative-prompt",
    "--end_image": "--last-image",
}


def test_the_package_is_the_program_too():
    words = [sys.executable, "-m", "skyreels_jax", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert version("skyreels-jax") in done.stdout


def test_help_lists_every_verb(command: Command):
    outcome = command("--help")
    assert outcome.code == 0
    for verb, summary in VERBS.items():
        assert verb in outcome.out
        assert summary[:40] in " ".join(outcome.out.split())


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(command: Command, verb: str):
    outcome = command(verb, "--help")
    assert outcome.code == 0
    assert f"usage: skyreels-jax {verb}" in outcome.out
    assert "--verbose" in outcome.out


@pytest.mark.parametrize("verb", VERBS)
def test_the_list_of_verbs_says_what_the_verb_says(verb: str, command: Command):
    """The list is written apart from the verbs' modules, so that it imports none of them."""
    parser = build_parser(verb)
    shown = parser.format_help()
    importlib.import_module(f"skyreels_jax.cli.{verb}")
    assert " ".join(VERBS[verb].split()) in " ".join(shown.split())


def test_help_and_version_import_no_jax():
    code = (
        "import sys; from skyreels_jax.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('jax' in sys.modules, 'numpy' in sys.modules)"
    )
    for flag in ("--help", "--version"):
        answer = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True)
        assert answer.stdout.split()[-2:] == ["False", "False"], answer.stderr


def test_version(command: Command):
    outcome = command("--version")
    assert outcome.code == 0
    assert outcome.out.strip() == f"skyreels-jax {version('skyreels-jax')}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "VERB"),
        (["genrate"], "'genrate'"),
        (["generate", "--promt", "a fox"], "did you mean --prompt?"),
        (["generate", "--prompt=a", "--Steps=3"], "did you mean --steps?"),
        (["generate", "--zzzzzz"], "--zzzzzz does not exist"),
        (["generate", "--prom", "a fox"], "--prom does not exist"),
        (["generate", "--prompt"], "--prompt"),
        (["info"], "SRC"),
        (["info", "x", "--jsn"], "did you mean --json?"),
        (["convert", "a", "b", "--layout", "odd"], "--layout"),
        (["doctor", "extra"], "extra"),
        *((["generate", flag, "x"], f"{flag} does not exist: ") for flag in ELSEWHERE),
    ],
)
def test_what_is_misspelt_gives_one_line_and_exit_code_2(
    command: Command, words: list[str], says: str
):
    outcome = command(*words)
    assert outcome.code == 2
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert says in line


@pytest.mark.parametrize("alias", ALIASES)
def test_flags_of_the_original_are_ours(alias: str):
    needed = ["generate", "--model", "m", "--prompt", "p"]
    parser = build_parser("generate")
    theirs, ours = (
        vars(parser.parse_args([*needed, name, "7"])) for name in (alias, ALIASES[alias])
    )
    assert theirs == ours
    assert theirs != vars(parser.parse_args(needed))


def test_a_value_that_looks_like_a_flag_is_a_value():
    words = ["generate", "--model", "m", "--prompt", "--- a fox ---"]
    parser = build_parser("generate")
    parser.check_flags(words)
    assert parser.parse_args(words).prompt == ["--- a fox ---"]


def test_ctrl_c_is_exit_code_130(command: Command, monkeypatch: pytest.MonkeyPatch):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("skyreels_jax.cli.doctor.run", stop)
    outcome = command("doctor")
    assert outcome.code == 130
    assert outcome.err.splitlines() == ["skyreels-jax: stopped"]


def test_a_bug_is_not_dressed_up_as_an_error(command: Command, monkeypatch: pytest.MonkeyPatch):
    def crash(args):
        raise ZeroDivisionError

    monkeypatch.setattr("skyreels_jax.cli.doctor.run", crash)
    with pytest.raises(ZeroDivisionError):
        command("doctor")


class Dropped:
    """Is interrupted by a signal where Python drops exceptions."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


@pytest.mark.parametrize("hook", [interrupt.send_again, lambda unraisable: None])
@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, interrupt.Terminated)],
)
def test_a_signal_that_a_finalizer_swallowed_comes_again(
    monkeypatch: pytest.MonkeyPatch, hook, number: int, kind: type
):
    monkeypatch.setattr(sys, "unraisablehook", hook)
    raised: list[type] = []
    try:
        with interrupt.signals_raise():
            Dropped(number)
            time.sleep(0.5)
    except KeyboardInterrupt as error:
        raised.append(type(error))
    assert raised == ([kind] if hook is interrupt.send_again else [])
