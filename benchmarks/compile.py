"""Every stage of the released checkpoints, compiled for a TPU or an H100 that nobody here has.

``python -m benchmarks.compile --target v5e:1x1`` (extra ``compile``: libtpu, for Linux) compiles,
from shapes alone, the step that sampling would run at each checkpoint's default size, the VAE's
decoding and encoding of a chunk, the text encoder and the image encoder, and prints what the
target's compiler says: bytes, the attention kernels that it found, collectives, and the time it
took. Nothing is executed. ``--target h100`` takes JAX's CUDA plugin instead.
"""

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
class Module:
    """What the text of a compiled module tells.

    Attributes:
        kernels: how often the program calls each fused attention.
        collectives: how often each kind stands in it, and the bytes of their results, as written:
            a loop's body counts once.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    collectives: dict[str, tuple[int, int]] = field(default_factory=dict)


_COLLECTIVE = re.compile(
    r"= (?P<shape>\S.*?) (?P<kind>all-reduce|all-gather|all-to-all|collective-permute|"
    r"reduce-scatter)(?P<start>-start)?\("
)
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
# By the scope that it was traced in, or by what a custom call is named. An instruction may take
# several lines.
_KERNELS = {
    "splash": re.compile(
        r'custom_call_target="tpu_custom_call"(?:(?!custom_call_target=).)*?'
        r'op_name="[^"]*attention_splash',
        re.DOTALL,
    ),
    "cudnn": re.compile(r'custom_call_target="__cudnn\$fmha'),
}


def read_module(text: str) -> Module:
    """The kernels and collectives in ``text``, which is ``Compiled.as_text()``."""
    counts = {name: len(pattern.findall(text)) for name, pattern in _KERNELS.items()}
    found = Module(Counter({name: count for name, count in counts.items() if count}))
    for line in text.splitlines():
        if match := _COLLECTIVE.search(line):
            sizes = [_bytes(*shape.groups()) for shape in _SHAPE.finditer(match["shape"])]
            # What is started stands with its operands in one tuple: the result is the last but
            # counters, and no smaller than any.
            size = max(sizes) if match["start"] else sum(sizes)
            count, before = found.collectives.get(match["kind"], (0, 0))
            found.collectives[match["kind"]] = count + 1, before + size
    return found


def _bytes(kind: str, bits: str | None, sizes: str) -> int:
    count = 1
    for size in filter(None, sizes.split(",")):
        count *= int(size)
    return count * max(1, int(bits or 8) // 8) if kind != "pred" else count


@dataclass(frozen=True)
class Stage:
    """A program: ``trace`` is called for the target's device and gives what JAX traced."""

    name: str
    of: str
    trace: Callable[["Place"], Any]


# An abstract array, by its shape and dtype, where it will lie. One device here; on a mesh this is
# where shardings come in.
Place = Callable[[Any], Any]


def _placed(model: Any, place: Place) -> tuple[Any, Any]:
    import jax
    from flax import nnx

    graph, state = nnx.split(model)
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
        import jax.numpy as jnp
        from flax import nnx
        from jax import ShapeDtypeStruct as Abstract

        from skyreels_jax.diffusion.frame_schedule import synchronous_schedule
        from skyreels_jax.diffusion.guidance import guidance_of
        from skyreels_jax.diffusion.unipc import flow_sigmas
        from skyreels_jax.models.transformer import WanModel
        from skyreels_jax.sampling.denoiser import AbstractInputs, Denoiser, Sampling

        model = nnx.merge(
            *_placed(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))), place)
        )
        shape = ((frames - 1) // 4 + 1, *(side // 8 for side in resolution))
        image = channels = None
        if config.model_type == "i2v":
            image = Abstract((1, config.image_tokens, config.image_dim), jnp.float32)
            channels = Abstract((1, config.in_dim - 16, *shape), jnp.float32)
        schedule = flow_sigmas(30, 5.0)
        programs = Denoiser(model).programs(
            Abstract((1, 16, *shape), jnp.float32),
            AbstractInputs(
                Abstract((1, config.text_len, config.text_dim), jnp.float32),
                image,
                channels,
                Abstract((1,), jnp.int32),
            ),
            Sampling(schedule, guidance_of(5.0)),
            frame_schedule=synchronous_schedule(schedule.timesteps),
        )
        return programs[0][0]

    return trace


def _vae(direction: str, height: int, width: int, dtype: str) -> Callable[[Place], Any]:
    def trace(place: Place) -> Any:
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from skyreels_jax.models.vae import WanVae
        from skyreels_jax.models.vae_layers import WAN_VAE

        vae = nnx.eval_shape(
            lambda: WanVae(WAN_VAE, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
        )
        graph, state = _placed(vae, place)
        if direction == "decode":
            first = later = (1, WAN_VAE.z_dim, 1, height // 8, width // 8)
        else:
            first, later = ((1, 3, frames, height, width) for frames in (1, 4))

        def chunk(state: Any, x: Any, cache: Any) -> Any:
            vae = nnx.merge(graph, state)
            return (vae.decode_chunk if direction == "decode" else vae.encode_chunk)(x, cache)

        first, later = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (first, later))
        # The third chunk is the steady one: the second keeps other shapes than the first.
        cache = None
        for x in (first, later):
            cache = jax.eval_shape(chunk, state, x, cache)[1]
        cache = jax.tree.map(place, cache)
        return jax.jit(chunk, donate_argnums=2).trace(state, place(later), cache)

    return trace


def _text(place: Place) -> Any:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from skyreels_jax.models.umt5 import UMT5_XXL, Umt5Encoder

    graph, state = _placed(nnx.eval_shape(lambda: Umt5Encoder(UMT5_XXL, rngs=nnx.Rngs(0))), place)
    inputs = [place(jax.ShapeDtypeStruct((1, 512), kind)) for kind in (jnp.int32, jnp.bool_)]
    return jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs)).trace(state, *inputs)


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
    return jax.jit(lambda state, pixels: nnx.merge(graph, state)(pixels)).trace(state, pixels)


