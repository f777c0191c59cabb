"""``python -m benchmarks [--list] [NAME ...]``: measurements, most of them beside PyTorch.

Each prints tables for docs/performance.md. They need the ``torch`` extra and a quiet machine. One
benchmark with its own options is ``python -m benchmarks.NAME --help``.
"""

import argparse
import ast
import subprocess
import sys
from pathlib import Path

HELPERS = {"__init__", "__main__", "measure", "sides"}


def benchmarks() -> dict[str, str]:
    """Every benchmark of this folder, and the first line it says of itself."""
    files = sorted(file for file in Path(__file__).parent.glob("*.py") if file.stem not in HELPERS)
    documents = {file.stem: ast.get_docstring(ast.parse(file.read_text())) for file in files}
    return {name: (text or "").partition("\n")[0] for name, text in documents.items()}


def main() -> None:
    """Run the benchmarks that are named, or all, each in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run (all)")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    options = parser.parse_args()
    known = benchmarks()
    if unknown := set(options.names) - set(known):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    failed = []
    for name in options.names or known:
        print(f"\n{name}: {known[name]}", flush=True)
        if options.list:
            continue
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode:
            failed.append(name)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
