"""MLHF's loss over that of every rival that needs no tuning, and over the best of them, as long frames."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from ratios import SOLVED, loss_between

BEST = "the best of them, task by task"
STEPS = (10, 30, 100, 300, 1000)
"""Where tables look. Records begin earlier, and some go on."""
END = "end"
"""In equal time: when the shorter of two trainings is over."""
_SCHEMA = {
    "task": pl.String,
    "rival": pl.String,
    "kind": pl.String,
    "when": pl.String,
    "ratio": pl.Float64,
}


def frame_of(rows: Sequence[Mapping[str, Any]], own: str) -> pl.DataFrame:
    """Returns the ratios of the losses of MLHF and of its rivals.

    Args:
      rows: as ``untuned.py`` keeps them; grids are no rivals here.
      own: label of MLHF.

    Returns:
      Columns task, rival, kind ("steps", "test" or "time"), when (a number of steps as text, or
      :data:`END`) and ratio, infinite where MLHF diverged. The rival :data:`BEST` has the lowest loss of all.
      By time, what did not train for as long is left out.
    """
    found = [entry for row in rows for entry in _of_task(row, own)]
    frame = pl.DataFrame(found, schema=_SCHEMA, orient="row")
    by = frame.group_by("task", "kind", "when", maintain_order=True)
    best = by.agg(pl.col("ratio").max()).with_columns(pl.lit(BEST).alias("rival"))
    return pl.concat([frame, best.select(frame.columns)])


def _of_task(row: Mapping[str, Any], own: str) -> list[tuple[str, str, str, str, float]]:
    curves, steps, task = row["curves"], row["steps"], row["task"]
    mine, found = curves[own], []
    own_losses, own_seconds = _losses(mine["train_loss"]), mine["seconds_per_step"] or math.nan
    for label, curve in curves.items():
        if label == own or curve["is_tuned"]:
            continue
        losses, seconds = _losses(curve["train_loss"]), curve["seconds_per_step"] or math.nan
        for index, step in enumerate(steps):
            if step not in STEPS:
                continue
            found.append((task, label, "steps", str(step), _ratio(own_losses[index], losses[index])))
            if mine["test_loss"][index] is not None or curve["test_loss"][index] is not None:
                pair = (_losses([one["test_loss"][index]])[0] for one in (mine, curve))
                found.append((task, label, "test", str(step), _ratio(*pair)))
            in_time = loss_between(steps, losses, step * own_seconds / seconds)
            if not math.isnan(in_time):
                found.append((task, label, "time", str(step), _ratio(own_losses[index], in_time)))
        time = min(own_seconds, seconds) * steps[-1]
        if not math.isnan(time):
            # Rounding may put the last step behind the last.
            at = lambda values, each, time=time: loss_between(steps, values, min(time / each, steps[-1]))
            ends = at(own_losses, own_seconds), at(losses, seconds)
            found.append((task, label, "time", END, _ratio(*ends)))
    return found


def _losses(values: Sequence[float | None]) -> list[float]:
    return [math.inf if value is None else value for value in values]


def _ratio(own: float, other: float) -> float:
    """Returns the ratio of two losses: infinite where MLHF diverged, 0 where only the rival did."""
    return math.inf if math.isinf(own) else max(own, SOLVED) / max(other, SOLVED)


def summary(frame: pl.DataFrame) -> pl.DataFrame:
    """Returns the median over tasks, on how many MLHF is ahead, and how many there are.

    By kind, rival and when. Level counts as ahead where both have solved a task.
    """
    by = frame.group_by("kind", "rival", "when", maintain_order=True)
    return by.agg(
        median=pl.col("ratio").median(), ahead=(pl.col("ratio") < 1).sum(), tasks=pl.col("ratio").len()
    )


def strongest(found: pl.DataFrame, kind: str, when: str) -> list[str]:
    """Returns the rivals from the one nearest to MLHF, or farthest ahead, by the median of a summary.

    Rivals that were trained on fewer than half as many tasks as others come last.
    """
    chosen = found.filter(pl.col("kind") == kind, pl.col("when") == when, pl.col("rival") != BEST)
    if not len(chosen):
        return []
    is_common = pl.col("tasks") * 2 >= pl.col("tasks").max()
    return chosen.sort(is_common, "median", descending=True, maintain_order=True)["rival"].to_list()
