"""What a denoising step takes of an H100's memory, compiled for one without having one.

``python -m benchmarks.gpu_memory --model i2v-14b --weights int8 --offload`` compiles the step that
sampling would run (guidance in one batch of two, cuDNN's attention) from shapes alone and prints
the compiler's own count. It takes JAX's CUDA plugin with its cuDNN and no GPU: nothing is executed,
kernels are not tuned, and what cuDNN asks for at run time is not counted.
"""

import argparse
import os
import time
from typing import Any

GIB = 1 << 30
SIZES = {"540p": (25, 68, 120), "720p": (31, 90, 160)}  # latents of 97 and of 121 frames
# What XLA's compiler must know of an H100 SXM: NVIDIA's data sheet, and CUDA's device properties.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation"
  device_address_bits: 64 pcie_bandwidth: 34359738368 name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def traced_step(args: argparse.Namespace, device: Any) -> tuple[Any, int]:
    """The largest program of a run, and the bytes of its parameters in the device's memory."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax import ShapeDtypeStruct as Abstract
    from jax.sharding import SingleDeviceSharding

    from skyreels_jax.diffusion.frame_schedule import synchronous_schedule
    from skyreels_jax.diffusion.guidance import guidance_of
    from skyreels_jax.diffusion.unipc import flow_sigmas
    from skyreels_jax.models import transformer_config
    from skyreels_jax.models.transformer import WanModel
    from skyreels_jax.ops.target import Device, compiled_for
    from skyreels_jax.sampling.denoiser import AbstractInputs, Denoiser, Sampling
    from skyreels_jax.weights.offload import stays_on_host

    class PinnedHost(SingleDeviceSharding):
        """Memory of the host: a device that is only described lists no kinds of memory."""

        memory_kind = _memory_kind = property(lambda self: "pinned_host")
        __eq__, __hash__ = object.__eq__, object.__hash__

    config = getattr(transformer_config, args.model.upper().replace("-", "_").replace(".", "_"))
    kernels = transformer_config.QUANTIZED_DTYPES.get(args.weights)
    model = nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0), kernel_dtype=kernels))
    resident = 0

    def placed(path: Any, leaf: Abstract) -> Abstract:
        nonlocal resident
        name = ".".join(str(getattr(key, "key", key)) for key in path)
        on_host = args.offload and stays_on_host(name)
        resident += 0 if on_host else leaf.size * leaf.dtype.itemsize
        if not on_host:
            return Abstract(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(device))
        sharding = PinnedHost(device)
        space = {"_memory_space": jax.memory.Space.Host}  # which JAX takes from arrays by itself
        return Abstract(leaf.shape, leaf.dtype, sharding=sharding, **space)

    graph, state = nnx.split(model)
    state = nnx.from_flat_state(
        [(path, leaf.replace(placed(path, leaf.get_value()))) for path, leaf in state.flat_state()]
    )
    shape = SIZES[args.size]
    text = Abstract((1, config.text_len, config.text_dim), jnp.float32)
    image = channels = None
    if config.model_type == "i2v":
        image = Abstract((1, config.image_tokens, config.image_dim), jnp.float32)
        channels = Abstract((1, config.in_dim - 16, *shape), jnp.float32)
    schedule = flow_sigmas(30, 5.0)
    sampling = Sampling(schedule, guidance_of(5.0, batched=not args.sequential), "cudnn")
    with compiled_for(Device("cuda", 9.0)):
        programs = Denoiser(nnx.merge(graph, state)).programs(
            Abstract((1, 16, *shape), jnp.float32),
            AbstractInputs(text, image, channels, Abstract((1,), jnp.int32)),
            sampling,
            frame_schedule=synchronous_schedule(schedule.timesteps),
        )
    return programs[0][0], resident


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="i2v-14b", help="t2v-1.3b, i2v-1.3b, t2v-14b, i2v-14b")
    parser.add_argument("--size", default="720p", choices=SIZES)
    parser.add_argument("--weights", default="bf16", choices=("bf16", "int8", "fp8"))
    parser.add_argument("--offload", action="store_true", help="blocks' kernels in pinned_host")
    parser.add_argument("--sequential", action="store_true", help="guidance in two calls")
    parser.add_argument("--hlo", help="write the compiled program there")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    traced, resident = traced_step(args, topology.devices[0])
    start = time.perf_counter()
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    if args.hlo:
        with open(args.hlo, "w") as file:
            file.write(compiled.as_text())
    counted = {
        "parameters on the device": resident,
        "arguments": memory.argument_size_in_bytes,
        "arguments on the host": memory.host_argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "temporary on the host": memory.host_temp_size_in_bytes,
        "results not in place": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }
    how = f"{args.weights}{', offload' if args.offload else ''}"
    print(f"{args.model}, {args.size}, {how}: compiled for an H100 in {seconds:.0f} s")
    for name, size in counted.items():
        print(f"  {name:<26}{size / GIB:8.2f} GiB {size / 1e9:8.2f} GB")


if __name__ == "__main__":
    main()
