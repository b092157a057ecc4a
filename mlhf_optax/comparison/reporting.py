"""Records what was measured, by what command and on what machine."""

import datetime
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlhf_optax.comparison.machine import machine_info, versions
from mlhf_optax.files import write_atomically


def command_line(script: str, arguments: Sequence[str] | None = None) -> str:
    """Returns the command that runs a script of ``benchmarks/``.

    Args:
      script: name of the file.
      arguments: its arguments; those of this process if None.

    Returns:
      A line for a shell.

    Example:
      >>> command_line("step_time.py", ["--quick"])
      'python benchmarks/step_time.py --quick'
    """
    given = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", f"benchmarks/{script}", *given])


def report(command: str, **content: Any) -> dict[str, Any]:
    """Returns measurements with what is needed to judge and repeat them, as plain JSON values.

    Args:
      command: the command line that measured.
      **content: what was measured.

    Returns:
      A dict with ``machine``, ``versions``, ``command``, ``date`` and the content.

    Example:
      >>> sorted(report("python benchmarks/step_time.py", rows=[]))
      ['command', 'date', 'machine', 'rows', 'versions']
    """
    return {
        "machine": machine_info(),
        "versions": versions(),
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **content,
    }


def write_json(path: str | os.PathLike, report: Mapping[str, Any]) -> None:
    """Writes a report; folders that are missing are made, so that no measurement is lost for one.

    Args:
      path: of the file.
      report: plain JSON values.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_json(f"{folder}/new/report.json", {"rows": []})
      ...     print(Path(f"{folder}/new/report.json").read_text().split())
      ['{', '"rows":', '[]', '}']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(report, indent=1).encode() + b"\n")


__all__ = ["command_line", "report", "write_json"]