def devices_of(target: str) -> list[Any]:
    """Described devices; exits with a line that says what is missing or wrong."""
    kind, _, grid = target.partition(":")
    if kind in TPUS and re.fullmatch(r"\d+x\d+(x\d+)?", grid):
        if find_spec("libtpu") is None:
            sys.exit(f"{target} is compiled for with libtpu: pip install 'skyreels-jax[compile]'")
        # Nothing of a cloud machine is asked for, and several processes may compile at once.
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        options: dict[str, Any] = {"platform": "tpu", "topology_name": target}
        if set(grid) == {"1", "x"}:
            options["chips_per_host_bounds"] = (1, 1, 1)
    elif target == "h100":
        from benchmarks.gpu_memory import H100

        if not any(map(find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
            sys.exit("h100 is compiled for with JAX's CUDA plugin: pip install 'jax[cuda12]'")
        options = {"platform": "cuda", "target_config": H100, "topology": "1x1x1"}
    else:
        sys.exit(f"target {target!r}: say h100, or one of {', '.join(TPUS)} with a grid: v5e:1x1")
    os.environ["JAX_PLATFORMS"] = "cpu"

    from jax.experimental import topologies

    return list(topologies.get_topology_desc(**options).devices)


def compile_stage(stage: Stage, device: Any) -> None:
    """Print its row: what the compiler says, or that it does not fit."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from skyreels_jax.ops.target import Device, compiled_for, device_of

    target = Device("cuda", 9.0) if device.platform in ("cuda", "gpu") else device_of(device)
    sharding = SingleDeviceSharding(device)

    def place(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with compiled_for(target):
        lowered = stage.trace(place).lower()
    start = time.perf_counter(), time.process_time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).partition("RESOURCE_EXHAUSTED: ")[2].partition("\n")[0]
        row(stage.name, stage.of, f"does not fit: {said}")
        return
    seconds, processor = time.perf_counter() - start[0], time.process_time() - start[1]
    memory, module = compiled.memory_analysis(), read_module(compiled.as_text())
    sizes = (
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes,
    )
    row(
        stage.name,
        stage.of,
        *(f"{size / GIB:.2f}" for size in sizes),
        ", ".join(f"{count} {name}" for name, count in module.kernels.items()) or "none",
        ", ".join(
            f"{count} {kind} {size / GIB:.2f}" for kind, (count, size) in module.collectives.items()
        )
        or "none",
        f"{seconds:.0f}",
        f"{processor:.0f}",
    )
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="v5e:1x1", help="v5e:1x1, v6e:1x1, v5p:1x1x1, h100")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="released checkpoints (all)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--vae-dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    devices = devices_of(args.target)

    import jax

    from skyreels_jax.presets import PRESETS

    jax.config.update("jax_enable_compilation_cache", False)  # Its hits would be timed as compiles.
    released = [name for name, preset in PRESETS.items() if preset.family != "mini"]
    names = args.models or released
    if unknown := set(names) - set(PRESETS):
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(released)}")
    if len(devices) > 1:
        print(f"{args.target} has {len(devices)} devices; the programs are those of one")
    print(f"\n{args.target}, jax {jax.__version__}, one device\n")
    head(*COLUMNS)
    for stage in stages_of(names, args.stages, args.vae_dtype):
        compile_stage(stage, devices[0])


if __name__ == "__main__":
    main()
