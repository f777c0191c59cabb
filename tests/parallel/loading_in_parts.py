"""One of two processes that load a transformer: ``PORT PROCESS FOLDER``; prints a line of JSON.

Of this process: bytes of the transformer's file, bytes that it read of it, bytes of memory that
loading took at its peak, and a hash of the parameters.
"""

import hashlib
import json
import re
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.parallel.loading import PlacementInParts
from skyreels_jax.parallel.placing import gather_parts
from skyreels_jax.parallel.processes import initialize
from skyreels_jax.parallel.transformer import MeshTransformer
from skyreels_jax.weights import engine
from skyreels_jax.weights.components.transformer import TRANSFORMER, stored_transformer
from skyreels_jax.weights.engine import TensorStream, export, parameters
from skyreels_jax.weights.layout import read_layout


def write_folder(folder: Path, config: TransformerConfig) -> None:
    """A transformer of random values, bfloat16, in the original's format."""
    specs = export(
        TRANSFORMER.abstract(config, jnp.bfloat16), TRANSFORMER.rules(config), "original"
    )
    block = np.random.default_rng(0).standard_normal(1 << 20).astype(jnp.bfloat16)
    values = (
        (name, np.roll(np.resize(block, spec.size), number).reshape(spec.shape))
        for number, (name, spec) in enumerate(specs.specs.items())
    )
    TRANSFORMER.write(folder, config, TensorStream(specs.specs, values), format="original")


def anonymous() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def main(port: str, process: str, folder: str) -> None:
    initialize(f"localhost:{port}", 2, int(process))
    stored = stored_transformer(read_layout(Path(folder)))
    devices = MeshTransformer.of("auto", stored.config)
    fill_all, fill_in_pieces = engine.fill_all, engine.fill_in_pieces
    read, over = [], threading.Event()

    def counting(threads, outs):
        outs = list(outs)
        read.extend(out.size for out, _, _ in outs)
        fill_all(threads, outs)

    def counting_pieces(threads, out, values, where):
        read.append(out.size)
        fill_in_pieces(threads, out, values, where)

    engine.fill_all, engine.fill_in_pieces = counting, counting_pieces
    before = anonymous()
    peaks = [before]

    def watch() -> None:
        while not over.wait(0.01):
            peaks.append(anonymous())

    watching = threading.Thread(target=watch)
    watching.start()
    model = stored.load(jnp.bfloat16, PlacementInParts(devices))
    over.set()
    watching.join()
    digest, size = hashlib.sha256(), 0
    for path, leaf in sorted(parameters(model).items()):
        value = leaf.get_value()
        size += value.size
        if len(sys.argv) < 5:
            digest.update(path.encode() + np.ascontiguousarray(gather_parts(value)).tobytes())
    print("found", json.dumps([2 * size, 2 * sum(read), max(peaks) - before, digest.hexdigest()]))


if __name__ == "__main__":
    main(*sys.argv[1:4])
