"""Files of JSON lines, one per iteration, that go on where a run does."""

import json
import math
from pathlib import Path
from typing import Any

from mlhf_optax.support.files import write_atomically


def append_json_line(path: Path, values: dict[str, Any]) -> None:
    r"""Appends a line; numbers that are not finite become null.

    Args:
      path: the file; made if it is not there.
      values: plain JSON values.

    Raises:
      OSError: if the line cannot be written, for example on a full disk.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp(), "metrics.jsonl")
      >>> append_json_line(path, {"iteration": 1, "loss": math.nan})
      >>> path.read_text()
      '{"iteration": 1, "loss": null}\n'
    """
    line = json.dumps({name: _json_value(value) for name, value in values.items()})
    try:
        with path.open("a") as file:
            file.write(f"{line}\n")
    except OSError as error:
        raise OSError(error.errno, f"cannot write to {path}: {error.strerror or error}") from error


def rewind_json_lines(path: Path, iteration: int) -> None:
    r"""Moves the lines after an iteration, and what is no whole line, to ``NAME.old``; nothing is lost.

    Args:
      path: the file; made if it is not there.
      iteration: the last one whose line stays.

    Raises:
      OSError: if a file cannot be written.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp(), "metrics.jsonl")
      >>> for i in (1, 2):
      ...     append_json_line(path, {"iteration": i})
      >>> rewind_json_lines(path, 1)
      >>> path.read_text(), path.with_name("metrics.jsonl.old").read_text()
      ('{"iteration": 1}\n', '{"iteration": 2}\n')
    """
    path.touch()
    content = path.read_bytes()
    lines = [line + b"\n" for line in content.splitlines()]
    kept = b"".join(line for line in lines if _is_until(line, iteration))
    moved = b"".join(line for line in lines if not _is_until(line, iteration))
    # First the copy: a kill in between leaves lines in both files, not in none.
    if moved:
        old = path.with_name(f"{path.name}.old")
        write_atomically(old, (old.read_bytes() if old.exists() else b"") + moved)
    if kept != content:
        write_atomically(path, kept)


def _is_until(line: bytes, iteration: int) -> bool:
    try:
        return json.loads(line)["iteration"] <= iteration
    except (ValueError, KeyError, TypeError):
        return False


def _json_value(value: Any) -> Any:
    """The value, with null in the place of numbers that are not finite: JSON has none of them."""
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
