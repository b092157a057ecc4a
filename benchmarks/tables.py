"""Writes the tables of README.md and benchmarks/README.md from the results beside the scripts.

    python benchmarks/tables.py            rewrites the tables
    python benchmarks/tables.py --check    fails if one is stale

A table lies between ``<!-- table NAME -->`` and ``<!-- end NAME -->``. A script says in ``TABLES``, by name,
how its folder of results becomes a :class:`mlhf_optax.experiments.scripts.Table`.
"""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

from mlhf_optax.experiments.scripts import Table

HERE = Path(__file__).resolve().parent
FILES = (HERE.parent / "README.md", HERE / "README.md")


def tables() -> dict[str, Callable[[], Table]]:
    """Returns how each table is made, by name, from all scripts."""
    found = {}
    for script in sorted(HERE.glob("*/*.py")):
        if str(script.parent) not in sys.path:
            sys.path.append(str(script.parent))
        for name, make in getattr(importlib.import_module(script.stem), "TABLES", {}).items():
            found[name] = lambda make=make, folder=script.parent / "results": make(folder)
    return found


def as_today(line: str) -> str:
    """Returns a line with every path under ``benchmarks/`` that moved after it was recorded as it is now."""

    def present(found: re.Match) -> str:
        places = sorted(HERE.rglob(found[1]))
        return places[0].relative_to(HERE.parent).as_posix() if places else found[0]

    return re.sub(r"\bbenchmarks/(?:results/|figures/)?([\w-]+\.(?:py|json|png))", present, line)


def rewritten(text: str, made: dict[str, Callable[[], Table]]) -> str:
    """Returns a text with its tables made anew."""

    def fill(found: re.Match) -> str:
        lines = map(as_today, made[found[1]]().markdown())
        return "\n".join([f"<!-- table {found[1]} -->", "", *lines, "", f"<!-- end {found[1]} -->"])

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end \1 -->", fill, text, flags=re.DOTALL)


def main() -> None:
    """Rewrites or checks the files."""
    made = tables()
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        new = rewritten(text, made)
        if "--check" not in sys.argv[1:]:
            file.write_text(new, encoding="utf-8")
        elif new != text:
            sys.exit(f"the tables in {file} are not those of the results; run {__file__} without --check")


if __name__ == "__main__":
    main()
