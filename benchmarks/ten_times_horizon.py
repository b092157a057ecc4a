"""General meta-parameters at ten times the longest training that their meta-training has seen.

Trains held-out tasks for 30,000 steps, where meta-training ends at 3,000, and records the loss on the
training set as it goes, beside Adam at its defaults. A training blows up where its loss is above three times
its lowest until then; losses below a thousandth of the loss before the first step count as that much. It
ends at chance where its last loss is above nine tenths of the loss before the first step.

    python benchmarks/ten_times_horizon.py --data-dir DIR --output runs/ten_times_horizon

What is finished is kept: ``--resume`` goes on after a stop. ``--quick`` takes minutes on two cores.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from experiment import command_line, finite_or_none, parse_options, save_drawing
from held_out_tasks import TASKS, check_tasks

from mlhf_optax import load_pretrained
from mlhf_optax.experiments import compare, default_adam, learned_contender
from mlhf_optax.experiments.origin import with_origin, write_json
from mlhf_optax.experiments.progress import comparison_bar
from mlhf_optax.meta_training.interface import task_loss
from mlhf_optax.tasks import Task

SPIKE = 3.0
"""Times the lowest loss until then, above which a training blows up."""
FLOOR = 1e-3
"""Share of the loss before the first step as which lower losses count."""
CHANCE = 0.9
"""Share of the loss before the first step above which a training ends at chance."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of this script."""

    tasks: tuple[str, ...] = ("digits-mlp", "diabetes", "mnist-mlp", "mnist-groupnorm", "shakespeare-lstm")
    """Which tasks, by default those that are fast to train."""
    meta_params: str = "general"
    """Shipped name or path."""
    steps: int = 30_000
    """Length of every training."""
    records: int = 300
    """How often the loss is recorded."""
    data_dir: Path | None = None
    """Where MNIST and CIFAR-10 lie; by default $TFDS_DATA_DIR."""
    cache_dir: Path | None = None
    """Where decoded data are kept."""
    output: Path = Path("runs/ten_times_horizon")
    """Folder for all that is written."""
    resume: bool = False
    """Go on from what lies in the folder."""
    quick: bool = False
    """300 steps of the digits."""

    def __post_init__(self):
        check_tasks(self.tasks)
        if self.records < 1 or self.steps < self.records:
            raise ValueError(
                f"--records must be at least 1 and at most --steps, got {self.records} and {self.steps}"
            )


def first_loss(task: Task) -> float:
    """Returns the training loss of initial parameters, on up to 1,024 examples."""
    examples = jax.tree.map(lambda leaf: jnp.asarray(leaf[:1024]), task.data.train)
    return float(task_loss(task, task.init_fn(jax.random.key(0)), examples))


def about(losses: Sequence[float], first: float) -> dict[str, Any]:
    """Returns how a training went: its worst rise over its best until then, whether it ended well."""
    bounded = np.maximum(np.where(np.isfinite(losses), losses, np.inf), FLOOR * first)
    rise = float(np.max(bounded / np.minimum.accumulate(bounded)))
    return {
        "last": finite_or_none(losses[-1]),
        "best": finite_or_none(float(np.fmin.reduce(losses))),
        "worst_rise": finite_or_none(rise),
        "blows_up": not rise <= SPIKE,
        "ends_at_chance": not losses[-1] <= CHANCE * first,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, prints a table, writes ``results.json`` and ``figure.png``."""
    options = parse_options(Options, __doc__, arguments)
    if options.quick:
        options = dataclasses.replace(options, tasks=("digits-mlp",), steps=300, records=30)
    steps = np.linspace(0, options.steps, options.records + 1).round().astype(int)[1:].tolist()
    command, rows = command_line(__file__, arguments), []
    print(f"{'task':25s}{'optimizer':16s}{'last loss':>11s}{'lowest':>11s}{'worst rise':>12s}")
    for name in options.tasks:
        task = TASKS[name]((options.data_dir, options.cache_dir))
        mlhf = learned_contender(task, load_pretrained(options.meta_params), source=options.meta_params)
        with comparison_bar() as on_progress:
            found = compare(
                task,
                [mlhf, default_adam()],
                steps,
                seeds=[0],
                folder=options.output / name,
                resume=options.resume,
                timed=False,
                command=command,
                on_progress=on_progress,
            )
        if not found.is_complete:
            print("Stopped: --resume goes on from here; results and figure come at the end.")
            return
        first = first_loss(task)
        for curve in found.curves():
            row = {"task": name, "optimizer": curve.label, "is_learned": curve.is_learned}
            row |= {"first_loss": first, "steps": steps}
            row["losses"] = [finite_or_none(loss) for loss in curve.train_loss]
            rows.append(row | about(curve.train_loss, first))
            print_row(rows[-1])
    content = with_origin(command, rows=rows, spike=SPIKE, floor=FLOOR, chance=CHANCE)
    write_json(options.output / "results.json", content)
    save_drawing(options.output / "figure.png", draw, content)


def print_row(row: dict[str, Any]) -> None:
    """Prints a training."""
    end = "blows up" if row["blows_up"] else ""
    end += " at chance" if row["ends_at_chance"] else ""
    numbers = [row["last"], row["best"], row["worst_rise"]]
    cells = "".join(
        f"{'-' if x is None else format(x, '.3g'):>{w}}" for x, w in zip(numbers, (11, 11, 12), strict=True)
    )
    print(f"{row['task']:25s}{row['optimizer']:16s}{cells}  {end}", flush=True)


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws the loss against steps, an axis per task."""
    tasks = list(dict.fromkeys(row["task"] for row in content["rows"]))
    figure.set_size_inches(9, 2.5 * math.ceil(len(tasks) / 3))
    grid = figure.subplots(math.ceil(len(tasks) / 3), 3, squeeze=False).flat
    for axes in grid[len(tasks) :]:
        axes.set_axis_off()
    for axes, task in zip(grid[: len(tasks)], tasks, strict=True):
        for row in content["rows"]:
            if row["task"] == task:
                losses = [math.nan if loss is None else loss for loss in row["losses"]]
                axes.plot(row["steps"], losses, label=row["optimizer"], linewidth=0.8)
        axes.axvline(3000, color="grey", linewidth=0.8, linestyle=":")
        axes.set(yscale="log", title=task, xlabel="steps", ylabel="training loss")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=7)


if __name__ == "__main__":
    main()
