"""A training run as a file: what is trained, on what, how, and where it goes."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from skyreels_jax.errors import RequestError
from skyreels_jax.mini.tasks import EncoderTraining, ImageTask, TextTask
from skyreels_jax.mini.vae_task import VaeTask, VaeTraining
from skyreels_jax.outputs import folder_of
from skyreels_jax.parallel.plan import AUTO, MeshPlan
from skyreels_jax.training.checkpointing import RunSettings
from skyreels_jax.training.config import from_table, read_toml
from skyreels_jax.training.dataset import OnEncoded
from skyreels_jax.training.distillation_recipe import DISTILLATION_OF_SOURCE, DistillTraining
from skyreels_jax.training.distillation_task import DistillTask
from skyreels_jax.training.loop import RunConfig
from skyreels_jax.training.lora_task import make_video_task
from skyreels_jax.training.mesh import check_rows
from skyreels_jax.training.optimizer import OptimizerConfig
from skyreels_jax.training.task import TrainingTask
from skyreels_jax.training.transformer_recipe import TRAINING_OF_SOURCE, VideoTraining
from skyreels_jax.training.videos.recipe import VideoData

# What is made of a recipe's tables, a seed, and what is called as clips are encoded.
_Make = Callable[[Any, int, OnEncoded], TrainingTask]
# What can be trained: the tables of its own, and what is made of them.
_TRAINABLE: Final[Mapping[str, tuple[type, _Make]]] = {
    "vae": (VaeTraining, lambda tables, seed, _: VaeTask(tables, seed)),
    "text": (EncoderTraining, lambda tables, seed, _: TextTask(tables, seed)),
    "image": (EncoderTraining, lambda tables, seed, _: ImageTask(tables, seed)),
    "video": (VideoTraining, make_video_task),
    "distill": (DistillTraining, DistillTask),
}
# Kinds whose tables depend on their data's source.
_BY_SOURCE: Final[Mapping[str, Mapping[str, type[VideoTraining]]]] = {
    "video": TRAINING_OF_SOURCE,
    "distill": DISTILLATION_OF_SOURCE,
}
_COMMON: Final = ("train", "output", "run", "optimizer")


@dataclass(frozen=True)
class Recipe:
    """A checked file.

    Attributes:
        kind: what is trained: ``vae``, ``text``, ``image``, ``video`` or ``distill``.
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

    def task(self, on_encoded: OnEncoded = lambda what, done, total: None) -> TrainingTask:
        """Load or make what is trained.

        Args:
            on_encoded: called as clips are encoded.

        Raises:
            SkyReelsError: what the recipe names cannot be found or loaded, or does not fit.
        """
        return _TRAINABLE[self.kind][1](self.tables, self.run.seed, on_encoded)

    def settings(self) -> RunSettings:
        """Every setting by dotted name, as JSON has it."""
        tables = {
            "run": dataclasses.asdict(self.run),
            "optimizer": dataclasses.asdict(self.optimizer),
            **dataclasses.asdict(self.tables),
        }
        found: dict[str, Any] = {"train": self.kind}
        for name, table in tables.items():
            for key, value in (table or {}).items():
                found[f"{name}.{key}"] = list(value) if isinstance(value, tuple) else value
        return found


def read_recipe(file: Path, overrides: Mapping[str, str | int] | None = None) -> Recipe:
    """Read and check a file; nothing that it names is looked for.

    Args:
        file: TOML: ``train`` names the kind; ``output`` a folder; the tables ``run`` and
            ``optimizer`` are of every kind, the others of the kind.
        overrides: ``output``, ``steps`` and ``mesh`` in place of the file's.

    Raises:
        RequestError: anything in it is unknown, missing or illegal.
    """
    values, where = dict(read_toml(file)), file.name
    for name, value in (overrides or {}).items():
        if name == "output":
            values[name] = value
        elif isinstance(run := values.get("run", {}), Mapping):
            values["run"] = {**run, name: value}
    kind = values.get("train")
    if not isinstance(kind, str) or kind not in _TRAINABLE:
        raise RequestError(f"{where}: train = {kind!r} should be one of {', '.join(_TRAINABLE)}")
    own = {name: table for name, table in values.items() if name not in _COMMON}
    tables = _BY_SOURCE[kind][_source(own, where)] if kind in _BY_SOURCE else _TRAINABLE[kind][0]
    recipe = Recipe(
        kind=kind,
        output=_output(values.get("output"), where),
        run=from_table(RunConfig, values.get("run", {}), f"{where}: run"),
        optimizer=from_table(OptimizerConfig, values.get("optimizer", {}), f"{where}: optimizer"),
        tables=from_table(tables, own, where),
    )
    if isinstance(recipe.tables, DistillTraining):
        _check_distillation(recipe.tables, recipe.run, where)
    data, parts = recipe.tables.data, recipe.run.accumulate
    for batch in data.batches() if isinstance(data, VideoData) else (data.batch,):
        if batch % parts:
            near = max(n for n in range(1, parts) if not batch % n)
            raise RequestError(
                f"{where}: run.accumulate = {parts} should divide data.batch = {batch}; "
                f"nearest: {near}"
            )
        if recipe.run.mesh not in (None, AUTO):
            check_rows(MeshPlan.parse(recipe.run.mesh), batch // parts)
    return recipe


def _check_distillation(tables: DistillTraining, run: RunConfig, where: str) -> None:
    if run.mesh is not None:
        raise RequestError(
            f"{where}: run.mesh = {run.mesh!r}: a student is distilled on one device so far; leave "
            "run.mesh out"
        )
    if tables.distill.stage == "consistency" and not run.ema:
        raise RequestError(
            f"{where}: run.ema must be above 0 for distill.stage = 'consistency', whose student "
            "should agree with its own average; such as 0.95"
        )


def _source(tables: Mapping[str, object], where: str) -> str:
    """What ``data.source`` names; moving shapes unless given."""
    data = tables.get("data")
    source = data.get("source", "shapes") if isinstance(data, Mapping) else "shapes"
    if not isinstance(source, str) or source not in TRAINING_OF_SOURCE:
        legal = ", ".join(TRAINING_OF_SOURCE)
        raise RequestError(f"{where}: data.source = {source!r:.60} should be one of {legal}")
    return source


def _output(value: object, where: str) -> Path:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise RequestError(f"{where}: output = {value!r} should be a folder's name")
    return folder_of(value, f"{where}: output")
