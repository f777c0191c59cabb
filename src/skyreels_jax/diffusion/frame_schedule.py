"""The frame schedule of diffusion forcing: which frame is at which timestep in which iteration.

A plain table on the host. An *iteration* is one evaluation of the model; each latent frame has its
own *index*: 0 is pure noise and not started, ``k`` in ``1..N`` means "takes solver step k in this
iteration", and ``N + 1`` is clean. Blocks of frames move together; each block runs ``ar_step``
iterations behind the one before it (0: all together, N or more: one after the other).

Source of the rule: SkyReels-V2 technical report (arXiv 2504.13074), asynchronous inference. The
original computes the table iteration by iteration; here each entry is written down directly, since
block j (counted from the first unfinished one) has waited ``j * min(ar_step, N)`` iterations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Int

from skyreels_jax.errors import RequestError

# The timestep of a frame that has not started: pure noise.
_NOT_STARTED_TIMESTEP: Final = 999
_CLEAN_TIMESTEP: Final = 0


@dataclass(frozen=True)
class BlockPlan:
    """How latent frames are grouped: ``lengths`` of the blocks in order.

    The first ``ready`` blocks are clean from the start, and so are the last ``ends``: an end frame
    is a block of its own. ``lengths`` may differ: a prefix is cut by itself, and the last block of
    the rest may be short.
    """

    lengths: tuple[int, ...]
    ready: int = 0
    ends: int = 0

    def __post_init__(self):
        if not self.lengths or min(self.lengths) < 1:
            raise RequestError(f"{self.lengths=} should be at least one block of at least 1 frame")
        if min(self.ready, self.ends) < 0 or self.ready + self.ends >= len(self.lengths):
            raise RequestError(
                f"{self.ready=} and {self.ends=} clean blocks of {len(self.lengths)} leave nothing "
                "to generate"
            )

    @property
    def frames(self) -> int:
        """Number of latent frames."""
        return sum(self.lengths)

    @property
    def block_of_frame(self) -> Int[np.ndarray, " F"]:
        """The block each frame belongs to."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


def plan_blocks(frames: int, block: int, *, prefix: int = 0, end: int = 0) -> BlockPlan:
    """Blocks of ``block`` frames after ``prefix`` clean ones; the last block may be short.

    ``end`` clean frames follow the ``frames``, as one more block.

    Where ``block`` divides both numbers this is the original's grouping. Where it does not, the
    original loses frames: a prefix shorter than a block is overwritten with noise, and frames after
    the last whole block are never denoised. Here an image prefix of one frame gives blocks
    ``1, k, k, ..., rest``. The original's end frame makes the number of frames indivisible, which
    leaves the last real frame noise and hides the end frame from the model.

    Raises:
        RequestError: a number is out of range.
    """
    if block < 1:
        raise RequestError(f"a causal block of {block} frames: it takes at least 1")
    if not 0 <= prefix < frames:
        raise RequestError(f"a prefix of {prefix} of {frames} latent frames leaves none to make")
    return BlockPlan(
        lengths=(*_cut(prefix, block), *_cut(frames - prefix, block), *[end][: end > 0]),
        ready=len(tuple(_cut(prefix, block))),
        ends=int(end > 0),
    )


def _cut(total: int, size: int) -> Iterator[int]:
    """``total`` cut into pieces of ``size``, the last one possibly shorter."""
    for start in range(0, total, size):
        yield min(size, total - start)


@dataclass(frozen=True)
class FrameSchedule:
    """All iterations of a run, as ``[iterations, F]`` tables.

    ``index`` is described in the module's docstring, ``timesteps`` is what the model is given, and
    ``update`` says which frames the solver moves.
    """

    index: Int[np.ndarray, "I F"]
    timesteps: Int[np.ndarray, "I F"]
    update: Bool[np.ndarray, "I F"]

    @property
    def iterations(self) -> int:
        """Number of model evaluations (pairs of them under guidance)."""
        return len(self.index)

    def describe(self, done: int) -> str:
        """The iteration that ``done`` counts last, for a message."""
        timestep = self.timesteps[done - 1].max()
        return f"step {done} of {self.iterations} (timestep {timestep})"


def schedule_frames(
    plan: BlockPlan, timesteps: Sequence[int] | Int[np.ndarray, " N"], *, ar_step: int
) -> FrameSchedule:
    """The schedule for ``plan`` when every frame takes the solver's ``timesteps`` in order.

    Args:
        plan: the blocks; its first ``ready`` ones are clean from the start.
        timesteps: what the model is given at each of the N solver steps.
        ar_step: iterations by which each block runs behind the one before.

    Raises:
        RequestError: ``ar_step`` is negative.
    """
    steps = len(timesteps)
    blocks = len(plan.lengths)
    if ar_step < 0:
        raise RequestError(f"ar_step {ar_step} is negative; 0 denoises all frames together")
    lag = min(ar_step, steps)
    waiting = np.arange(blocks) - plan.ready
    moving = blocks - plan.ready - plan.ends
    clean = (waiting < 0) | (waiting >= moving)
    iterations = steps + (moving - 1) * lag
    started = np.arange(1, iterations + 1)[:, None] - waiting * lag
    index = np.where(clean, steps + 1, np.clip(started, 0, steps + 1))
    before = np.vstack([np.where(clean, steps + 1, 0), index[:-1]])
    update = (index != before) & (index <= steps)
    by_index = np.array([_NOT_STARTED_TIMESTEP, *timesteps, _CLEAN_TIMESTEP], np.int32)
    frame = plan.block_of_frame
    return FrameSchedule(
        index=index[:, frame].astype(np.int32),
        timesteps=by_index[index][:, frame],
        update=update[:, frame],
    )


def synchronous_schedule(timesteps: Sequence[int] | Int[np.ndarray, " N"]) -> FrameSchedule:
    """All frames take every step at once: a schedule with one column for all of them."""
    return schedule_frames(plan_blocks(frames=1, block=1), timesteps, ar_step=0)
