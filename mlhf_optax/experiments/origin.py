"""The origin of a measurement: machine, versions, command and date. And how measurements are written."""

import datetime
import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from mlhf_optax.support.files import write_atomically

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def machine_info() -> dict[str, str | int]:
    """Describes the machine: model of the processor, cores that this process may use, devices of jax."""
    devices = jax.devices()
    has_affinity = hasattr(os, "sched_getaffinity")
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1,
        "backend": jax.default_backend(),
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "platform": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python, this package and what it computes with."""
    from mlhf_optax import __version__

    own = {"python": platform.python_version(), "mlhf_optax": __version__}
    return own | {package: metadata.version(package) for package in _PACKAGES}


def with_origin(command: str, **content: Any) -> dict[str, Any]:
    """Returns content with its origin: what it takes to judge and repeat it, as plain JSON values."""
    return {
        "machine": machine_info(),
        "versions": versions(),
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **content,
    }


def origin_line(content: Mapping[str, Any]) -> str:
    """Says in a line by which command, where and when something was measured, from :func:`with_origin`."""
    machine, version = content["machine"], content["versions"]
    device = machine["cpu"] if machine["backend"] == "cpu" else machine["device"]
    cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    packages = f"jax {version['jax']}, Python {version['python']}"
    return f"`{content['command']}`; {device}, {cores}; {packages}; {content['date'][:10]}."


def write_json(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Writes plain JSON values; missing folders are made, so that no measurement is lost for one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())
