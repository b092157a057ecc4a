"""What a benchmark script needs: options from a command line, a process of its own, a report, its table."""

import dataclasses
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tyro

from mlhf_optax.experiments.figures import require_matplotlib
from mlhf_optax.experiments.origin import origin_line, with_origin, write_json
from mlhf_optax.experiments.tables import markdown_table
from mlhf_optax.support.checks import FROM_ONE, check_fields

Options = TypeVar("Options")


def parse_options(options: type[Options], about: str | None, arguments: Sequence[str] | None) -> Options:
    """Reads a command line into a frozen dataclass; a field is an option, its docstring the help.

    A mistake ends the process with status 2 and says what is wanted.
    """
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    return tyro.cli(options, description=about or "", args=arguments, config=config)


def command_line(script: str, arguments: Sequence[str] | None = None) -> str:
    """Returns the command that runs a script from this folder, with the arguments of this process if None."""
    given = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", Path(os.path.relpath(script)).as_posix(), *given])


def in_fresh_process(script: str, worker: Any, environment: Mapping[str, str] | None = None) -> Any:
    """Runs a script with ``--worker JSON`` in a process of its own; returns the JSON in its last line.

    Args:
      script: its path.
      worker: what the process is to do, as plain JSON values.
      environment: its variables; those of this process if None.

    Raises:
      RuntimeError: if the process fails, with the end of what it said.
    """
    command = [sys.executable, script, "--worker", json.dumps(worker)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"measuring {worker} ended with status {done.returncode} (a negative one is a signal, -9 mostly "
            f"want of memory); measure less at a time:\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def finite_or_none(number: float | None) -> float | None:
    """Returns the number as JSON can have it: None, which becomes null, where it is not finite."""
    return number if number is not None and math.isfinite(number) else None


def save_drawing(path: Path, draw: Callable[..., None], content: Any) -> None:
    """Writes the figure that ``draw(figure, content)`` draws."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    draw(figure, content)
    figure.savefig(path, dpi=150)


def draw_panels(figure: Any, panels: Mapping[str, Mapping[str, Any]], **axis: Any) -> list[Any]:
    """Draws an axis per panel, three in a row, and in it a line per label, with one legend below all.

    Args:
      figure: of matplotlib.
      panels: by title and label, a pair of what lies along the axes; None is a gap.
      **axis: what `axes.set` takes, for all axes.

    Returns:
      The axes that are drawn on.
    """
    rows = math.ceil(len(panels) / 3)
    figure.set_size_inches(9, 2.5 * rows)
    grid = list(figure.subplots(rows, 3, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, lines) in zip(grid, panels.items(), strict=False):
        for label, (steps, values) in lines.items():
            known = [math.nan if value is None else value for value in values]
            axes.plot(steps, known, label=label, linewidth=1)
        axes.set(title=title, **axis)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7)
    return grid[: len(panels)]


class Table(NamedTuple):
    """A table with a note on what it shows.

    Attributes:
      rows: cells as text, the head first.
      note: sentences that stand below it.
      about: what :func:`mlhf_optax.experiments.origin.with_origin` made; its origin stands at the end.
    """

    rows: list[list[str]]
    note: str
    about: Mapping[str, Any]

    def markdown(self) -> list[str]:
        """Returns its lines."""
        below = [*([self.note] if self.note else []), origin_line(self.about)]
        return [*markdown_table(self.rows), *(line for text in below for line in ("", text))]


def saved(folder: Path, *names: str) -> list[dict[str, Any]]:
    """Returns the contents of JSON files in a folder."""
    return [json.loads((folder / f"{name}.json").read_text()) for name in names]


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """Options that all benchmarks of speed have; each adds its own."""

    repeats: int = 9
    """Rounds."""
    json: Path | None = None
    """Write what was measured to this file."""
    figure: Path | None = None
    """Draw a figure into this file."""
    quick: bool = False
    """Show in minutes that it runs: little work, few rounds."""

    def __post_init__(self):
        check_fields(self, FROM_ONE, "repeats")

    def report(self, command: str, table: Callable[..., Table], draw: Callable[..., None], **content: Any):
        """Prints the table of what was measured; writes it, and draws a figure, where that is asked for."""
        content = with_origin(command, **content)
        print(*table(content).markdown(), sep="\n", flush=True)
        if self.json:
            write_json(self.json, content)
        if self.figure:
            save_drawing(self.figure, draw, content)
