"""Files of JSON lines, one an iteration, that go on where a run does."""

import json
import math
from pathlib import Path
from typing import Any

from mlhf_optax.files import write_atomically


class JsonLog:
    """A file of JSON lines; what it holds past a resumed iteration is removed first."""

    def __init__(self, path: Path, iteration: int):
        lines = path.read_text().splitlines(keepends=True) if iteration and path.exists() else []
        kept = [line for line in lines if _iteration_of(line) <= iteration]
        # At once: killed between emptying the file and writing it again, a run would lose its past.
        write_atomically(path, "".join(kept).encode())
        self._file = path.open("a")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, values: dict) -> None:
        """Appends a line; numbers that are not finite become null."""
        self._file.write(json.dumps({name: _json_value(value) for name, value in values.items()}) + "\n")
        self._file.flush()


def _json_value(value: Any) -> Any:
    """The value, with null in the place of numbers that are not finite: JSON has none of them."""
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _iteration_of(line: str) -> float:
    """Number of a line; a line that was cut off belongs to no iteration that is kept."""
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError):
        return float("inf")


__all__ = ["JsonLog"]
