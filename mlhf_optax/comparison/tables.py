"""Results as tables for people."""

import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from mlhf_optax.comparison.results import Result, best_of, leaders, table_steps


def comparison_table(
    results: Sequence[Result], title: str, *, show_all: bool = False, columns: Mapping[int, str] | None = None
) -> Table:
    """Returns MLHF, the best of the others at each step, how they compare, and the others.

    Args:
      results: of one comparison, at least one.
      title: title of the table.
      show_all: a row for every result, instead of those that are best of their family at some step.
      columns: heads of the columns of losses by step; those of
        :func:`mlhf_optax.comparison.results.table_steps` if None.

    Returns:
      A rich table; print it with a :class:`rich.console.Console`.

    Example:
      >>> result = Result("mlhf", "mlhf", {}, 1, (1, 10), (2.0, 1.0), 0.9, 1e-3)
      >>> comparison_table([result], "one step").row_count
      1
    """
    columns = columns or {step: str(step) for step in table_steps(results)}
    steps = list(columns)
    learned = [result for result in results if result.family == "mlhf"]
    others = [result for result in results if result.family != "mlhf"]
    # Narrow enough for a terminal of 80 columns, which is also what rich assumes for a file.
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("training loss after step", overflow="fold")
    for step in steps:
        table.add_column(columns[step], justify="right", no_wrap=True)
    table.add_column("test", justify="right", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    for result in learned:
        rate, name = result.hyperparameters.get("learning_rate", ""), result.name.replace("mlhf", "MLHF", 1)
        table.add_row(f"{name} lr={rate:g}" if rate else name, *_cells(result, steps), style="bold")
    if others:
        if learned:
            _add_verdict(table, learned[0], others, steps)
        table.add_section()
        _add_others(table, others, steps, show_all)
    return table


def _add_verdict(table: Table, learned: Result, others: Sequence[Result], steps: Sequence[int]) -> None:
    losses = [best_of(others, step).loss_at(step) for step in steps]
    accuracy = max(result.test_accuracy for result in others)
    fastest = min(result.seconds_per_step for result in others)
    best = [*map(format_loss, losses), f"{accuracy:.1%}", f"{1e3 * fastest:.2f}"]
    table.add_row(f"best of the other {len(others)} there", *best)
    ratios = [_ratio(learned.loss_at(step), loss) for step, loss in zip(steps, losses, strict=True)]
    points = 100 * (learned.test_accuracy - accuracy)
    slower = Text(f"{_short(learned.seconds_per_step / fastest)}x")
    table.add_row("MLHF / that best", *ratios, _coloured(f"{points:+.1f}", points >= -0.5), slower)


def _add_others(table: Table, others: Sequence[Result], steps: Sequence[int], show_all: bool) -> None:
    best = {step: best_of(others, step) for step in steps}
    for family in dict.fromkeys(result.family for result in others):
        members = [result for result in others if result.family == family]
        for result in members if show_all else leaders(members, steps):
            cells = _cells(result, steps)
            for index, step in enumerate(steps):
                if result is best[step]:
                    cells[index].stylize("bold underline")
            table.add_row(result.name, *cells)


def _cells(result: Result, steps: Sequence[int]) -> list[Text]:
    losses = [Text(format_loss(result.loss_at(step))) for step in steps]
    return [*losses, Text(f"{result.test_accuracy:.1%}"), Text(f"{1e3 * result.seconds_per_step:.2f}")]


def _ratio(own: float, other: float) -> Text:
    if not (math.isfinite(own) and other > 0):
        return _coloured("diverged" if not math.isfinite(own) else "-", False)
    return _coloured(f"{_short(own / other)}x", own < other)


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def _coloured(text: str, is_good: bool) -> Text:
    return Text(text, style="bold green" if is_good else "bold red")


def format_loss(loss: float) -> str:
    """Writes a loss in a few characters.

    Args:
      loss: in nats; not finite for a training that diverged.

    Returns:
      At most 8 characters.

    Example:
      >>> format_loss(0.1534), format_loss(3.9712e-06), format_loss(float("nan"))
      ('0.153', '4.0e-6', 'diverged')
    """
    if not math.isfinite(loss):
        return "diverged"
    if loss >= 100 or 0 < loss < 0.01:
        mantissa, exponent = f"{loss:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{loss:.3f}"


__all__ = ["comparison_table", "format_loss"]
