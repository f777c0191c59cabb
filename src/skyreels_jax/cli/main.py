"""``skyreels-jax``: one command with verbs.

Exit codes: 0 done; 2 the request, the checkpoint or the machine does not allow it (one line on
standard error says why); 130 stopped by Ctrl-C, 143 by SIGTERM, both without leaving half files.
Anything else is a bug and shows its traceback.
"""

import argparse
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final, NoReturn

from skyreels_jax.errors import SkyReelsError
from skyreels_jax.interrupt import (
    HUNG_UP,
    INTERRUPTED,
    TERMINATED,
    exit_code,
    send_again,
    signals_raise,
)

USAGE_ERROR: Final = 2
# Each verb is a module of this package with `add_parser` and, set as the parser's default, `run`.
# Its help stands here too: a list of verbs should not wait until the modules have imported JAX.
VERBS: Final[Mapping[str, str]] = {
    "generate": "make a video from a prompt, and an image where the checkpoint takes one",
    "resume": "go on with a long video that was interrupted",
    "convert": "translate a checkpoint into the other layout or another dtype",
    "data": "write videos with captions, to train on",
    "train": "train a model from a TOML file, or go on with it",
    "validate": "compare the JAX model with PyTorch's, layer by layer and frame by frame",
    "info": "what a checkpoint is and what it lacks",
    "doctor": "versions, devices, memory and caches",
}
# Flags of the original's scripts that have no counterpart under a similar name.
ELSEWHERE: Final[Mapping[str, str]] = {
    "--outdir": "name the file with --output",
    "--offload": "not needed: each part leaves memory before the next one comes",
    "--use_usp": "not needed to run on one device",
}


class Parser(argparse.ArgumentParser):
    """An argument parser that says in one line what is wrong, with the nearest flag's name."""

    def __init__(self, *args: Any, **kwargs: Any):
        # Abbreviated flags would change their meaning whenever a flag is added.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Exit with 2 after one line."""
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def check_flags(self, argv: Sequence[str]) -> None:
        """Refuse unknown flags before anything else: a misspelt one often looks like a missing one.

        Exits with 2 after one line that names the nearest flag.
        """
        known = self.flags()
        for argument in argv:
            flag = argument.partition("=")[0]
            # As argparse has it, what contains a space is a value.
            if not flag.startswith("--") or " " in flag or flag in known:
                continue
            if flag in ELSEWHERE:
                self.error(f"{flag} does not exist: {ELSEWHERE[flag]}")
            near = difflib.get_close_matches(flag, known, n=1)
            self.error(f"{flag} does not exist" + (f"; did you mean {near[0]}?" if near else ""))

    def flags(self) -> list[str]:
        """Every flag of this parser and of its verbs."""
        flags: list[str] = []
        for action in self._actions:
            flags += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    flags += parser.flags()
        return flags


def build_parser(verb: str | None) -> Parser:
    """The command line, of which only ``verb`` has its flags."""
    parser = Parser(
        prog="skyreels-jax",
        description="SkyReels-V2 video diffusion in JAX: generate, convert, inspect.",
        epilog="`skyreels-jax VERB --help` lists the flags of a verb.",
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {version('skyreels-jax')}"
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=Parser)
    for name, summary in VERBS.items():
        if name != verb:
            verbs.add_parser(name, help=summary)
            continue
        importlib.import_module(f"skyreels_jax.cli.{name}").add_parser(verbs)
        verbs.choices[name].add_argument(
            "--verbose", action="store_true", help="log shapes, dtypes and timings; show tracebacks"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the arguments without the program's name; ``None`` takes the process's own.

    Returns:
        the exit code (see the module's docstring).
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(next((word for word in argv if not word.startswith("-")), None))
    parser.check_flags(argv)
    args = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    # Others' debug lines (compiler passes, plugins) would drown ours.
    for noisy in ("jax", "PIL", "filelock", "httpx", "httpcore", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        with signals_raise():
            return args.run(args)
    except SkyReelsError as error:
        if args.verbose:
            logging.getLogger(__name__).exception("refused")
        line = " ".join(part.strip() for part in str(error).splitlines())
        print(f"skyreels-jax: error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:
        print("skyreels-jax: stopped", file=sys.stderr)
        return exit_code(stop)


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """The program: :func:`main`, and the end of the process.

    An interrupted one ends at once. Its computation may still be running in threads of XLA, which
    crash now and then if the interpreter is taken down around them.
    """
    sys.unraisablehook = send_again
    code = main(argv)
    if code in (INTERRUPTED, TERMINATED, HUNG_UP):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    program()
