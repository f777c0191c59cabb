"""Losses of 50 steps on films in buckets: in parts, on two virtual devices, and with faults.

A program of its own, as :mod:`tests.training.on_meshes` is: a folder, and words such as
``2:data=2`` (parts of a batch, and a mesh or ``-``), each answered by a line of JSON. A third part
of a word is a fault, and stays from there on.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import jax
from tests.training.videos.small_films import make_films, write_recipe

from skyreels_jax.mini.recipe import read_recipe
from skyreels_jax.training.loop import train
from skyreels_jax.training.lora_task import make_video_task
from skyreels_jax.training.objective import Batch
from skyreels_jax.training.videos.clips import Videos

STEPS = 50


def others_captions() -> None:
    """In one of the buckets clips have each other's captions."""
    true = Videos._batch

    def batch(self: Videos, clips, texts):
        return true(self, clips, texts[::-1] if clips[0].bucket.width > 32 else texts)

    Videos._batch = batch


def unsummed() -> None:
    """Gradients of what is whole on every device stay each device's own."""
    jax.lax.psum = lambda x, *_, **__: x


def first_part() -> None:
    """Of a batch in parts the first one is taken for all."""
    true = jax.lax.scan

    def scan(f, init, xs, *rest, **named):
        if isinstance(xs, tuple) and isinstance(xs[0], Batch):
            xs = jax.tree.map(lambda x: x[:1].repeat(x.shape[0], 0), xs)
        return true(f, init, xs, *rest, **named)

    jax.lax.scan = scan


FAULTS: Mapping[str, Callable[[], None]] = {
    f.__name__: f for f in (others_captions, unsummed, first_part)
}


def losses(folder: Path, accumulate: int, mesh: str | None) -> tuple[list[float], list[str]]:
    """The loss of every step, and the shapes of the latents that were seen."""
    recipe = read_recipe(
        write_recipe(
            folder,
            run__steps=str(STEPS),
            run__checkpoint_every=str(STEPS),
            optimizer__name='"adamw"',
            optimizer__learning_rate="3e-3",
            data__batch="4",
            datasets__enable_bucket="true",
            datasets__frame_extraction='"uniform"',
            datasets__frame_sample="2",
        )
    )
    run = replace(recipe.run, accumulate=accumulate, mesh=mesh)
    task = make_video_task(recipe.tables, 0)
    output = folder / f"out-{accumulate}-{mesh}-{len(list(folder.glob('out-*')))}"
    with jax.numpy_rank_promotion("allow"):
        train(task, run, recipe.optimizer, output)
    logged = map(json.loads, (output / "log.jsonl").open())
    shapes = {str(task.batch(index).latents.shape) for index in range(STEPS)}
    return [line["loss"] for line in logged if "loss" in line], sorted(shapes)


def main(folder: Path, words: list[str]) -> None:
    make_films(folder)
    for word in words:
        accumulate, mesh, *faults = word.split(":")
        for fault in faults:
            FAULTS[fault]()
        found = losses(folder, int(accumulate), None if mesh == "-" else mesh)
        print(json.dumps([word, *found]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
