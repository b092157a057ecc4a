"""What ``mlhf-optax train`` does once its arguments are parsed."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mlhf_optax.comparison import first_order
from mlhf_optax.comparison.comparison import Contender, OnProgress, compare, grid_contenders, mlhf_contender
from mlhf_optax.comparison.figures import require_matplotlib, save_comparison
from mlhf_optax.comparison.machine import machine_info
from mlhf_optax.comparison.results import Result, report
from mlhf_optax.comparison.tables import comparison_table, format_loss
from mlhf_optax.curvature import CurvatureBatch
from mlhf_optax.pretrained import load_pretrained
from mlhf_optax.tasks import Task, check_batch_size, get_task, in_memory, num_examples

FAMILIES = ("mlhf", *first_order.FAMILIES)


class Plan(NamedTuple):
    """A comparison that is ready to run.

    Attributes:
      task: what to train.
      contenders: what to train it with.
      num_seeds: trainings an optimizer.
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
    families: Sequence[str] = FAMILIES,
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
      learning_rate: of MLHF; what the record of the meta-parameters says if None.
      num_cg_steps: of MLHF; what the record says if None.
      curvature_batch_size: of MLHF; what the record says if None, 1.0 for the whole batch.
      num_seeds: trainings an optimizer.
      num_steps: length of every training.
      figure: where the figure goes; a name made of the task's in the current folder if None.
      json_file: where the results go, or None.

    Returns:
      The plan.

    Raises:
      ValueError, TypeError: for arguments that do not fit.
      FileNotFoundError: if there are no such meta-parameters.
      ImportError: if a package for data or figures is missing.

    Example:
      >>> plan = make_plan("digits-mlp", {"hidden": (16,)}, families=["adam"])
      >>> plan.figure.name, len(plan.contenders[0].names)
      ('mlhf-optax-digits-mlp-16.png', 27)
    """
    task = get_task(task_name, **task_options)
    figure = Path(f"mlhf-optax-{task.name}.png") if figure is None else figure
    for path in (figure, json_file):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"the folder of {path} does not exist; make it first")
    require_matplotlib()
    check_batch_size(task)  # also loads the data
    contenders = grid_contenders(task.batch_size, [f for f in first_order.FAMILIES if f in families])
    if "mlhf" in families:
        source = meta_params or task.pretrained
        learned = load_pretrained(source)
        asked = {
            "learning_rate": learning_rate,
            "num_cg_steps": num_cg_steps,
            "curvature_batch_size": curvature_batch_size,
        }
        chosen = learned.recommended | {name: value for name, value in asked.items() if value is not None}
        contenders.insert(0, mlhf_contender(task, learned.meta_params, source=source, **chosen))
    return Plan(task, contenders, num_seeds, num_steps, figure, json_file)


def run_plan(plan: Plan, *, command: str, show_all: bool = False) -> bool:
    """Trains, prints the table, draws the figure and writes the results.

    Args:
      plan: from :func:`make_plan`.
      command: the command line, for the record.
      show_all: print a row for every optimizer.

    Returns:
      False if it was stopped by Ctrl-C; then the table shows what was done, and no file is written.

    Example:
      ``mlhf-optax train`` is :func:`make_plan` and this.
    """
    console = Console(highlight=False)
    _print_introduction(console, plan)
    results, is_complete = _train(plan)
    title = f"{plan.task.name}: {_seeds(plan)}, batch {plan.task.batch_size}"
    if results:
        console.print(comparison_table(results, title, show_all=show_all))
        _print_legend(console, plan, show_all)
    if not is_complete:
        console.print("Stopped: neither figure nor file was written.")
        return False
    console.print(f"figure:  {save_comparison(results, plan.figure, title)}", soft_wrap=True, markup=False)
    if plan.json_file is not None:
        plan.json_file.write_text(json.dumps(report(plan.task, results, command), indent=1) + "\n")
        console.print(f"results: {plan.json_file}", soft_wrap=True, markup=False)
    return True


def _train(plan: Plan) -> tuple[list[Result], bool]:
    """Returns the results there are, and whether these are all."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %  {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    done: list[Result] = []
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        try:
            for results in compare(
                plan.task,
                plan.contenders,
                num_seeds=plan.num_seeds,
                num_steps=plan.num_steps,
                on_progress=_progress_reporter(progress, plan),
            ):
                done += results
        except KeyboardInterrupt:
            return done, False
    return done, True


def _progress_reporter(progress: Progress, plan: Plan) -> OnProgress:
    total = plan.num_steps * len(plan.contenders)
    bar = progress.add_task("compiling and timing single steps", total=total, loss="")
    start = {contender.family: plan.num_steps * index for index, contender in enumerate(plan.contenders)}
    shown = math.inf

    def on_progress(family: str, step: int, loss: float | None) -> None:
        nonlocal shown
        shown = shown if loss is None else loss
        completed = start[family] + step
        progress.update(bar, description=family, completed=completed, loss=f"loss {format_loss(shown)}")

    return on_progress


def _seeds(plan: Plan) -> str:
    return "1 seed" if plan.num_seeds == 1 else f"{plan.num_seeds} seeds"


def _print_introduction(console: Console, plan: Plan) -> None:
    parts = []
    for contender in plan.contenders:
        if contender.family == "mlhf":
            rate, source = (contender.hyperparameters[0][key] for key in ("learning_rate", "meta_params"))
            parts.append(f"MLHF (meta-parameters {source}, learning rate {rate:g})")
    grid = sum(len(contender.names) for contender in plan.contenders if contender.family != "mlhf")
    if grid:
        parts.append(f"{grid} settings of first-order optimizers")
    console.print(f"{plan.task.name}: {plan.task.description}", markup=False)
    console.print(
        f"{' and '.join(parts)}, {_seeds(plan)} each, {plan.num_steps} steps of batch "
        f"{plan.task.batch_size}\n",
        markup=False,
    )


def _print_legend(console: Console, plan: Plan, show_all: bool) -> None:
    machine, data = machine_info(), plan.task.data
    part = "the whole training part" if isinstance(data.train, dict) else "a sample of the training part"
    device = machine["cpu"] if machine["backend"] == "cpu" else machine["device"]
    lines = [
        f"Losses in nats, on {part} ({num_examples(in_memory(data.train))} examples), mean over seeds.",
        f"test: accuracy on {num_examples(data.test)} other examples after the last step.",
        f"ms: one step of one training on {device}.",
    ]
    if plan.contenders[0].family == "mlhf" and len(plan.contenders) > 1:
        lines.append(
            "MLHF / that best: below 1x, MLHF has the lower loss. Underlined: the best of the others."
        )
    if not show_all:
        lines.append(
            "Shown of each family: the settings that are its best at some step; --all shows every one."
        )
    console.print("\n".join(lines) + "\n", markup=False)


__all__ = ["FAMILIES", "Plan", "make_plan", "run_plan"]
