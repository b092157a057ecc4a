"""What the comparisons on image tasks share: options, contenders, the run, and its table."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from mlhf_optax.experiments import (
    Comparison,
    Contender,
    compare,
    comparison_table,
    epoch_steps,
    learned_contender,
    save_figure,
)
from mlhf_optax.experiments.figures import require_matplotlib
from mlhf_optax.experiments.progress import comparison_bar
from mlhf_optax.experiments.results import best_at
from mlhf_optax.experiments.scripts import Table
from mlhf_optax.experiments.tables import comparison_rows, format_loss
from mlhf_optax.learned import LEARNED
from mlhf_optax.pretrained import Pretrained, load_pretrained
from mlhf_optax.support.checks import FROM_ONE, check_fields, require
from mlhf_optax.tasks import Dataset, Task, cifar10_convnet

UNTRAINED = "untrained"
_UNTRAINED_RECORD = {"learning_rate": 1.0, "num_cg_steps": 4, "max_update_ratio": 0.25, "batch_size": 128}


@dataclasses.dataclass(frozen=True)
class ExperimentOptions:
    """Options that all comparisons for epochs have."""

    epochs: int = 250
    """Length of every training; the paper's is 250."""
    seeds: int = 3
    """Trainings of every optimizer."""
    batch_size: int = 128
    """Examples per mini-batch."""
    data_dir: Path | None = None
    """Where the data lie; by default $TFDS_DATA_DIR."""
    cache_dir: Path | None = None
    """Where decoded data are kept."""
    meta_params: str | None = None
    """Shipped name or path, or "untrained"; by default those for the task."""
    learning_rate: float | None = None
    """Of the learned optimizer; by default what its record says."""
    momentum: float | None = None
    """Of the learned optimizer; by default what its record says."""
    curvature_share: float = 0.25
    """Also train it with this share of the batch for its curvature; 0 for not."""
    cg_steps: tuple[int, ...] = ()
    """CG steps with that share, one training each; by default what its record says."""
    only: tuple[str, ...] = ()
    """Families of optimizers to train; all by default."""
    group_size: int | None = None
    """Settings that advance together; chosen by the device by default."""
    output: Path = Path("runs/comparison")
    """Folder for all that is written."""
    resume: bool = False
    """Go on from what lies in the folder, also with more seeds."""
    quick: bool = False
    """A narrow network, few examples, 2 epochs and 1 seed: minutes on two cores."""

    def __post_init__(self):
        check_fields(self, FROM_ONE, "epochs", "seeds", "batch_size")
        require(all(count >= 1 for count in self.cg_steps), "cg_steps", "at least 1", self.cg_steps)

    def shortened(self, **more: Any) -> Any:
        """Returns the options of a quick run if ``quick`` is set, with more changes."""
        return dataclasses.replace(self, epochs=2, seeds=1, **more) if self.quick else self


def find_meta_params(task: Task, name_or_path: str | None) -> tuple[str, Pretrained]:
    """Returns meta-parameters (``"untrained"``, or if None those for the task), and where they are from."""
    source = name_or_path or task.pretrained
    if source != UNTRAINED:
        return source, load_pretrained(source)
    name, family = next(iter(LEARNED.items()))
    learned = family.learned(family.options())
    assert learned.init is not None  # those of the registry have one
    return source, Pretrained(learned.init(jax.random.key(0), task), {"optimizer": name, **_UNTRAINED_RECORD})


def learned_contenders(task: Task, options: ExperimentOptions) -> list[Contender]:
    """Returns the learned optimizer and, if wanted, cheaper variants of it.

    The first has the whole batch for its curvature; then comes one contender for each of
    ``options.cg_steps`` with ``options.curvature_share`` of it. None if ``options.only`` leaves it out.
    """
    source, learned = find_meta_params(task, options.meta_params)
    if options.only and learned.family.name not in options.only:
        return []
    given = {"learning_rate": options.learning_rate, "momentum": options.momentum}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    found = [learned_contender(task, learned, source=source, **changes, curvature_batch_size=None)]
    share, usual = options.curvature_share, learned.recommended["num_cg_steps"]
    for count in dict.fromkeys(options.cg_steps or (usual,)) if share else ():
        name = f"curvature {share:g}" + (f" CG {count}" if count != usual else "")
        cheaper = {**changes, "curvature_batch_size": share, "num_cg_steps": count}
        found.append(learned_contender(task, learned, name=name, source=source, **cheaper))
    return found


