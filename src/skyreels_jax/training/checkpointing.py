"""Checkpoints of a training run: Orbax, behind three functions."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from skyreels_jax.errors import WeightsError
from skyreels_jax.training.step import TrainState


@dataclass(frozen=True)
class Checkpoints:
    """Of one run; the newest few are kept. Written beside the computation, each whole or not."""

    manager: Any

    def save(self, state: TrainState) -> None:
        """Begin to write; returns once the values are out of the device's way."""
        import orbax.checkpoint as ocp

        self.manager.save(int(state.step), args=ocp.args.StandardSave(state._asdict()))

    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self.manager.latest_step()

    def restore(self, like: TrainState) -> TrainState:
        """The newest, with the shapes of ``like``.

        Raises:
            WeightsError: there is none, or it is of another model or optimiser.
        """
        import orbax.checkpoint as ocp

        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        try:
            found = self.manager.restore(self.latest(), args=ocp.args.StandardRestore(shapes))
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise WeightsError(
                f"{self.manager.directory}: the checkpoint does not fit this run's model and "
                f"optimiser: {error}"
            ) from error
        return TrainState(**found)


@contextmanager
def checkpoints(folder: Path, *, keep: int) -> Iterator[Checkpoints]:
    """The checkpoints in ``folder``, the newest ``keep`` of them; waits for the last write."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    with ocp.CheckpointManager(folder.resolve(), options=options) as manager:
        yield Checkpoints(manager)
        manager.wait_until_finished()
