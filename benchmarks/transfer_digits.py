"""Shipped meta-parameters on networks and batch sizes that they never saw.

Trains variants of ``digits-mlp`` (other widths, depths, activations, batch sizes) with MLHF, unchanged,
and with every entry of the paper's first-order grid (Table 1), and says where MLHF wins and loses. One more
variant keeps the LSTMs' states in bfloat16, half the memory, to show what that costs in quality.

    python benchmarks/transfer_digits.py --json transfer_digits.json --figure transfer_digits.png

``--quick`` takes one variant and few steps. The quality of a batch size is judged at equal steps.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlhf_optax.comparison.comparison import compare, grid_contenders, mlhf_contender
from mlhf_optax.comparison.reporting import command_line, report, write_json
from mlhf_optax.comparison.results import best_of
from mlhf_optax.pretrained import load_pretrained
from mlhf_optax.tasks import digits_mlp

VARIANTS: dict[str, dict[str, Any]] = {
    "as meta-trained": {},
    "width 16": {"hidden": (16,)},
    "width 128": {"hidden": (128,)},
    "2 hidden layers": {"hidden": (32, 32)},
    "3 hidden layers": {"hidden": (32, 32, 32)},
    "tanh": {"activation": "tanh"},
    "sigmoid": {"activation": "sigmoid"},
    "batch 32": {"batch_size": 32},
    "batch 256": {"batch_size": 256},
    "bfloat16 states": {},
}
OPTIONS: dict[str, dict[str, Any]] = {"bfloat16 states": {"carry_dtype": "bfloat16"}}
STEPS = (10, 30, 100, 200, 500)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs every variant, prints the table as it grows, writes JSON and figure."""
    options = _parse(arguments)
    steps = [step for step in STEPS if step <= options.steps]
    rows = []
    print(_header(steps))
    for variant in options.variants:
        rows.append(run_variant(variant, options, steps))
        print(_line(rows[-1], steps), flush=True)
    if options.json:
        write_json(options.json, report(command_line("transfer_digits.py", arguments), rows=rows))
    if options.figure:
        save_figure(rows, steps, options.figure)


def run_variant(variant: str, options: argparse.Namespace, steps: Sequence[int]) -> dict[str, Any]:
    """Trains one variant with MLHF and the grid; returns losses of MLHF and of the best entry."""
    task = digits_mlp(**VARIANTS[variant])
    pretrained = load_pretrained(options.meta_params)
    rate = pretrained.learning_rate if options.learning_rate is None else options.learning_rate
    given = pretrained.recommended | {"learning_rate": rate} | OPTIONS.get(variant, {})
    mlhf = mlhf_contender(task, pretrained.meta_params, **given)
    results = []
    for group in compare(
        task, [mlhf, *grid_contenders(task.batch_size)], num_seeds=options.seeds, num_steps=steps[-1]
    ):
        results += group
    ours, grid = results[0], results[1:]
    return {
        "variant": variant,
        "task": task.name,
        "batch_size": task.batch_size,
        "learning_rate": rate,
        "seeds": options.seeds,
        "steps": list(steps),
        "mlhf": [_finite(ours.loss_at(step)) for step in steps],
        "best_of_grid": [_finite(best_of(grid, step).loss_at(step)) for step in steps],
        "best_entries": [best_of(grid, step).name for step in steps],
        "mlhf_test_accuracy": ours.test_accuracy,
        "best_test_accuracy": max(result.test_accuracy for result in grid),
    }


def save_figure(rows: Sequence[dict[str, Any]], steps: Sequence[int], path: Path) -> None:
    """Draws MLHF's loss over that of the best entry of the grid, a line a variant."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for row in rows:
        ratio = [
            m / b if m and b else math.nan for m, b in zip(row["mlhf"], row["best_of_grid"], strict=True)
        ]
        axes.plot(steps, ratio, marker="o", markersize=3, label=row["variant"])
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="loss of MLHF / best of 45 tuned entries")
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _header(steps: Sequence[int]) -> str:
    return (
        f"{'variant':18s}" + "".join(f"{f'{step} steps':>20s}" for step in steps) + f"{'test accuracy':>18s}"
    )


def _line(row: dict[str, Any], steps: Sequence[int]) -> str:
    show = lambda loss: "diverged" if loss is None else f"{loss:.1e}"
    cells = [f"{show(m)} / {show(b)}" for m, b in zip(row["mlhf"], row["best_of_grid"], strict=True)]
    accuracy = f"{row['mlhf_test_accuracy']:.3f} / {row['best_test_accuracy']:.3f}"
    return f"{row['variant']:18s}" + "".join(f"{cell:>20s}" for cell in cells) + f"{accuracy:>18s}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--meta-params", default="digits", help="shipped name or path")
    parser.add_argument("--learning-rate", type=float, help="of MLHF; what the record says by default")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--quick", action="store_true", help="one variant, 10 steps, 1 seed")
    options = parser.parse_args(arguments)
    if options.quick:
        options.variants, options.steps, options.seeds = ["width 16"], 10, 1
    return options


if __name__ == "__main__":
    main()
