"""Writes the numbers of the README from the results in benchmarks/results.

Every file there was written by ``mlhf-optax train --json FILE``. ``digits-mlp.json`` becomes the main
table; every other one a row in the table of networks that meta-training never saw.

    python benchmarks/readme_numbers.py            rewrites the section in README.md
    python benchmarks/readme_numbers.py --check    fails if the section is not up to date
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlhf_optax.results import Result, best_of, table_steps
from mlhf_optax.tables import format_loss

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MAIN = "digits-mlp.json"
BEGIN = "<!-- numbers written by benchmarks/readme_numbers.py -->"
END = "<!-- end of numbers -->"


def read_results(report: dict[str, Any]) -> tuple[Result, list[Result]]:
    """Returns MLHF and the others."""
    results = []
    for entry in report["results"]:
        losses = tuple(math.inf if loss is None else loss for loss in entry["train_loss"])
        results.append(Result(**{**entry, "family": entry["name"].split()[0], "train_loss": losses}))
    (learned,) = (result for result in results if result.name == "mlhf")
    return learned, [result for result in results if result.name != "mlhf"]


def main_table(report: dict[str, Any]) -> list[str]:
    """Returns Markdown lines: MLHF, the best at each step, and the best of each family at the end."""
    learned, others = read_results(report)
    steps = table_steps([learned])
    best = [best_of(others, step).loss_at(step) for step in steps]
    ratios = ratio_cells(learned, others, steps)
    rows = [
        ["training loss after step", *map(str, steps), "test accuracy", "ms a step"],
        ["---", *["---:"] * (len(steps) + 2)],
        [f"**MLHF, learning rate {learned.hyperparameters['learning_rate']:g}**", *cells(learned, steps)],
        [f"best of {len(others)} at that step", *map(format_loss, best), "", ""],
        ["MLHF / that best", *ratios, "", ""],
    ]
    for family in dict.fromkeys(result.family for result in others):
        members = [result for result in others if result.family == family]
        result = best_of(members, steps[-1])
        rows.append([result.name, *cells(result, steps)])
    rows_text = [f"| {' | '.join(row)} |" for row in rows]
    note = (
        f"`{report['task']}`, means over {learned.seeds} seeds on the whole training part, in nats. Of each "
        "first-order family the setting is shown that is its best at the end. "
    )
    return [*rows_text, "", note + origin(report)]


def transfer_table(reports: Sequence[dict[str, Any]]) -> list[str]:
    """Returns Markdown lines: one row a report, the loss of MLHF over that of the best of the grid."""
    steps = table_steps([read_results(reports[0])[0]])
    rows = [
        ["MLHF's loss / best of the grid, after step", *map(str, steps), "test accuracy", "command"],
        ["---", *["---:"] * (len(steps) + 1), "---"],
    ]
    for report in reports:
        learned, others = read_results(report)
        points = 100 * (learned.test_accuracy - max(result.test_accuracy for result in others))
        ratios = ratio_cells(learned, others, steps)
        rows.append([report["task"], *ratios, f"{points:+.1f} points", f"`{report['command']}`"])
    origins = sorted({origin(report, with_command=False) for report in reports})
    return [*(f"| {' | '.join(row)} |" for row in rows), "", *origins]


def cells(result: Result, steps: Sequence[int]) -> list[str]:
    """Returns losses, accuracy and milliseconds of one optimizer."""
    losses = [format_loss(result.loss_at(step)) for step in steps]
    return [*losses, f"{result.test_accuracy:.1%}", f"{1e3 * result.seconds_per_step:.2f}"]


def ratio_cells(learned: Result, others: Sequence[Result], steps: Sequence[int]) -> list[str]:
    """Returns the loss of MLHF as a multiple of the best loss at each step, bold where it wins."""
    ratios = []
    for step in steps:
        own, best = learned.loss_at(step), best_of(others, step).loss_at(step)
        text = f"{own / best:.2f}" if math.isfinite(own) else "diverged"
        ratios.append(f"**{text}**" if own < best else text)
    return ratios


def origin(report: dict[str, Any], with_command: bool = True) -> str:
    """Says where and when the numbers were measured, and by which command."""
    machine, versions = report["machine"], report["versions"]
    device = machine["cpu"] if machine["backend"] == "cpu" else machine["device"]
    command = f"`{report['command']}`; " if with_command else ""
    return (
        f"{command}{device}, {machine['cores']} cores; jax {versions['jax']}, Python {versions['python']}; "
        f"{report['date'][:10]}."
    )


def section(results: Path = RESULTS) -> str:
    """Returns the Markdown between the two marks."""
    reports = {path.name: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    lines = main_table(reports.pop(MAIN))
    if reports:
        lines += ["", *transfer_table(list(reports.values()))]
    return "\n".join([BEGIN, "", *lines, "", END])


def main() -> None:
    """Rewrites or checks the README."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    new = before + section() + rest.split(END)[1]
    if "--check" not in sys.argv[1:]:
        readme.write_text(new, encoding="utf-8")
    elif new != text:
        sys.exit("the numbers in README.md are not those of benchmarks/results; run this without --check")


if __name__ == "__main__":
    main()
