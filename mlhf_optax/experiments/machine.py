"""What a measurement was made on: the machine and the versions, for records."""

import os
import platform
from importlib import metadata
from pathlib import Path

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


__all__ = ["machine_info", "versions"]
