"""Streams of moving shapes, scored by the judge: short ones, long ones, and where a prompt changes.

``python -m skyreels_jax.evaluation.quality --parts live`` prints their table.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Final, Protocol, runtime_checkable

import jax
import numpy as np

from skyreels_jax.diffusion.guidance import Guidance
from skyreels_jax.evaluation.scores import (
    FPS,
    FRAMES,
    MINI_SIZE,
    Score,
    held_out_scenes,
    lasting_scenes,
    score,
)
from skyreels_jax.generation.live import BlockSampler, LiveStream
from skyreels_jax.media import contact_sheet
from skyreels_jax.moving_shapes.captions import caption, foreign_caption, plain_caption
from skyreels_jax.moving_shapes.judge import DetectedThing, detect_things, judge_scene
from skyreels_jax.moving_shapes.scene import COLOURS, SHAPE_KINDS, Motion, Scene
from skyreels_jax.sampling.denoiser import Denoiser
from skyreels_jax.sampling.step import Conditioning
from skyreels_jax.shapes import Frames, Latents

# What a student is asked for, and frames between two that are judged of a long stream.
STEPS: Final = (4, 2, 1)
EVERY: Final = 100
# Blocks after a change of which one must show it, and how much larger the jump may be.
WITHIN_BLOCKS: Final = 2
LARGEST_JUMP: Final = 1.5
# Blocks before a change and after it.
_BEFORE: Final = 6
_AFTER: Final = 8
# What things do whose colour or shape changes, by row.
_CHANGES: Final[Mapping[str, Motion]] = {"changes": "still", "changes, moving": "bounce"}
# Frames that all of them have room in, and absolute positions too.
_ENOUGH: Final = 1024
# Frames that the judge sees at a time where things stand still; of 255, a jump that nobody sees.
_JUDGED: Final = 5
_UNSEEN: Final = 0.5


@runtime_checkable
class JudgedStream(AbstractContextManager["JudgedStream"], Protocol):
    """What is used of a :class:`.LiveStream`."""

    make_sampler: Callable[..., BlockSampler]

    def __iter__(self) -> Iterator[Frames]:
        """Frames by block."""
        ...

    def change(self, prompt: str) -> None:
        """Show something else from the next block on that is begun."""
        ...


# Makes a stream of a prompt and settings: :meth:`.Pipeline.stream`.
Streamer = Callable[..., JudgedStream]


@dataclass
class _TimedSampler:
    """A sampler whose blocks are waited for: CPU seconds of denoising, without those of decoding.

    Nothing else computes meanwhile, so the process's seconds are its own.
    """

    sampler: BlockSampler
    seconds: list[float]

    def given(self, latents: Latents) -> None:
        """As the sampler."""
        self.sampler.given(latents)

    def change(self, conditioning: Conditioning) -> None:
        """As the sampler."""
        self.sampler.change(conditioning)

    def next(self) -> Latents:
        """The next block, finished."""
        started = time.process_time()
        latents = jax.block_until_ready(self.sampler.next())
        self.seconds.append(time.process_time() - started)
        return latents


def timed(stream: JudgedStream) -> list[float]:
    """Fill the list that is returned with the CPU seconds of each block of a new stream."""
    make, seconds = stream.make_sampler, []

    def make_timed(of: LiveStream, denoiser: Denoiser, guidance: Guidance) -> BlockSampler:
        return _TimedSampler(make(of, denoiser, guidance), seconds)

    stream.make_sampler = make_timed
    return seconds


def _started(
    make_stream: Streamer, prompt: str, seed: int, frames: int, **settings: object
) -> JudgedStream:
    height, width = MINI_SIZE
    size = {"height": height, "width": width, "fps": FPS, "seconds": frames / FPS}
    return make_stream(prompt, seed=seed, **size, **settings)


def live_clips(
    make_stream: Streamer,
    count: int,
    *,
    wording: Callable[[Scene, int], str] | None = None,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    **settings: object,
) -> Score:
    """Score streams of the length of a training clip, of held-out combinations.

    ``cpu`` is the mean of a video's CPU seconds of denoising, the first aside, which compiles.

    Args:
        make_stream: makes them.
        count: of scenes.
        wording: says a scene; the plain one unless given.
        seed: of the scenes. Settings were chosen on those of 5.
        log: told of each 20th.
        settings: of the streams.
    """
    cpu: list[float] = []

    def make(scene: Scene, seed: int) -> Frames:
        prompt = plain_caption(scene) if wording is None else wording(scene, seed)
        with _started(make_stream, prompt, seed, FRAMES, **settings) as stream:
            seconds = timed(stream)
            frames = np.concatenate(list(stream))[:FRAMES]
        cpu.append(math.fsum(seconds))
        return frames

    found = score(make, held_out_scenes(count, seed=seed), log=log)
    found.metrics = {"cpu": float(np.mean(cpu[1:] or cpu))}
    return found


def drawn_wording(scene: Scene, number: int) -> str:
    """One of the many wordings that training has, by a number."""
    return caption(scene, np.random.default_rng([number, 79]))


def _windows(stream: JudgedStream, frames: int) -> Iterator[Frames]:
    """The last frames before each :data:`EVERY`-th; no more is held than they take."""
    held = np.zeros((0, *MINI_SIZE, 3), np.uint8)
    seen, due = 0, EVERY
    for block in stream:
        held, seen = np.concatenate([held, block])[-(FRAMES + len(block)) :], seen + len(block)
        while due <= min(seen, frames):
            last = len(held) - (seen - due)
            yield held[max(0, last - FRAMES) : last]
            due += EVERY


def long_runs(
    make_stream: Streamer,
    runs: int,
    frames: int,
    *,
    log: Callable[[str], None] = lambda line: None,
    **settings: object,
) -> Score:
    """Score what stands still at each 100th frame of long streams.

    ``at_end`` is the share of streams that are right at their last such frame, ``right_until`` the
    frame of the middle stream until which all are.

    Args:
        make_stream: makes them.
        runs: how many.
        frames: of each, 100 at least.
        log: told of each stream.
        settings: of the streams.
    """
    found, at_end, until = Score(), [], []
    started = time.perf_counter()
    for number, scene in enumerate(lasting_scenes(runs, seed=2, motions=("still",))):
        right: list[bool] = []
        with _started(make_stream, plain_caption(scene), number, frames, **settings) as stream:
            for window in _windows(stream, frames):
                verdict = judge_scene(detect_things(window, FPS), scene)
                found.verdicts.append(verdict)
                found.sheets.append(contact_sheet(window, count=6, columns=6))
                right.append(verdict.all)
        at_end.append(right[-1])
        until.append((right.index(False) if False in right else len(right)) * EVERY)
        log(f"{plain_caption(scene)}: {sum(right)} of {len(right)} frames right, last: {right[-1]}")
    found.seconds = (time.perf_counter() - started) / runs
    found.metrics = {"at_end": float(np.mean(at_end)), "right_until": float(np.median(until))}
    return found


def changed_scenes(count: int, motion: Motion = "still") -> list[tuple[Scene, Scene]]:
    """Things that last, and the same ones in the next colour or, every other time, shape."""
    pairs = []
    for number, scene in enumerate(lasting_scenes(count, seed=3, motions=(motion,))):
        thing = scene.things[0]
        if number % 2:
            shape = SHAPE_KINDS[(SHAPE_KINDS.index(thing.kind) + 1) % len(SHAPE_KINDS)]
            other = replace(thing, kind=shape)
        else:
            other = replace(thing, colour=COLOURS[(COLOURS.index(thing.colour) + 1) % len(COLOURS)])
        pairs.append((scene, Scene((other,), scene.background)))
    return pairs


def blocks_until(blocks: Sequence[np.ndarray], scene: Scene) -> float:
    """After how many blocks the judge sees the scene's colour and shape; infinite if in none.

    Args:
        blocks: the last before the change, then those after it, each frames of its own number.
        scene: that was changed to.
    """
    for number in range(1, len(blocks)):
        seen = detect_things(np.concatenate(blocks[number - 1 : number + 1])[-_JUDGED:], FPS)
        if len(seen) == 1 and _is_shown(seen[0], scene):
            return float(number)
    return math.inf


def _is_shown(seen: DetectedThing, scene: Scene) -> bool:
    thing = scene.things[0]
    return (seen.colour, seen.kind) == (thing.colour, thing.kind)


def jump_at_change(blocks: Sequence[np.ndarray], change: int) -> float:
    """The largest step between frames where a prompt changes, over the largest within a block.

    A step is the mean difference of two frames' pixels, of 255. Steps where it changes are those
    into the :data:`WITHIN_BLOCKS` blocks after it; within a block, those of any block.

    Args:
        blocks: of a stream, each frames of its own number.
        change: the first block after it.
    """

    def steps(frames: Frames) -> np.ndarray:
        return np.abs(np.diff(frames.astype(np.float32), axis=0)).mean((1, 2, 3))

    within = max(float(steps(block).max()) for block in blocks if len(block) > 1)
    at = [
        float(steps(np.stack([blocks[n - 1][-1], blocks[n][0]]))[0])
        for n in range(change, min(change + WITHIN_BLOCKS, len(blocks)))
    ]
    return max(at) / max(within, _UNSEEN)


def prompt_changes(
    make_stream: Streamer,
    count: int,
    *,
    motion: Motion = "still",
    log: Callable[[str], None] = lambda line: None,
    **settings: object,
) -> Score:
    """Score what a stream shows after another prompt, of another colour or shape.

    ``blocks_median`` is after how many blocks the judge sees it, ``within_2`` the share of streams
    in which it does within 2; ``jump_median`` and ``jump_within_1.5`` are of
    :func:`jump_at_change`. The verdicts are of the last blocks.

    Args:
        make_stream: makes them.
        count: of streams.
        motion: of the things.
        log: told of each.
        settings: of the streams.
    """
    found, until, jumps = Score(), [], []
    started = time.perf_counter()
    for number, (scene, other) in enumerate(changed_scenes(count, motion)):
        blocks: list[Frames] = []
        with _started(make_stream, plain_caption(scene), number, _ENOUGH, **settings) as stream:
            for block in stream:
                blocks.append(block)
                if len(blocks) == _BEFORE:
                    stream.change(plain_caption(other))
                elif len(blocks) == _BEFORE + _AFTER:
                    break
        until.append(blocks_until(blocks[_BEFORE - 1 :], other))
        jumps.append(jump_at_change(blocks, _BEFORE))
        last = np.concatenate(blocks)[-FRAMES:]
        found.verdicts.append(judge_scene(detect_things(last, FPS), other))
        around = np.concatenate(blocks[_BEFORE - 1 : _BEFORE + 2])
        found.sheets.append(contact_sheet(around, count=6, columns=6))
        said = f"{plain_caption(scene)} -> {plain_caption(other)}"
        log(f"{said}: seen after {until[-1]} blocks, jump {jumps[-1]:.2f}")
    found.seconds = (time.perf_counter() - started) / count
    found.metrics = {
        "blocks_median": float(np.median(until)),
        f"within_{WITHIN_BLOCKS}": float(np.mean([n <= WITHIN_BLOCKS for n in until])),
        "jump_median": float(np.median(jumps)),
        f"jump_within_{LARGEST_JUMP}": float(np.mean([jump <= LARGEST_JUMP for jump in jumps])),
    }
    return found


def live_rows(
    make_stream: Streamer,
    counts: tuple[int, int, int, int],
    log: Callable[[str], None],
) -> Iterator[tuple[str, Score]]:
    """Score a student in every way, without guidance; names of rows and what they hold.

    Args:
        make_stream: makes its streams.
        counts: of short streams a row, of long ones, of those that change, and of a long one's
            frames.
        log: told how far it is.
    """
    clips, runs, changes, frames = counts
    off = 1.0
    for steps in STEPS:
        yield (
            f"{steps} step{'s' if steps > 1 else ''}",
            live_clips(make_stream, clips, steps=steps, log=log, guidance_scale=off),
        )
    for name, wording in (("other wordings", drawn_wording), ("other sentences", foreign_caption)):
        yield name, live_clips(make_stream, clips, wording=wording, log=log, guidance_scale=off)
    yield f"{frames} frames", long_runs(make_stream, runs, frames, log=log, guidance_scale=off)
    for name, motion in _CHANGES.items():
        changed = prompt_changes(make_stream, changes, motion=motion, log=log, guidance_scale=off)
        yield name, changed
