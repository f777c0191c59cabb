"""``skyreels-jax doctor``: versions, devices, memory and caches, to be pasted into a bug report."""

import argparse
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Iterator

from skyreels_jax import hub

PACKAGES = (
    *("skyreels-jax", "jax", "jaxlib", "flax", "numpy", "safetensors", "tokenizers", "av"),
    *("torch", "diffusers", "transformers"),
)


def run(args: argparse.Namespace) -> int:
    """Print the report; always 0."""
    report = dict(collect())
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        width = max(map(len, report))
        for name, value in report.items():
            print(f"{name:<{width}}  {value}")
    return 0


def collect() -> Iterator[tuple[str, str]]:
    """``(name, value)`` pairs; paths appear as they are, tokens and user names do not."""
    import jax

    yield "python", platform.python_version()
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    for package in PACKAGES:
        yield package, version_of(package)
    yield "backend", jax.default_backend()
    for device in jax.devices():
        yield f"device {device.id}", f"{device.device_kind}{device_memory(device)}"
    yield "host memory", host_memory()
    hub.enable_compilation_cache()
    folder = hub.compilation_cache_folder()
    if folder is not None:
        files, size = hub.folder_size(folder)
        yield "compilation cache", f"{folder} ({files} files, {size / 1e6:.1f} MB)"
    yield "cache root", str(hub.cache_root() or "none: there is no home folder")
    yield "video encoder", "libx264 of PyAV"
    yield "ffmpeg", shutil.which("ffmpeg") or "not on the PATH (not needed: PyAV carries its own)"


def version_of(package: str) -> str:
    """The installed version, without importing the package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def device_memory(device: object) -> str:
    """What the device says of its memory, or nothing (the CPU says nothing)."""
    stats = getattr(device, "memory_stats", lambda: None)() or {}
    if "bytes_limit" not in stats:
        return ""
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return f", {stats['bytes_limit'] / 2**30:.1f} GiB usable, {free / 2**30:.1f} free"


def host_memory() -> str:
    """Total and available memory of the machine, as far as the system tells."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        total, free = (int(lines[key].split()[0]) for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return "unknown"
    return f"{total / 2**20:.1f} GiB, {free / 2**20:.1f} available"
