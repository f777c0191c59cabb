"""What README and docs claim that a machine can look up: paths, names, commands and snippets.

Each check takes a page and gives one line for everything in it that is not so. Python snippets run
and commands of ``skyreels-jax`` are parsed by the real parser; a snippet behind
``<!-- needs released weights -->`` or ``<!-- needs an accelerator -->`` is compiled and its imports
are resolved, but it does not run.
"""

import ast
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path

from skyreels_jax.cli.main import VERBS, Parser, build_parser

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "skyreels_jax"
# What a path in backticks may be relative to, its page's own folder apart.
BASES = (ROOT, PACKAGE, ROOT / "src")
# Paths of these kinds are ours wherever they are named; others may be what a program writes.
OUR_KINDS = (".py", ".md")
# Folders that a program writes, or that a checkpoint has.
WRITTEN = {"model/", "raw/", "samples/", "text_encoder/", "tokenizer/", "vae/", "transformer/"}
MARK = re.compile(r"<!-- needs (released weights|an accelerator) -->\s*\Z")
LAUNCHERS = {"python", ".venv/bin/python", "python3"}


@dataclass(frozen=True)
class Page:
    """A page and the folder that its links are relative to."""

    text: str
    folder: Path = ROOT


@dataclass(frozen=True)
class Snippet:
    """A fenced block of a page."""

    language: str
    code: str
    runs: bool


def pages() -> dict[str, Page]:
    """README, CONTRIBUTING and docs; decisions are history, of which only the paths are checked."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {f.relative_to(ROOT).as_posix(): Page(f.read_text(), f.parent) for f in files}


def is_decision(name: str) -> bool:
    """Whether a page is one of docs/adr."""
    return name.startswith("docs/adr/")


FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def snippets(page: Page, language: str) -> list[Snippet]:
    """The fenced blocks of a language."""
    return [
        Snippet(found[1], found[2], MARK.search(page.text[: found.start()]) is None)
        for found in FENCE.finditer(page.text)
        if found[1] == language
    ]


def spans(page: Page) -> list[str]:
    """What stands in backticks, fenced blocks apart."""
    return [" ".join(s.split()) for s in re.findall(r"`([^`]+)`", FENCE.sub("", page.text))]


def wrong_links(page: Page) -> Iterator[str]:
    """Links and images whose file or heading is not there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.text)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.folder / path if path else None
        if file is not None and not file.exists():
            yield f"link to {target}: no such file"
        elif anchor and anchor not in _anchors(file.read_text() if file else page.text):
            yield f"link to {target}: no such heading"


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def wrong_paths(page: Page) -> Iterator[str]:
    """Files and folders of ours that are not there."""
    tops = {p.name for base in (ROOT, PACKAGE) for p in base.iterdir() if p.is_dir()} - {"out"}
    words = [word for span in spans(page) for word in span.split()]
    for word in words:
        path = word.rstrip(",;:.").partition("::")[0]
        if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)*/?", path) or path.startswith("."):
            continue
        top, *rest = path.rstrip("/").split("/")
        ours = path.endswith(OUR_KINDS) or path.endswith("/") or (top in tops and rest)
        if path in WRITTEN:
            continue
        if ours and not any((base / path).exists() for base in (page.folder, *BASES)):
            yield f"{path}: no such file"


def wrong_names(page: Page) -> Iterator[str]:
    """Dotted names of the package that do not resolve: from the top, or from one of its rooms."""
    modules = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or p.is_dir()}
    rooms = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    names = re.findall(r"\b(?:skyreels_jax|jax_implementation)(?:\.\w+)+", page.text)
    for span in spans(page):
        if span.endswith((".json", ".jsonl", ".py", ".md", ".toml")):
            continue
        if re.fullmatch(r"\w+(\.\w+)+", span) and span.split(".")[0] in rooms & modules:
            names.append(f"skyreels_jax.{span}")
    for name in names:
        if not resolves(name):
            yield f"{name}: no such module or name"


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or a name in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            found: object = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and not module.startswith(error.name):
                raise
            continue
        for part in parts[count:]:
            fields = getattr(found, "__annotations__", {})
            if part in fields:
                return True
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def commands(page: Page) -> list[list[str]]:
    """Lines of shell blocks, continued ones joined, without comments, pipes and a last ``…``."""
    found = []
    for block in snippets(page, "sh"):
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            words = words[: words.index("|")] if "|" in words else words
            if words:
                found.append(words[:-1] if words[-1] == "…" else words)
    return found


