"""What the commands of ``mlhf-optax`` do: check, call the library, print."""

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import mlhf_optax
from mlhf_optax import experiments
from mlhf_optax import meta_training as mt
from mlhf_optax.experiments import (
    Contender,
    constant_contender,
    grid_contenders,
    learned_contender,
    rates_per_decade,
)
from mlhf_optax.experiments.cli.options import MetaTrain, MetaTrainLong, Train, parse
from mlhf_optax.experiments.contenders import CONSTANT, FAMILIES, PAPER_FAMILIES
from mlhf_optax.experiments.figures import require_matplotlib
from mlhf_optax.experiments.meta_train import meta_train_task, shown_losses
from mlhf_optax.experiments.meta_train_long import RECIPE, meta_train_on_tiny_tasks
from mlhf_optax.experiments.origin import machine_info
from mlhf_optax.experiments.progress import comparison_bar, progress_bar
from mlhf_optax.learned import LEARNED
from mlhf_optax.meta_training.driver import Progress
from mlhf_optax.pretrained import Pretrained, list_pretrained, load_pretrained
from mlhf_optax.tasks import (
    TASKS,
    Task,
    check_batch_size,
    get_task,
    num_examples,
    tiny_tasks,
    tiny_validation_tasks,
)

STOPPED = 130  # the exit status of a program that Ctrl-C ended
_RATES = rates_per_decade(1e-3, 1.0)  # for optimizers that the paper's grid does not have
_ARGUMENTS = ("learning_rate", "num_cg_steps", "curvature_batch_size")  # of learned optimizers


def run(arguments: Sequence[str]) -> int:
    """Runs the command in what follows ``mlhf-optax``; returns the exit status, 130 after Ctrl-C.

    Raises:
      SystemExit: with status 2 after an error, which was explained.
    """
    if list(arguments[:1]) == ["--version"]:
        print(mlhf_optax.__version__)
        return 0
    command = shlex.join(["mlhf-optax", *arguments])
    try:
        with errors_explained():
            options = parse(arguments)
        if isinstance(options, Train):
            return train(options, command)
        if isinstance(options, MetaTrain):
            return meta_train(options, command)
        return meta_train_long(options, command) if isinstance(options, MetaTrainLong) else list_all()
    except KeyboardInterrupt:
        return STOPPED


