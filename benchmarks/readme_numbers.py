"""Writes the numbers of the README from the results in benchmarks/results.

    python benchmarks/readme_numbers.py            rewrites its sections in README.md
    python benchmarks/readme_numbers.py --check    fails if a section is not up to date

``digits-mlp.json`` is what ``mlhf-optax train --json`` writes; every other file is what the benchmark of
its name writes. A section lies between two comments, ``<!-- NAME written by ... -->`` and
``<!-- end of NAME -->``.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from readme_cifar10 import first_order_section, long_run_section, transfer_section
from readme_markdown import origin, ratio, table
from readme_paper import ablation_section, second_order_section
from readme_speed import speed_section

from mlhf_optax.comparison.results import Result, best_of, table_steps
from mlhf_optax.comparison.tables import format_loss

ROOT = Path(__file__).resolve().parents[1]


def numbers_section(results: Path) -> list[str]:
    """Returns the Markdown lines of the losses on digits, for a folder of results."""
    comparison = json.loads((results / "digits-mlp.json").read_text())
    transfer = json.loads((results / "transfer_digits.json").read_text())
    return [*comparison_table(comparison), "", *transfer_table(transfer)]


SECTIONS = {
    "numbers": numbers_section,
    "first order": first_order_section,
    "second order": second_order_section,
    "ablation": ablation_section,
    "transfer": transfer_section,
    "long run": long_run_section,
    "speed": speed_section,
}


def comparison_table(report: dict[str, Any]) -> list[str]:
    """Returns Markdown lines: MLHF, the best at each step, and the best of each family at the end."""
    learned, others = read_results(report)
    steps = table_steps([learned])
    best = [best_of(others, step).loss_at(step) for step in steps]
    ratios = [ratio(learned.loss_at(step), loss) for step, loss in zip(steps, best, strict=True)]
    accuracy = max(result.test_accuracy for result in others)
    seconds = min(result.seconds_per_step for result in others)
    points = f"{100 * (learned.test_accuracy - accuracy):+.1f} points"
    rows = [
        ["training loss after step", *map(str, steps), "test accuracy", "ms a step"],
        [f"**MLHF, learning rate {learned.hyperparameters['learning_rate']:g}**", *cells(learned, steps)],
        [
            f"best of {len(others)} in that column",
            *map(format_loss, best),
            f"{accuracy:.1%}",
            f"{1e3 * seconds:.2f}",
        ],
        ["MLHF / that best", *ratios, points, f"{learned.seconds_per_step / seconds:.1f}"],
    ]
    for family in dict.fromkeys(result.family for result in others):
        members = [result for result in others if result.family == family]
        result = best_of(members, steps[-1])
        rows.append([result.name, *cells(result, steps)])
    note = (
        f"`{report['task']}`, mean over {learned.seeds} seeds, loss in nats on the whole training part. Of "
        f"each first-order family the setting is shown that is its best at the end. {origin(report)}"
    )
    return [*table(rows), "", note]


def transfer_table(report: dict[str, Any]) -> list[str]:
    """Returns Markdown lines: one row a variant, the loss of MLHF over that of the best of the grid."""
    steps = report["rows"][0]["steps"]
    rows = [["loss of MLHF / best of the grid, after step", *map(str, steps), "test accuracy, points"]]
    for row in report["rows"]:
        pairs = zip(row["mlhf"], row["best_of_grid"], strict=True)
        ratios = [ratio(math.inf if own is None else own, best) for own, best in pairs]
        points = 100 * (row["mlhf_test_accuracy"] - row["best_test_accuracy"])
        rows.append([row["variant"], *ratios, f"{points:+.1f}"])
    seeds = report["rows"][0]["seeds"]
    note = f"The same meta-parameters on networks and batches they never saw, {seeds} seeds. {origin(report)}"
    return [*table(rows), "", note]


def read_results(report: dict[str, Any]) -> tuple[Result, list[Result]]:
    """Returns MLHF and the others."""
    results = []
    for entry in report["results"]:
        losses = tuple(math.inf if loss is None else loss for loss in entry["train_loss"])
        results.append(Result(**{**entry, "family": entry["name"].split()[0], "train_loss": losses}))
    (learned,) = (result for result in results if result.name == "mlhf")
    return learned, [result for result in results if result.name != "mlhf"]


def cells(result: Result, steps: Sequence[int]) -> list[str]:
    """Returns losses, accuracy and milliseconds of one optimizer."""
    losses = [format_loss(result.loss_at(step)) for step in steps]
    return [*losses, f"{result.test_accuracy:.1%}", f"{1e3 * result.seconds_per_step:.2f}"]


def rewritten(text: str, results: Path) -> str:
    """Returns the README with its sections made anew from a folder of results."""
    for name, section in SECTIONS.items():
        begin, end = f"<!-- {name} written by benchmarks/readme_numbers.py -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = before + "\n".join([begin, "", *section(results), "", end]) + rest.split(end)[1]
    return text


def main() -> None:
    """Rewrites or checks the README."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    new = rewritten(text, ROOT / "benchmarks" / "results")
    if "--check" not in sys.argv[1:]:
        readme.write_text(new, encoding="utf-8")
    elif new != text:
        sys.exit("the numbers in README.md are not those of benchmarks/results; run this without --check")


if __name__ == "__main__":
    main()
