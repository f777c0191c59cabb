"""The plan of a run: which iterations, or parts of them, are carried out by which program.

A run executes it; a forecast of its memory traces its programs. With block reuse an iteration
computes some blocks only, and blocks that are finished are put into the cache of keys and values
before the first iteration that reads them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from skyreels_jax.diffusion import unipc
from skyreels_jax.diffusion.block_reuse import BlockRange, BlockReuse
from skyreels_jax.sampling.kv_cache import allocate
from skyreels_jax.sampling.progress import IterationReport
from skyreels_jax.sampling.step import DenoisingStep, Iteration, SamplerState
from skyreels_jax.shapes import Latents

# Gives the next state, and a report if frames were moved.
_Program = Callable[
    [DenoisingStep, SamplerState, Iteration], tuple[SamplerState, IterationReport | None]
]


class ProgramKey(NamedTuple):
    """What decides a compiled program: columns of the iteration, and whether it fills the cache."""

    columns: int
    fills_cache: bool

    @property
    def function(self) -> _Program:
        """What is compiled."""
        return DenoisingStep.fill_cache if self.fills_cache else DenoisingStep.advance


class WorkItem(NamedTuple):
    """An iteration, or part of one, to be carried out by the program of ``key``."""

    iteration: Iteration
    key: ProgramKey


@dataclass(frozen=True, eq=False)
class RunPlan:
    """A run before it is executed: the step, what it is given in turn, and the blocks reused."""

    step: DenoisingStep
    work: tuple[WorkItem, ...]
    reuse: BlockReuse | None
    latents: str

    @property
    def programs(self) -> dict[ProgramKey, Iteration]:
        """Each program that the run takes, with an iteration that it serves."""
        return {item.key: item.iteration for item in reversed(self.work)}

    def start(self, noise: Latents) -> SamplerState:
        """The state before the first iteration."""
        # A copy: programs donate the state, and the caller's noise must survive.
        x = jnp.array(jnp.moveaxis(noise, 2, 0), dtype=self.latents, copy=True)
        make = self.step.parallelism.zeros
        state = self.step.parallelism.place(SamplerState(x, unipc.init(x), (), ()))
        if self.reuse is not None and self.reuse.cached:
            block = next(item.iteration for item in self.work if item.key.fills_cache)
            shapes = jax.eval_shape(DenoisingStep.key_values, self.step, state, block)
            slots = self.reuse.cached * len(block.timestep)
            state = state._replace(kv_cache=allocate(shapes, slots, make))
        first = self.work[0].iteration
        shapes = jax.eval_shape(DenoisingStep.initial_caches, self.step, state, first)
        zeros = jax.tree.map(lambda leaf: make(leaf.shape, leaf.dtype), shapes)
        return state._replace(caches=zeros)


def work_items(lines: Iterator[Iteration], reuse: BlockReuse | None) -> Iterator[WorkItem]:
    """What is carried out, in order: iterations, or the parts of them that must be computed."""
    if reuse is None:
        for iteration in lines:
            yield WorkItem(iteration, ProgramKey(len(iteration.timestep), False))
        return
    cached = 0
    for iteration, computed in zip(lines, reuse.iterations, strict=True):
        blocks = [BlockRange(number, 1) for number in range(cached, computed.first)]
        for part in (*blocks, computed):
            columns = iteration.columns(reuse.frames_of(part))
            yield WorkItem(columns, ProgramKey(len(columns.timestep), part is not computed))
        cached = max(cached, computed.first)
