"""Ratios of losses, medians and ranks of ``held_out.py``, worked out on long frames."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from mlhf_optax.experiments.results import Curve
from mlhf_optax.experiments.scripts import finite_or_none
from mlhf_optax.experiments.tables import bold_ratio

STEPS = (10, 30, 100, 300, 1000, 3000)
SOLVED = 1e-6
"""Losses below it count as this much: by then a task is solved."""
OWN = "MLHF"
ADAM_OR_SGD = "best Adam or SGD"
RIVALS = ("constant", "untrained", "default Adam", ADAM_OR_SGD, "best Muon")
_GRIDS = {"adam": ADAM_OR_SGD, "sgd": ADAM_OR_SGD, "muon": "best Muon"}
KINDS = ("ratios", "by_time", "by_test_loss")
"""After equal steps, in equal time, and of test losses after equal steps."""
_SCHEMA = {
    "task": pl.String,
    "kind": pl.String,
    "contender": pl.String,
    "step": pl.Int64,
    "ratio": pl.Float64,
}


def measured(curves: Sequence[Curve]) -> pl.DataFrame:
    """Returns a row for every optimizer and step.

    Args:
      curves: MLHF, the constant, MLHF before meta-training, Adam at its defaults, then all others.

    Returns:
      Columns contender, step, loss, test_loss (null where it was not measured) and loss_in_time: the loss
      that an optimizer has in the time that MLHF takes for so many steps, NaN if it did not train for as
      long. All optimizers of a grid are one contender.
    """
    own, *_ = curves
    names = [OWN, *RIVALS[:3], *(_GRIDS.get(curve.family, curve.label) for curve in curves[4:])]

    def of_curve(name: str, curve: Curve) -> pl.DataFrame:
        times = [step * (own.seconds_per_step or math.nan) for step in curve.steps]
        in_time = [
            loss_between(curve.steps, curve.train_loss, time / (curve.seconds_per_step or 1))
            for time in times
        ]
        columns = {"loss": curve.train_loss, "test_loss": curve.test_loss, "loss_in_time": in_time}
        frame = pl.DataFrame(
            {"step": curve.steps, **columns}, schema_overrides=dict.fromkeys(columns, pl.Float64)
        )
        return frame.select(pl.lit(name).alias("contender"), pl.all())

    return pl.concat(map(of_curve, names, curves))


def loss_between(steps: Sequence[int], losses: Sequence[float], step: float) -> float:
    """Returns the loss after a step that need not be whole, and NaN after the last.

    Between two recorded steps it is interpolated, both on logarithmic scales.
    """
    if not step <= steps[-1]:
        return math.nan
    logs = np.log(np.maximum(losses, 1e-12))
    after = int(np.searchsorted(steps, step))
    if after == 0 or not np.isfinite(logs[after]):  # before the first, or about to diverge
        return losses[after]
    return float(np.exp(np.interp(np.log(step), np.log(steps), logs)))


def ratios(curves: Sequence[Curve]) -> pl.DataFrame:
    """Returns MLHF's loss over that of every contender: columns contender, step and :data:`KINDS`.

    Of a grid the best entry counts, at every step anew. By test loss that may be another than by training
    loss. A ratio is NaN where a contender did not train for as long, null without test data.
    """
    frame = measured(curves)
    if frame.filter(pl.col("contender") == OWN)["test_loss"].is_not_null().any():
        frame = frame.with_columns(pl.col("test_loss").fill_null(math.inf))
    losses = pl.col("loss", "loss_in_time", "test_loss")
    # Unlike `min`, `nan_min` is NaN where a part of a grid is.
    best = frame.group_by("contender", "step", maintain_order=True).agg(losses.nan_min())
    best = best.with_columns(losses.clip(lower_bound=SOLVED))
    own = best.filter(pl.col("contender") == OWN).select("step", own="loss", own_test="test_loss")
    return (
        best.filter(pl.col("contender") != OWN)
        .join(own, on="step", maintain_order="left")
        .select(
            "contender",
            "step",
            ratios=pl.col("own") / pl.col("loss"),
            by_time=pl.col("own") / pl.col("loss_in_time"),
            by_test_loss=pl.col("own_test") / pl.col("test_loss"),
        )
    )


def nested(found: pl.DataFrame) -> dict[str, dict[int, dict[str, float | None]]]:
    """Returns ratios as JSON keeps them: by kind, step and contender; None for what is not finite."""
    result: dict[str, dict[int, dict[str, float | None]]] = {
        kind: {step: {} for step in found["step"].unique(maintain_order=True)} for kind in KINDS
    }
    for row in found.iter_rows(named=True):
        for kind in KINDS:
            if row[kind] is not None:
                result[kind][row["step"]][row["contender"]] = finite_or_none(row[kind])
    return result


def long(rows: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    """Returns what JSON keeps of many tasks as one frame: columns task, kind, contender, step, ratio.

    The ratio is infinite where MLHF diverged. By time, rivals that did not train for as long are left out.
    """
    found = [
        (row["task"], kind, contender, int(step), ratio)
        for row in rows
        for kind in KINDS
        for step, at_step in row.get(kind, {}).items()
        for contender, ratio in at_step.items()
    ]
    frame = pl.DataFrame(found, schema=_SCHEMA, orient="row")
    is_known = (pl.col("kind") != "by_time") | pl.col("ratio").is_not_null()
    return frame.filter(is_known).with_columns(pl.col("ratio").fill_null(math.inf))


def summary(frame: pl.DataFrame) -> pl.DataFrame:
    """Returns the median over tasks, on how many MLHF is ahead, and the number of tasks.

    By kind, contender and step; the columns are median, ahead and tasks.
    """
    ratio = pl.col("ratio")
    by = frame.group_by("kind", "contender", "step", maintain_order=True)
    return by.agg(median=ratio.median(), ahead=(ratio < 1).sum(), tasks=pl.len())


def mean_ranks(frame: pl.DataFrame) -> dict[int, float]:
    """Returns MLHF's mean place among itself and :data:`RIVALS` by training loss, by step.

    Equal losses share a place, so where all have solved a task, all are first.
    """
    of_rivals = frame.filter(pl.col("kind") == "ratios", pl.col("contender").is_in(RIVALS))
    ranks = of_rivals.group_by("task", "step").agg(rank=1 + (pl.col("ratio") > 1).sum())
    return dict(ranks.group_by("step").agg(pl.col("rank").mean()).iter_rows())


def at(frame: pl.DataFrame, kind: str, contender: str, task: str | None = None) -> dict[int, float]:
    """Returns the ratios of one task, or the medians over all, by step."""
    if task is None:
        frame, value = summary(frame), "median"
    else:
        frame, value = frame.filter(pl.col("task") == task), "ratio"
    chosen = frame.filter(pl.col("kind") == kind, pl.col("contender") == contender)
    return dict(chosen.select("step", value).iter_rows())


def cells(values: Mapping[int, float], steps: Sequence[int] = STEPS) -> list[str]:
    """Returns ratios as text, a cell for every step, empty where there is none."""
    return [bold_ratio(values[step]) if step in values else "" for step in steps]
