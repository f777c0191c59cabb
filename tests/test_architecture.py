"""Who may import whom: the diagram in docs/architecture.md, held against the code.

The diagram is the block that opens with ``layers`` as its language: an empty line between layers,
the highest first; ``room ──► rooms it imports``. A room is a folder or a single module of the
package. Every import has its arrow, every arrow its import, and each points to a lower layer, so
that there is no circle. ``python -m tests.test_architecture`` draws the arrows anew; the layers
are drawn by hand.
"""

import ast
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
PACKAGE = "skyreels_jax"
ARROW = "──►"
FILES = sorted((SOURCE / PACKAGE).rglob("*.py"))
# Imported nowhere at module level, and in functions only where PyTorch is run or its files are
# made (random checkpoints in the original's layout hold .pth files).
TORCH_ROOMS = {"torch_side", "testing"}
TORCH_SIDE = {"torch", "diffusers", "transformers", "accelerate"}
OPTIONAL = {
    "matplotlib",
    "skimage",
    "gradio",
    "optax",
    "orbax",
    "grain",
    "msgspec",
    "tensorboardX",
    "ray",
}

Edges = Mapping[str, set[str]]


@dataclass(frozen=True)
class Diagram:
    """What docs/architecture.md draws.

    Attributes:
        layers: the rooms of each layer, the highest first.
        arrows: room -> the rooms it imports.
    """

    layers: list[list[str]]
    arrows: Edges

    def height(self, room: str) -> int:
        """The number of layers below the room's."""
        return len(self.layers) - next(i for i, rooms in enumerate(self.layers) if room in rooms)


def parsed(document: str) -> Diagram:
    """The diagram of a document; a line that cannot be read is an error."""
    blocks = re.findall(r"^```layers\n(.*?)^```", document, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, f"one diagram, not {len(blocks)}"
    layers: list[list[str]] = []
    arrows: dict[str, set[str]] = {}
    for block in re.split(r"\n\s*\n", blocks[0].strip()):
        layers.append([])
        for line in re.sub(r",\s*\n\s+", ", ", block).splitlines():  # a list may take two lines
            left, _, right = (part.strip() for part in line.partition(ARROW))
            targets = {name.strip() for name in right.split(",") if name.strip()}
            for room in (name.strip() for name in left.split(",")):
                assert re.fullmatch(r"\w+", room), f"not a room: {line!r}"
                assert room not in arrows, f"{room} stands twice in the diagram"
                layers[-1].append(room)
                arrows[room] = targets
    return Diagram(layers, arrows)


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE / PACKAGE).with_suffix("").parts[0]


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Every dotted name imported anywhere in ``tree``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            yield module
            if module == PACKAGE:  # `from skyreels_jax import errors`
                yield from (f"{module}.{alias.name}" for alias in node.names)


def rooms_imported(source: str, room: str) -> set[str]:
    """The other rooms that a file of ``room`` imports, in functions too."""
    names = (name.split(".") for name in imports_of(ast.parse(source)))
    found = {rest[0] for top, *rest in names if top == PACKAGE and rest}
    return found - {room}


@cache
def edges_of_the_code() -> Edges:
    edges: dict[str, set[str]] = {}
    for file in FILES:
        room = room_of(file)
        edges.setdefault(room, set()).update(rooms_imported(file.read_text(), room))
    return edges


def lies(diagram: Diagram, edges: Edges) -> list[str]:
    """Where diagram and code differ, and arrows that do not point downwards."""
    found = [f"{room} is missing in the diagram" for room in edges.keys() - diagram.arrows.keys()]
    found += [f"{room} is drawn and not there" for room in diagram.arrows.keys() - edges.keys()]
    for room in diagram.arrows.keys() & edges.keys():
        drawn, true = diagram.arrows[room], edges[room]
        found += [f"{room} imports {other} without an arrow" for other in true - drawn]
        found += [f"{room} {ARROW} {other}: no import has it" for other in drawn - true]
        for other in drawn & diagram.arrows.keys():
            if diagram.height(other) >= diagram.height(room):
                found.append(f"{room} {ARROW} {other} does not point downwards")
    return sorted(found)


DOCUMENT = (ROOT / "docs" / "architecture.md").read_text()


# What does not point downwards yet; empty once recipes of the small models stand in their room.
KNOWN = []


def test_the_diagram_is_what_the_code_imports():
    assert lies(parsed(DOCUMENT), edges_of_the_code()) == KNOWN


def without_a_row(diagram: Diagram, document: str) -> set[str]:
    """Rooms that the table of rooms does not name."""
    table = "".join(line for line in document.splitlines() if line.startswith("|"))
    named = set(re.findall(r"`(\w+)(?:/|\.py)`", table))
    return diagram.arrows.keys() - named


def test_every_room_has_a_row_in_the_table():
    assert without_a_row(parsed(DOCUMENT), DOCUMENT) == set()
    assert without_a_row(parsed(DOCUMENT), DOCUMENT.replace("`weights/`", "weights")) == {"weights"}


