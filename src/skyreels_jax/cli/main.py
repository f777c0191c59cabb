"""``skyreels-jax``: one command with verbs.

Exit codes: 0 done; 1 rows of a batch failed; 2 the request, the checkpoint or the machine does not
allow it (one line on standard error says why); 130 stopped by Ctrl-C, 143 by SIGTERM, both without
leaving half files. Anything else is a bug and shows its traceback.
"""

import argparse
import errno
import importlib
import io
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final, NoReturn

import skyreels_jax
from skyreels_jax.cli.flags import FLAGS, QUIET_VERBS, quietly
from skyreels_jax.errors import SkyReelsError, Stopped, is_out_of_memory, out_of_memory
from skyreels_jax.generation.request.declaration import hint, in_flags, one_line
from skyreels_jax.interrupt import (
    HUNG_UP,
    INTERRUPTED,
    TERMINATED,
    exit_code,
    send_again,
    signals_raise,
)

if TYPE_CHECKING:
    from skyreels_jax.parallel.processes import Processes

USAGE_ERROR: Final = 2
# What a shell returns for a program whose reader went away (SIGPIPE).
CLOSED_PIPE: Final = 141
# Each verb is a module of this package with `run`. Its help stands here and its flags in `flags`:
# neither should wait until the modules have imported JAX.
VERBS: Final[Mapping[str, str]] = {
    "generate": "make a video from a prompt, and an image where the checkpoint takes one",
    "live": "make a video that plays while it is made; another prompt at any time",
    "resume": "go on with a video that was interrupted",
    "batch": "make a video of each row of a file of JSON lines, with one model load",
    "convert": "translate a checkpoint into the other format or another dtype",
    "lora": "inspect, convert, merge and extract LoRA files",
    "data": "write videos with captions to train on; look through and encode one's own",
    "train": "train a model from a TOML file, or go on with it",
    "validate": "compare the JAX model with PyTorch's, layer by layer and frame by frame",
    "plan": "which meshes of devices a model fits on, and how long a step takes there",
    "drift": "whether a video's likeness, brightness, colour or sharpness drifts over time",
    "info": "what a checkpoint is and what it lacks",
    "doctor": "versions, devices, memory and caches",
}


class Parser(argparse.ArgumentParser):
    """An argument parser that says in one line what is wrong, with the nearest name."""

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
            self.error(in_flags(f"{flag} does not exist{hint(flag, known)}"))

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
    version = f"%(prog)s {skyreels_jax.__version__}"
    parser.add_argument("--version", action="version", version=version)
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=Parser)
    for name, summary in VERBS.items():
        if name != verb or name in FLAGS:
            verb_parser = verbs.add_parser(name, help=summary, description=f"{summary}.")
            if name != verb:
                continue
            FLAGS[name](verb_parser)
        else:
            importlib.import_module(f"skyreels_jax.cli.{name}").add_parser(verbs)
        said = verbs.choices[name].add_mutually_exclusive_group()
        said.add_argument(
            "--verbose", action="store_true", help="log shapes, dtypes and timings; show tracebacks"
        )
        if name in QUIET_VERBS:
            said.add_argument("--quiet", action="store_true", help="say nothing but errors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the arguments without the program's name; ``None`` takes the process's own.

    Returns:
        the exit code (see the module's docstring).
    """
    argv = sys.argv[1:] if argv is None else argv
    verb = next((word for word in argv if not word.startswith("-")), None)
    parser = build_parser(verb)
    if verb is not None and verb not in VERBS:
        parser.error(f"{verb!r} is no verb{_nearest(verb)}; there are {', '.join(VERBS)}")
    parser.check_flags(argv)
    args = parser.parse_args(argv)
    quiet = getattr(args, "quiet", False)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.ERROR if quiet else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    # Others' debug lines (compiler passes, plugins) would drown ours.
    for noisy in ("jax", "PIL", "filelock", "httpx", "httpcore", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        with signals_raise(), quietly() if quiet else nullcontext():
            return importlib.import_module(f"skyreels_jax.cli.{verb}").run(args)
    except SkyReelsError as error:
        if args.verbose:
            logging.getLogger(__name__).exception("refused")
        _say_error(in_flags(one_line(str(error))), stopped=isinstance(error, Stopped))
        return error.exit_code
    except (MemoryError, RuntimeError, OSError) as error:
        if args.verbose or not is_out_of_memory(error):
            raise
        _say_error(in_flags(out_of_memory(error)))
        return USAGE_ERROR
    except KeyboardInterrupt as stop:
        print("skyreels-jax: stopped", file=sys.stderr)
        if (processes := _joined()) is not None:
            processes.failed("stopped")
        return exit_code(stop)


def _joined() -> "Processes | None":
    """The processes that this one has joined; imports nothing that is not there."""
    module = sys.modules.get("skyreels_jax.parallel.processes")
    return None if module is None else module.current_processes()


def _say_error(line: str, *, stopped: bool = False) -> None:
    """One line on standard error, and to the processes that this one has joined."""
    who = ""
    if (processes := _joined()) is not None:
        if stopped and not processes.first:
            return
        if not stopped:
            processes.failed(line)
        who = "" if processes.first else f"process {processes.id}: "
    print(f"skyreels-jax: error: {who}{line}", file=sys.stderr)


def _nearest(verb: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(verb.lower(), VERBS, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """The program: :func:`main`, and the end of the process.

    An interrupted one ends at once. Its computation may still be running in threads of XLA, which
    crash now and then if the interpreter is taken down around them.
    """
    sys.unraisablehook = send_again
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files may hold what the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    code = CLOSED_PIPE
    try:
        try:
            code = main(argv)
        finally:
            # Here and not at the interpreter's end, which complains on standard error.
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # Whoever read the output has seen enough, as `head` does, or the log's disk is full.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            code = CLOSED_PIPE
    except KeyboardInterrupt as stop:  # After the verb, while its last line is written.
        code = exit_code(stop)
    if (processes := _joined()) is not None:
        processes.leave(code)
    if code in (INTERRUPTED, TERMINATED, HUNG_UP):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    program()
