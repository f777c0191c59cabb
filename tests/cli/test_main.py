"""The command line as a whole: help, versions, misspelt words, exit codes."""

import importlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from tests.cli.commands import Command
from tests.test_errors import RAN_OUT

from skyreels_jax import interrupt
from skyreels_jax.cli.main import CLOSED_PIPE, VERBS, build_parser

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


SLOW = ("jax", "numpy", "rich", "huggingface_hub", "PIL")


def imported_by(*words: str) -> set[str]:
    """Which of the slow modules a command line imports in a process of its own."""
    code = (
        "import sys; from skyreels_jax.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        f"finally: print('imported', *(set({SLOW}) & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    return set(answer.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "words",
    ["--help", "--version", "genrate", "generate --help", "generate --promt x", "info --hlp"],
)
def test_help_and_refusals_import_nothing_slow(words: str):
    assert imported_by(*words.split()) == set()


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_no_verb_imports_jax(verb: str):
    assert "jax" not in imported_by(verb, "--help")


def test_what_runs_imports_jax(tmp_path: Path):
    """Negative twin: a verb that has to look at a checkpoint."""
    assert {"jax", "numpy"} <= imported_by("info", str(tmp_path))


def seconds_of(*words: str) -> float:
    """The least processor time of a few runs; other processes do not count into it.

    The first leaves byte code, as an installed program has it.
    """
    found, run = [], [sys.executable, *words]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(run, capture_output=True, check=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def test_help_starts_at_once():
    """At most 8 times an empty program; measured 6.3."""
    help_of = "import sys; sys.argv[1:] = ['generate', '--help']; import skyreels_jax.__main__"
    assert seconds_of("-c", help_of) < 8 * seconds_of("-c", "pass")


def test_help_of_generate_has_examples_defaults_and_groups(command: Command):
    shown = " ".join(command("generate", "--help").out.split())
    assert "examples: skyreels-jax generate --prompt" in shown
    # Python 3.13 names what a flag takes once, behind its last name.
    names = r"--steps( N)?, --inference_steps( N)?, --num_inference_steps N steps of the solver"
    assert re.search(names, shown)
    assert "(default: the checkpoint's)" in shown
    for group in ("what to show:", "size and length:", "sampling:", "running:", "output:"):
        assert group in shown


@pytest.mark.parametrize(
    ("words", "complains"),
    [("-m skyreels_jax --help", False), ("-c print(1)", True)],
    ids=["ours", "negative twin: Python alone"],
)
def test_a_closed_pipe_ends_quietly(words: str, complains: bool):
    program = [sys.executable, *words.split()]
    # Without a buffer argparse passes the failure over, which ends quietly too.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    with subprocess.Popen(program, stdout=pipe, stderr=pipe, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (b"BrokenPipeError" in process.stderr.read()) == complains
    assert (process.returncode == CLOSED_PIPE) != complains


def test_version(command: Command):
    outcome = command("--version")
    assert outcome.code == 0
    assert outcome.out.strip() == f"skyreels-jax {version('skyreels-jax')}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "VERB"),
        (["genrate"], "'genrate' is no verb; did you mean generate?"),
        (["generate", "--promt", "a fox"], "did you mean --prompt?"),
        (["generate", "--prompt=a", "--Steps=3"], "did you mean --steps?"),
        (["generate", "--zzzzzz"], "--zzzzzz does not exist"),
        (["generate", "--prom", "a fox"], "--prom does not exist"),
        (["generate", "--prompt"], "--prompt"),
        (["info"], "SRC"),
        (["info", "x", "--jsn"], "did you mean --json?"),
        (["convert", "a", "b", "--layout", "odd"], "--layout"),
        (["doctor", "extra"], "extra"),
        (["generate", "--outdir", "x"], "--outdir does not exist: name the file with --output"),
        (["generate", "--offload_model"], "--offload_model does not exist: not needed"),
        (["generate", "--use_usp"], "--use_usp does not exist: not needed"),
        (["generate", "--size", "1280*720"], "--size does not exist: give --height and --width"),
        (["generate", "--cfg", "5"], "did you mean --guidance-scale?"),
        (["generate", "--frame_num", "81"], "did you mean --num-frames?"),
        (["generate", "--sample_steps=9"], "did you mean --steps?"),
        (["generate", "--callback", "x"], "--callback does not exist (see"),
        (["Generate"], "'Generate' is no verb; did you mean generate?"),
        (["xyz"], "'xyz' is no verb; there are generate,"),
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


@pytest.mark.parametrize(("verb", "words"), [("info", "x"), ("convert", "a b --format diffusers")])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_is_its_exit_code_with_every_verb(
    command: Command, monkeypatch: pytest.MonkeyPatch, verb: str, words: str, number: int, code: int
):
    def stop(args):
        signal.raise_signal(number)
        raise AssertionError("it was not heard")

    monkeypatch.setattr(f"skyreels_jax.cli.{verb}.run", stop)
    outcome = command(verb, *words.split())
    assert outcome.code == code
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


@pytest.mark.parametrize("kind", ["python", "jax", "torch", "system"])
@pytest.mark.parametrize("verb", ["doctor", "info"])
def test_on_the_command_line_it_is_one_line_wherever_it_is(
    verb: str, kind: str, command: Command, monkeypatch: pytest.MonkeyPatch
):
    def run(args: object) -> int:
        raise RAN_OUT[kind]

    monkeypatch.setattr(f"skyreels_jax.cli.{verb}.run", run)
    outcome = command(verb, *(["x"] if verb == "info" else []))
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith("skyreels-jax: error: not enough memory")
