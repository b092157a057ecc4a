"""``mlhf-optax list``: what there is to choose from."""

import dataclasses

from rich import box
from rich.console import Console
from rich.table import Table

from mlhf_optax.experiments.contenders import CONSTANT, FAMILIES
from mlhf_optax.learned import LEARNED
from mlhf_optax.pretrained import list_pretrained
from mlhf_optax.tasks import TASKS, get_task

_LEAST_WIDTH = 60  # of the tables; a narrower terminal breaks their lines, but no name is cut off
_FITS = {
    True: "any network",
    False: "networks and data like those that they were trained on, for 30 to 100 steps",
}


@dataclasses.dataclass(frozen=True)
class List:
    """List the tasks, the optimizers, and the meta-parameters that come with the package."""


def list_all() -> int:
    """Prints the tasks, the optimizers and the shipped meta-parameters; returns the exit status."""
    sets = []
    for name, record in list_pretrained().items():
        known = {key: record.get(key) for key in LEARNED[record["optimizer"]].arguments}
        use = ", ".join(f"{key} {value}" for key, value in known.items() if value is not None)
        made = f"{record['optimizer']} on {record['task']}, batch {record['batch_size']}"
        sets.append((name, f"{made}: {use}"))
    tasks = [(name, get_task(name).description) for name in TASKS]
    optimizers = [(name, one.description, _FITS[one.fits_any]) for name, one in LEARNED.items()]
    console = Console(highlight=False)
    console.width = max(console.width, _LEAST_WIDTH)
    console.print(_table(["task", "what is trained"], tasks))
    console.print(_table(["learned optimizer", "what it is", "its meta-parameters fit"], optimizers))
    console.print(_table(["meta-parameters", "optimizer and what it was trained on: to be used with"], sets))
    console.print(f"first-order optimizers: {', '.join(FAMILIES)}")
    console.print(f"Gauss-Newton damped by a constant (1, 3 or 10): {CONSTANT}")
    return 0


def _table(head: list[str], rows: list[tuple[str, ...]]) -> Table:
    """Returns a table of names and texts. A name has to be typed, so it is never cut off."""
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column(head[0], min_width=max(len(name) for name, *_ in rows))
    for title in head[1:]:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
