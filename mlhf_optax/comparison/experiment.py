"""What the comparisons on image tasks share: running all contenders, and reporting."""

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mlhf_optax.comparison.comparison import Contender
from mlhf_optax.comparison.epoch_figures import save_epoch_comparison
from mlhf_optax.comparison.epoch_results import EpochResult
from mlhf_optax.comparison.epochs import Plan, num_parameters, train_epochs
from mlhf_optax.comparison.figures import require_matplotlib
from mlhf_optax.comparison.machine import machine_info
from mlhf_optax.comparison.reporting import command_line, write_json
from mlhf_optax.comparison.results import report
from mlhf_optax.comparison.tables import comparison_table, format_loss
from mlhf_optax.comparison.timing import seconds_per_step
from mlhf_optax.comparison.trainings import Program
from mlhf_optax.meta_training import runs_in_sequence
from mlhf_optax.tasks import Task, part_size


class ForeignContender(Contender):
    """Optimizers that are no optax transformations: they bring how steps are taken, and their time."""

    def program(self, task: Task) -> Program:
        """Returns what takes the steps."""
        raise NotImplementedError

    def seconds_per_step(self, task: Task) -> float:
        """Returns how long a step of a single training takes."""
        raise NotImplementedError


_TABLE_EPOCHS = (1, 2, 5, 10, 20, 50, 100, 250)


def run_experiment(
    task: Task,
    contenders: Sequence[Contender],
    options: argparse.Namespace,
    title: str,
    script: str,
    about: Mapping[str, Any] | None = None,
) -> list[EpochResult]:
    """Trains the task with all contenders; prints a table, writes results and figure.

    Args:
      task: what to train.
      contenders: what to train it with.
      options: parsed by :func:`mlhf_optax.comparison.experiment_options.experiment_parser`.
      title: of table and figure.
      script: name of the script in ``benchmarks/``, for the record.
      about: more for the record.

    Returns:
      The results, MLHF's first. They are also in ``results.json`` in the output folder, beside
      ``figure.png``.

    Raises:
      ValueError: as :func:`mlhf_optax.comparison.epochs.train_epochs`, and for unknown families in
        ``options.only``.

    Example:
      See ``benchmarks/first_order_cifar10.py``.
    """
    chosen = _chosen(contenders, options.only)
    require_matplotlib()
    options.output.mkdir(parents=True, exist_ok=True)
    plan = Plan(options.epochs, range(options.seeds), options.output, options.resume, options.group_size)
    results = _train_all(task, chosen, plan)
    seconds = _timed(task, chosen, options.output)
    results = [
        dataclasses.replace(result, seconds_per_step=seconds[contender.names[0]])
        for contender, of_contender in zip(chosen, results, strict=True)
        for result in of_contender
    ]
    length = f"{_count(options.epochs, 'epoch')}, {_count(options.seeds, 'seed')}"
    title = f"{title}: {task.name}, {length}, batch {task.batch_size}"
    _print(results, title)
    content = report(task, results, command_line(script)) | {
        "num_epochs": options.epochs,
        "num_train": part_size(task.data.train),
        "num_parameters": num_parameters(task),
        "batch_size": task.batch_size,
        **(about or {}),
    }
    write_json(options.output / "results.json", content)
    save_epoch_comparison(results, options.output / "figure.png", title)
    return results


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _chosen(contenders: Sequence[Contender], families: Sequence[str] | None) -> list[Contender]:
    known = dict.fromkeys(("mlhf", *(contender.family for contender in contenders)))
    unknown = sorted(set(families or ()) - set(known))
    if unknown:
        raise ValueError(f"--only must be among {', '.join(known)}, got {', '.join(unknown)}")
    return [contender for contender in contenders if contender.family in (families or known)]


def _train_all(task: Task, contenders: Sequence[Contender], plan: Plan) -> list[list[EpochResult]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:4.1f} %  {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    steps_per_epoch = part_size(task.data.train) // task.batch_size
    one = steps_per_epoch * plan.num_epochs * len(plan.seeds)
    results = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=one * sum(len(c.names) for c in contenders), loss="")

        def on_step(steps: int, loss: float | None) -> None:
            progress.advance(bar, steps)
            if loss is not None:
                progress.update(bar, loss=f"loss {format_loss(loss)}")

        done = 0
        for contender in contenders:
            progress.update(bar, description=contender.names[0], completed=done)
            program = contender.program(task) if isinstance(contender, ForeignContender) else None
            results.append(train_epochs(task, contender, plan, on_step, program))
            done += one * len(contender.names)
    return results


def _timed(task: Task, contenders: Sequence[Contender], folder: Path) -> dict[str, float]:
    """Measures what has not been measured on this machine yet, all contenders in turns."""
    path, machine = folder / "seconds_per_step.json", machine_info()
    known = json.loads(path.read_text()) if path.exists() else {}
    seconds = known["seconds"] if known.get("machine") == machine else {}
    if {contender.names[0] for contender in contenders} <= set(seconds):
        return seconds
    foreign = [contender for contender in contenders if isinstance(contender, ForeignContender)]
    first = {
        contender.names[0]: (contender.make_optimizer, {k: v[0] for k, v in contender.stacked.items()})
        for contender in contenders
        if not isinstance(contender, ForeignContender)
    }
    num_steps, repeats = (5, 5) if runs_in_sequence(task) else (25, 9)
    seconds |= seconds_per_step(task, first, num_steps=num_steps, repeats=repeats)
    for contender in foreign:
        if contender.names[0] not in seconds:
            seconds[contender.names[0]] = contender.seconds_per_step(task)
    write_json(path, {"machine": machine, "seconds": seconds})
    return seconds


def _print(results: Sequence[EpochResult], title: str) -> None:
    per_epoch, last = results[0].steps_per_epoch, results[0].steps[-1]
    steps = [per_epoch * e for e in _TABLE_EPOCHS if per_epoch * e in results[0].steps]
    columns = {step: f"{step // per_epoch}" for step in sorted({*steps, last})}
    Console(highlight=False).print(comparison_table(results, title, columns=columns))
    diverged = sum(not math.isfinite(result.train_loss[-1]) for result in results)
    print(f"columns: training loss after so many epochs; {diverged} of {len(results)} settings diverged")


__all__ = ["run_experiment"]
