"""What a measurement is made on: the machine and the versions, for records, and the memory there is."""

import math
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def machine_info() -> dict[str, str | int]:
    """Describes the machine that this process runs on.

    Returns:
      ``cpu`` (model), ``cores`` (that this process may use), ``backend`` and ``device`` of jax,
      ``num_devices`` and ``platform`` (operating system).

    Example:
      >>> sorted(machine_info())
      ['backend', 'cores', 'cpu', 'device', 'num_devices', 'platform']
    """
    devices = jax.devices()
    return {
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "backend": jax.default_backend(),
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "platform": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python, this package and what it computes with.

    Returns:
      Version strings by package name.

    Example:
      >>> sorted(versions())
      ['flax', 'jax', 'jaxlib', 'mlhf_optax', 'numpy', 'optax', 'python']
    """
    # Imported here, as the package's __init__ may import this module.
    from mlhf_optax import __version__

    own = {"python": platform.python_version(), "mlhf_optax": __version__}
    return own | {package: metadata.version(package) for package in _PACKAGES}


def needed_memory(program: Any) -> int:
    """Returns the bytes that a program takes when it runs: arguments, results and what lies between.

    Args:
      program: a compiled function, ``jax.jit(f).lower(...).compile()``.

    Example:
      >>> needed_memory(jax.jit(lambda x: x + 1).lower(jax.numpy.ones(1000)).compile()) >= 8000
      True
    """
    sizes = program.memory_analysis()
    arrays = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return arrays + sizes.temp_size_in_bytes


def free_memory() -> float:
    """Returns the bytes that may be used on the device that computes, infinite where they cannot be told.

    Example:
      >>> free_memory() > 0
      True
    """
    statistics, meminfo = jax.devices()[0].memory_stats(), Path("/proc/meminfo")
    if statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    if not meminfo.is_file():
        return math.inf
    sizes = dict(line.split(":") for line in meminfo.read_text().splitlines())
    # A system that runs out of memory ends the process, and with it the measurement.
    return 0.8 * 1024 * int(sizes["MemAvailable"].split()[0])


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


__all__ = ["free_memory", "machine_info", "needed_memory", "versions"]
