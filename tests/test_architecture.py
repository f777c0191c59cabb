"""Who may import whom: the diagram in docs/architecture.md as a table, held against the code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
PACKAGE = "skyreels_jax"

# Room -> the rooms it may import. A room is a folder or a single module of the package.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"checkpoints", "errors", "generation", "models", "pipeline"},
    "__main__": {"cli"},
    "backends": {"checkpoints", "components", "prompts", "torch_side", "weights"},
    "cache_dirs": set(),
    "checkpoints": {"errors", "hub", "models", "presets", "weights"},
    "cli": {
        "backends",
        "cache_dirs",
        "checkpoints",
        "components",
        "errors",
        "files",
        "generation",
        "geometry",
        "hub",
        "interrupt",
        "media",
        "memory",
        "models",
        "moving_shapes",
        "ops",
        "parity",
        "pipeline",
        "sampling",
        "shapes",
        "testing",
        "torch_side",
        "training",
        "weights",
    },
    "components": {
        "errors",
        "files",
        "geometry",
        "media",
        "memory",
        "models",
        "ops",
        "prompts",
        "shapes",
    },
    "diffusion": {"errors", "shapes"},
    "errors": set(),
    "evaluation": {
        "cache_dirs",
        "checkpoints",
        "diffusion",
        "errors",
        "files",
        "generation",
        "hub",
        "media",
        "models",
        "moving_shapes",
        "parity",
        "pipeline",
        "presets",
        "sampling",
        "shapes",
        "weights",
    },
    "files": {"errors"},
    "generation": {
        "checkpoints",
        "components",
        "diffusion",
        "errors",
        "files",
        "geometry",
        "media",
        "memory",
        "models",
        "ops",
        "presets",
        "prompts",
        "sampling",
        "shapes",
        "weights",
    },
    "geometry": {"errors"},
    "hub": {"errors"},
    "hybrid": {
        "checkpoints",
        "components",
        "errors",
        "generation",
        "media",
        "models",
        "sampling",
        "torch_side",
        "weights",
    },
    "interrupt": set(),
    "media": {"geometry", "errors", "files", "shapes"},
    "memory": {"errors", "models", "weights"},
    "mini": {
        "checkpoints",
        "hub",
        "models",
        "moving_shapes",
        "presets",
        "prompts",
        "training",
        "weights",
    },
    "models": {"errors", "ops", "shapes"},
    "moving_shapes": {"errors", "shapes"},
    "ops": {"errors"},
    "parity": {
        "checkpoints",
        "components",
        "diffusion",
        "errors",
        "files",
        "generation",
        "geometry",
        "media",
        "models",
        "ops",
        "pipeline",
        "sampling",
        "shapes",
        "torch_side",
        "weights",
    },
    "pipeline": {
        "backends",
        "checkpoints",
        "components",
        "errors",
        "generation",
        "media",
        "memory",
        "prompts",
        "sampling",
        "shapes",
        "weights",
    },
    "presets": {"models"},
    "prompts": {"errors"},
    "sampling": {"diffusion", "errors", "interrupt", "models", "ops", "shapes"},
    "shapes": set(),
    "testing": {"models", "weights"},
    "torch_side": {
        "checkpoints",
        "components",
        "diffusion",
        "errors",
        "models",
        "prompts",
        "shapes",
        "weights",
    },
    "training": {
        "diffusion",
        "errors",
        "files",
        "interrupt",
        "media",
        "mini",
        "models",
        "moving_shapes",
        "ops",
        "prompts",
        "shapes",
        "weights",
    },
    "weights": {"errors", "models"},
}
# Imported nowhere at module level, and only under torch_side/ at all.
TORCH_SIDE = {"torch", "diffusers", "transformers", "accelerate"}
OPTIONAL = {"matplotlib", "skimage", "gradio", "optax", "orbax", "grain", "tensorboardX"}


def room_of(file: Path) -> str:
    parts = file.relative_to(SOURCE / PACKAGE).with_suffix("").parts
    return parts[0]


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


def violations(file: Path, source: str) -> list[str]:
    """What ``source``, standing at ``file``, imports against the table."""
    tree = ast.parse(source)
    room = room_of(file)
    found = []
    for name in imports_of(tree):
        top, *rest = name.split(".")
        if top == PACKAGE and rest and rest[0] != room and rest[0] not in ALLOWED[room]:
            found.append(f"{room} may not import {name}")
        if top in TORCH_SIDE and room not in {"torch_side", "testing"}:
            found.append(f"{name}: only torch_side/ and testing/ may import the PyTorch side")
    for name in imports_of(at_module_level(tree)):
        if name.split(".")[0] in TORCH_SIDE | OPTIONAL:
            found.append(f"{name} at module level, though the core installs without it")
    return found


FILES = sorted((SOURCE / PACKAGE).rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_follow_the_table(file: Path):
    assert room_of(file) in ALLOWED, f"{room_of(file)} is not in the table"
    assert violations(file, file.read_text()) == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("ops/x.py", "from skyreels_jax.models import transformer"),
        ("models/x.py", "import torch"),
        ("torch_side/x.py", "import torch"),
        ("diffusion/x.py", "from skyreels_jax import models"),
        ("generation/x.py", "def f():\n    import diffusers"),
        ("weights/x.py", "from skyreels_jax.checkpoints import Checkpoint"),
    ],
)
def test_a_forbidden_import_is_caught(place: str, line: str):
    assert violations(SOURCE / PACKAGE / place, line) != []


def test_a_torch_import_inside_a_function_of_torch_side_is_allowed():
    file = SOURCE / PACKAGE / "torch_side" / "x.py"
    assert violations(file, "def f():\n    import torch") == []
    assert violations(file, "if TYPE_CHECKING:\n    import torch") == []


def test_the_described_import_paths_hold_no_code():
    for file in (SOURCE / "jax_implementation").rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            assert is_docstring or is_all or isinstance(node, ast.ImportFrom), f"{file}: {node}"
