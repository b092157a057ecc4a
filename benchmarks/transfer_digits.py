"""Shipped meta-parameters on networks and batch sizes that they never saw.

Trains variants of ``digits-mlp`` (other widths, depths, activations, batch sizes) with MLHF, unchanged,
and with every entry of the paper's first-order grid (Table 1), and says where MLHF wins and loses. One more
variant keeps the LSTMs' states in bfloat16, half the memory, to show what that costs in quality.

    python benchmarks/transfer_digits.py --json transfer_digits.json --figure transfer_digits.png

``--quick`` takes one variant and few steps. The quality of a batch size is judged at equal steps.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from experiment import BenchmarkOptions, command_line, parse_options

from mlhf_optax import load_pretrained
from mlhf_optax.experiments import compare, grid_contenders, learned_contender
from mlhf_optax.experiments.results import best_at
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
CHANGES: dict[str, dict[str, Any]] = {"bfloat16 states": {"carry_dtype": "bfloat16"}}
STEPS = (10, 30, 100, 200, 500)


@dataclasses.dataclass(frozen=True)
class Options(BenchmarkOptions):
    """Options of this script."""

    meta_params: str = "digits"
    """Shipped name or path."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which networks and batches."""
    seeds: int = 5
    """Trainings of every optimizer."""
    steps: int = 500
    """Length of every training."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs every variant, prints the table as it grows, writes JSON and figure."""
    options = parse_options(Options, __doc__, arguments)
    if options.quick:
        options = dataclasses.replace(options, variants=("width 16",), steps=10, seeds=1)
    rows = []
    for variant in options.variants:
        rows.append(row := run_variant(variant, options))
        show = lambda loss: "diverged" if loss is None else f"{loss:.1e}"
        pairs = zip(row["steps"], row["mlhf"], row["best_of_grid"], strict=True)
        losses = "  ".join(f"{step}: {show(own)} / {show(best)}" for step, own, best in pairs)
        accuracy = f"{row['mlhf_test_accuracy']:.3f} / {row['best_test_accuracy']:.3f}"
        print(f"{variant:18s}{losses}  accuracy {accuracy}", flush=True)
    options.save(command_line(__file__, arguments), draw, rows=rows)


def run_variant(variant: str, options: Options) -> dict[str, Any]:
    """Trains one variant with MLHF and the grid; returns losses of MLHF and of the best entry."""
    task, pretrained = digits_mlp(**VARIANTS[variant]), load_pretrained(options.meta_params)
    mine = learned_contender(task, pretrained, **CHANGES.get(variant, {}))
    contenders = [mine, *grid_contenders(batch_size=task.batch_size)]
    steps = [step for step in STEPS if step <= options.steps]
    own, *grid = compare(task, contenders, steps, seeds=range(options.seeds), timed=False).curves()
    finite = lambda loss: loss if math.isfinite(loss) else None
    return {
        "variant": variant,
        "task": task.name,
        "batch_size": task.batch_size,
        "learning_rate": pretrained.learning_rate,
        "seeds": options.seeds,
        "steps": steps,
        "mlhf": [finite(loss) for loss in own.train_loss],
        "best_of_grid": [finite(best_at(grid, step).loss_at(step)) for step in steps],
        "best_entries": [best_at(grid, step).optimizer for step in steps],
        "mlhf_test_accuracy": own.accuracy,
        "best_test_accuracy": max(curve.accuracy for curve in grid),
    }


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws MLHF's loss over that of the best entry of the grid, a line per variant."""
    figure.set_size_inches(7, 4.2)
    axes, steps = figure.subplots(), content["rows"][0]["steps"]
    for row in content["rows"]:
        pairs = zip(row["mlhf"], row["best_of_grid"], strict=True)
        ratio = [own / best if own and best else math.nan for own, best in pairs]
        axes.plot(steps, ratio, marker="o", markersize=3, label=row["variant"])
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="loss of MLHF / best of 45 tuned entries")
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.legend(fontsize=8, ncols=2)


if __name__ == "__main__":
    main()
