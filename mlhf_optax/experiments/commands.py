"""The commands of ``mlhf-optax``: parsing and printing; the work is done elsewhere."""

import enum
import math
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

import mlhf_optax
from mlhf_optax.experiments.arguments import (
    BatchSize,
    Channels,
    CurvatureBatchSize,
    DataDir,
    Hidden,
    TaskName,
    errors_explained,
    given,
    option,
    parse_channels,
    parse_names,
    parse_part,
    parse_widths,
)
from mlhf_optax.experiments.train_command import FAMILIES, make_plan, run_plan
from mlhf_optax.meta_params import Settings
from mlhf_optax.models import ACTIVATIONS
from mlhf_optax.pretrained import list_pretrained
from mlhf_optax.tasks import TASKS, get_task

app = typer.Typer(
    help="Train networks with MLHF, a learned second-order optimizer, and see how it compares with SGD, "
    "RMSprop and Adam.",
    epilog="Start with `mlhf-optax train`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class StartingSettings(enum.StrEnum):
    """Names of the settings that a meta-training can start from."""

    DEFAULT = "default"
    RELATIVE = "relative"
    PAPER = "paper"
    AUTHORS = "authors"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(mlhf_optax.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        option(
            "Print the version and exit.", "--version", metavar="", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


@app.command()
def train(
    context: typer.Context,
    task: TaskName = "digits-mlp",
    seeds: Annotated[int, option("Trainings of each optimizer; their mean is shown.", min=1)] = 5,
    steps: Annotated[int, option("Length of each training, in mini-batches.", min=1)] = 500,
    batch_size: BatchSize = None,
    optimizers: Annotated[str, option("Which ones, separated by commas.", metavar="NAMES")] = ",".join(
        FAMILIES
    ),
    meta_params: Annotated[
        str | None,
        option(
            "Meta-parameters of MLHF, by default those for the task: see `mlhf-optax list`.",
            metavar="NAME|FILE",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, option("Learning rate of MLHF; its meta-parameters know a good one.", metavar="X")
    ] = None,
    cg_steps: Annotated[int | None, option("CG steps of MLHF, by default as meta-trained.", min=1)] = None,
    curvature_batch_size: CurvatureBatchSize = None,
    data_dir: DataDir = None,
    channels: Channels = None,
    hidden: Hidden = None,
    activation: Annotated[
        str | None, option(f"Activation in digits-mlp: {', '.join(ACTIVATIONS)}.", metavar="NAME")
    ] = None,
    show_all: Annotated[bool, option("Show every setting, not only the best.", "--all", metavar="")] = False,
    json_file: Annotated[
        Path | None, option("Write all results to a file.", "--json", metavar="FILE")
    ] = None,
    figure: Annotated[
        Path | None, option("Where the figure goes, by default ./mlhf-optax-TASK.png.", metavar="FILE")
    ] = None,
) -> None:
    """Train a task with MLHF and with a grid of first-order optimizers, and compare them.

    The grid is that of the MLHF paper: SGD with momentum, RMSprop and Adam, each with three learning rates
    and three values of every decay, 45 settings in all. Prints a table and draws a figure.
    """
    with errors_explained():
        plan = make_plan(
            task,
            given(
                batch_size=batch_size,
                data_dir=data_dir,
                channels=parse_channels(channels),
                hidden=parse_widths(hidden, "hidden"),
                activation=activation,
            ),
            families=parse_names(optimizers),
            meta_params=meta_params,
            learning_rate=learning_rate,
            num_cg_steps=cg_steps,
            curvature_batch_size=parse_part(curvature_batch_size),
            num_seeds=seeds,
            num_steps=steps,
            figure=figure,
            json_file=json_file,
        )
    if not run_plan(plan, command=context.obj, show_all=show_all):
        raise typer.Exit(130)


@app.command("meta-train")
def meta_train(
    task: TaskName = "digits-mlp",
    output: Annotated[
        Path | None,
        option("Folder for checkpoints, metrics and the result, by default runs/TASK.", metavar="DIR"),
    ] = None,
    iterations: Annotated[int, option("Meta-iterations, each one unroll of every task.", min=1)] = 1000,
    stop_after: Annotated[
        int | None,
        option("Write the result after so many of them; --resume with a larger number goes on.", min=1),
    ] = None,
    num_tasks: Annotated[int, option("Networks in training side by side.", min=1)] = 8,
    unroll_length: Annotated[int, option("Steps of an unroll.", min=1)] = 10,
    batch_size: BatchSize = None,
    data_dir: DataDir = None,
    channels: Channels = None,
    hidden: Hidden = None,
    meta_learning_rate: Annotated[
        float, option("Peak learning rate of the meta-optimizer.", metavar="X")
    ] = 1e-2,
    learning_rate: Annotated[
        float,
        option(
            "Learning rate of the networks in training, kept in the record. Below 1 directions that the "
            "curvature of one mini-batch gets wrong do less harm, which no damping can do as well.",
            metavar="X",
        ),
    ] = 1.0,
    seed: Annotated[int, option("Decides everything that is random.")] = 0,
    resume: Annotated[
        bool, option("Go on from the last checkpoint in the folder.", "--resume", metavar="")
    ] = False,
    checkpoint_every: Annotated[int, option("Meta-iterations between checkpoints.", min=1)] = 50,
    validate_every: Annotated[int, option("Meta-iterations between validations.", min=1)] = 100,
    settings: Annotated[
        StartingSettings,
        option(
            "What the LSTMs see and mean: ours, ours with damping relative to the size of the parameters, "
            "which carries over to wider networks, the paper's or its authors' code's.",
            metavar="|".join(StartingSettings),
        ),
    ] = StartingSettings.DEFAULT,
    initial_damping: Annotated[
        float | None,
        option(
            "Damping of untrained LSTMs, with the default settings in units of the gradient's root mean "
            "square and 30, with 'relative' also over that of the parameters and 10. It has to train the "
            "task before any meta-training: raise it where the inner loss stays at chance.",
            metavar="X",
        ),
    ] = None,
    initial_preconditioner: Annotated[
        float | None, option("The same for the preconditioner.", metavar="X")
    ] = None,
    keep_probability: Annotated[
        float,
        option("Chance that a healthy inner training goes on after an unroll.", min=0, max=1, metavar="X"),
    ] = 0.95,
    age_scale: Annotated[
        float | None,
        option(
            "Instead, let it go on with chance (age + X) / (age + X + T), so that the LSTMs see ages of all "
            "orders of magnitude, and trainings of thousands of steps.",
            metavar="X",
        ),
    ] = None,
    replay_opt_state: Annotated[
        bool, option("Replay a training with its LSTM states.", "--replay-opt-state", metavar="")
    ] = False,
    same_batch_weight: Annotated[
        float,
        option(
            "Weight in l_s of the gain on the step's own mini-batch; 0 counts the gain on the next one "
            "alone, which is right where mini-batches are far from telling the whole loss.",
            min=0,
            metavar="X",
        ),
    ] = 1.0,
    curvature_batch_size: CurvatureBatchSize = None,
) -> None:
    """Meta-train MLHF on a task, on the part of its data that `mlhf-optax train` never uses.

    It can be stopped at any time and continued with `--resume`. The result is a file for
    `mlhf-optax train --meta-params FILE`.
    """
    from mlhf_optax.experiments.meta_train_command import run_meta_training

    with errors_explained():
        options = given(
            data_dir=data_dir, channels=parse_channels(channels), hidden=parse_widths(hidden, "hidden")
        )
        get_task(task, **options).data  # noqa: B018  what is wrong with them is said at once
        starts = given(initial_damping=initial_damping, initial_preconditioner=initial_preconditioner)
        Settings(**starts)
        part = parse_part(curvature_batch_size)
        positive = given(
            learning_rate=learning_rate, meta_learning_rate=meta_learning_rate, age_scale=age_scale
        )
        for name, number in positive.items():
            if not 0 < number < math.inf:
                raise ValueError(f"`--{name.replace('_', '-')}` must be a positive number, got {number}")
    run_meta_training(
        task=task,
        task_options=options,
        output=Path("runs") / task if output is None else output,
        iterations=iterations,
        num_tasks=num_tasks,
        unroll_length=unroll_length,
        batch_size=batch_size,
        meta_learning_rate=meta_learning_rate,
        learning_rate=learning_rate,
        seed=seed,
        resume=resume,
        checkpoint_every=checkpoint_every,
        validate_every=validate_every,
        settings=settings.value,
        starts=starts,
        keep_probability=keep_probability,
        age_scale=age_scale,
        replay_opt_state=replay_opt_state,
        same_batch_weight=same_batch_weight,
        curvature_batch_size=part,
        stop_after=stop_after,
    )


@app.command("list")
def list_all() -> None:
    """List the tasks and the meta-parameters that come with the package."""
    console = Console(highlight=False)
    table = Table("task", "what is trained", box=box.SIMPLE_HEAD, padding=0)
    for name in TASKS:
        table.add_row(name, get_task(name).description)
    console.print(table)
    columns = ("meta-parameters", "trained on", "learning rate", "batch", "CG steps")
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=0)
    for name, record in list_pretrained().items():
        values = (record[key] for key in ("task", "learning_rate", "batch_size", "num_cg_steps"))
        table.add_row(name, *map(str, values))
    console.print(table)


__all__ = ["app"]
