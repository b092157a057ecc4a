"""A progress bar for comparisons."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mlhf_optax.comparison.engine import OnProgress, Progress
from mlhf_optax.comparison.tables import format_loss


@contextlib.contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """Shows what is in training, the lowest loss and the time left, if errors go to a terminal.

    Yields:
      What to hand to :func:`mlhf_optax.comparison.compare` as ``on_progress``.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:4.1f} %  {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, loss="")

        def on_progress(progress: Progress) -> None:
            name = progress.optimizer or "compiling and timing single steps"
            bar.update(task, description=name, completed=progress.done, total=progress.total)
            if progress.loss is not None:
                bar.update(task, loss=f"loss {format_loss(progress.loss)}")

        yield on_progress
