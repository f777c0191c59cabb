"""Peak host memory of loading a 1.3B-shaped transformer: float32 files in, bfloat16 parameters out.

``python -m benchmarks.weights_memory`` writes a folder of random weights (5.7 GB of disk, removed
afterwards), loads it in a process of its own and compares that process's peak with the bound that
the loader promises: bytes in the target dtype, plus the largest parameter, plus 1 GiB.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from skyreels_jax.models.transformer_config import I2V_1_3B, TransformerConfig
from skyreels_jax.weights.components.transformer import TRANSFORMER, stored_transformer
from skyreels_jax.weights.engine import TensorStream, export, parameters
from skyreels_jax.weights.layout import read_layout

GIB = 1 << 30


def write_random(folder: Path, config: TransformerConfig) -> None:
    """A folder in the original format, a tensor at a time."""
    model = TRANSFORMER.abstract(config)
    specs = export(model, TRANSFORMER.rules(config), "original").specs
    rng = np.random.default_rng(0)

    def values() -> Iterator[tuple[str, np.ndarray]]:
        for name, spec in specs.items():
            yield name, rng.standard_normal(spec.shape, np.float32)

    TRANSFORMER.write(folder, config, TensorStream(specs, values()), format="original")


def load(folder: Path) -> None:
    """Load in this process and print the peak, its bound and the time."""
    jax.device_put(np.zeros(1)).block_until_ready()  # the runtime itself
    before = _peak()
    start = time.perf_counter()
    stored = stored_transformer(read_layout(folder))
    state = stored.load_state(jnp.bfloat16)
    seconds = time.perf_counter() - start
    sizes = [variable.get_value().nbytes for variable in parameters(state).values()]
    in_files = sum(info.nbytes for info in stored.source.tensors().values())
    bound = sum(sizes) + max(sizes) + GIB
    print(f"files {in_files / GIB:.2f} GiB, parameters {sum(sizes) / GIB:.2f} GiB")
    print(f"largest parameter {max(sizes) / GIB:.2f} GiB, runtime before {before / GIB:.2f} GiB")
    print(f"peak {_peak() / GIB:.2f} GiB of {bound / GIB:.2f} GiB allowed, {seconds:.1f} s")
    sys.exit(_peak() >= bound)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=Path, help="load this folder instead of making one")
    folder = parser.parse_args().load
    if folder is not None:
        load(folder)
    with tempfile.TemporaryDirectory() as made:
        write_random(Path(made), I2V_1_3B)
        command = [sys.executable, "-m", "benchmarks.weights_memory", "--load", made]
        sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
