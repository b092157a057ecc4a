"""What the commands of ``mlhf-optax`` share: options, parsing, and errors that are explained."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from mlhf_optax.comparison.train_command import FAMILIES
from mlhf_optax.tasks import TASKS

TaskName = Annotated[str, typer.Argument(metavar="TASK", help=f"What to train: {', '.join(TASKS)}.")]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Examples a mini-batch; by default the task's own number."),
]


def option(text: str, *names: str, metavar: str = "N", **options: Any) -> Any:
    """Returns an option of a command, with its help first."""
    return typer.Option(*names, help=text, metavar=metavar, **options)


DataDir = Annotated[
    Path | None,
    option(
        "Where the data of cifar10 and imagenet tasks lie, by default $TFDS_DATA_DIR or "
        "~/tensorflow_datasets.",
        metavar="DIR",
    ),
]
Channels = Annotated[
    str | None,
    option("Channels of cifar10 networks: two numbers, like 8,16, for the convnet, one else.", metavar="N,N"),
]
Hidden = Annotated[
    str | None,
    option(
        "Widths of the hidden dense layers of digits-mlp and cifar10-convnet, like 16 or 32,32.",
        metavar="N,N",
    ),
]
CurvatureBatchSize = Annotated[
    str | None,
    option(
        "Examples of the batch for MLHF's curvature, or a share of it, like 0.25; by default all while "
        "meta-training, and after it as meta-trained.",
        metavar="N|X",
    ),
]


@contextlib.contextmanager
def errors_explained() -> Iterator[None]:
    """Prints what is wrong with the arguments as one line; only for code that checks and loads."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        Console(stderr=True, highlight=False).print(Text(f"error: {error}", style="red"), soft_wrap=True)
        raise typer.Exit(2) from error


def given(**options: Any) -> dict[str, Any]:
    """Returns the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def parse_names(text: str) -> list[str]:
    """Returns the families of optimizers in a list with commas."""
    names = [name.strip() for name in text.split(",")]
    if not set(names) <= set(FAMILIES):
        raise ValueError(
            f"--optimizers must be among {','.join(FAMILIES)}, separated by commas, got {text!r}"
        )
    return names


def parse_widths(text: str | None, name: str) -> tuple[int, ...] | None:
    """Returns the widths in a list with commas, the value of the option ``name``."""
    if text is None:
        return None
    widths = _whole_numbers(text)
    if widths is None:
        raise ValueError(f"--{name} must be widths separated by commas, like 32 or 32,32, got {text!r}")
    return widths


def parse_channels(text: str | None) -> tuple[int, ...] | int | None:
    """Returns widths, or one of them alone, as tasks take them."""
    widths = parse_widths(text, "channels")
    return widths[0] if widths and len(widths) == 1 else widths


def parse_steps(text: str) -> tuple[int, ...]:
    """Returns the ascending numbers of steps in a list with commas."""
    steps = _whole_numbers(text)
    if steps is None or list(steps) != sorted(set(steps)) or steps[0] < 1:
        raise ValueError(f"--validation-steps must be ascending numbers, like 10,30,100, got {text!r}")
    return steps


def parse_part(text: str | None) -> int | float | None:
    """Returns a number of examples or a share of them."""
    if text is None:
        return None
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError as error:
        raise ValueError(f"--curvature-batch-size must be a number or a share, got {text!r}") from error


def _whole_numbers(text: str) -> tuple[int, ...] | None:
    """Returns the numbers in a list with commas, or None where one is none."""
    numbers = [number.strip() for number in text.split(",")]
    return tuple(map(int, numbers)) if all(number.isdecimal() for number in numbers) else None


__all__ = [
    "BatchSize",
    "Channels",
    "CurvatureBatchSize",
    "DataDir",
    "Hidden",
    "TaskName",
    "errors_explained",
    "given",
    "option",
    "parse_channels",
    "parse_names",
    "parse_part",
    "parse_steps",
    "parse_widths",
]
