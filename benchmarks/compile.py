"""Every stage of the released checkpoints, compiled for a TPU or an H100 that nobody here has.

``python -m benchmarks.compile --target v5e:1x1`` (extra ``compile``: libtpu, for Linux) compiles,
from shapes alone, the step that sampling would run at each checkpoint's default size, the VAE's
decoding and encoding of a chunk, the text encoder and the image encoder, and prints what the
target's compiler says of each device: bytes, the attention kernels that it found, collectives, and
the time it took. Of a target with several devices (``v5e:2x4``) they are the programs of a mesh of
all. Nothing is executed. ``--target h100`` and ``h100x8`` take JAX's CUDA plugin instead. With
``--live`` it is the program of a stream, and bounds of its speed (:mod:`benchmarks.compile_live`).
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from benchmarks.measure import head, row

GIB = 1 << 30
STAGES = ("step", "decode", "encode", "text", "image")
TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
COLUMNS = (
    *("stage", "of", "arguments GiB", "temporary", "peak", "kernels", "collectives"),
    *("compile s", "processor s"),
)


@dataclass(frozen=True)
class Stage:
    """A program: ``trace`` is called for the target's device and gives what JAX traced."""

    name: str
    of: str
    trace: Callable[["Place"], Any]


@dataclass(frozen=True)
class Place:
    """Where programs lie: the target's devices, all of them in a mesh or the first.

    Attributes:
        devices: of the target.
        mesh: how they are cut for; ``None`` is the first device.
    """

    devices: Sequence[Any]
    mesh: str | None = None

    def plan(self, config: Any) -> Any:
        """The mesh of a transformer."""
        from skyreels_jax.parallel.plan import MeshPlan, choose_plan

        if self.mesh is None:
            return MeshPlan()
        if self.mesh == "auto":
            return choose_plan(len(self.devices), config)[0]
        return MeshPlan.parse(self.mesh)

    def line(self) -> Any:
        """The devices in a line, for VAE and encoders; ``None`` for the first alone."""
        import numpy as np
        from jax.sharding import Mesh

        from skyreels_jax.parallel.encoders import LINE
        from skyreels_jax.parallel.plan import MeshPlan

        if self.mesh is None:
            return None
        count = len(self.devices) if self.mesh == "auto" else MeshPlan.parse(self.mesh).devices
        return Mesh(np.array(self.devices[:count]), (LINE,))

    def __call__(self, leaf: Any, spec: tuple[str | None, ...] = ()) -> Any:
        """An abstract array on the first device, or on all of the line."""
        import jax
        from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

        line = self.line()
        if line is None:
            sharding = SingleDeviceSharding(self.devices[0])
        else:
            sharding = NamedSharding(line, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _placed(model: Any, place: Place) -> tuple[Any, Any]:
    import jax
    from flax import nnx

    from skyreels_jax.parallel.encoders import MeshEncoder

    graph, state = nnx.split(model)
    if (line := place.line()) is not None:
        return graph, MeshEncoder(line).abstract(state)
    return graph, jax.tree.map(place, state)


def stages_of(names: Sequence[str], wanted: Sequence[str], vae_dtype: str) -> Iterator[Stage]:
    """The programs of these presets, each once, whoever shares it."""
    from skyreels_jax.presets import PRESETS

    presets = [PRESETS[name] for name in names]
    if "step" in wanted:
        programs: dict[Any, list[str]] = {}
        for preset in presets:
            key = (preset.config, preset.resolution, preset.num_frames)
            programs.setdefault(key, []).append(preset.name)
        for key, sharers in programs.items():
            yield Stage("step", ", ".join(sharers), _step(*key))
    sizes = sorted({preset.resolution for preset in presets})
    for direction in ("decode", "encode"):
        for height, width in sizes if direction in wanted else ():
            name = f"{height} x {width}, {vae_dtype}"
            yield Stage(direction, name, _vae(direction, height, width, vae_dtype))
    if "text" in wanted:
        yield Stage("text", "UMT5-XXL, 512 tokens", _text)
    if "image" in wanted and any(preset.config.model_type == "i2v" for preset in presets):
        yield Stage("image", "CLIP ViT-H", _image)


def _step(config: Any, resolution: tuple[int, int], frames: int) -> Callable[[Place], Any]:
    def trace(place: Place) -> Any:
        from skyreels_jax.generation.dry_run.compiled import trace_step
        from skyreels_jax.generation.dry_run.meshes import Job

        job = Job(config, frames, *resolution, steps=30)
        return trace_step(job, place.plan(config), place.devices)

    return trace


def _vae(direction: str, height: int, width: int, dtype: str) -> Callable[[Place], Any]:
    def trace(place: Place) -> Any:
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from skyreels_jax.models.vae import WanVae
        from skyreels_jax.models.vae_layers import WAN_VAE
        from skyreels_jax.parallel.encoders import LINE
        from skyreels_jax.parallel.vae import MeshFrames

        vae = nnx.eval_shape(
            lambda: WanVae(WAN_VAE, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
        )
        graph, state = nnx.split(vae)
        state = jax.tree.map(place, state)
        if direction == "decode":
            first = later = (1, WAN_VAE.z_dim, 1, height // 8, width // 8)
        else:
            first, later = ((1, 3, frames, height, width) for frames in (1, 4))

        def chunk(graph: Any, state: Any, x: Any, cache: Any) -> Any:
            vae = nnx.merge(graph, state)
            return (vae.decode_chunk if direction == "decode" else vae.encode_chunk)(x, cache)

        if (line := place.line()) is None:
            program, filling, spec = jax.jit(partial(chunk, graph), donate_argnums=2), 0, ()
        else:
            slab = -(-height // 8 // line.size)
            frames = MeshFrames(line)
            program = frames.program(chunk, graph, slab=slab, count=height // 8)
            filling = slab * line.size - height // 8
            spec = (None, None, None, LINE)
        unit = later[3] // (height // 8)
        first, later = (
            place(jax.ShapeDtypeStruct((*s[:3], s[3] + unit * filling, s[4]), jnp.float32), spec)
            for s in (first, later)
        )
        # The third chunk is the steady one: the second keeps other shapes than the first.
        cache = None
        for x in (first, later):
            cache = jax.eval_shape(program, state, x, cache)[1]
            cache = jax.tree.map(lambda x: place(x, (*[None] * (x.ndim - 3), *spec[3:])), cache)
        return program.trace(state, later, cache)

    return trace


def _text(place: Place) -> Any:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from skyreels_jax.models.umt5 import UMT5_XXL, Umt5Encoder

    graph, state = _placed(nnx.eval_shape(lambda: Umt5Encoder(UMT5_XXL, rngs=nnx.Rngs(0))), place)
    inputs = [place(jax.ShapeDtypeStruct((1, 512), kind)) for kind in (jnp.int32, jnp.bool_)]
    return _encoder(place, graph).trace(state, *inputs)


def _image(place: Place) -> Any:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from skyreels_jax.models.clip_vision import CLIP_VIT_H, ClipVision

    kinds = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model = nnx.eval_shape(lambda: ClipVision(CLIP_VIT_H, rngs=nnx.Rngs(0), **kinds))
    graph, state = _placed(model, place)
    side = CLIP_VIT_H.image_size
    pixels = place(jax.ShapeDtypeStruct((1, 3, side, side), jnp.float32))
    return _encoder(place, graph).trace(state, pixels)


def _encoder(place: Place, graph: Any) -> Any:
    import jax
    from flax import nnx

    from skyreels_jax.parallel.encoders import MeshEncoder

    if (line := place.line()) is not None:
        return jax.jit(partial(MeshEncoder(line).apply, graph))
    return jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs))


def devices_of(target: str) -> list[Any]:
    """Described devices; exits with a line that says what is missing or wrong."""
    kind, _, grid = target.partition(":")
    if kind in TPUS and re.fullmatch(r"\d+x\d+(x\d+)?", grid):
        if find_spec("libtpu") is None:
            sys.exit(f"{target} is compiled for with libtpu: pip install 'skyreels-jax[compile]'")
        from skyreels_jax.generation.dry_run.compiled import described_tpus

        return list(described_tpus(target))
    if gpus := re.fullmatch(r"h100(?:x(\d+))?", target):
        from benchmarks.gpu_memory import H100

        if not any(map(find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
            sys.exit("h100 is compiled for with JAX's CUDA plugin: pip install 'jax[cuda12]'")
        options = {"platform": "cuda", "target_config": H100, "topology": f"1x1x{gpus[1] or 1}"}
    else:
        sys.exit(f"target {target!r}: say h100, or one of {', '.join(TPUS)} with a grid: v5e:1x1")
    os.environ["JAX_PLATFORMS"] = "cpu"

    from jax.experimental import topologies

    return list(topologies.get_topology_desc(**options).devices)


def compile_stage(stage: Stage, place: Place) -> None:
    """Print its row: what the compiler says, or that it does not fit."""
    from skyreels_jax.errors import UnsupportedError
    from skyreels_jax.generation.dry_run.compiled import compile_traced
    from skyreels_jax.ops.target import Device, compiled_for, device_of

    device = place.devices[0]
    cuda = device.platform in ("cuda", "gpu")
    target = Device("cuda", 9.0) if cuda else device_of(device)
    with compiled_for(target):
        traced = stage.trace(place)
    try:
        found = compile_traced(traced, target)
    except UnsupportedError as error:
        row(stage.name, stage.of, str(error))
        return
    kernels, collectives = found.module.kernels.items(), found.module.collectives.items()
    row(
        stage.name,
        stage.of,
        *(f"{size / GIB:.2f}" for size in (found.arguments, found.temporary, found.peak)),
        ", ".join(f"{count} {name}" for name, count in kernels) or "none",
        ", ".join(f"{count} {kind} {size / GIB:.2f}" for kind, (count, size) in collectives)
        or "none",
        *(f"{seconds:.0f}" for seconds in found.seconds),
    )
    sys.stdout.flush()


def main() -> None:
    if "--live" in sys.argv[1:]:
        from benchmarks import compile_live

        compile_live.main([word for word in sys.argv[1:] if word != "--live"])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="v5e:1x1", help="v5e:2x4, v5p:1x1x1, h100x8, …")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="released checkpoints (all)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--vae-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--mesh", help="such as fsdp=2,ulysses=4 (default: auto, of all devices)")
    parser.add_argument("--live", action="store_true", help="a stream's block; see --live --help")
    args = parser.parse_args()
    devices = devices_of(args.target)

    import jax

    from skyreels_jax.presets import PRESETS

    jax.config.update("jax_enable_compilation_cache", False)  # Its hits would be timed as compiles.
    released = [name for name, preset in PRESETS.items() if preset.family != "mini"]
    names = args.models or released
    if unknown := set(names) - set(PRESETS):
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(released)}")
    mesh = args.mesh if args.mesh or len(devices) == 1 else "auto"
    place = Place(devices, mesh)
    print(f"\n{args.target}, jax {jax.__version__}, mesh {mesh or 'of one device'}\n")
    head(*COLUMNS)
    for stage in stages_of(names, args.stages, args.vae_dtype):
        compile_stage(stage, place)


if __name__ == "__main__":
    main()