@contextlib.contextmanager
def errors_explained(*others: type[Exception]) -> Iterator[None]:
    """Prints an error that a user can mend as one line, and exits with status 2.

    ``others`` are more kinds of errors: a TypeError is a user's only where arguments are checked.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError, *others) as error:
        # The number of a system error says nothing to most people.
        text = error.strerror if isinstance(error, OSError) and not error.filename else None
        line = Text(f"error: {text or error}", style="red")
        Console(stderr=True, highlight=False).print(line, soft_wrap=True)
        raise SystemExit(2) from error


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


def meta_train(options: MetaTrain, command: str) -> int:
    """Meta-trains, says where the result is and how to use it; returns the exit status."""
    with errors_explained(TypeError):
        task = get_task(options.task, **options.task_options("meta_batch_size"))
        schedule = _from_options(mt.Schedule, options)
        config = _from_options(mt.MetaTrainingConfig, options, decay_iterations=options.iterations)
    output = options.output or Path("runs") / options.task

    def run(on_progress: Progress) -> Path:
        return meta_train_task(
            task,
            LEARNED[options.optimizer],
            options.optimizer_options,
            output,
            schedule,
            config,
            start=options.start,
            validation_steps=options.validation_steps,
            seed=options.seed,
            resume=options.resume,
            command=command,
            on_progress=on_progress,
        )

    return _meta_train(run, schedule, output, options.optimizer, options.task)


def meta_train_long(options: MetaTrainLong, command: str) -> int:
    """Meta-trains over long horizons; says and returns what :func:`meta_train` does."""
    with errors_explained(TypeError):
        schedule = _from_options(mt.Schedule, options)
        changes = {name: getattr(options, name) for name in _RECIPE_OPTIONS}
        config = dataclasses.replace(RECIPE, **changes, decay_iterations=options.iterations)
        known = tiny_tasks(options.data_dir)
        names = [task.name for task in known]
        if unknown := sorted(set(options.only) - set(names)):
            raise ValueError(f"`only` must be among {', '.join(names)}, got {', '.join(unknown)}")
        validation = tiny_validation_tasks(options.data_dir)
        mesh = _mesh(options.devices)

    def run(on_progress: Progress) -> Path:
        return meta_train_on_tiny_tasks(
            [task for task in known if task.name in (options.only or names)],
            validation,
            LEARNED[options.optimizer],
            options.optimizer_options,
            options.output,
            schedule,
            config,
            start=options.start,
            validation_steps=options.validation_steps,
            seed=options.seed,
            resume=options.resume,
            command=command,
            on_progress=on_progress,
            mesh=mesh,
        )

    return _meta_train(run, schedule, options.output, options.optimizer, next(iter(TASKS)))


def _mesh(count: int) -> jax.sharding.Mesh | None:
    """Returns a mesh of so many devices, with axes of which JAX decides what lies where; None for one."""
    if not 1 <= count <= len(jax.devices()):
        raise ValueError(
            f"`devices` must lie between 1 and {len(jax.devices())}, those there are, got {count}"
        )
    return None if count == 1 else jax.sharding.Mesh(jax.devices()[:count], ("pairs",))


_RECIPE_OPTIONS = ("num_pairs", "truncation", "horizons", "sigma", "meta_learning_rate", "average_decay")


def _meta_train(
    run: Callable[[Progress], Path], schedule: mt.Schedule, output: Path, optimizer: str, task: str
) -> int:
    """Runs a meta-training with a progress bar; says where the result is and how to use it."""
    console = Console(highlight=False, soft_wrap=True)

    def on_progress(iteration: int, metrics: dict[str, float]) -> None:
        losses = "  ".join(f"{name} {value:.3g}" for name, value in shown_losses(metrics).items())
        update(completed=iteration, total=schedule.last, loss=losses.replace("_loss", " loss"))

    try:
        with progress_bar("meta-training") as update, errors_explained():
            path = run(on_progress)
    except KeyboardInterrupt:
        again = f"the same command with --resume goes on from the last checkpoint in {output}"
        console.print(f"Stopped: {again}.", markup=False)
        return STOPPED
    best = load_pretrained(path).record["best_iteration"]
    console.print(
        f"best meta-parameters by validation: iteration {best} of {schedule.last}, in {path}", markup=False
    )
    use = f"--optimizers {optimizer},adam --meta-params {path}"
    console.print(f"try them: mlhf-optax train {task} {use}", markup=False)
    return 0


_FITS = {
    True: "any network",
    False: "networks and data like those that they were trained on, for 30 to 100 steps",
}


def list_all() -> int:
    """Prints the tasks, the optimizers and the shipped meta-parameters; returns the exit status."""
    sets = []
    for name, record in list_pretrained().items():
        known = {key: record.get(key) for key in LEARNED[record["optimizer"]].arguments}
        use = ", ".join(f"{key} {value}" for key, value in known.items() if value is not None)
        sets.append((name, record["optimizer"], record["task"], str(record["batch_size"]), use))
    tables = {
        ("task", "what is trained"): [(name, get_task(name).description) for name in TASKS],
        ("learned optimizer", "what it is", "its meta-parameters fit"): [
            (name, one.description, _FITS[one.fits_any]) for name, one in LEARNED.items()
        ],
        ("meta-parameters", "optimizer", "trained on", "batch", "to be used with"): sets,
    }
    console = Console(highlight=False)
    for head, rows in tables.items():
        table = Table(*head, box=box.SIMPLE_HEAD, padding=0)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"first-order optimizers: {', '.join(FAMILIES)}")
    console.print(f"Gauss-Newton damped by a constant (1, 3 or 10): {CONSTANT}")
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
        contenders.append(learned_contender(task, pretrained, source=source, **own))
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


def _from_options(cls: type, options: MetaTrain | MetaTrainLong, **others: Any) -> Any:
    """Returns a ``cls`` made of the options that have the names of its fields."""
    names = {field.name for field in dataclasses.fields(cls)} - set(others)
    return cls(**{name: value for name, value in vars(options).items() if name in names}, **others)
