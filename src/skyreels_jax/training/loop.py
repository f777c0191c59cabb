"""The training loop: batches, steps, logs, checkpoints, and an orderly end."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import jax
import numpy as np
from jaxtyping import PyTree

from skyreels_jax.errors import RequestError, SkyReelsError
from skyreels_jax.interrupt import StopRequest, stop_requested
from skyreels_jax.parallel.plan import AUTO, MeshPlan
from skyreels_jax.training.checkpointing import Checkpoints, RunSettings, open_checkpoints
from skyreels_jax.training.log import OnLog, TrainingLog
from skyreels_jax.training.mesh import TrainingMesh
from skyreels_jax.training.optimizer import OptimizerConfig, learning_rate, optimizer_of
from skyreels_jax.training.prefetch import prefetched
from skyreels_jax.training.processes import agreed, any_says, is_first, whole
from skyreels_jax.training.step import (
    TrainState,
    TrainStep,
    TrainStepReport,
    best_params,
    init_state,
    make_step,
)
from skyreels_jax.training.task import FrozenBase, Params, TrainingTask
from skyreels_jax.weights.writer import new_folder

if TYPE_CHECKING:
    import optax

# Settings that may change when a run goes on: they decide how it is watched, not what it learns.
_FREE: Final = frozenset(
    f"run.{name}"
    for name in (
        *("log_every", "evaluate_every", "sample_every", "checkpoint_every"),
        *("keep", "tensorboard", "export_raw", "export_every", "mesh", "offload", "sample_prompts"),
    )
) | {"model.export_dtype", "model.remat"}
# Folders may move: what is in them is compared by its digest.
_FOLDERS: Final = frozenset(
    f"data.{name}" for name in ("vae", "text", "image", "encoded", "datasets")
)

_logger = logging.getLogger(__name__)


class DivergedError(SkyReelsError):
    """Loss or gradient became infinite or no number."""


@dataclass(frozen=True)
class RunConfig:
    """How long, how much at once, and what is written when.

    Attributes:
        steps: updates in all.
        seed: of initial values, data and noise.
        accumulate: parts of a batch whose gradients are averaged, one in memory at a time.
        ema: of the parameters, which is what is evaluated and exported; 0 for none.
        log_every: steps between two lines of the log.
        evaluate_every: steps between two evaluations; 0 for none but the last.
        sample_every: steps between two samples; 0 for none but the last.
        sample_prompts: a file of prompts for the samples, a line each, as in musubi-tuner; the
            data's own captions unless given.
        checkpoint_every: steps between two checkpoints.
        export_every: steps between two exports, in ``exports``; 0 for none but the last.
        keep: checkpoints that stay.
        tensorboard: write the log's metrics for TensorBoard too (takes the extra ``train``).
        export_raw: write ``model-raw`` too: the parameters themselves, not their average.
        mesh: devices along each axis, such as ``data=2,fsdp=2``, or ``auto``; one device unless
            given. Whatever it is, a run learns the same from the same batches.
        kernels: dtype in which what multiplies is given to the model and its gradients are;
            ``bfloat16`` halves both. Masters, optimiser and average stay float32.
        offload: keep optimiser and average in the host's memory between steps.
    """

    steps: int
    seed: int = 0
    accumulate: int = 1
    ema: float = 0.0
    log_every: int = 10
    evaluate_every: int = 0
    sample_every: int = 0
    sample_prompts: str | None = None
    checkpoint_every: int = 500
    export_every: int = 0
    keep: int = 2
    tensorboard: bool = False
    export_raw: bool = False
    mesh: str | None = None
    kernels: Literal["float32", "bfloat16"] = "float32"
    offload: bool = False

    def __post_init__(self):
        if self.mesh not in (None, AUTO):
            MeshPlan.parse(self.mesh)
        for name in ("steps", "accumulate", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} should be at least 1; nearest: 1")
        for name in ("evaluate_every", "sample_every", "export_every", "seed"):
            if getattr(self, name) < 0:
                value = getattr(self, name)
                raise ValueError(f"{name} = {value} should not be negative; nearest: 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema = {self.ema} should be at least 0 and below 1, such as 0.99")


@dataclass(frozen=True)
class Outcome:
    """Where a run stands.

    Attributes:
        started: the step from which it went on.
        step: its last one.
        finished: whether that is the end.
        metrics: the last value of each.
        stop: who asked it to stop, where it is not the end.
    """

    started: int
    step: int
    finished: bool
    metrics: Mapping[str, float]
    stop: StopRequest


def train(
    task: TrainingTask,
    run: RunConfig,
    optimizer: OptimizerConfig,
    output: Path,
    *,
    settings: RunSettings | None = None,
    on_log: OnLog = lambda step, metrics: None,
    on_mesh: Callable[[str], None] = lambda mesh: None,
) -> Outcome:
    """Train to the end, going on from the newest checkpoint in ``output`` if there is one.

    A run that was interrupted and goes on gives bit for bit what it would have given: a step's
    batch and noise follow from the seed and the step's number alone. SIGTERM, SIGHUP and SIGINT
    finish the step, save, and return.

    Args:
        task: what is trained.
        run: its course.
        optimizer: its updates.
        output: folder of checkpoints, log and samples; the exported model is in ``model``.
        settings: what the run is made of, by dotted name; kept with each checkpoint.
        on_log: called with each line of the log.
        on_mesh: called with the mesh and its reason, if there is one.

    Raises:
        DivergedError: with the step, its batch and the last good checkpoint.
        RequestError: a checkpoint in ``output`` was made with other settings.
        WeightsError: a checkpoint in ``output`` is of another model.
    """
    output.mkdir(parents=True, exist_ok=True)
    settings, first = {**(settings or {}), **task.fingerprint()}, task.init()
    mesh = None if run.mesh is None else _mesh_of(task, run.mesh, run.accumulate)
    if mesh is not None:
        on_mesh(str(mesh))
    chain = optimizer_of(task, optimizer, run.steps, first)
    state = init_state(first, chain, run.ema, mesh, offload=run.offload)
    with (
        open_checkpoints(output / "checkpoints", keep=run.keep) as saved,
        stop_requested() as stop,
    ):
        if saved.latest() is not None:
            _check_settings(saved, settings, output, run.steps)
            state = saved.restore(state)
        started = int(state.step)
        log = TrainingLog(output, started, on_log, tensorboard=run.tensorboard, writes=is_first())
        rate = learning_rate(optimizer, run.steps)
        loop = _Loop(task, run, output, saved, settings, log, rate, mesh)
        frozen = task.frozen() if isinstance(task, FrozenBase) else {}
        loss = task.loss if mesh is None else mesh.loss_of({**frozen, **first}, task.loss)
        step = make_step(
            loss,
            chain,
            draw=task.draw,
            accumulate=run.accumulate,
            ema=run.ema,
            frozen=frozen,
            kernels=run.kernels,
            mesh=mesh,
        )
        state = loop.run_steps(state, step, stop)
        done = int(state.step)
        finished = done >= run.steps
        if finished:
            loop.finish(state)
        return Outcome(started, done, finished, log.latest, stop)


@dataclass
class _Loop:
    """One call of :func:`train`: what its parts share."""

    task: TrainingTask
    run: RunConfig
    output: Path
    saved: Checkpoints
    settings: RunSettings
    log: TrainingLog
    rate: "optax.Schedule"
    mesh: TrainingMesh | None

    def run_steps(self, state: TrainState, step: TrainStep, stop: StopRequest) -> TrainState:
        """Up to the end or until asked to stop; the state is saved then."""
        run, key = self.run, jax.random.key(self.run.seed)
        done, last, logged, since = int(state.step), None, int(state.step), time.monotonic()
        self._show(state, done)
        with prefetched(self._batch, done, run.steps) as batches:
            while done < run.steps and not self._is_asked_to_stop(stop, done):
                state, report = step(state, next(batches), jax.random.fold_in(key, done))
                # Read one step late: the device never waits for the host.
                if last is not None:
                    self._check(last, done - 1)
                done, last = done + 1, report
                if done % run.log_every == 0 or done == run.steps:
                    self._check(report, done - 1)
                    metrics = {name: float(value) for name, value in report.metrics.items()}
                    metrics["learning_rate"] = float(np.asarray(self.rate(done - 1)))
                    metrics["steps_per_second"] = (done - logged) / (time.monotonic() - since)
                    self.log.write(done, metrics)
                    logged, since = done, time.monotonic()
                due = done % run.checkpoint_every == 0 or self._is_due(done)
                if due and done < run.steps:
                    paused = time.monotonic()
                    self._check(report, done - 1)
                    # What is looked at is safe before anything is done with it that may fail.
                    self.saved.save(state, self.settings, wait=self._is_due(done))
                    self._show(state, done)
                    since += time.monotonic() - paused
        if last is not None:
            self._check(last, done - 1)
            if self.saved.latest() != done:
                self.saved.save(state, self.settings, wait=True)
        return state

    def _batch(self, index: int) -> PyTree:
        batch = self.task.batch(index)
        return batch if self.mesh is None else self.mesh.place_batch(batch)

    def finish(self, state: TrainState) -> None:
        """Write the model, then evaluate and sample: what is not there yet of it."""
        done = int(state.step)
        for name, params in (("model", best_params(state)), ("model-raw", state.params)):
            if name == "model-raw" and not self.run.export_raw:
                continue
            params = whole(params)
            if is_first():
                with new_folder(self.output / name, overwrite=True) as partial:
                    self.task.export(params, partial)
        self._show(state, done, last=True)

    def _is_asked_to_stop(self, stop: StopRequest, done: int) -> bool:
        """Several processes ask each other when they log: all must take the same last step."""
        if jax.process_count() == 1:
            return stop.is_set()
        return done % self.run.log_every == 0 and any_says(stop.is_set())

    def _is_due(self, done: int) -> bool:
        every = (self.run.evaluate_every, self.run.sample_every, self.run.export_every)
        return any(number > 0 and done % number == 0 for number in every)

    def _show(self, state: TrainState, done: int, *, last: bool = False) -> None:
        """Evaluate and sample where that is due; a run that goes on makes up for what it owes."""
        run = self.run
        if done == 0 or (done == run.steps and not last):
            return
        params = best_params(state)
        if last or (run.evaluate_every and done % run.evaluate_every == 0):
            self._evaluate(params, done)
        exported = self.output / "exports" / f"{done:07d}"
        due = run.export_every and done % run.export_every == 0 and not last
        if due and not agreed(exported.exists()):
            readable = whole(params)
            if is_first():
                with new_folder(exported) as partial:
                    self.task.export(readable, partial)
        folder = self.output / "samples" / f"{done:07d}"
        due = last or (run.sample_every and done % run.sample_every == 0)
        if due and not agreed(folder.exists()):
            readable = whole(params)
            if is_first():
                self._sample(readable, folder)

    def _evaluate(self, params: Params, done: int) -> None:
        done_before = agreed(self.log.is_evaluated(done))
        if not done_before and (metrics := self.task.evaluate(params)):
            self.log.write(done, metrics)

    def _sample(self, params: Params, folder: Path) -> None:
        try:
            with new_folder(folder) as partial:
                self.task.sample(params, partial)
        except Exception as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            _logger.warning("no sample was made (%s); the run is saved and goes on", reason)

    def _check(self, report: TrainStepReport, step: int) -> None:
        if bool(report.is_finite):
            return
        metrics = ", ".join(f"{name} {float(v):g}" for name, v in report.metrics.items())
        last = self.saved.latest()
        where = f"step {last} in {self.output / 'checkpoints'}"
        raise DivergedError(
            f"step {step + 1} is not finite ({metrics}), from batch {step}; last good checkpoint: "
            f"{'none was saved' if last is None else where}; lower learning_rate or clip"
        )


def _mesh_of(task: TrainingTask, given: str, accumulate: int) -> TrainingMesh:
    """The mesh of a run, which can train the task."""
    rows = jax.tree.leaves(task.batch(0))[0].shape[0]
    mesh = TrainingMesh.of(given, rows // accumulate, task)
    if mesh.layered is not None:
        mesh.layered.on_mesh(mesh)
    return mesh


def _check_settings(saved: Checkpoints, settings: RunSettings, output: Path, steps: int) -> None:
    """Name every setting that differs from those of the newest checkpoint.

    Only ``run.steps`` and what decides nothing may; settings that only one of both knows may too.
    """
    before = saved.settings()
    changed = [
        n
        for n in settings
        if n in before and before[n] != settings[n] and n not in _FREE | _FOLDERS
    ]
    said = ", ".join(f"{name} {before[name]!r} -> {settings[name]!r}" for name in changed)
    if changed == ["run.steps"]:
        if steps <= (saved.latest() or 0):
            return
        _logger.warning("%s goes on with %s; the rate's course follows the new one", output, said)
    elif changed:
        raise RequestError(
            f"{output} holds a run that was begun with other settings: {said}; set them back, or "
            "name another output folder"
        )
