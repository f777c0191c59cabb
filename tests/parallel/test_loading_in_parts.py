"""Two processes of four devices load a transformer, and neither reads or holds it whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.parallel.loading_in_parts import write_folder
from tests.parallel.test_processes import free_port

from skyreels_jax.models.transformer_config import TransformerConfig

CONFIG = TransformerConfig(
    model_type="t2v", dim=1024, ffn_dim=4096, num_heads=8, num_layers=32, in_dim=16
)


def loaded(folder: Path, *more: str) -> list[list]:
    """What each of two processes says."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    port = str(free_port())
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.parallel.loading_in_parts", port, process),
                *(str(folder), *more),
            ],
            env={**os.environ, **flags},
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in ("0", "1")
    ]
    said = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    return [
        json.loads(next(x[6:] for x in text.splitlines() if x.startswith("found ")))
        for text in said
    ]


@pytest.mark.slow
def test_each_process_reads_and_holds_its_part(tmp_path: Path):
    write_folder(tmp_path / "model", CONFIG)
    found = loaded(tmp_path / "model")
    size = found[0][0]
    assert sum(read for _, read, _, _ in found) <= 1.1 * size
    for _, _, peak, _ in found:
        assert peak <= 0.65 * size
    assert len({digest for *_, digest in found}) == 1
    assert found[0][3] == expected_digest(tmp_path / "model")


def expected_digest(folder: Path) -> str:
    """Of the same parameters, loaded by one process on one device."""
    import hashlib

    import jax.numpy as jnp
    import numpy as np

    from skyreels_jax.weights.components.transformer import stored_transformer
    from skyreels_jax.weights.engine import parameters
    from skyreels_jax.weights.layout import read_layout

    digest = hashlib.sha256()
    model = stored_transformer(read_layout(folder)).load(jnp.bfloat16)
    for path, leaf in sorted(parameters(model).items()):
        digest.update(path.encode() + np.ascontiguousarray(leaf.get_value()).tobytes())
    return digest.hexdigest()
