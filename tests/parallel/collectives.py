"""Which collectives a compiled step has: ``python -m tests.parallel.collectives [MESH]...``.

Started as :mod:`tests.parallel.on_devices` is; each line of JSON is a mesh, and how often each kind
of collective stands in the loop over layers and outside of it, with sizes of what is gathered.
"""

import json
import math
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
from tests.parallel.on_devices import CASES, config_of

from skyreels_jax.diffusion.frame_schedule import synchronous_schedule
from skyreels_jax.diffusion.guidance import guidance_of
from skyreels_jax.diffusion.unipc import flow_sigmas
from skyreels_jax.parallel.transformer import MeshTransformer
from skyreels_jax.sampling.denoiser import AbstractInputs, Denoiser, Sampling
from skyreels_jax.weights.components.transformer import TRANSFORMER

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_LINE = re.compile(rf"= (.*?) ({KINDS})(?:-start)?\(.*op_name=\"([^\"]*)\"")
_SHAPE = re.compile(r"\[([\d,]*)\]")


def compiled(mesh: str) -> jax.stages.Compiled:
    """The step of the case ``t2v`` on a mesh, from shapes alone."""
    case = CASES["t2v"]
    config = config_of(case)
    placed = MeshTransformer.of(mesh, config)
    model = placed.abstract(TRANSFORMER.abstract(config, jnp.float32))
    schedule = flow_sigmas(3, 5.0)
    text = jax.ShapeDtypeStruct((4, config.text_len, config.text_dim), jnp.float32)
    ((program, _),) = Denoiser(model, parallelism=placed).programs(
        jax.ShapeDtypeStruct((4, 16, 3, *case.size), jnp.float32),
        AbstractInputs(text, None, None, None),
        Sampling(schedule, guidance_of(3.0, batched=True)),
        frame_schedule=synchronous_schedule(schedule.timesteps),
    )
    return program.lower().compile()


def counted(module: str) -> dict[str, Any]:
    """By place (``layers`` or ``around``) and kind: how many; values gathered in layers."""
    found = {"layers": {}, "around": {}, "gathered": []}
    for line in module.splitlines():
        if match := _LINE.search(line):
            shape, kind, name = match.groups()
            inside = "while/body" in name
            place = found["layers" if inside else "around"]
            place[kind] = place.get(kind, 0) + 1
            if inside and kind == "all-gather":
                sizes = [math.prod(map(int, x.split(","))) for x in _SHAPE.findall(shape) if x]
                found["gathered"].append(max(sizes))
    return found


def main(meshes: list[str]) -> None:
    for mesh in meshes:
        print(json.dumps([mesh, counted(compiled(mesh).as_text())]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
