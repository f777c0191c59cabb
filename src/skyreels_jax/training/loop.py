"""The training loop: batches, steps, logs, checkpoints, and an orderly end."""

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax

from skyreels_jax.errors import SkyReelsError, UnsupportedError
from skyreels_jax.interrupt import stop_requested
from skyreels_jax.training.checkpointing import Checkpoints, checkpoints
from skyreels_jax.training.optimizer import OptimizerConfig, make_optimizer
from skyreels_jax.training.parameters import Params
from skyreels_jax.training.step import StepReport, TrainState, init_state, make_step
from skyreels_jax.training.task import Task
from skyreels_jax.weights.writer import new_folder

LOG: Final = "log.jsonl"
# Batches made before they are asked for.
AHEAD: Final = 2

logger = logging.getLogger(__name__)


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
        checkpoint_every: steps between two checkpoints.
        keep: checkpoints that stay.
        tensorboard: write the log's figures for TensorBoard too (takes the extra ``train``).
    """

    steps: int
    seed: int = 0
    accumulate: int = 1
    ema: float = 0.0
    log_every: int = 10
    evaluate_every: int = 0
    sample_every: int = 0
    checkpoint_every: int = 500
    keep: int = 2
    tensorboard: bool = False

    def __post_init__(self):
        counts = (self.steps, self.accumulate, self.log_every, self.checkpoint_every, self.keep)
        if min(counts) < 1:
            raise ValueError("steps, accumulate, log_every, checkpoint_every, keep: at least 1")
        if min(self.evaluate_every, self.sample_every, self.seed) < 0:
            raise ValueError("evaluate_every, sample_every and seed should not be negative")
        if not 0 <= self.ema < 1:
            raise ValueError(f"{self.ema=} should be at least 0 and below 1")


@dataclass(frozen=True)
class Outcome:
    """Where a run stands: its last step, whether that is the end, and the last evaluation."""

    step: int
    finished: bool
    figures: dict[str, float]


# Called after each logged step with its number and figures.
Watch = Callable[[int, dict[str, float]], None]


def train(
    task: Task,
    run: RunConfig,
    optimizer: OptimizerConfig,
    output: Path,
    *,
    watch: Watch = lambda step, figures: None,
) -> Outcome:
    """Train to the end, going on from the newest checkpoint in ``output`` if there is one.

    A run that was interrupted and goes on gives bit for bit what it would have given: a step's
    batch and noise follow from the seed and the step's number alone. SIGTERM and SIGINT finish the
    step, save, and return.

    Args:
        task: what is trained.
        run: its course.
        optimizer: its updates.
        output: folder of checkpoints, log and samples; the exported model is in ``model``.
        watch: told of progress.

    Raises:
        DivergedError: with the step, its batch and the last good checkpoint.
        WeightsError: a checkpoint in ``output`` is of another model.
    """
    output.mkdir(parents=True, exist_ok=True)
    first = task.init()
    chain = make_optimizer(optimizer, run.steps, first)
    step = make_step(task.loss, chain, accumulate=run.accumulate, ema=run.ema)
    state = init_state(first, chain, run.ema)
    with checkpoints(output / "checkpoints", keep=run.keep) as saved, stop_requested() as stop:
        if saved.latest() is not None:
            state = saved.restore(state)
        log = _Log(output, int(state.step), watch, board=run.tensorboard)
        key = jax.random.key(run.seed)
        done, last = int(state.step), None
        with _ahead(task.batch, done, run.steps) as batches:
            while done < run.steps and not stop.is_set():
                state, report = step(state, next(batches), jax.random.fold_in(key, done))
                # Read one step late: the device never waits for the host.
                if last is not None:
                    _check(last, done - 1, saved, output)
                done, last = done + 1, report
                if done % run.log_every == 0 or done == run.steps:
                    _check(report, done - 1, saved, output)
                    log.write(done, {n: float(v) for n, v in report.figures.items()})
                if done % run.checkpoint_every == 0 and done < run.steps:
                    _check(report, done - 1, saved, output)
                    saved.save(state)
                if _is_due(done, run.evaluate_every, run.steps):
                    log.write(done, task.evaluate(_best(state)))
                if _is_due(done, run.sample_every, run.steps):
                    _write_new(output / "samples" / f"{done:07d}", task.sample, _best(state))
        if last is not None:
            _check(last, done - 1, saved, output)
            if saved.latest() != done:
                saved.save(state)
        if done == run.steps:
            _write_new(output / "model", task.export, _best(state))
        return Outcome(done, done == run.steps, log.latest)


def _best(state: TrainState) -> Params:
    return state.average or state.params


def _is_due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


def _write_new(folder: Path, write: Callable[[Params, Path], None], params: Params) -> None:
    with new_folder(folder, overwrite=True) as partial:
        write(params, partial)


def _check(report: StepReport, step: int, saved: Checkpoints, output: Path) -> None:
    if bool(report.is_finite):
        return
    figures = ", ".join(f"{name} {float(value):g}" for name, value in report.figures.items())
    last = saved.latest()
    where = "none was saved" if last is None else f"step {last} in {output / 'checkpoints'}"
    raise DivergedError(
        f"step {step + 1} is not finite ({figures}), from batch {step}; last good checkpoint: "
        f"{where}; lower learning_rate or clip"
    )


class _Log:
    """Lines of JSON; what an interrupted run wrote past its last checkpoint is dropped."""

    def __init__(self, output: Path, done: int, watch: Watch, *, board: bool):
        file = output / LOG
        self.board = _board(output / "tensorboard", done) if board else None
        lines = file.read_text().splitlines() if file.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= done]
        file.write_text("".join(f"{line}\n" for line in kept))
        earlier = json.loads(kept[-1])["seconds"] if kept else 0.0
        self.file, self.watch = file, watch
        self.started = time.monotonic() - earlier
        self.latest: dict[str, float] = {}

    def write(self, step: int, figures: dict[str, float]) -> None:
        seconds = round(time.monotonic() - self.started, 2)
        self.latest |= figures
        with self.file.open("a") as stream:
            stream.write(json.dumps({"step": step, "seconds": seconds, **figures}) + "\n")
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()
        self.watch(step, figures)


def _board(folder: Path, done: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "run.tensorboard = true takes tensorboardX: pip install 'skyreels-jax[train]'"
        ) from error
    # What an interrupted run wrote past its last checkpoint is hidden.
    return SummaryWriter(str(folder), purge_step=done + 1 if done else None)


@contextmanager
def _ahead(batch: Callable[[int], Any], start: int, end: int) -> Iterator[Iterator[Any]]:
    """Batches ``start`` to ``end``, made in a thread while the device computes."""
    ready: queue.Queue[Any] = queue.Queue(AHEAD)
    ended = threading.Event()

    def put(item: Any) -> None:
        while not ended.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.1)
                break

    def make() -> None:
        for index in range(start, end):
            try:
                put(batch(index))
            except Exception as error:
                put(error)
                break
            if ended.is_set():
                break

    def take() -> Iterator[Any]:
        for _ in range(start, end):
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        ended.set()
        thread.join()
