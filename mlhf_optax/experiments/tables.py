"""The table of a comparison, for terminals and as Markdown."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from mlhf_optax.experiments.engine import TABLE_STEPS
from mlhf_optax.experiments.results import Comparison, Curve, best_at, leaders

Unit = Literal["step", "epoch"]
_MOST_COLUMNS = 7


class _Row(NamedTuple):
    """A row: cells as text, and for those between the first and the last whether they are good."""

    cells: list[str]
    are_good: Sequence[bool | None] = ()
    is_new_part: bool = False

    def marked(self) -> list[tuple[str, bool | None]]:
        inner = self.are_good or [None] * (len(self.cells) - 2)
        return list(zip(self.cells, [None, *inner, None], strict=True))


def comparison_table(
    comparison: Comparison, title: str, *, show_all: bool = False, unit: Unit = "step"
) -> Table:
    """Returns the learned optimizers, the best of the others at each step, how they compare, and the others.

    Args:
      comparison: with at least one optimizer.
      title: title of the table.
      show_all: a row for every optimizer, instead of those that are best of their family at some step.
      unit: what the columns count.

    Returns:
      A rich table; print it with a :class:`rich.console.Console`.
    """
    head, *rows = _rows(comparison.curves(), unit, show_all)
    # Narrow enough for a terminal of 80 columns, which is also what rich assumes for a file.
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    table.add_column(f"training loss after {unit}", overflow="fold")
    for name in [*head.cells[1:-2], "test", "ms"]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.is_new_part and table.row_count:
            table.add_section()
        styles = {True: "bold green", False: "bold red", None: ""}
        table.add_row(*(Text(cell, styles[is_good]) for cell, is_good in row.marked()))
    return table


def comparison_markdown(comparison: Comparison, unit: Unit = "step") -> list[str]:
    """Returns the same table as Markdown lines; of every family the setting of lowest loss at the end.

    By epochs, rows compare at equal time, too.
    """
    return markdown_table(comparison_rows(comparison, unit))


def comparison_rows(comparison: Comparison, unit: Unit = "step") -> list[list[str]]:
    """Returns the cells of :func:`comparison_markdown`, the head first."""
    rows = _rows(comparison.curves(), unit, show_all=False, at_end=True)
    return [[f"**{cell}**" if is_good else cell for cell, is_good in row.marked()] for row in rows]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table; the first row is its head."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]


def table_steps(curve: Curve, unit: Unit = "step") -> list[int]:
    """Returns the recorded steps that make columns: the usual ones and the last, or up to seven by epochs."""
    if unit == "step":
        return sorted({*(step for step in TABLE_STEPS if step in curve.steps), curve.steps[-1]})
    wanted = np.geomspace(curve.steps[0], curve.steps[-1], _MOST_COLUMNS)
    return sorted({curve.steps[int(np.argmin(np.abs(np.subtract(curve.steps, x))))] for x in wanted})


def losses_by_time(others: Sequence[Curve], curve: Curve) -> list[float]:
    """Returns the best loss of others by the time at which ``curve`` was recorded, one number per record.

    Between two records the loss is taken on a straight line. NaN before the first record of the fastest of
    the others, and after its last one: what was not reached is not made up.
    """
    best = [best_at(others, step).loss_at(step) for step in curve.steps]
    factor = (curve.seconds_per_step or math.nan) / min(one.seconds_per_step or math.nan for one in others)
    steps = np.array(curve.steps, float)
    return np.interp(steps * factor, steps, best, left=math.nan, right=math.nan).tolist()


def format_loss(loss: float) -> str:
    """Writes a loss in at most 8 characters."""
    if not math.isfinite(loss):
        return "diverged"
    if loss >= 100 or 0 < loss < 0.01:
        mantissa, exponent = f"{loss:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{loss:.3f}"


def format_ratio(own: float, best: float) -> str:
    """Writes one loss as a multiple of another; with two decimals around one."""
    if not math.isfinite(own):
        return "diverged"
    if not best > 0:
        return "-"
    return f"{own / best:.2f}" if 0.1 <= own / best < 10 else f"{own / best:.2g}"


def bold_ratio(own: float, best: float = 1.0) -> str:
    """Writes one loss as a multiple of another, bold where it is the lower one."""
    return f"**{format_ratio(own, best)}**" if own < best else format_ratio(own, best)


def _rows(curves: Sequence[Curve], unit: Unit, show_all: bool, at_end: bool = False) -> list[_Row]:
    """Returns the rows of a table, the head first."""
    steps = table_steps(curves[0], unit)
    per_unit = (curves[0].steps_per_epoch or 1) if unit == "epoch" else 1
    learned = [curve for curve in curves if curve.is_learned]
    others = [curve for curve in curves if not curve.is_learned]
    head = [
        f"training loss after {unit}",
        *(f"{step / per_unit:g}" for step in steps),
        "test accuracy",
        "ms per step",
    ]
    rows = [_Row(head)]
    for curve in learned:
        rate = curve.setting.get("learning_rate")
        title = f"{curve.label} lr={rate:g}" if isinstance(rate, int | float) else curve.label
        rows.append(_Row([title, *_cells(curve, steps)]))
    if learned and others:
        rows += _verdict(learned, others, steps, unit)
    for family in dict.fromkeys(curve.family for curve in others):
        members = [curve for curve in others if curve.family == family]
        shown = members if show_all else leaders(members, steps[-1:] if at_end else steps)
        for index, curve in enumerate(shown):
            is_first = index == 0 and family == others[0].family
            best = [best_at(others, step) is curve or None for step in steps]
            rows.append(_Row([curve.label, *_cells(curve, steps)], [*best, None], is_first))
    return rows


def _cells(curve: Curve, steps: Sequence[int]) -> list[str]:
    losses = [format_loss(curve.loss_at(step)) for step in steps]
    return [*losses, _percent(curve.accuracy), _milliseconds(curve.seconds_per_step)]


def _percent(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else "-"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}" if seconds < 0.01 else f"{1e3 * seconds:.3g}"


def _verdict(
    learned: Sequence[Curve], others: Sequence[Curve], steps: Sequence[int], unit: Unit
) -> list[_Row]:
    """Returns the best of the others in each column, and how every learned optimizer compares with it."""
    best = [best_at(others, step).loss_at(step) for step in steps]
    accuracy = max(curve.accuracy for curve in others)
    times = [curve.seconds_per_step for curve in others if curve.seconds_per_step is not None]
    fastest = min(times, default=None)
    cells = [*map(format_loss, best), _percent(accuracy), _milliseconds(fastest)]
    rows = [_Row([f"best of the other {len(others)} there", *cells])]
    for curve in learned:
        own = [curve.loss_at(step) for step in steps]
        pairs = list(zip(own, best, strict=True))
        points = 100 * (curve.accuracy - accuracy)
        slower = f"{curve.seconds_per_step / fastest:.1f}x" if fastest and curve.seconds_per_step else "-"
        ratios = [f"{format_ratio(*pair)}x".replace("dx", "d") for pair in pairs]
        signs = [*(a < b for a, b in pairs), points >= -0.5]
        rows.append(_Row([f"{curve.short_label} / that best", *ratios, f"{points:+.1f}", slower], signs))
        if unit == "epoch" and fastest and curve.seconds_per_step:
            rows += _by_time(curve, others, steps)
    return rows


def _by_time(curve: Curve, others: Sequence[Curve], steps: Sequence[int]) -> list[_Row]:
    """Returns a row on the others by the time of a learned optimizer, where they had got anywhere by then."""
    by_time = dict(zip(curve.steps, losses_by_time(others, curve), strict=True))
    if not any(math.isfinite(by_time[step]) for step in steps):
        return []
    pairs = [(curve.loss_at(step), by_time[step]) for step in steps]
    ratios = [f"{format_ratio(*pair)}x" if math.isfinite(pair[1]) else "-" for pair in pairs]
    signs = [own < other if math.isfinite(other) else None for own, other in pairs]
    return [_Row([f"{curve.short_label} / best at equal time", *ratios, "", ""], [*signs, None])]
