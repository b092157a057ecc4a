"""What the tables of the READMEs share."""

from typing import Any

from mlhf_optax.experiments.origin import origin_line
from mlhf_optax.experiments.tables import format_ratio, markdown_table


def with_note(rows: list[list[str]], note: str, record: dict[str, Any]) -> list[str]:
    """Returns the lines of a table, and below it a note with where and how it was measured."""
    return [*markdown_table(rows), "", f"{note} {origin_line(record)}".strip()]


def bold(own: float, best: float) -> str:
    """Returns one loss as a multiple of another, bold where it is the lower one."""
    return f"**{format_ratio(own, best)}**" if own < best else format_ratio(own, best)
