"""What a measurement is kept with: the machine, the versions, the command and the date."""

import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from mlhf_optax.files import write_atomically

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
    """Returns the versions of Python, this package and what it computes with.

    Example:
      >>> sorted(versions())
      ['flax', 'jax', 'jaxlib', 'mlhf_optax', 'numpy', 'optax', 'python']
    """
    from mlhf_optax import __version__

    own = {"python": platform.python_version(), "mlhf_optax": __version__}
    return own | {package: metadata.version(package) for package in _PACKAGES}


def command_line(script: str, arguments: Sequence[str] | None = None) -> str:
    """Returns the shell command that runs a script of ``benchmarks/``.

    Args:
      script: path or name of the file.
      arguments: its arguments; those of this process if None.

    Example:
      >>> command_line("step_time.py", ["--quick"])
      'python benchmarks/step_time.py --quick'
    """
    given = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *given])


def record(command: str, **content: Any) -> dict[str, Any]:
    """Returns content with what is needed to judge and repeat it, as plain JSON values.

    Args:
      command: the command line that measured.
      **content: what was measured.

    Returns:
      A dict with ``machine``, ``versions``, ``command``, ``date`` and the content.

    Example:
      >>> sorted(record("python benchmarks/step_time.py", rows=[]))
      ['command', 'date', 'machine', 'rows', 'versions']
    """
    return {
        "machine": machine_info(),
        "versions": versions(),
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **content,
    }


def origin(record: Mapping[str, Any]) -> str:
    """Says in a line by which command, where and when something was measured.

    Args:
      record: what :func:`record` made.

    Example:
      >>> origin(record("mlhf-optax train")).startswith("`mlhf-optax train`; ")
      True
    """
    machine, version = record["machine"], record["versions"]
    device = machine["cpu"] if machine["backend"] == "cpu" else machine["device"]
    cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    packages = f"jax {version['jax']}, Python {version['python']}"
    return f"`{record['command']}`; {device}, {cores}; {packages}; {record['date'][:10]}."


def write_json(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Writes plain JSON values; missing folders are made, so that no measurement is lost for one.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_json(f"{folder}/new/rows.json", {"rows": []})
      ...     print(Path(f"{folder}/new/rows.json").read_text().split())
      ['{', '"rows":', '[]', '}']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
