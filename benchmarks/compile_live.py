"""Bounds of a stream on an accelerator that nobody here has: what a block must compute and move.

``python -m benchmarks.compile --live --target v5e`` compiles the program that makes a block of a
stream, from shapes alone and for one device, and counts what decoding takes; nothing is executed.
Operations and bytes are divided by the rates of makers' data sheets: a stream can be no faster than
that, and how near it comes is not known.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.compile import GIB, Place, devices_of, stages_of
from benchmarks.measure import head, row

FRAMES_PER_LATENT = 4
BF16 = 2
COLUMNS = (
    *("program", "attention", "arguments GiB", "peak", "TFLOP", "GB at least"),
    *("s by operations", "s by memory", "of what stands in it, TFLOP", "by its compiler"),
    "compile s",
)


@dataclass(frozen=True)
class Rates:
    """One chip, by its maker.

    Attributes:
        operations: a second, dense products in bfloat16.
        bytes: a second, between the chip and its memory.
    """

    operations: float
    bytes: float


# docs.cloud.google.com/tpu/docs/v5e and v6e; NVIDIA's data sheet of the H100 SXM.
RATES = {
    "v5e": Rates(197e12, 819e9),
    "v6e": Rates(918e12, 1638e9),
    "h100": Rates(989e12, 3352e9),
}


@dataclass(frozen=True)
class BlockWork:
    """What one block of a stream takes, once its window is full. Without guidance.

    Attributes:
        config: of the transformer.
        patches: tokens of a latent frame.
        block: latent frames that are made.
        past: latent frames before them that are seen.
        steps: of denoising.
    """

    config: Any
    patches: int
    block: int
    past: int
    steps: int

    @property
    def kernels(self) -> int:
        """Operations of one layer's attentions: scores and averages.

        ``4 L (L + W) D`` with ``L`` tokens and ``W`` before them, ``4 L T D`` with the prompt's.
        """
        own, past = self.block * self.patches, self.past * self.patches
        return 4 * own * (own + past + self.config.text_len) * self.config.dim

    @property
    def linears(self) -> int:
        """Operations of one layer's linear maps: ``12 L D²``, and ``4 L D H`` in the feed-forward.

        Keys and values of the prompt are made once, not in a block.
        """
        own, width = self.block * self.patches, self.config.dim
        return 12 * own * width**2 + 4 * own * width * self.config.ffn_dim

    @property
    def before(self) -> int:
        """Operations of a call before its layers: patches, and the timestep."""
        config, width = self.config, self.config.dim
        patches = 2 * self.block * self.patches * 4 * config.in_dim * width
        return patches + 2 * width * (config.freq_dim + 7 * width)

    @property
    def after(self) -> int:
        """Operations of a call after its layers; the one that makes keys and values has none."""
        return 2 * self.block * self.patches * 4 * self.config.out_dim * self.config.dim

    @property
    def operations(self) -> int:
        """Of a block: a call for each step, and one for its keys and values."""
        call = self.before + self.config.num_layers * (self.kernels + self.linears)
        return (self.steps + 1) * call + self.steps * self.after

    def standing(self, *, kernels: bool) -> int:
        """The same with each loop taken for one turn, and with or without attention."""
        layer = self.linears + (self.kernels if kernels else 0)
        return 2 * (self.before + layer) + self.after

    def bytes(self, weights: int) -> int:
        """That must be moved at least: weights, the prompt's and the window's keys and values.

        Each call reads them once; the block's own are written once. Activations are not counted.
        """
        config = self.config
        a_token = 2 * config.num_layers * config.dim * BF16
        seen = a_token * (self.past * self.patches + config.text_len)
        return (self.steps + 1) * (weights + seen) + a_token * self.block * self.patches


@dataclass(frozen=True)
class Stream:
    """What is compiled.

    Attributes:
        config: of the transformer.
        schedule: how a block is made.
        window: what it sees.
        size: height and width in pixels.
        attention: name of a path; ``None`` chooses.
    """

    config: Any
    schedule: Any
    window: Any
    size: tuple[int, int]
    attention: str | None = None

    @property
    def work(self) -> BlockWork:
        """Of a block."""
        height, width = self.size
        patches = self.config.patches(height // 8, width // 8)
        past = self.window.slots(self.schedule.block)
        steps = len(self.schedule.timesteps)
        return BlockWork(self.config, patches, self.schedule.block, past, steps)

    def trace(self, device: Any) -> tuple[Any, int]:
        """The program of a block, and the bytes of weights that a call reads."""
        import jax
        import jax.numpy as jnp

        from skyreels_jax.generation.dry_run.compiled import on_devices
        from skyreels_jax.parallel.plan import MeshPlan
        from skyreels_jax.sampling.causal import CausalSampler
        from skyreels_jax.sampling.denoiser import AbstractInputs, Denoiser
        from skyreels_jax.weights.components.transformer import TRANSFORMER

        abstract = TRANSFORMER.abstract(self.config, "bfloat16")
        model, parallelism = on_devices(abstract, MeshPlan(), [device])
        text = jax.ShapeDtypeStruct((1, self.config.text_len, self.config.text_dim), jnp.float32)
        fps = jax.ShapeDtypeStruct((1,), jnp.int32)
        sampler = CausalSampler(
            Denoiser(model, parallelism=parallelism),
            self.schedule,
            self.window,
            latent_size=(self.size[0] // 8, self.size[1] // 8),
            attention=self.attention,
        )
        traced = sampler.trace_block(AbstractInputs(text, None, None, fps))
        return traced, _read_weights(model)


def _read_weights(model: Any) -> int:
    """Bytes of all parameters but those that a prompt's keys and values are made with, once."""
    from flax import nnx

    total = 0
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        once = path[0] == "text_embedding"
        once |= path[:2] == ("blocks", "cross_attn") and path[2] in ("k", "v", "norm_k")
        leaf = variable.get_value()
        total += 0 if once else leaf.size * leaf.dtype.itemsize
    return total


