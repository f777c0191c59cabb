"""Timing and memory, the same way for both sides."""

import importlib.metadata
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Taken(NamedTuple):
    """Seconds on the clock, and of processors: the latter say more on a machine that is shared."""

    clock: float
    cpu: float


def timed(call: Callable[[], Any]) -> tuple[Any, Taken]:
    """What ``call`` returns, and what it took."""
    clock, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, Taken(time.perf_counter() - clock, time.process_time() - cpu)


def interleaved(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Taken]:
    """Medians for each call, all sides in turn in each round, after one unmeasured round."""
    for call in sides.values():
        call()
    taken: dict[str, list[Taken]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            taken[name].append(timed(call)[1])
    return {
        name: Taken(*(middle(list(column)) for column in zip(*times, strict=True)))
        for name, times in taken.items()
    }


def peak_gib() -> float:
    """The most memory this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def middle(seconds: list[float]) -> float:
    """The median."""
    return statistics.median(seconds)


def row(*cells: object) -> None:
    """Print one row of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def head(*names: str) -> None:
    """Begin a table."""
    row(*names)
    row(*len(names) * ["---"])


def versions() -> str:
    """Of everything that is compared."""
    packages = ("jax", "jaxlib", "flax", "torch", "diffusers")
    numbers = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"Python {platform.python_version()}, {numbers}"
