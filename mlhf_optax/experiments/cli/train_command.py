"""``mlhf-optax train``: trains a task with many optimizers and compares them."""

import dataclasses
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import arg

from mlhf_optax import experiments
from mlhf_optax.experiments.cli.console import STOPPED, errors_explained
from mlhf_optax.experiments.cli.options import DEFAULT_GENERAL, DEFAULT_OPTIMIZER, TaskOptions, joined
from mlhf_optax.experiments.contenders import (
    CONSTANT,
    FAMILIES,
    PAPER_FAMILIES,
    Contender,
    constant_contender,
    grid_contenders,
    learned_contender,
    rates_per_decade,
)
from mlhf_optax.experiments.figures import require_matplotlib
from mlhf_optax.experiments.origin import machine_info
from mlhf_optax.experiments.progress import comparison_bar
from mlhf_optax.learned import LEARNED
from mlhf_optax.pretrained import Pretrained, list_pretrained, load_pretrained
from mlhf_optax.support.checks import FROM_ONE, POSITIVE, check_fields, require
from mlhf_optax.tasks import Task, check_batch_size, get_task, num_examples

_RATES = rates_per_decade(1e-3, 1.0)  # for optimizers that the paper's grid does not have
_SHIPPED = inspect.signature(load_pretrained).parameters["name_or_path"].default
_ARGUMENTS = ("learning_rate", "num_cg_steps", "curvature_batch_size")  # of learned optimizers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(TaskOptions):
    """Train a task with learned and with first-order optimizers, and compare them.

    Prints a table and draws a figure. SGD with momentum, RMSprop and Adam are trained with the grid of the
    MLHF paper: three learning rates and three values of every decay, 45 settings in all.
    """

    seeds: int = 5
    """Trainings of each optimizer; the table and the figure show their mean."""
    steps: int = 500
    """Length of each training, in mini-batches."""
    optimizers: tuple[str, ...] = (DEFAULT_GENERAL, DEFAULT_OPTIMIZER, *PAPER_FAMILIES)
    """Which optimizers to train, separated by commas; `mlhf-optax list` shows their names. gauss_newton is
    the control that learned ones have to beat: the same step, damped by the constants 1, 3 and 10."""
    meta_params: Annotated[tuple[str, ...], arg(metavar="NAME|FILE|OPTIMIZER=FILE")] = ()
    """Meta-parameters of learned optimizers, separated by commas: shipped names or files. By default those
    that ship for the task."""
    learning_rate: float | None = None
    """Learning rate of learned optimizers that take one; by default what the meta-parameters recommend."""
    num_cg_steps: Annotated[int | None, arg(aliases=("--cg-steps",))] = None
    """CG steps per step of learned optimizers that take them; by default as meta-trained."""
    curvature_batch_size: int | float | None = None
    """Examples of the batch for curvature, or a share of it, like 0.25; by default as meta-trained."""
    all: bool = False
    """Show every setting, not only the best."""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write all results to this file."""
    figure: Annotated[Path | None, arg(metavar="FILE")] = None
    """Where the figure goes; by default ./mlhf-optax-TASK.png."""

    def __post_init__(self):
        check_fields(self, FROM_ONE, "seeds", "steps")
        if self.learning_rate is not None:
            check_fields(self, POSITIVE, "learning_rate")
        known = [*LEARNED, *FAMILIES, CONSTANT]
        wanted = f"among {joined(known)}, separated by commas"
        require(set(self.optimizers) <= set(known), "optimizers", wanted, joined(self.optimizers))


def train(options: Train, command: str) -> int:
    """Trains, prints the table, writes results and figure; returns the exit status."""
    with errors_explained(TypeError):
        task = get_task(options.task, **options.task_options())
        figure = options.figure or Path(f"mlhf-optax-{task.name}.png")
        _check_outputs(figure, options.json)
        check_batch_size(task)
        contenders = [*_learned_contenders(task, options), *_other_contenders(task, options.optimizers)]
    console = Console(highlight=False)
    seeds = "1 seed" if options.seeds == 1 else f"{options.seeds} seeds"
    work = f"{seeds} each, {options.steps} steps of batch {task.batch_size}"
    console.print(f"{task.name}: {task.description}\n{_describe(contenders)}, {work}\n", markup=False)
    with comparison_bar() as on_progress, errors_explained():
        result = experiments.compare(
            task,
            contenders,
            experiments.log_steps(options.steps),
            seeds=range(options.seeds),
            command=command,
            on_progress=on_progress,
        )
    title = f"{task.name}: {seeds}, batch {task.batch_size}"
    if not result.frame.is_empty():
        console.print(experiments.comparison_table(result, title, show_all=options.all))
        console.print(_legend(task, contenders, options.all), markup=False)
    if not result.is_complete:
        console.print("Stopped: neither figure nor file was written.")
        return STOPPED
    with errors_explained():
        if options.json is not None:
            result.save(options.json)
            console.print(f"results: {options.json}", soft_wrap=True, markup=False)
        experiments.save_figure(result, figure, title)
        console.print(f"figure:  {figure}", soft_wrap=True, markup=False)
    return 0


def _check_outputs(figure: Path, results: Path | None) -> None:
    """Finds out before the long work whether its results can be written."""
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    if figure.suffix[1:] not in (known := FigureCanvasBase.get_supported_filetypes()):
        raise ValueError(f"`figure` must end in one of {', '.join(known)}, got {figure}")
    for path in filter(None, (figure, results)):
        folder = path.absolute().parent
        if not folder.is_dir():
            raise ValueError(f"the folder of {path} does not exist; make it first")
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file in it")
        if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
            raise ValueError(f"{path} cannot be written; change its permissions or name another file")


def _learned_contenders(task: Task, options: Train) -> list[Contender]:
    wanted = [name for name in options.optimizers if name in LEARNED]
    changes = {name: getattr(options, name) for name in _ARGUMENTS if getattr(options, name) is not None}
    for name in changes:
        if not any(name in LEARNED[family].arguments for family in wanted):
            raise ValueError(f"`{name}` is an argument of no learned optimizer in --optimizers; leave it out")
    found = _given_meta_params(wanted, options.meta_params)
    contenders = []
    for family in wanted:
        source, pretrained = found.get(family) or _shipped_meta_params(task, family)
        own = {name: value for name, value in changes.items() if name in LEARNED[family].arguments}
        contender = learned_contender(task, pretrained, source=source, **own)
        if source == _SHIPPED and not own:
            # So that table and figure say which line a user gets who types this.
            label = f"{contender.labels[0]} = load_pretrained()"
            contender = dataclasses.replace(contender, labels=(label,))
        contenders.append(contender)
    return contenders


def _given_meta_params(wanted: Sequence[str], entries: Sequence[str]) -> dict[str, tuple[str, Pretrained]]:
    """Returns name or path, and meta-parameters, by the learned optimizer that their record names."""
    found = {}
    for entry in entries:
        prefix, equals, rest = entry.partition("=")
        source, allowed = (rest, [prefix]) if equals and prefix in LEARNED else (entry, wanted)
        pretrained = load_pretrained(source)
        name = pretrained.family.name
        if name not in allowed or name not in wanted:
            asked = ", ".join(allowed) or "no learned optimizer"
            raise ValueError(f"{source} holds meta-parameters of {name!r}, but they are asked for {asked}")
        if name in found:
            raise ValueError(f"--meta-params has two sets for {name!r}, {found[name][0]} and {source}")
        found[name] = source, pretrained
    return found


def _shipped_meta_params(task: Task, family: str) -> tuple[str, Pretrained]:
    """Returns the set that is recommended for the task, or any other of the learned optimizer."""
    shipped = {name: record["optimizer"] for name, record in list_pretrained().items()}
    for name in (task.pretrained, *shipped):
        if shipped.get(name) == family:
            return name, load_pretrained(name)
    raise ValueError(
        f"no meta-parameters of {family!r} come with the package; make them with `mlhf-optax meta-train "
        f"--optimizer {family}`, then pass --meta-params FILE"
    )


def _other_contenders(task: Task, names: Sequence[str]) -> list[Contender]:
    paper = [name for name in names if name in PAPER_FAMILIES]
    others = [name for name in names if name in FAMILIES and name not in paper]
    constants = [constant_contender(task)] if CONSTANT in names else []
    grids = grid_contenders(paper, batch_size=task.batch_size)
    return [*constants, *grids, *grid_contenders(others, rates=_RATES)]


def _describe(contenders: Sequence[Contender]) -> str:
    """Returns who competes, in words."""
    parts = []
    for one in contenders:
        if one.family in LEARNED:
            rate = one.settings[0].get("learning_rate")
            rate = "" if rate is None else f", learning rate {rate:g}"
            parts.append(f"{one.labels[0]} (meta-parameters {one.settings[0]['meta_params']}{rate})")
    hand_made = [one for one in contenders if one.family not in LEARNED]
    parts += [f"{len(one.names)} constants of {CONSTANT}" for one in hand_made if one.family == CONSTANT]
    if others := sum(len(one.names) for one in hand_made if one.family != CONSTANT):
        parts.append(f"{others} settings of first-order optimizers")
    return " and ".join(parts)


def _legend(task: Task, contenders: Sequence[Contender], show_all: bool) -> str:
    machine, data = machine_info(), task.data
    device = machine["cpu"] if machine["backend"] == "cpu" else machine["device"]
    lines = [
        f"Losses in nats, on the whole training part ({num_examples(data.train)} examples), mean over seeds.",
        f"test: accuracy on {num_examples(data.test)} other examples after the last step.",
        f"ms: one step of one training on {device}.",
    ]
    if len({one.family in LEARNED for one in contenders}) == 2:
        lines.append("... / that best: below 1x, the learned optimizer has the lower loss.")
    if not show_all:
        lines.append("Hand-made optimizers: settings that are best at some step; --all shows every one.")
    return "\n".join(lines) + "\n"
