"""Checkpoints of a training run: Orbax, behind four functions."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from skyreels_jax.errors import WeightsError
from skyreels_jax.training.step import TrainState, default_memory_kind

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager

# What a run was made of, by dotted name: what may be written as JSON.
RunSettings = Mapping[str, str | int | float | bool | list | None]


@dataclass(frozen=True)
class Checkpoints:
    """The newest few checkpoints of a run, written beside the computation, each whole or not."""

    manager: "CheckpointManager"

    def save(self, state: TrainState, settings: RunSettings, *, wait: bool = False) -> None:
        """Begin to write; returns once the values are out of the device's way.

        Args:
            state: to write.
            settings: kept beside it.
            wait: return only when it is written.
        """
        import orbax.checkpoint as ocp

        values = ocp.args.StandardSave(state._asdict())
        self.manager.save(int(state.step), args=values, custom_metadata=dict(settings))
        if wait:
            self.manager.wait_until_finished()

    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self.manager.latest_step()

    def _newest(self) -> int:
        newest = self.latest()
        if newest is None:
            raise WeightsError(f"{self.manager.directory} holds no checkpoint")
        return newest

    def settings(self) -> RunSettings:
        """What the newest checkpoint was saved with; empty for one that says nothing."""
        return self.manager.metadata(self._newest()).custom_metadata or {}

    def restore(self, like: TrainState) -> TrainState:
        """The newest, with the shapes of ``like``.

        Raises:
            WeightsError: there is none, or it is of another model or optimiser.
        """
        import orbax.checkpoint as ocp

        def asked(leaf: jax.Array) -> jax.ShapeDtypeStruct | np.ndarray:
            # Orbax takes what is in the host's memory for what is on the device.
            if leaf.sharding.memory_kind == default_memory_kind(leaf):
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            return np.empty(leaf.shape, leaf.dtype)

        shapes = jax.tree.map(asked, like._asdict())
        self._check_params(like)
        try:
            found = self.manager.restore(self._newest(), args=ocp.args.StandardRestore(shapes))
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise WeightsError(
                f"{self.manager.directory}: the checkpoint does not fit this run's model and "
                f"optimiser: {reason}"
            ) from error
        return jax.tree.map(
            lambda leaf, wanted: jax.device_put(leaf, wanted.sharding), TrainState(**found), like
        )

    def _check_params(self, like: TrainState) -> None:
        """Compare shapes before values are read: Orbax says in pages what differs."""
        stored = self.manager.item_metadata(self._newest())
        if stored is None:  # By another version of Orbax; reading it will tell.
            return
        saved = {name: tuple(value.shape) for name, value in stored["params"].items()}
        wanted = {name: value.shape for name, value in like.params.items()}
        if differing := sorted(n for n in saved | wanted if saved.get(n) != wanted.get(n)):
            name = differing[0]
            raise WeightsError(
                f"{self.manager.directory}: the checkpoint is of another model: {name} is "
                f"{saved.get(name, 'not in it')} there and {wanted.get(name, 'missing')} in this "
                f"recipe, {len(differing)} such in all; name another output folder"
            )


@contextmanager
def open_checkpoints(folder: Path, *, keep: int) -> Iterator[Checkpoints]:
    """The checkpoints in ``folder``, the newest ``keep`` of them; waits for the last write."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    # Named, so that shapes can be asked for before anything is read.
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(folder.resolve(), options=options, item_handlers=handler) as manager:
        yield Checkpoints(manager)
        manager.wait_until_finished()
