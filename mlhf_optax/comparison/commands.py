"""The commands of ``mlhf-optax``: parsing and printing; the work is done elsewhere."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

import mlhf_optax
from mlhf_optax.comparison.arguments import (
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
from mlhf_optax.comparison.meta_train_options import meta_train
from mlhf_optax.comparison.train_command import DEFAULT_FAMILIES, make_plan, run_plan
from mlhf_optax.pretrained import list_pretrained
from mlhf_optax.tasks import TASKS, get_task
from mlhf_optax.tasks.models import ACTIVATIONS

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
        DEFAULT_FAMILIES
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


app.command("meta-train")(meta_train)


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
