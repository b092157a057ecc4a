"""What the sections of the README that are written from results share."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlhf_optax.comparison.epoch_results import EpochResult


def load(results: Path, name: str) -> dict[str, Any] | None:
    """Returns what a benchmark wrote, or None where nobody has run it yet."""
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a Markdown table; the first row is its head."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]


def ratio(own: float, best: float) -> str:
    """Returns one loss as a multiple of another, bold where it is the lower one."""
    if not math.isfinite(own):
        return "diverged"
    # Around one, two digits would say "1" of what is a few percent more or less.
    text = f"{own / best:.2f}" if 0.1 <= own / best < 10 else f"{own / best:.2g}"
    return f"**{text}**" if own < best else text


def epoch_results(report: dict[str, Any]) -> list[EpochResult]:
    """Returns the results of a comparison for epochs; the first word of a name is the family."""
    return [EpochResult.from_json(entry, entry["name"].split()[0]) for entry in report["results"]]


def origin(report: dict[str, Any]) -> str:
    """Says by which command, where and when the numbers were measured."""
    machine, versions = report["machine"], report["versions"]
    device = machine["cpu"] if machine["backend"] == "cpu" else machine["device"]
    cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    return (
        f"`{report['command']}`; {device}, {cores}; jax {versions['jax']}, Python "
        f"{versions['python']}; {report['date'][:10]}."
    )