def attention_of(traced: Any) -> str:
    """The paths of the attentions in a program, by the scopes they were traced in."""
    text = str(traced.lower().as_text(debug_info=True))
    paths = ("splash", "cudnn", "chunked", "xla")
    return ", ".join(path for path in paths if f"attention_{path}" in text) or "none"


def compile_block(stream: Stream, device: Any) -> tuple[Any, str, int]:
    """What the compiler says of a block; the attention in it; bytes of weights of a call."""
    from skyreels_jax.generation.dry_run.compiled import compile_traced
    from skyreels_jax.ops.target import compiled_for

    target = target_of(device)
    with compiled_for(target):
        traced, weights = stream.trace(device)
        attention = attention_of(traced)
    return compile_traced(traced, target), attention, weights


def target_of(device: Any) -> Any:
    """What the choices of a program need to know of a described device."""
    from skyreels_jax.ops.target import Device, device_of

    cuda = device.platform in ("cuda", "gpu")
    return Device("cuda", 9.0) if cuda else device_of(device)


def block_row(stream: Stream, device: Any, rates: Rates) -> tuple[float, int]:
    """Print the row of a block: its bound in seconds, and its peak in bytes."""
    found, attention, weights = compile_block(stream, device)
    work = stream.work
    counted = work.standing(kernels=attention not in ("splash", "cudnn"))
    bounds = work.operations / rates.operations, work.bytes(weights) / rates.bytes
    row(
        f"a block of {work.block} latent frames",
        attention,
        *(f"{size / GIB:.2f}" for size in (found.arguments, found.peak)),
        f"{work.operations / 1e12:.1f}",
        f"{work.bytes(weights) / 1e9:.1f}",
        *(f"{bound:.3f}" for bound in bounds),
        *(f"{count / 1e12:.4f}" for count in (counted, found.counted)),
        f"{found.seconds[0]:.0f}",
    )
    return max(bounds), found.peak


