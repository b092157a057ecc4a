"""General meta-parameters against everything else that needs no tuning, by samples and by the clock.

Who takes an optimizer with nothing to tune chooses between it and others with nothing to tune. Here are those
of optax, the fixed NadamW of AlgoPerf, Muon at 0.02, PSGD Kron, SOAP and the learned optimizers of the
literature, each with the settings that its documentation gives, on the held-out tasks or, with ``--new``, on
ten that were never looked at before. Schedule-free is judged by the parameters that its documentation says;
MoMo gets the loss of each batch. Times are measured in turns in one process.

Targets: after as many steps the loss is below the best of them, chosen task by task, on 14 of 15 tasks from
30 steps on; in equal time it is at most 0.90 of the best single one in the median, and below each single one
on two thirds of the tasks.

    pip install psgdax==0.1.1 diffrax && pip install --no-deps jax-numerical-operators
    python benchmarks/held_out/untuned.py --data-dir DIR --output runs/untuned

What needs a package that is missing is left out, and the results say so. What is finished is kept:
``--resume`` goes on after a stop. ``--quick`` takes minutes on two cores.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from held_out import brief
from new_tasks import ARGUMENTS, NEW_LENGTHS, NEW_TASKS, problem
from rivals import RATES
from tasks import BATCH_SIZES, LENGTHS, TASKS
from untuned_ratios import BEST, END, STEPS, frame_of, strongest, summary
from untuned_rivals import NAMES, own_contender, rivals_of

from mlhf_optax.experiments import Comparison, compare, grid_contenders
from mlhf_optax.experiments.origin import with_origin, write_json
from mlhf_optax.experiments.progress import comparison_bar
from mlhf_optax.experiments.results import Curve
from mlhf_optax.experiments.scripts import (
    Table,
    command_line,
    finite_or_none,
    parse_options,
    save_drawing,
    saved,
)
from mlhf_optax.experiments.tables import bold_ratio
from mlhf_optax.support.checks import FROM_ONE, check_choice, check_fields

OWN = "MLHF"
HELD_OUT = tuple(name for name in TASKS if name not in BATCH_SIZES or name == "mnist-mlp-1024")
TUNED = {"adam": "best tuned Adam", "muon": "best tuned Muon"}
_RECORDS = (1, 3, 10, 30, 100, 300, 1000, 3000)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of this script."""

    tasks: tuple[str, ...] = ()
    """Which tasks; by default the fifteen of `held_out.py`."""
    new: bool = False
    """The new tasks by default, not those of `held_out.py`."""
    meta_params: str = "general"
    """Shipped name or path."""
    rivals: tuple[str, ...] = NAMES
    """Which rivals."""
    tuned_on: tuple[str, ...] = ()
    """Tasks on which grids of Adam and Muon are trained too, for the figure."""
    steps: int | None = None
    """Greatest length of a training; by default that of the task."""
    seeds: int = 1
    """Trainings of every optimizer."""
    data_dir: Path | None = None
    """Where MNIST and CIFAR-10 lie; by default $TFDS_DATA_DIR."""
    cache_dir: Path | None = None
    """Where decoded data are kept."""
    output: Path = Path("runs/untuned")
    """Folder for all that is written."""
    resume: bool = False
    """Go on from what lies in the folder."""
    quick: bool = False
    """30 steps of the digits with three rivals."""

    def __post_init__(self):
        for name in (*self.tasks, *self.tuned_on):
            check_choice("tasks", name, TASKS | NEW_TASKS)
        for name in self.rivals:
            check_choice("rivals", name, NAMES)
        check_fields(self, FROM_ONE, "steps", or_none=True)
        check_fields(self, FROM_ONE, "seeds")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the tasks, prints the tables, writes ``results.json`` and ``figure.png``."""
    options = parse_options(Options, __doc__, arguments)
    if options.quick:
        few = ("adam", "schedule-free", "momo")
        options = dataclasses.replace(options, tasks=("digits-mlp",), steps=30, seeds=1, rivals=few)
    command, rows, left_out = command_line(__file__, arguments), [], {}
    for name in options.tasks or (NEW_TASKS if options.new else HELD_OUT):
        if because := problem(name):
            print(f"{name} is left out: {because}")
            left_out[name] = because
            continue
        row = run_task(name, options, command)
        if row is None:
            print("Stopped: --resume goes on from here; results and figure come at the end.")
            return
        rows.append(row)
        one = with_origin(command, rows=[row], left_out={})
        print(f"\n{name}", *by_samples(one).markdown()[:-2], "", *by_time(one).markdown()[:-2], sep="\n")
    content = with_origin(command, rows=rows, left_out=left_out)
    for table in (by_samples, by_time, aims):
        print("", *table(content).markdown(), sep="\n", flush=True)
    write_json(options.output / "results.json", content)
    save_drawing(options.output / "figure.png", draw, content)


def run_task(name: str, options: Options, command: str) -> dict[str, Any] | None:
    """Trains one task with all optimizers; returns what is kept of it, None if it was stopped."""
    task = (TASKS | NEW_TASKS)[name]((options.data_dir, options.cache_dir))
    length = min(options.steps or 10**9, (LENGTHS | NEW_LENGTHS)[name])
    steps = [step for step in _RECORDS if step < length] + [length]
    rivals, left_out = rivals_of(task, options.rivals, length)
    contenders = [own_contender(task, options.meta_params, **ARGUMENTS.get(name, {})), *rivals]
    if name in options.tuned_on:
        contenders += [grid_contenders([family], rates=RATES[family])[0] for family in TUNED]
    with comparison_bar() as on_progress:
        found = compare(
            task,
            contenders,
            steps,
            seeds=range(options.seeds),
            folder=options.output / name,
            resume=options.resume,
            command=command,
            on_progress=on_progress,
        )
    return row_of(name, found, steps, left_out) if found.is_complete else None


def row_of(name: str, found: Comparison, steps: Sequence[int], left_out: dict[str, str]) -> dict[str, Any]:
    """Returns what is kept of a task: the curves of MLHF, of its rivals, and of the best of each grid."""
    own, *others = found.curves()
    curves = {OWN: kept(own)}
    curves |= {one.label: kept(one) for one in others if one.family not in TUNED}
    for family, label in TUNED.items():
        # The best at the end stands for the grid, all the way.
        if grid := [one for one in others if one.family == family]:
            curves[label] = kept(min(grid, key=lambda one: one.train_loss[-1])) | {"is_tuned": True}
    sizes = {key: found.about[key] for key in ("batch_size", "num_parameters")}
    own_sizes = {"task": name, "seeds": own.seeds, "steps": list(steps), **sizes}
    return own_sizes | {"left_out": left_out, "curves": curves}


def kept(curve: Curve) -> dict[str, Any]:
    """Returns a curve as JSON keeps it."""
    test = [None if loss is None else finite_or_none(loss) for loss in curve.test_loss]
    return {
        "setting": curve.setting,
        "train_loss": [finite_or_none(loss) for loss in curve.train_loss],
        "test_loss": test,
        "accuracy": finite_or_none(curve.accuracy),
        "seconds_per_step": curve.seconds_per_step,
        "is_tuned": False,
    }


def _table(content: dict[str, Any], kinds: dict[str, str], columns: Sequence[str], note: str) -> Table:
    """Returns a row per rival, the strongest first, with a median and a count for each kind and column."""
    found = summary(frame_of(content["rows"], OWN))
    columns = [one for one in columns if len(found.filter(pl.col("when") == one))]
    first = next(iter(kinds))
    shown = {
        (row["kind"], row["rival"], row["when"]): (
            f"{bold_ratio(row['median'])} ({row['ahead']} of {row['tasks']})"
        )
        for row in found.iter_rows(named=True)
    }
    heads = [f"{one} steps" if one != END else "when the shorter ends" for one in columns]
    rows = [["loss of MLHF over that of", *heads]]
    last = [one for one in columns if len(found.filter(pl.col("when") == one, pl.col("kind") == first))][-1:]
    order = [rival for one in last for rival in strongest(found, first, one)]
    # Some did not train for long enough to be in the last column.
    order += [rival for rival in found["rival"].unique(maintain_order=True) if rival not in (*order, BEST)]
    for kind, text in kinds.items():
        rivals = (BEST, *order) if kind == first else (BEST,)
        rows += [[rival + text, *(shown.get((kind, rival, one), "") for one in columns)] for rival in rivals]
    about = content | {"command": brief(content)["command"]}
    return Table(rows, note, about)


def by_samples(content: dict[str, Any]) -> Table:
    """Returns the medians over tasks after as many steps."""
    note = (
        f"Medians over {len(content['rows'])} tasks, in brackets on how many MLHF is ahead. "
        f"{left_out_text(content)}"
    ).strip()
    return _table(content, {"steps": "", "test": ", by test loss"}, tuple(map(str, STEPS)), note)


def by_time(content: dict[str, Any]) -> Table:
    """Returns the medians over tasks in equal time."""
    note = (
        "In the time of so many steps of MLHF; a task is left out where a rival did not train for as long. "
        "Last column: in the time that the shorter of both trainings took, on all tasks."
    )
    return _table(content, {"time": ""}, (*map(str, STEPS), END), note)


def left_out_text(content: dict[str, Any]) -> str:
    """Returns a sentence on what could not be trained."""
    tasks: dict[tuple[str, str], list[str]] = {}
    for row in content["rows"]:
        for label, because in row["left_out"].items():
            tasks.setdefault((label, because), []).append(row["task"])
    texts = [f"{label} on {len(names)} ({because:.60})" for (label, because), names in tasks.items()]
    texts += [f"{name} ({because})" for name, because in content["left_out"].items()]
    return f"Left out: {'; '.join(texts)}." if texts else ""


def aims(content: dict[str, Any]) -> Table:
    """Returns a row per target, what was measured, and whether it was met."""
    found = summary(frame_of(content["rows"], OWN))
    rows = [
        ["aim", "measured", ""],
        *map(_verdict, (_task_by_task(found), _best_single(found), _each(found))),
    ]
    return Table(rows, "", content | {"command": brief(content)["command"]})


def _verdict(one: tuple[str, str, bool]) -> list[str]:
    return [one[0], one[1], "met" if one[2] else "**missed**"]


def _task_by_task(found: pl.DataFrame) -> tuple[str, str, bool]:
    # Few tasks go on after 300 steps.
    late = [str(step) for step in STEPS if 30 <= step <= 300]
    chosen = found.filter(pl.col("kind") == "steps", pl.col("rival") == BEST, pl.col("when").is_in(late))
    counts = [(row["when"], row["ahead"], row["tasks"]) for row in chosen.iter_rows(named=True)]
    aim = "after as many steps below the best of them, task by task, on 14 of 15 tasks from 30 steps on"
    shown = ", ".join(f"{ahead} of {tasks} at {when} steps" for when, ahead, tasks in counts)
    return aim, shown or "nothing", bool(counts) and all(15 * ahead >= 14 * n for _, ahead, n in counts)


def _best_single(found: pl.DataFrame) -> tuple[str, str, bool]:
    aim = "in equal time at most 0.90 of the best single one, in the median"
    texts, is_met = [], True
    for when in ("30", "100", END):
        order = strongest(found, "time", when)
        if not order:
            continue
        is_it = (pl.col("kind") == "time", pl.col("when") == when, pl.col("rival") == order[0])
        median = found.filter(*is_it)["median"].item()
        texts.append(f"{median:.2f} of {order[0]} {_at(when)}")
        is_met &= median <= 0.9
    return aim, "; ".join(texts) or "nothing", bool(texts) and is_met


def _each(found: pl.DataFrame) -> tuple[str, str, bool]:
    ends = found.filter(pl.col("kind") == "time", pl.col("when") == END, pl.col("rival") != BEST)
    behind = ends.filter(3 * pl.col("ahead") < 2 * pl.col("tasks"))
    texts = [f"{row['rival']} ({row['ahead']} of {row['tasks']})" for row in behind.iter_rows(named=True)]
    aim = "in equal time ahead of each single one on two thirds of the tasks"
    shown = f"not of {', '.join(texts)}" if texts else f"of all {len(ends)}"
    return aim, f"{shown} {_at(END)}", bool(len(ends)) and not texts


def _at(when: str) -> str:
    return "when the shorter training ends" if when == END else f"at {when} steps"


TABLES = {
    f"{prefix}{name}": lambda folder, make=make, file=file: make(*saved(folder, file))
    for prefix, file in (("untuned", "held_out_untuned"), ("new_tasks", "new_tasks"))
    for name, make in (("", by_samples), ("_time", by_time), ("_aims", aims))
    if (Path(__file__).parent / "results" / f"{file}.json").exists()  # a table comes with its results
}


def draw(figure: Any, content: dict[str, Any], tasks: Sequence[str] = (), count: int = 3) -> None:
    """Draws the loss of MLHF and of the best of its rivals, an axis per task.

    Args:
      figure: of matplotlib.
      content: results.
      tasks: which ones; by default up to three, those with tuned rivals first.
      count: of the strongest untuned rivals in equal time.

    Against steps above, against seconds below.
    """
    has_tuned = lambda row: any(curve["is_tuned"] for curve in row["curves"].values())
    rows = sorted(content["rows"], key=lambda row: not has_tuned(row))[:3]
    if tasks:
        rows = [row for row in content["rows"] if row["task"] in tasks]
    found = summary(frame_of(content["rows"], OWN))
    labels = [OWN, *strongest(found, "time", END)[:count], *TUNED.values()]
    figure.set_size_inches(max(6, 3 * len(rows)), 5)
    grid = figure.subplots(2, len(rows), squeeze=False)
    for column, row in zip(grid.T, rows, strict=True):
        for index, label in enumerate(labels):
            if (curve := row["curves"].get(label)) is None:
                continue
            losses = [float("nan") if loss is None else loss for loss in curve["train_loss"]]
            style = {"color": "black" if label == OWN else f"C{index}", "linewidth": 2 if index == 0 else 1}
            style["linestyle"] = "--" if curve["is_tuned"] else "-"
            for axes, unit in zip(column, (1, curve["seconds_per_step"]), strict=True):
                axes.plot([step * unit for step in row["steps"]], losses, label=label, **style)
        column[0].set(title=row["task"], xlabel="steps")
        column[1].set(xlabel="seconds")
        for axes in column:
            axes.set(xscale="log", yscale="log")
    for axes in grid[:, 0]:
        axes.set_ylabel("training loss")
    handles = {text: line for axes in grid[0] for line, text in zip(*axes.get_legend_handles_labels())}  # noqa: B905
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=7)


if __name__ == "__main__":
    main()