SMALL = parsed("```layers\na ──► b,\n      c\n\nb ──► c\n\nc\n```")
TRUE: Edges = {"a": {"b", "c"}, "b": {"c"}, "c": set()}


@pytest.mark.parametrize(
    ("edges", "lie"),
    [
        (TRUE, None),
        (TRUE | {"d": set()}, "d is missing in the diagram"),
        ({"a": {"b", "c"}, "b": {"c"}}, "c is drawn and not there"),
        (TRUE | {"a": {"b"}}, "a ──► c: no import has it"),
        (TRUE | {"c": {"b"}}, "c imports b without an arrow"),
    ],
)
def test_a_lie_of_the_diagram_is_caught(edges: Edges, lie: str | None):
    assert lies(SMALL, edges) == ([lie] if lie else [])


@pytest.mark.parametrize(
    ("drawn", "lie"),
    [
        ("a ──► b\n\nb ──► a", "b ──► a does not point downwards"),
        ("a ──► b\nb", "a ──► b does not point downwards"),
    ],
)
def test_an_arrow_upwards_or_within_a_layer_is_caught(drawn: str, lie: str):
    diagram = parsed(f"```layers\n{drawn}\n```")
    assert lies(diagram, diagram.arrows) == [lie]


@pytest.mark.parametrize(
    "lie",
    ["from skyreels_jax.cli import main", "def f():\n    from skyreels_jax import cli"],
)
def test_an_import_upwards_is_read_off_the_code_wherever_it_stands(lie: str):
    edges = edges_of_the_code()
    planted = edges | {"ops": edges["ops"] | rooms_imported(lie, "ops")}
    found = set(lies(parsed(DOCUMENT), planted))
    assert found - set(KNOWN) == {"ops imports cli without an arrow"}


def test_an_unreadable_diagram_is_an_error():
    for drawn in ("a ──► b\na ──► c", "a -> b"):
        with pytest.raises(AssertionError):
            parsed(f"```layers\n{drawn}\n```")


def at_module_level(tree: ast.Module) -> ast.Module:
    """The imports that run when the module is: not in functions, not for type checkers only."""
    later = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_type_checkers(node)
        for inner in ast.walk(node)
    }
    statements = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in later
    ]
    return ast.Module(body=list(statements), type_ignores=[])


def is_for_type_checkers(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not node.orelse
    )


def forbidden_libraries(file: Path, source: str) -> list[str]:
    """What ``source``, standing at ``file``, imports though the core installs without it."""
    tree = ast.parse(source)
    found = []
    for name in imports_of(tree):
        if name.split(".")[0] in TORCH_SIDE and room_of(file) not in TORCH_ROOMS:
            found.append(f"{name}: only {', '.join(TORCH_ROOMS)} may import the PyTorch side")
    for name in imports_of(at_module_level(tree)):
        if name.split(".")[0] in TORCH_SIDE | OPTIONAL:
            found.append(f"{name} at module level, though the core installs without it")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_the_core_installs_without_extras(file: Path):
    assert forbidden_libraries(file, file.read_text()) == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("models/x.py", "import torch"),
        ("torch_side/x.py", "import torch"),
        ("generation/x.py", "def f():\n    import diffusers"),
        ("training/x.py", "import optax"),
    ],
)
def test_a_forbidden_library_is_caught(place: str, line: str):
    assert forbidden_libraries(SOURCE / PACKAGE / place, line) != []


def test_a_torch_import_inside_a_function_of_torch_side_is_allowed():
    file = SOURCE / PACKAGE / "torch_side" / "x.py"
    assert forbidden_libraries(file, "def f():\n    import torch") == []
    assert forbidden_libraries(file, "if TYPE_CHECKING:\n    import torch") == []


def test_the_described_import_paths_hold_no_code():
    for file in (SOURCE / "jax_implementation").rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            assert is_docstring or is_all or isinstance(node, ast.ImportFrom), f"{file}: {node}"


def redrawn(diagram: Diagram, edges: Edges) -> str:
    """The block with the arrows that the code has, the rooms in the layers they are drawn in."""
    layers: list[str] = []
    for rooms in diagram.layers:
        lines: list[str] = []
        for room in rooms:
            head = f"{room} {ARROW} "
            text = f"{head}{', '.join(sorted(edges[room]))}" if edges[room] else room
            lines += textwrap.wrap(text, width=100, subsequent_indent=" " * len(head))
        layers.append("\n".join(lines))
    return "```layers\n" + "\n\n".join(layers) + "\n```"


if __name__ == "__main__":  # `python -m tests.test_architecture` draws the arrows anew
    block = redrawn(parsed(DOCUMENT), edges_of_the_code())
    new = re.sub(r"^```layers\n.*?^```", lambda _: block, DOCUMENT, flags=re.MULTILINE | re.DOTALL)
    (ROOT / "docs" / "architecture.md").write_text(new)
