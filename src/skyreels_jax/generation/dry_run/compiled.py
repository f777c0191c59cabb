"""What a TPU's compiler says of a denoising step, without a TPU and without weights."""

import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Final

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from skyreels_jax.diffusion.frame_schedule import synchronous_schedule
from skyreels_jax.diffusion.guidance import guidance_of
from skyreels_jax.diffusion.unipc import flow_sigmas
from skyreels_jax.errors import RequestError, UnsupportedError
from skyreels_jax.generation.dry_run.meshes import Job
from skyreels_jax.geometry import latent_shape
from skyreels_jax.memory import kernel_dtype
from skyreels_jax.models.parallelism import SINGLE_DEVICE, Parallelism
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.ops.target import Device, compiled_for, device_of
from skyreels_jax.parallel.plan import MeshPlan
from skyreels_jax.parallel.transformer import MeshTransformer
from skyreels_jax.sampling.denoiser import AbstractInputs, Denoiser, Sampling
from skyreels_jax.weights.components.transformer import TRANSFORMER

# The grid of so many chips of a slice.
_FLAT: Final = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16"}
_CUBES: Final = {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
GRIDS: Final[Mapping[str, Mapping[int, str]]] = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBES}
_SCALE: Final = 5.0  # Of guidance; no number of it is in the program.


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


_COLLECTIVE: Final = re.compile(
    r"= (?P<shape>\S.*?) (?P<kind>all-reduce|all-gather|all-to-all|collective-permute|"
    r"reduce-scatter)(?P<start>-start)?\("
)
_SHAPE: Final = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
# By the scope that it was traced in, or by what a custom call is named. An instruction may take
# several lines.
_KERNELS: Final = {
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
class Compiled:
    """What the compiler says of a program, on each device.

    Attributes:
        arguments: bytes.
        temporary: bytes.
        peak: bytes of both at their most.
        module: what the program calls.
        seconds: that compiling took, and of them the processor's.
        results: bytes of what it returns, buffers that it was given and fills again included.
        counted: floating-point operations by the compiler, which takes each loop for one turn and
            sees nothing of kernels (:mod:`.operations` is what plans are made with).
    """

    arguments: int
    temporary: int
    peak: int
    module: Module
    seconds: tuple[float, float]
    results: int = 0
    counted: float = 0.0


def described_tpus(topology: str) -> Sequence[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
    """Devices of a slice such as ``v5e:2x4``, which nobody needs to have.

    Raises:
        UnsupportedError: libtpu is not installed.
        RequestError: there is no such slice.
    """
    if find_spec("libtpu") is None:
        raise UnsupportedError(
            f"{topology} is compiled for with libtpu: pip install 'skyreels-jax[compile]'"
        )
    # Nothing of a cloud machine is asked for, and several processes may compile at once.
    os.environ.update({"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    # A slice smaller than a host has to say so.
    small = set(topology.partition(":")[2]) == {"1", "x"}
    more = {"chips_per_host_bounds": (1, 1, 1)} if small else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise RequestError(f"{topology} is no slice of TPUs: {error}") from error
    return described.devices


def grid_of(kind: str, devices: int) -> str:
    """The slice of so many TPUs of a kind.

    Raises:
        UnsupportedError: it is no TPU, or there is none of so many.
    """
    grids = GRIDS.get(kind)
    if grids is None:
        raise UnsupportedError(
            f"the compiler is asked for TPUs, {', '.join(GRIDS)}, and not for {kind}"
        )
    if devices not in grids:
        sizes = ", ".join(map(str, grids))
        raise UnsupportedError(f"there is no slice of {devices} {kind}; there are {sizes}")
    return f"{kind}:{grids[devices]}"


def on_devices(
    model: WanModel,
    plan: MeshPlan,
    devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm]
) -> tuple[WanModel, Parallelism]:
    """An abstract model whose parameters are on described devices, and where all else will be."""
    if plan.devices > 1:
        placed = MeshTransformer.of(plan, model.config, devices)
        mapped = placed.abstract(model)
        assert isinstance(mapped, WanModel)
        return mapped, placed
    sharding = SingleDeviceSharding(devices[0])
    graph, state = nnx.split(model)
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )
    return nnx.merge(graph, state), SINGLE_DEVICE


def trace_step(
    job: Job,
    plan: MeshPlan,
    devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm]
) -> jax.stages.Traced:
    """The step that sampling would run, traced from shapes for the first devices."""
    config = job.config
    abstract = TRANSFORMER.abstract(config, "bfloat16", kernel_dtype=kernel_dtype(job.weights))
    model, parallelism = on_devices(abstract, plan, devices)
    shape = latent_shape(job.frames, job.height, job.width)
    image = channels = None
    if config.model_type == "i2v":
        image = jax.ShapeDtypeStruct((1, config.image_tokens, config.image_dim), jnp.float32)
        channels = jax.ShapeDtypeStruct((1, config.in_dim - 16, *shape), jnp.float32)
    text = jax.ShapeDtypeStruct((1, config.text_len, config.text_dim), jnp.float32)
    schedule = flow_sigmas(job.steps, _SCALE)
    with compiled_for(device_of(devices[0])):
        programs = Denoiser(model, parallelism=parallelism).programs(
            jax.ShapeDtypeStruct((1, 16, *shape), jnp.float32),
            AbstractInputs(text, image, channels, jax.ShapeDtypeStruct((1,), jnp.int32)),
            Sampling(schedule, guidance_of(_SCALE if job.guided else 1.0, batched=job.batched)),
            frame_schedule=synchronous_schedule(schedule.timesteps),
        )
    return programs[0][0]


def compile_traced(traced: jax.stages.Traced, device: Device) -> Compiled:
    """Compile a program that was traced for ``device``.

    Raises:
        UnsupportedError: it does not fit; in the compiler's words.
    """
    with compiled_for(device):
        lowered = traced.lower()
    start = time.perf_counter(), time.process_time()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).partition("RESOURCE_EXHAUSTED: ")[2].partition("\n")[0]
        raise UnsupportedError(f"does not fit: {said}") from error
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    memory = program.memory_analysis()
    assert memory is not None
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes,
        read_module(program.as_text() or ""),
        seconds,
        memory.output_size_in_bytes,
        (program.cost_analysis() or {}).get("flops", 0.0),
    )


def compile_step(job: Job, plan: MeshPlan, kind: str) -> Compiled:
    """What the compiler for a kind of TPU says of a step on a mesh.

    Raises:
        UnsupportedError: it cannot be asked, or the step does not fit.
    """
    devices = described_tpus(grid_of(kind, plan.devices))
    return compile_traced(trace_step(job, plan, devices), device_of(devices[0]))