def wrong_commands(page: Page) -> Iterator[str]:
    """Commands of shell blocks and backticks that do not parse, and targets that are not there."""
    for words in commands(page):
        for reason in _wrong_command(words, whole=True):
            yield f"{shlex.join(words)}: {reason}"
    for span in spans(page):
        try:
            words = [word for word in shlex.split(span) if word not in ("…", "...")]
        except ValueError:  # an apostrophe: prose
            continue
        for reason in _wrong_command(words, whole=False):
            yield f"{span}: {reason}"


def _wrong_command(words: list[str], *, whole: bool) -> Iterator[str]:
    head, *rest = words or [""]
    if head == "make":
        yield from (f"make has no target {name}" for name in rest if name not in targets())
    elif head == "skyreels-jax":
        yield from refusals(rest, whole=whole)
    elif head in LAUNCHERS and rest[:1] == ["-m"]:
        yield from _wrong_program(rest[1], rest[2:])
    elif head in LAUNCHERS and rest and rest[0].endswith(".py"):
        yield from _wrong_script(rest[0], rest[1:])
    elif re.fullmatch(r"--[a-z][\w-]*", head) and head not in known_flags():
        yield f"no command has {head}"


def targets() -> set[str]:
    """What make can make."""
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@cache
def parser_of(verb: str) -> Parser:
    """The real parser of one verb."""
    return build_parser(verb)


def refusals(words: list[str], *, whole: bool) -> Iterator[str]:
    """What the command line answers to what it does not take; a part may leave some out."""
    verb = next((word for word in words if not word.startswith("-")), None)
    if verb is None:
        return
    if verb not in VERBS:
        yield f"no verb {verb}"
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser_of(verb).check_flags(words)
            if whole:
                parser_of(verb).parse_args(words)
    except SystemExit:
        yield said.getvalue().strip()


def _wrong_program(module: str, words: list[str]) -> Iterator[str]:
    spec = _found(module)
    if spec is None:
        yield f"no module {module}"
    elif module.split(".")[0] in ("skyreels_jax", "benchmarks", "tests"):
        if spec.submodule_search_locations is not None:
            spec = _found(f"{module}.__main__")
        if spec is None or spec.origin is None:
            yield f"{module} is no program"
        else:
            yield from _missing_flags(Path(spec.origin), words)


def _found(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a folder on the way to it is not there
        return None


def _wrong_script(name: str, words: list[str]) -> Iterator[str]:
    if not (ROOT / name).exists():
        yield f"no file {name}"
    elif name == "test_jax_port.py":
        yield from refusals(["validate", *words], whole=True)
    else:
        yield from _missing_flags(ROOT / name, words)


def _missing_flags(file: Path, words: list[str]) -> Iterator[str]:
    source = file.read_text()
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and f'"{flag}"' not in source:
            yield f"{file.name} has no {flag}"


@cache
def known_flags() -> frozenset[str]:
    """Every flag of ours: of the verbs, the original's scripts and the benchmarks."""
    flags = {flag for verb in VERBS for flag in parser_of(verb).flags()}
    files = [*(ROOT / "benchmarks").glob("*.py"), *PACKAGE.rglob("*.py"), *ROOT.glob("*.py")]
    for file in [*files, *(ROOT / "examples").glob("*.py")]:
        flags.update(re.findall(r"[\"'](--[a-z][\w-]*)[\"']", file.read_text()))
    return frozenset(flags)


def wrong_snippets(page: Page) -> Iterator[str]:
    """Python that does not compile, and imports that do not resolve."""
    for snippet in snippets(page, "python"):
        try:
            tree = ast.parse(snippet.code)
        except SyntaxError as error:
            yield f"snippet does not compile: {error}"
            continue
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (
                f"snippet imports {name}: not there" for name in names if not resolves(name)
            )


CHECKS: Mapping[str, Callable[[Page], Iterator[str]]] = {
    "links": wrong_links,
    "paths": wrong_paths,
    "names": wrong_names,
    "commands": wrong_commands,
    "snippets": wrong_snippets,
}
OF_DECISIONS = ("links", "paths")
