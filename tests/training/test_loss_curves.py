"""Fifty steps on films in buckets have the losses that they have clip by clip and on a mesh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.training.loss_curves import STEPS

# Largest difference of a loss, of its own size; measured up to 1.8e-7.
TOLERANCE = 2e-6
WHOLE = "1:-"
# Each clip by itself; in parts on two devices; parameters in parts on two devices.
SAME = ("4:-", "2:data=2", "1:fsdp=2")
# Each stays for those after it, which it does not concern; measured 0.5, 0.1, 0.0099.
FAULTS = ("2:-:first_part", "1:data=2:unsummed", "1:-:others_captions")


def curves(folder: Path) -> dict[str, tuple[np.ndarray, list[str]]]:
    """What ``tests.training.loss_curves`` finds on a CPU of two devices."""
    flags = {
        # Quick to compile; both sides of every comparison are compiled alike.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
    }
    words = [WHOLE, *SAME, *FAULTS]
    command = [sys.executable, "-m", "tests.training.loss_curves", str(folder), *words]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {word: (np.asarray(losses), shapes) for word, losses, shapes in found}


@pytest.mark.slow
def test_parts_buckets_and_meshes_leave_the_losses_as_they_are(tmp_path: Path):
    found = curves(tmp_path)
    whole, shapes = found[WHOLE]
    assert len(whole) == STEPS
    assert len(shapes) == 2
    # It learns: a curve that nothing changes would say little.
    assert np.mean(whole[-10:]) < 0.8 * np.mean(whole[:10])
    apart = {word: float(np.max(np.abs(losses / whole - 1))) for word, (losses, _) in found.items()}
    for word in SAME:
        assert apart[word] < TOLERANCE
    for word in FAULTS:
        assert apart[word] > 100 * TOLERANCE
