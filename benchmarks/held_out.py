"""General meta-parameters, never retuned, on networks and data that they never met.

Trains every task with MLHF, and against it the best single constant, Adam at its defaults, and grids of
Adam, SGD with momentum and Muon with three learning rates per decade. A grid counts with its best entry at
every step, so it is tuned for each step anew. Ratios below 1 say that MLHF has the lower training loss.

    python benchmarks/held_out.py --data-dir DIR --output runs/held_out

What is finished is kept: ``--resume`` goes on after a stop. ``--quick`` takes minutes on two cores.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiment import command_line, parse_options, save_drawing
from held_out_tasks import LENGTHS, TASKS

from mlhf_optax import load_pretrained
from mlhf_optax.comparison import (
    Comparison,
    Contender,
    compare,
    constant_contender,
    default_adam,
    grid_contenders,
    learned_contender,
    rates_per_decade,
)
from mlhf_optax.comparison.progress import comparison_bar
from mlhf_optax.comparison.record import record, write_json
from mlhf_optax.comparison.results import Curve, best_at
from mlhf_optax.tasks import Task

STEPS = (10, 30, 100, 300, 1000, 3000)
BEST_CONSTANT = {
    "metric": "kronecker",
    "gradient_decay": 0.86,
    "unit_decay": 0.98,
    "num_cg_steps": 2,
    "curvature_batch_size": 0.25,
}
RATES = {
    "adam": rates_per_decade(1e-4, 1e-1),
    "sgd": rates_per_decade(1e-3, 1.0),
    "muon": rates_per_decade(1e-3, 1e-1),
}
ADAM_OR_SGD = "best Adam or SGD"
RIVALS = ("constant", "default Adam", ADAM_OR_SGD, "best Muon")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of this script."""

    tasks: tuple[str, ...] = ()
    """Which tasks; all by default."""
    meta_params: str = "general"
    """Shipped name or path."""
    steps: int | None = None
    """Length of every training; by default what takes some minutes per task on two cores."""
    seeds: int = 1
    """Trainings of every optimizer."""
    data_dir: Path | None = None
    """Where MNIST and CIFAR-10 lie; by default $TFDS_DATA_DIR."""
    cache_dir: Path | None = None
    """Where decoded data are kept."""
    output: Path = Path("runs/held_out")
    """Folder for all that is written."""
    resume: bool = False
    """Go on from what lies in the folder."""
    quick: bool = False
    """100 steps and one seed of the digits: minutes on two cores."""

    def __post_init__(self):
        if unknown := sorted(set(self.tasks) - set(TASKS)):
            raise ValueError(f"--tasks must be among {', '.join(TASKS)}, got {', '.join(unknown)}")
        for name in ("steps", "seeds"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")


def contenders_for(task: Task, options: Options) -> list[Contender]:
    """Returns MLHF and its rivals."""
    return [
        learned_contender(task, load_pretrained(options.meta_params), source=options.meta_params),
        constant_contender(task, [10.0], **BEST_CONSTANT),
        default_adam(),
        *(grid_contenders([family], rates=rates)[0] for family, rates in RATES.items()),
    ]


def ratios(curves: Sequence[Curve], step: int) -> dict[str, float]:
    """Returns MLHF's loss over that of every rival after a step, means over seeds.

    Losses below 1e-6 count as 1e-6: by then a task is solved.
    """
    own, constant, default, *grid = curves
    best = lambda families: best_at([curve for curve in grid if curve.family in families], step)
    rivals: tuple[Curve, ...] = (constant, default, best(("adam", "sgd")), best(("muon",)))
    floored = lambda curve: max(curve.loss_at(step), 1e-6)
    return dict(zip(RIVALS, (floored(own) / floored(rival) for rival in rivals), strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the tasks, prints a table, writes ``results.json`` and ``figure.png``."""
    options = parse_options(Options, __doc__, arguments)
    if options.quick:
        options = dataclasses.replace(options, tasks=("digits-mlp",), steps=100, seeds=1)
    command, rows = command_line(__file__, arguments), []
    for name in options.tasks or TASKS:
        task = TASKS[name]((options.data_dir, options.cache_dir))
        length = options.steps or LENGTHS[name]
        steps = [step for step in STEPS if step < length] + [length]
        with comparison_bar() as on_progress:
            found = compare(
                task,
                contenders_for(task, options),
                steps,
                seeds=range(options.seeds),
                folder=options.output / name,
                resume=options.resume,
                command=command,
                on_progress=on_progress,
            )
        if not found.is_complete:
            print("Stopped: --resume goes on from here; results and figure come at the end.")
            return
        rows.append(row_of(name, found, steps))
        print_row(rows[-1])
    print_median(rows)
    content = record(command, seeds=options.seeds, rows=rows)
    write_json(options.output / "results.json", content)
    save_drawing(options.output / "figure.png", draw, content)


def row_of(name: str, comparison: Comparison, steps: Sequence[int]) -> dict[str, Any]:
    """Returns what is kept of a task: ratios by step, losses, test accuracy and seconds per step."""
    curves = comparison.curves()
    own, *others = curves
    finite = lambda x: x if x is not None and math.isfinite(x) else None
    adams = [curve.accuracy for curve in others if curve.family == "adam"]
    return {
        "task": name,
        "steps": list(steps),
        "ratios": {step: {k: finite(v) for k, v in ratios(curves, step).items()} for step in steps},
        "losses": [finite(own.loss_at(step)) for step in steps],
        "accuracy": finite(own.accuracy),
        "best_adam_accuracy": finite(max(adams)),
        "seconds_per_step": {curve.optimizer: curve.seconds_per_step for curve in curves},
    }


def print_row(row: dict[str, Any]) -> None:
    """Prints a task: one line per rival."""
    accuracies = [row["accuracy"], row["best_adam_accuracy"]]
    about = "" if None in accuracies else ": accuracy {:.3f}, best Adam {:.3f}".format(*accuracies)
    print(f"\n{row['task']}{about}")
    print(f"{'loss over that of':20s}" + "".join(f"{step:>9}" for step in row["steps"]))
    for rival in RIVALS:
        values = [row["ratios"][step][rival] for step in row["steps"]]
        print(f"{rival:20s}" + "".join(f"{'diverged' if x is None else format(x, '.2f'):>9}" for x in values))
    print(f"{'(loss)':20s}" + "".join(f"{x:9.4f}" if x is not None else f"{'-':>9}" for x in row["losses"]))


def ratios_at(rows: Sequence[dict[str, Any]], step: Any, rival: str) -> list[float]:
    """Returns the ratios of all tasks that are trained so far; infinity where MLHF diverged."""
    found = [row["ratios"][step][rival] for row in rows if step in row["ratios"]]
    return [math.inf if ratio is None else ratio for ratio in found]


def print_median(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the median over tasks of every ratio."""
    steps = sorted({step for row in rows for step in row["steps"] if step in STEPS})
    print("\nmedian over tasks" + "".join(f"{step:>9}" for step in steps))
    for rival in RIVALS:
        medians = [statistics.median(ratios_at(rows, step, rival)) for step in steps]
        print(f"{rival:17s}" + "".join(f"{value:9.2f}" for value in medians), flush=True)
    print(f"{'(tasks)':17s}" + "".join(f"{sum(step in row['steps'] for row in rows):9d}" for step in steps))


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws the ratios, an axis per rival and a line per task."""
    figure.set_size_inches(9, 2.8)
    for axes, rival in zip(figure.subplots(1, len(RIVALS), sharey=True), RIVALS, strict=True):
        for row in content["rows"]:
            ratios_of = [row["ratios"][step][rival] or math.nan for step in row["steps"]]
            axes.plot(row["steps"], ratios_of, marker="o", markersize=3, label=row["task"])
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="steps", title=f"over {rival}")
    figure.axes[0].set_ylabel("loss of MLHF / rival's")
    figure.axes[0].legend(fontsize=7)


if __name__ == "__main__":
    main()
