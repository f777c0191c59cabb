"""``skyreels-jax``: one command with verbs.

Exit codes: 0 done; 2 the request, the checkpoint or the machine does not allow it (one line on
standard error says why); 130 stopped by Ctrl-C. Anything else is a bug and shows its traceback.
"""

import argparse
import difflib
import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Final, NoReturn

from skyreels_jax.errors import SkyReelsError

USAGE_ERROR: Final = 2
INTERRUPTED: Final = 130
# Each is a module of this package with `add_parser` and, set as the parser's default, `run`.
VERBS: Final = ("generate", "convert", "info", "doctor")


class Parser(argparse.ArgumentParser):
    """An argument parser that says in one line what is wrong, with the nearest flag's name."""

    def __init__(self, *args, **kwargs):
        # Abbreviated flags would change their meaning whenever a flag is added.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Exit with 2 after one line."""
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}{self._nearest(message)}\n")

    def _nearest(self, message: str) -> str:
        prefix = "unrecognized arguments: "
        if not message.startswith(prefix):
            return f" (see {self.prog} --help)"
        known = self.flags()
        given = message.removeprefix(prefix).split()[0].partition("=")[0]
        near = difflib.get_close_matches(given, known, n=1)
        return f"; did you mean {near[0]}?" if near else f" (see {self.prog} --help)"

    def flags(self) -> list[str]:
        """Every flag of this parser and of its verbs."""
        flags: list[str] = []
        for action in self._actions:
            flags += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    flags += parser.flags()
        return flags


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="skyreels-jax",
        description="SkyReels-V2 video diffusion in JAX: generate, convert, inspect.",
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {version('skyreels-jax')}"
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=Parser)
    for verb in VERBS:
        importlib.import_module(f"skyreels_jax.cli.{verb}").add_parser(verbs)
    for verb in verbs.choices.values():
        verb.add_argument(
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
    args = build_parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    # Others' debug lines (compiler passes, plugins) would drown ours.
    for noisy in ("jax", "PIL", "filelock", "httpx", "httpcore", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return args.run(args)
    except SkyReelsError as error:
        if args.verbose:
            logging.getLogger(__name__).exception("refused")
        lines = " ".join(str(error).split("\n"))
        print(f"skyreels-jax: error: {lines}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("skyreels-jax: stopped", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