def decode_row(stage: Any, place: Place, rates: Rates, *, compiled: bool) -> tuple[float, int]:
    """The row of a latent frame's decoding: its bound in seconds, and bytes that stay in memory.

    At least its arguments are read and its results written, among them what is kept of the frames
    before. That activations pass through memory too is not counted.
    """
    from skyreels_jax.generation.dry_run.compiled import compile_traced
    from skyreels_jax.generation.dry_run.operations import operations
    from skyreels_jax.ops.target import compiled_for

    target = target_of(place.devices[0])
    with compiled_for(target):
        traced = stage.trace(place)
    jaxpr = traced.jaxpr.jaxpr
    read = {variable for equation in jaxpr.eqns for variable in map(id, equation.invars)}
    taken = sum(_size(variable.aval) for variable in jaxpr.invars if id(variable) in read)
    moved = taken + sum(_size(variable.aval) for variable in jaxpr.outvars)
    work = operations(jaxpr)
    bounds = work / rates.operations, moved / rates.bytes
    peak, counted, seconds = "not compiled", "", ""
    if compiled:
        found = compile_traced(traced, target)
        peak, seconds = f"{found.peak / GIB:.2f}", f"{found.seconds[0]:.0f}"
        counted = f"{found.counted / 1e12:.4f}"
    row(
        f"decoding a latent frame, {stage.of}",
        "",
        f"{taken / GIB:.2f}",
        peak,
        f"{work / 1e12:.1f}",
        f"{moved / 1e9:.1f}",
        *(f"{bound:.3f}" for bound in bounds),
        "",
        counted,
        seconds,
    )
    return max(bounds), taken


def _size(array: Any) -> int:
    """Bytes of an abstract array."""
    return array.size * array.dtype.itemsize


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of one target, and its bounds in frames a second."""
    from skyreels_jax.causal_presets import CAUSAL_PRESETS

    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile --live")
    parser.add_argument("--target", default="v5e", choices=RATES)
    parser.add_argument("--preset", default="self-forcing", choices=CAUSAL_PRESETS)
    parser.add_argument("--layers", type=int, help="of so many layers, to try")
    parser.add_argument("--attention", help="path of attention (chosen as a stream would)")
    parser.add_argument("--vae-dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--compile-decoder",
        action="store_true",
        help="too, which takes minutes; else it is counted",
    )
    args = parser.parse_args(arguments)
    preset = CAUSAL_PRESETS[args.preset]
    if preset.is_rolling:
        parser.error(f"{args.preset} rolls: its blocks are not made one at a time")
    devices = devices_of(args.target if args.target == "h100" else f"{args.target}:1x1")

    import jax

    from skyreels_jax.generation.dry_run.meshes import ACCELERATORS, USABLE_SHARE

    jax.config.update("jax_enable_compilation_cache", False)
    config = preset.model.config
    if args.layers:
        config = dataclasses.replace(config, num_layers=args.layers)
    schedule, window = preset.schedule(), preset.attention_window()
    stream = Stream(config, schedule, window, preset.model.resolution, args.attention)
    rates = RATES[args.target]
    height, width = preset.model.resolution
    print(
        f"\nBounds, not measurements: {args.preset} at {height} x {width}, window {window.frames}, "
        f"{len(schedule.timesteps)} steps, {config.num_layers} layers, bfloat16; one {args.target} "
        f"of {rates.operations / 1e12:g} TFLOP/s and {rates.bytes / 1e9:g} GB/s; jax "
        f"{jax.__version__}\n"
    )
    head(*COLUMNS)
    seconds, peak = block_row(stream, devices[0], rates)
    frames = FRAMES_PER_LATENT * schedule.block
    (stage,) = stages_of([preset.base], ["decode"], args.vae_dtype)
    decoding, kept = decode_row(stage, Place(devices), rates, compiled=args.compile_decoder)
    # An accelerator takes one after the other.
    together = seconds + schedule.block * decoding
    peak, memory = peak + kept, ACCELERATORS[args.target].memory
    print(
        f"\nAt most {frames / seconds:.1f} frames a second without decoding, "
        f"{frames / together:.1f} with it; play is {preset.fps}."
    )
    print(
        f"Peak with the decoder's arguments {peak / GIB:.2f} of {memory / GIB:.0f} GiB: "
        f"{'fits' if peak <= USABLE_SHARE * memory else 'does not fit'} in the "
        f"{USABLE_SHARE:.0%} that plans count with."
    )
    sys.stdout.flush()
