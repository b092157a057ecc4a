"""Options of the comparisons on image tasks, which scripts in ``benchmarks/`` add to, and their report."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from mlhf_optax.comparison.contenders import Contender, learned_contender
from mlhf_optax.comparison.engine import compare, epoch_steps
from mlhf_optax.comparison.figures import require_matplotlib, save_figure
from mlhf_optax.comparison.progress import progress_bar
from mlhf_optax.comparison.results import Comparison
from mlhf_optax.comparison.tables import comparison_table
from mlhf_optax.learned import LEARNED
from mlhf_optax.pretrained import load_pretrained
from mlhf_optax.pretrained.files import Pretrained
from mlhf_optax.tasks import Dataset, Task

UNTRAINED = "untrained"
_UNTRAINED_RECORD = {"learning_rate": 1.0, "num_cg_steps": 4, "max_update_ratio": 0.25, "batch_size": 128}


@dataclasses.dataclass(frozen=True)
class ExperimentOptions:
    """Options that all comparisons for epochs have.

    Raises:
      ValueError: if a number is below one.
    """

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
        for name in ("epochs", "seeds", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if any(count < 1 for count in self.cg_steps):
            raise ValueError(f"--cg-steps must be at least 1, got {self.cg_steps}")

    def shortened(self, **more: Any) -> Any:
        """Returns the options of a quick run if ``quick`` is set, with more changes."""
        return dataclasses.replace(self, epochs=2, seeds=1, **more) if self.quick else self


def find_meta_params(task: Task, name_or_path: str | None) -> tuple[str, Pretrained]:
    """Returns meta-parameters for a task, and where they came from.

    Args:
      task: the task.
      name_or_path: a shipped name, a path, ``"untrained"``, or None for those recommended for the task.

    Returns:
      Name or path, and the meta-parameters with their record.

    Raises:
      FileNotFoundError: if there are no such meta-parameters.
    """
    source = name_or_path or task.pretrained
    if source != UNTRAINED:
        return source, load_pretrained(source)
    name, family = next(iter(LEARNED.items()))
    learned = family.learned(family.options())
    assert learned.init is not None  # those of the registry have one
    fresh = learned.init(jax.random.key(0), task)
    return source, Pretrained(fresh, {"optimizer": name, **_UNTRAINED_RECORD})


def learned_contenders(task: Task, options: ExperimentOptions) -> list[Contender]:
    """Returns the learned optimizer and, if wanted, cheaper variants of it.

    Args:
      task: the task.
      options: whose meta-parameters, and which variants.

    Returns:
      The optimizer with the whole batch for its curvature, and one contender for each of
      ``options.cg_steps`` with ``options.curvature_share`` of it; none if ``options.only`` leaves it out.

    Raises:
      FileNotFoundError: if there are no such meta-parameters.
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
    """Trains the task with all contenders; prints a table, writes results and figure.

    Args:
      task: what to train.
      contenders: what to train it with.
      options: how long, and where results go: ``results.json`` and ``figure.png`` in the output folder.
      title: of table and figure.
      command: the command line, for the record.

    Returns:
      The comparison.

    Raises:
      ValueError: as :func:`mlhf_optax.comparison.compare`, and for unknown families in ``options.only``.
    """
    known = dict.fromkeys(contender.family for contender in contenders)
    unknown = sorted(set(options.only) - {*known, *LEARNED})
    if unknown:
        raise ValueError(f"--only must be among {', '.join(known)}, got {', '.join(unknown)}")
    require_matplotlib()
    with progress_bar() as on_progress:
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
        length = f"{_count(options.epochs, 'epoch')}, {_count(options.seeds, 'seed')}"
        title = f"{title}: {task.name}, {length}, batch {task.batch_size}"
        Console(highlight=False).print(comparison_table(comparison, title, unit="epoch"))
    if comparison.is_complete:
        comparison.save(options.output / "results.json")
        save_figure(comparison, options.output / "figure.png", title, unit="epoch")
    else:
        print("Stopped: --resume goes on from here; results and figure come at the end.")
    return comparison


def limit_data(task: Task, num_meta_train: int, num_train: int, num_test: int) -> Task:
    """Returns the task with the first examples of every part of its data only."""

    def load() -> Dataset:
        first = lambda part, count: jax.tree.map(lambda leaf: leaf[:count], part)
        data = task.data
        return Dataset(
            first(data.meta_train, num_meta_train), first(data.train, num_train), first(data.test, num_test)
        )

    return dataclasses.replace(task, load_data=load)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
