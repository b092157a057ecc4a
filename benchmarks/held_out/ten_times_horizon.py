"""General meta-parameters at ten times the longest training that their meta-training has seen.

Trains held-out tasks for 30,000 steps, where meta-training ends at 3,000, and records the loss on the
training set as it goes, beside Adam at its defaults. A training blows up where its loss is above three times
its lowest until then; losses below a thousandth of the loss before the first step count as that much. It
ends at chance where its last loss is above nine tenths of the loss before the first step.

    python benchmarks/held_out/ten_times_horizon.py --data-dir DIR --output runs/ten_times_horizon

What is finished is kept: ``--resume`` goes on after a stop. ``--quick`` takes minutes on two cores.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tasks import TASKS

from mlhf_optax import load_pretrained
from mlhf_optax.experiments import compare, default_adam, learned_contender
from mlhf_optax.experiments.origin import with_origin, write_json
from mlhf_optax.experiments.progress import comparison_bar
from mlhf_optax.experiments.scripts import (
    Table,
    command_line,
    draw_panels,
    finite_or_none,
    parse_options,
    save_drawing,
    saved,
)
from mlhf_optax.experiments.tables import format_loss
from mlhf_optax.meta_training.interface import task_loss
from mlhf_optax.support.checks import check_choice, require
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
        for name in self.tasks:
            check_choice("tasks", name, TASKS)
        require(
            1 <= self.records <= self.steps, "records", f"from 1 to {self.steps}, the steps", self.records
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
    content = with_origin(command, rows=rows, spike=SPIKE, floor=FLOOR, chance=CHANCE)
    print(*table(content).markdown(), sep="\n")
    write_json(options.output / "results.json", content)
    save_drawing(options.output / "figure.png", draw, content)


def table(content: dict[str, Any]) -> Table:
    """Returns a row per task: last loss and worst rise of MLHF, and of Adam at its defaults."""
    rows = [["task", "last loss", "lowest", "worst rise", "Adam's last loss", "lowest", "worst rise"]]
    for task in dict.fromkeys(row["task"] for row in content["rows"]):
        cells = [task]
        for row in (one for one in content["rows"] if one["task"] == task):
            losses = ["-" if row[name] is None else format_loss(row[name]) for name in ("last", "best")]
            rise = "not finite" if row["worst_rise"] is None else f"{row['worst_rise']:.1f}"
            cells += [*losses, rise + " (at chance)" * row["ends_at_chance"]]
        rows.append(cells)
    own = [row for row in content["rows"] if row["is_learned"]]
    note = (
        f"{own[0]['steps'][-1]:,} steps of one training each. The worst rise is the largest ratio of the "
        f"loss to its lowest until then. MLHF's is above {content['spike']:g} on "
        f"{sum(row['blows_up'] for row in own)} of {len(own)}; it ends at chance on "
        f"{sum(row['ends_at_chance'] for row in own)}."
    )
    return Table(rows, note, content)


TABLES = {"ten_times_horizon": lambda folder: table(*saved(folder, "ten_times_horizon"))}


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws the loss against steps, an axis per task."""
    panels: dict[str, dict[str, Any]] = {}
    for row in content["rows"]:
        panels.setdefault(row["task"], {})[row["optimizer"]] = (row["steps"], row["losses"])
    for axes in draw_panels(figure, panels, yscale="log", xlabel="steps", ylabel="training loss"):
        axes.axvline(3000, color="grey", linewidth=0.8, linestyle=":")  # where meta-training ends


if __name__ == "__main__":
    main()
