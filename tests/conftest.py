"""Strictness for tests: shapes and dtypes of every annotated function are checked at run time."""

import os
import signal

# PyTorch's threads wait in loops: two on busy cores make small convolutions 40 times as slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
from jaxtyping import install_import_hook

# A shell's background jobs inherit that Ctrl-C is ignored; tests that send it would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything of the package is imported: annotations become run-time checks.
install_import_hook("skyreels_jax", "beartype.beartype")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The `checkpoints` fixture: complete small checkpoint folders.
pytest_plugins = ["tests.fabricate"]