def run_experiment(
    task: Task, contenders: Sequence[Contender], options: ExperimentOptions, title: str, command: str
) -> Comparison:
    """Trains the task with all contenders; prints a table, writes ``results.json`` and ``figure.png``.

    Raises:
      ValueError: as :func:`mlhf_optax.experiments.engine`, and for unknown families in ``options.only``.
    """
    known = dict.fromkeys(contender.family for contender in contenders)
    require({*options.only} <= {*known, *LEARNED}, "only", f"among {', '.join(known)}", options.only)
    require_matplotlib()
    with comparison_bar() as on_progress:
        comparison = compare(
            task,
            [contender for contender in contenders if contender.family in (options.only or known)],
            epoch_steps(task, options.epochs),
            seeds=range(options.seeds),
            folder=options.output,
            resume=options.resume,
            group_size=options.group_size,
            command=command,
            on_progress=on_progress,
        )
    if not comparison.frame.is_empty():
        count = lambda number, noun: f"{number} {noun}" if number == 1 else f"{number} {noun}s"
        length = f"{count(options.epochs, 'epoch')}, {count(options.seeds, 'seed')}"
        title = f"{title}: {task.name}, {length}, batch {task.batch_size}"
        Console(highlight=False).print(comparison_table(comparison, title, unit="epoch"))
    if comparison.is_complete:
        comparison.save(options.output / "results.json")
        save_figure(comparison, options.output / "figure.png", title, unit="epoch")
    else:
        print("Stopped: --resume goes on from here; results and figure come at the end.")
    return comparison


def by_step(found: Comparison) -> Table:
    """Returns losses by step, as of ``mlhf-optax train``."""
    note = (
        f"`{found.about['task']}`, mean over {found.curves()[0].seeds} seeds, loss in nats on the whole "
        "training part. For each first-order family we show the setting with the lowest final loss."
    )
    return Table(comparison_rows(found), note, found.about)


def by_epoch(found: Comparison) -> Table:
    """Returns losses by epoch, and against the best of the grid at equal time."""
    record, curves = found.about, found.curves()
    learned, others = ([c for c in curves if c.is_learned == wanted] for wanted in (True, False))
    note = (
        f"`{record['task']}`, {curves[0].steps[-1] // record['steps_per_epoch']} epochs of "
        f"{record['num_train']} images, batch {record['batch_size']}, seeds: {learned[0].seeds} for MLHF, "
        f"{others[0].seeds} for the grid."
    )
    if learned[0].seeds > 1:
        shown = [*learned, best_at(others, others[0].steps[-1])]
        losses = (f"{c.label} {', '.join(map(format_loss, found.last_losses(c.optimizer)))}" for c in shown)
        note += f" The last loss of every seed: {'; '.join(losses)}."
    return Table(comparison_rows(found, "epoch"), note, record)


# Measured by `mlhf-optax train`, which compares with the same grid.
TABLES = {"digits-mlp": lambda folder: by_step(Comparison.load(folder / "digits-mlp.json"))}


def limit_data(task: Task, num_meta_train: int, num_train: int, num_test: int) -> Task:
    """Returns the task with the first examples of every part of its data only."""

    def load() -> Dataset:
        data, first = task.data, lambda part, count: {name: array[:count] for name, array in part.items()}
        parts = ((data.meta_train, num_meta_train), (data.train, num_train), (data.test, num_test))
        return Dataset(*(first(*part) for part in parts))

    return dataclasses.replace(task, load_data=load)


@dataclasses.dataclass(frozen=True)
class ConvnetOptions(ExperimentOptions):
    """Options of a comparison on CUDA-convnet."""

    channels: tuple[int, ...] = (32, 64)
    """Channels of the convolutions; 8 16 is narrow."""
    hidden: tuple[int, ...] = (32,)
    """Widths of the dense layers."""

    def make_task(self, sizes: tuple[int, int, int], **more: Any) -> Task:
        """Returns the task; a quick one is narrow and has parts of ``sizes``."""
        options = self.shortened(channels=(8, 16), hidden=(16,))
        task = cifar10_convnet(
            channels=options.channels,
            hidden=options.hidden,
            batch_size=options.batch_size,
            data_dir=options.data_dir,
            cache_dir=options.cache_dir,
            **more,
        )
        return limit_data(task, *sizes) if self.quick else task
