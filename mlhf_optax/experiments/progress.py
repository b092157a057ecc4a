"""Progress bars on the terminal, if errors go to one."""

import contextlib
import math
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mlhf_optax.experiments.engine import OnProgress, Progress
from mlhf_optax.experiments.tables import format_loss


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[Callable[..., None]]:
    """Shows a bar with the time left; yields ``update(completed=, total=, loss=, description=)``."""
    left = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    columns = (*left, TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task(description, total=None, loss="compiling")
        yield lambda **values: bar.update(line, **values)


@contextlib.contextmanager
def comparison_bar() -> Iterator[OnProgress]:
    """Shows what is in training, and the lowest loss; yields the ``on_progress`` of :func:`compare`."""
    shown = math.inf
    with progress_bar("compiling and timing single steps") as update:

        def on_progress(now: Progress) -> None:
            nonlocal shown
            shown = shown if now.loss is None else now.loss
            if now.optimizer:
                loss = f"loss {format_loss(shown)}"
                update(description=now.optimizer.split()[0], completed=now.done, total=now.total, loss=loss)

        yield on_progress
