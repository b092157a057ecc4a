"""The figure of the project's README: loss against steps, and below against seconds, from what is measured.

Draws MLHF, the three that need no tuning and are nearest to it in equal time over all tasks, and the best of
the tuned grids, from the results of ``untuned.py``, for tasks that were run with ``--tuned-on``.

    python benchmarks/held_out/readme_figure.py --tasks cifar10-conv shakespeare-lstm mnist-mlp-1024
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

from untuned import draw

from mlhf_optax.experiments.scripts import parse_options, save_drawing
from mlhf_optax.support.checks import FROM_ONE, check_fields, require

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of this script."""

    tasks: tuple[str, ...] = ()
    """Which tasks; by default three, those with tuned rivals first."""
    count: int = 3
    """Rivals that need no tuning."""
    results: Path = HERE / "results" / "held_out_untuned.json"
    """What `untuned.py` has written."""
    figure: Path = HERE / "figures" / "untuned.png"
    """Draw into this file."""

    def __post_init__(self):
        check_fields(self, FROM_ONE, "count")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the figure."""
    options = parse_options(Options, __doc__, arguments)
    content = json.loads(options.results.read_text())
    known = [row["task"] for row in content["rows"]]
    require(set(options.tasks) <= set(known), "tasks", f"among {', '.join(known)}", options.tasks)
    how = functools.partial(draw, tasks=options.tasks, count=options.count)
    save_drawing(options.figure, how, content)


if __name__ == "__main__":
    main()
