"""What ``mlhf-optax train`` does once its arguments are parsed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from mlhf_optax.comparison.contenders import (
    PAPER_FAMILIES,
    Contender,
    grid_contenders,
    is_learned,
    learned_contender,
)
from mlhf_optax.comparison.engine import compare, log_steps
from mlhf_optax.comparison.figures import require_matplotlib, save_figure
from mlhf_optax.comparison.progress import progress_bar
from mlhf_optax.comparison.record import machine_info
from mlhf_optax.comparison.tables import comparison_table
from mlhf_optax.curvature import CurvatureBatch
from mlhf_optax.learned import LEARNED
from mlhf_optax.pretrained import load_pretrained
from mlhf_optax.tasks import Task, check_batch_size, get_task, in_memory, num_examples

FAMILIES = (*LEARNED, *PAPER_FAMILIES)
DEFAULT_FAMILIES = (next(iter(LEARNED)), *PAPER_FAMILIES)


class Plan(NamedTuple):
    """A comparison that is ready to run.

    Attributes:
      task: what to train.
      contenders: what to train it with.
      num_seeds: trainings per optimizer.
      num_steps: length of every training.
      figure: where the figure goes.
      json_file: where the results go, or None.
    """

    task: Task
    contenders: list[Contender]
    num_seeds: int
    num_steps: int
    figure: Path
    json_file: Path | None


def make_plan(
    task_name: str,
    task_options: Mapping[str, Any],
    *,
    families: Sequence[str] = DEFAULT_FAMILIES,
    meta_params: str | None = None,
    learning_rate: float | None = None,
    num_cg_steps: int | None = None,
    curvature_batch_size: CurvatureBatch = None,
    num_seeds: int = 5,
    num_steps: int = 500,
    figure: Path | None = None,
    json_file: Path | None = None,
) -> Plan:
    """Loads and checks everything, so that what can go wrong does so before the long work.

    Args:
      task_name: a key of :data:`mlhf_optax.tasks.TASKS`.
      task_options: arguments of the function registered there.
      families: names of :data:`FAMILIES`.
      meta_params: name or path of meta-parameters; those recommended for the task if None.
      learning_rate: of the learned optimizer; what the record of the meta-parameters says if None.
      num_cg_steps: the same.
      curvature_batch_size: the same; 1.0 for the whole batch.
      num_seeds: trainings per optimizer.
      num_steps: length of every training.
      figure: where the figure goes; a name made of the task's in the current folder if None.
      json_file: where the results go, or None.

    Raises:
      ValueError, TypeError: for arguments that do not fit.
      FileNotFoundError: if there are no such meta-parameters.
      ImportError: if a package for data or figures is missing.
    """
    task = get_task(task_name, **task_options)
    figure = Path(f"mlhf-optax-{task.name}.png") if figure is None else figure
    for path in (figure, json_file):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"the folder of {path} does not exist; make it first")
    require_matplotlib()
    check_batch_size(task)  # also loads the data
    grids = [family for family in PAPER_FAMILIES if family in families]
    contenders = grid_contenders(grids, batch_size=task.batch_size)
    wanted = [family for family in families if is_learned(family)]
    if wanted:
        source = meta_params or task.pretrained
        asked = {
            "learning_rate": learning_rate,
            "num_cg_steps": num_cg_steps,
            "curvature_batch_size": curvature_batch_size,
        }
        chosen = {name: value for name, value in asked.items() if value is not None}
        contender = learned_contender(task, load_pretrained(source), source=source, **chosen)
        missing = sorted(set(wanted) - {contender.family})
        if missing:
            raise ValueError(
                f"`meta_params` {source} are for {contender.family}, not for {', '.join(missing)}"
            )
        contenders.insert(0, contender)
    return Plan(task, contenders, num_seeds, num_steps, figure, json_file)


def run_plan(plan: Plan, *, command: str, show_all: bool = False) -> bool:
    """Trains, prints the table, draws the figure and writes the results.

    Args:
      plan: from :func:`make_plan`.
      command: the command line, for the record.
      show_all: print a row for every optimizer.

    Returns:
      False if it was stopped by Ctrl-C; then the table shows what was done, and no file is written.
    """
    console, steps = Console(highlight=False), log_steps(plan.num_steps)
    _print_introduction(console, plan)
    with progress_bar() as on_progress:
        comparison = compare(
            plan.task,
            plan.contenders,
            steps,
            seeds=range(plan.num_seeds),
            command=command,
            on_progress=on_progress,
        )
    title = f"{plan.task.name}: {_seeds(plan)}, batch {plan.task.batch_size}"
    if not comparison.frame.is_empty():
        console.print(comparison_table(comparison, title, show_all=show_all))
        _print_legend(console, plan, show_all)
    if not comparison.is_complete:
        console.print("Stopped: neither figure nor file was written.")
        return False
    console.print(f"figure:  {save_figure(comparison, plan.figure, title)}", soft_wrap=True, markup=False)
    if plan.json_file is not None:
        comparison.save(plan.json_file)
        console.print(f"results: {plan.json_file}", soft_wrap=True, markup=False)
    return True


def _seeds(plan: Plan) -> str:
    return "1 seed" if plan.num_seeds == 1 else f"{plan.num_seeds} seeds"


def _print_introduction(console: Console, plan: Plan) -> None:
    parts = []
    for contender in (one for one in plan.contenders if is_learned(one.family)):
        rate, source = (contender.settings[0].get(key) for key in ("learning_rate", "meta_params"))
        tuned = "" if rate is None else f", learning rate {rate:g}"
        parts.append(f"{contender.labels[0]} (meta-parameters {source}{tuned})")
    grid = sum(len(one.names) for one in plan.contenders if not is_learned(one.family))
    if grid:
        parts.append(f"{grid} settings of first-order optimizers")
    console.print(f"{plan.task.name}: {plan.task.description}", markup=False)
    length = f"{plan.num_steps} steps of batch {plan.task.batch_size}"
    console.print(f"{' and '.join(parts)}, {_seeds(plan)} each, {length}\n", markup=False)


def _print_legend(console: Console, plan: Plan, show_all: bool) -> None:
    machine, data = machine_info(), plan.task.data
    part = "the whole training part" if isinstance(data.train, dict) else "a sample of the training part"
    device = machine["cpu"] if machine["backend"] == "cpu" else machine["device"]
    lines = [
        f"Losses in nats, on {part} ({num_examples(in_memory(data.train))} examples), mean over seeds.",
        f"test: accuracy on {num_examples(data.test)} other examples after the last step.",
        f"ms: one step of one training on {device}.",
    ]
    first = plan.contenders[0]
    if is_learned(first.family) and len(plan.contenders) > 1:
        lines.append(f"{first.labels[0]} / that best: below 1x, {first.labels[0]} has the lower loss.")
    if not show_all:
        lines.append(
            "Shown of each family: the settings that are its best at some step; --all shows every one."
        )
    console.print("\n".join(lines) + "\n", markup=False)
