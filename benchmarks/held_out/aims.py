"""What was aimed at before the meta-training of the general meta-parameters, and what came of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import polars as pl
from held_out import NAMES, brief
from ratios import ADAM_OR_SGD, STEPS, long, summary
from tasks import AUTOENCODERS

from mlhf_optax.experiments.scripts import Table, saved

_WHERE_TIME_PAYS = ("poisson", "burgers", *AUTOENCODERS, "mnist-mlp-1024", "mnist-mlp-4096")


class Aim(NamedTuple):
    """What was aimed at, what was measured, and whether the aim was reached."""

    aim: str
    found: str
    is_met: bool


def table(content: dict[str, Any], others: dict[str, Any], horizon: dict[str, Any]) -> Table:
    """Returns a row per aim.

    Args:
      content: results of ``held_out.py`` on the fifteen tasks.
      others: those on other batch sizes.
      horizon: results of ``ten_times_horizon.py``.
    """
    rows = content["rows"]
    frame, with_batches = long(rows), long([*rows, *others["rows"]])
    pays = with_batches.filter(pl.col("task").is_in(_WHERE_TIME_PAYS))
    where = "differential equations, autoencoders, batches of 1,024 and more"
    tuned = f"in equal time ahead of all that is tuned: {where}"
    adam = "in equal time ahead of Adam at its defaults on all tasks from 30 steps on"
    aims = [
        _median(frame, ADAM_OR_SGD, 0.85, 30),
        _worst(frame, ADAM_OR_SGD, 1.10, 30),
        _median(frame, "best Muon", 1.0, 10),
        _median(frame, "constant", 0.85, 100),
        _share(frame, "constant", 0.8, 100),
        _in_time(pays, tuned, (ADAM_OR_SGD, "best Muon"), 10),
        _in_time(frame, adam, ("default Adam",), 30),
        _accuracy(rows),
        _stability(horizon),
    ]
    lines = [["aim", "measured", ""], *([a.aim, a.found, "met" if a.is_met else "**missed**"] for a in aims)]
    note = "The aims were set before the meta-training; medians are over tasks, and nothing is retuned."
    return Table(lines, note, brief(content))


def _chosen(frame: pl.DataFrame, kind: str, rivals: Sequence[str], first: int) -> pl.DataFrame:
    """Returns the ratios over some rivals from a step on; few tasks go on to the last step."""
    steps = [step for step in STEPS[:-1] if step >= first]
    of_kind = pl.col("kind") == kind
    return frame.filter(of_kind, pl.col("contender").is_in(rivals), pl.col("step").is_in(steps))


def _from(first: int) -> str:
    return f" from {first} steps on" if first > STEPS[0] else ""


def _by_step(shown: Sequence[str], steps: Sequence[int]) -> str:
    return f"{', '.join(shown)} at {', '.join(map(str, steps))} steps"


def _median(frame: pl.DataFrame, rival: str, most: float, first: int) -> Aim:
    found = summary(_chosen(frame, "ratios", [rival], first)).sort("step")
    shown = _by_step([f"{x:.2f}" for x in found["median"]], found["step"].to_list())
    aim = f"loss over that of {NAMES[rival]} at most {most:.2f}{_from(first)}, in the median"
    return Aim(aim, shown, all(median <= most for median in found["median"]))


def _worst(frame: pl.DataFrame, rival: str, most: float, first: int) -> Aim:
    order = ("ratio", "task", "step")
    ratio, task, step = _chosen(frame, "ratios", [rival], first).select(order).sort(order).row(-1)
    aim = f"on no task above {most:.2f} of {NAMES[rival]}{_from(first)}"
    return Aim(aim, f"at worst {ratio:.2f}, {task} at {step} steps", ratio <= most)


def _share(frame: pl.DataFrame, rival: str, least: float, first: int) -> Aim:
    found = summary(_chosen(frame, "ratios", [rival], first)).sort("step")
    counts = list(found.select("ahead", "tasks").iter_rows())
    shown = _by_step([f"{ahead} of {tasks}" for ahead, tasks in counts], found["step"].to_list())
    aim = f"ahead of {NAMES[rival]} on {least:.0%} of the tasks{_from(first)}"
    return Aim(aim, shown, all(ahead >= least * tasks for ahead, tasks in counts))


def _in_time(frame: pl.DataFrame, aim: str, rivals: Sequence[str], first: int) -> Aim:
    tasks = frame["task"].unique(maintain_order=True)
    worst = _chosen(frame, "by_time", rivals, first).sort("ratio", "contender", "step")
    worst = worst.group_by("task").last().filter(pl.col("ratio") >= 1)
    told = {
        row["task"]: f"{row['task']} ({row['ratio']:.2f} of {row['contender']} at {row['step']} steps)"
        for row in worst.iter_rows(named=True)
    }
    behind = "; ".join(told[task] for task in tasks if task in told)
    found = f"behind on {len(told)} of {len(tasks)}: {behind}" if told else "ahead on all"
    return Aim(aim, found, not told)


def _accuracy(rows: Sequence[dict[str, Any]]) -> Aim:
    gaps = [
        (100 * (row["accuracy"] - row["best_adam_accuracy"]), row["task"])
        for row in rows
        if None not in (row["accuracy"], row["best_adam_accuracy"])
    ]
    aim = "test accuracy at most 0.3 points below the best Adam's"
    return Aim(aim, "at worst {:+.1f} points, {}".format(*min(gaps)), min(gaps)[0] >= -0.3)


def _stability(content: dict[str, Any]) -> Aim:
    own = [row for row in content["rows"] if row["is_learned"]]
    bad = [row["task"] for row in own if row["blows_up"] or row["ends_at_chance"]]
    aim = "at ten times the horizon no training that blows up or ends at chance"
    return Aim(aim, f"{', '.join(bad) or 'none'} of {len(own)} tasks, one training each", not bad)


TABLES = {
    "held_out_aims": lambda folder: table(*saved(folder, "held_out", "held_out_batches", "ten_times_horizon"))
}
