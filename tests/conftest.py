"""Strictness for tests: shapes and dtypes of every annotated function are checked at run time.

And what keeps the run short and small: workers and the processes that tests start share a folder of
compiled programs, and a module's programs leave memory when it is through.
"""

import atexit
import ctypes
import gc
import os
import shutil
import signal
import tempfile
from importlib.metadata import version
from typing import Any

# PyTorch's threads wait in loops: two on busy cores make small convolutions 40 times as slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before JAX reads them; the workers of a run inherit the folder of the process that starts them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="skyreels-jax-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Most of the time goes into machine code that runs once: `make test` has LLVM optimize little of it
# (a quarter of the time of a test of causal sampling). `make test-all` compiles as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# And XLA emits it the older way, which takes a third to a half of the time of the newer one. JAX
# 0.11 has the newer alone, and ends where a flag is unknown.
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0" and version("jaxlib").startswith("0.10."):
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_use_fusion_emitters" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false".strip()

import jax
import jaxtyping
import pytest
import tests.checked
from jax._src import compiler

# A shell's background jobs inherit that Ctrl-C is ignored; tests that send it would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

_C = ctypes.CDLL(None)
OLDER_EMITTERS = "--xla_cpu_use_fusion_emitters=false"

# Before anything of the package is imported: annotations become run-time checks.
jaxtyping.jaxtyped = tests.checked.jaxtyped  # The hook's decorator.
jaxtyping.install_import_hook("skyreels_jax", "tests.checked.on_call")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The `checkpoints` fixture: complete small checkpoint folders.
pytest_plugins = ["tests.fabricate"]


@pytest.fixture(scope="session", autouse=True)
def imported_modules_are_not_searched_for_garbage():
    """A collection takes a third of a second else, and there is one after each module."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def optimized_where_a_module_says_so(request: pytest.FixtureRequest):
    """Modules that are marked `optimized` compile as users do, and so do programs they start."""
    if request.node.get_closest_marker("optimized") is None:
        yield
        return
    # XLA reads its flags once in a process; JAX alone can ask for something else later.
    made, flags = compiler.get_compile_options, os.environ.get("XLA_FLAGS", "").split()

    def as_users_do(*args: Any, env_options_overrides: Any = None, **given: Any) -> Any:
        options = {"xla_cpu_use_fusion_emitters": True, **(env_options_overrides or {})}
        return made(*args, env_options_overrides=options, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        if OLDER_EMITTERS in flags:
            patch.setenv("XLA_FLAGS", " ".join(flag for flag in flags if flag != OLDER_EMITTERS))
            patch.setattr(compiler, "get_compile_options", as_users_do)
        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_leave_memory():
    """A worker would keep the programs of every module to its end: 5 GB."""
    yield
    jax.clear_caches()
    gc.collect()
    # What is free goes back to the system, where the C library has a way to say so.
    if hasattr(_C, "malloc_trim"):
        _C.malloc_trim(0)
