"""A training run as a file: what is trained, on what, how, and where it goes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from skyreels_jax.errors import RequestError
from skyreels_jax.mini.tasks import ImageTask, TextTask, TowerTraining
from skyreels_jax.training.config import from_table, read_toml
from skyreels_jax.training.loop import RunConfig
from skyreels_jax.training.optimizer import OptimizerConfig
from skyreels_jax.training.task import Task
from skyreels_jax.training.transformer_task import VideoTask, VideoTraining
from skyreels_jax.training.vae_task import VaeTask, VaeTraining

# What can be trained: the tables of its own, and what is made of them and the seed.
KINDS: Final[Mapping[str, tuple[type[Any], Callable[[Any, int], Task]]]] = {
    "vae": (VaeTraining, VaeTask),
    "text": (TowerTraining, TextTask),
    "image": (TowerTraining, ImageTask),
    "video": (VideoTraining, VideoTask),
}
COMMON: Final = ("train", "output", "run", "optimizer")


@dataclass(frozen=True)
class Recipe:
    """A checked file.

    Attributes:
        kind: what is trained, of :data:`KINDS`.
        output: folder of the run.
        run: its course.
        optimizer: its updates.
        tables: those of the kind.
    """

    kind: str
    output: Path
    run: RunConfig
    optimizer: OptimizerConfig
    tables: Any

    def task(self) -> Task:
        """Loads or makes what is trained."""
        return KINDS[self.kind][1](self.tables, self.run.seed)


def read_recipe(file: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a file.

    Args:
        file: TOML: ``train`` names the kind; ``output`` a folder; the tables ``run`` and
            ``optimizer`` are of every kind, the others of the kind.
        overrides: ``output`` and ``steps`` in place of the file's.

    Raises:
        RequestError: anything in it is unknown, missing or illegal.
    """
    values = dict(read_toml(file))
    overrides = dict(overrides or {})
    if "steps" in overrides:
        values["run"] = {**values.get("run", {}), "steps": overrides.pop("steps")}
    values |= overrides
    where = file.name
    kind = values.get("train")
    if kind not in KINDS:
        raise RequestError(f"{where}: train = {kind!r} should be one of {', '.join(KINDS)}")
    if not isinstance(values.get("output"), str):
        raise RequestError(f"{where}: output = {values.get('output')!r} should be a folder's name")
    own = {name: table for name, table in values.items() if name not in COMMON}
    return Recipe(
        kind=kind,
        output=Path(values["output"]),
        run=from_table(RunConfig, values.get("run", {}), f"{where}: run"),
        optimizer=from_table(OptimizerConfig, values.get("optimizer", {}), f"{where}: optimizer"),
        tables=from_table(KINDS[kind][0], own, where),
    )
