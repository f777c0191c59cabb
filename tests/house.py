"""The house rules that can be counted; ``python -m tests.house`` lists offenders by room."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "skyreels_jax"

FILE_LINES = 350
FUNCTION_LINES = {"models": 50}
OTHER_FUNCTION_LINES = 80
ARGUMENTS = 8
ANYS = 215

# Names that several modules define, and why. At most five.
TWICE: Mapping[str, str] = {
    "logger": "a module's logger, as logging's own documentation names it",
    "main": "the entry of a program that runs with `python -m`",
    "add_parser": "a verb of the command line",
    "run": "a verb of the command line",
}

# Words that the field's own replaced, as they would stand in code, text or messages.
OLD_WORDS: Mapping[str, str] = {
    "level for sigma": r"TRAIN_LEVELS|\bnoise[ _]levels?\b",
    "timetable": r"timetables?\b|\bTimetable",
    "told": r"\btold(_\w+)?\b(?= ?[=:.,)\[(])",
    "together, movement": r"def (together|movement)\b|\b(together|movement)\(",
    "Passage": r"\bPassage\b|\.passage\b|def passage\b|\bpassages?\b",
    "Before, Earlier": r"\b(class )?(Before|Earlier)\b(?=[\s|,)\]:]*[|,)\]:(])",
    "Kept": r"\bclass Kept\b|\bKept(?=[\[(.,|)\]])|sampling\.kept\b",
    "NotKept, Gathered": r"NotKept|\bGathered\b",
    "Pass, fewest": r"\bclass Pass(es)?\b|\bPasses\b|\bfewest\b",
    "Veil, PrefixNoise": r"\bveil\w*|\bVeil|PrefixNoise",
    "hand-over": r"[hH]and[- _]?[oO]vers?\b|HAND_OVERS?\b",
    "Rollout": r"\bRollout|roll_out|\brollouts?\b",
    "Draft, settle": r"\bclass Draft\b|\bDraft\b|\bdef settle\b|\bsettle\(",
    "tower": r"\btowers?\b|[Tt]ower[A-Z]\w*|Tower\b|_towers?\b",
    "codec": r"\bcodecs?\b|[a-z]Codec\b|\bCodec|_codecs?\b",
    "dialect": r"[dD]ialects?\b|DIALECTS?\b",
    "yardstick": r"[yY]ardsticks?\b",
    "departs": r"\bdeparts?\b",
    "walk, Site, Note, Observed": r"\bclass (Site|Note|Observed)\b|\bdef walk\b",
    "of_linear": r"\bof_linear\b|faults/kernels|\bdef of_\w+",
    "say, figures, watch": r"\bdef (say|watch)\b|\bfigures: ",
    "together with its parts": r"\bmaking_room\b",
}
# Where an old word is right: an alias that users keep, or the thing that other people call so too.
RIGHT: Mapping[str, Mapping[str, str]] = {
    "codec": {"media": "an MP4 has a video codec"},
}
# A line that says so keeps an old name of a flag or a key alive.
ALIAS = re.compile(r"alias|\bold name", re.IGNORECASE)


@dataclass(frozen=True)
class Offence:
    """One line against a rule."""

    rule: str
    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule}: {self.what}"


Sources = Mapping[str, str]


def sources() -> Sources:
    """The package's files, their paths relative to it."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {file.relative_to(PACKAGE).as_posix(): file.read_text() for file in files}


def public_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Names without an underscore that a module defines itself; imports are not definitions."""
    top = ast.Module([n for n in tree.body if not _is_scope(n)], [])
    # The variable of a comprehension is none of the module's.
    inner = {
        name
        for node in ast.walk(top)
        if isinstance(node, ast.comprehension)
        for name in ast.walk(node.target)
    }
    for node in ast.walk(top):
        if node not in inner and isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
    for node in tree.body:
        if _is_scope(node):
            yield node.name, node.lineno


def _is_scope(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def defined_twice(files: Sources) -> Iterator[Offence]:
    """Public names of more than one module."""
    places: dict[str, dict[str, int]] = defaultdict(dict)
    for file, source in files.items():
        for name, line in public_names(ast.parse(source)):
            if not name.startswith("_") and name not in TWICE:
                places[name][file] = line
    for name, where in places.items():
        if len(where) > 1:
            for file, line in where.items():
                others = ", ".join(sorted(set(where) - {file}))
                yield Offence("defined twice", file, line, f"{name}, also in {others}")


def old_words(files: Sources) -> Iterator[Offence]:
    """Lines with a word that the field's own replaced."""
    for file, source in files.items():
        room = file.partition("/")[0].removesuffix(".py")
        for number, line in enumerate(source.splitlines(), 1):
            if ALIAS.search(line):
                continue
            for word, pattern in OLD_WORDS.items():
                if room not in RIGHT.get(word, {}) and (found := re.search(pattern, line)):
                    yield Offence("old word", file, number, found[0])


def docstrings(files: Sources) -> Iterator[Offence]:
    """Docstrings that open with "Of "."""
    for file, source in files.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module) or _is_scope(node):
                text = ast.get_docstring(node) or ""
                if text.startswith("Of "):
                    yield Offence('docstring "Of"', file, getattr(node, "lineno", 1), text[:60])


def lengths(files: Sources) -> Iterator[Offence]:
    """Files, functions and lists of arguments that are too long."""
    for file, source in files.items():
        if (lines := len(source.splitlines())) > FILE_LINES:
            yield Offence("too long", file, 1, f"{lines} lines")
        most = FUNCTION_LINES.get(file.partition("/")[0], OTHER_FUNCTION_LINES)
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > most:
                yield Offence("too long", file, node.lineno, f"{node.name}: {lines} lines")
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([a for a in arguments if a.arg not in ("self", "cls")])
            if count > ARGUMENTS:
                yield Offence("arguments", file, node.lineno, f"{node.name} takes {count}")


def anys(files: Sources) -> dict[str, int]:
    """How often each file says ``Any``."""
    return {file: len(re.findall(r"\bAny\b", source)) for file, source in files.items()}


RULES = {
    "defined twice": defined_twice,
    "old words": old_words,
    "docstrings": docstrings,
    "lengths": lengths,
}


def main() -> None:
    """Print every offence, by room, and how often each room says ``Any``."""
    files = sources()
    by_room: dict[str, list[Offence]] = defaultdict(list)
    for rule in RULES.values():
        for offence in rule(files):
            by_room[offence.file.partition("/")[0]].append(offence)
    counts: dict[str, int] = defaultdict(int)
    for file, count in anys(files).items():
        counts[file.partition("/")[0]] += count
    print(f"lines: {sum(len(s.splitlines()) for s in files.values())}; Any: {sum(counts.values())}")
    for room in sorted(set(by_room) | {room for room in counts if counts[room]}):
        print(f"\n== {room}: {len(by_room[room])} offences; Any {counts[room]} times")
        for offence in sorted(by_room[room], key=lambda o: (o.rule, o.file, o.line)):
            print(offence)


if __name__ == "__main__":
    main()
