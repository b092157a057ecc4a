"""General meta-parameters, never retuned, on networks and data that they never met.

Trains every task with MLHF, and against it two constants, Adam at its defaults, and grids of Adam, SGD with
momentum and Muon with three learning rates per decade. The constants are ``gauss_newton``, with one unit of
damping for all tensors, and MLHF before meta-training, with one for each. A grid counts with its best entry
at every step, so it is tuned for each step anew. Ratios below 1 say that MLHF has the lower training loss:
after as many steps, and in as much time, in which a rival takes more steps. The learned optimizers of the
literature are there too, with the meta-parameters that are shipped, as little retuned as MLHF; LODO, which
has none, with the settings that its authors use for a ResNet on CIFAR-10. So is the MLHF of the paper
(``cifar10``), where a task has only layers that it knows.

    python benchmarks/held_out/held_out.py --data-dir DIR --output runs/held_out

With ``--cosine`` all rates, that of MLHF too, fall along a cosine to zero at the end of the training, where
losses are then compared; learned optimizers that have no rate are left out, and nothing is timed.

What is finished is kept: ``--resume`` goes on after a stop. ``--quick`` takes minutes on two cores.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ratios import ADAM_OR_SGD, RIVALS, SOLVED, STEPS, at, cells, long, mean_ranks, nested, ratios, summary
from rivals import LEARNED_RIVALS, ON_THE_SHELF, contenders_for
from tasks import LENGTHS, TASKS

from mlhf_optax.experiments import Comparison, Contender, compare, default_adam
from mlhf_optax.experiments.origin import with_origin, write_json
from mlhf_optax.experiments.progress import comparison_bar
from mlhf_optax.experiments.scripts import (
    Table,
    command_line,
    draw_panels,
    finite_or_none,
    parse_options,
    save_drawing,
    saved,
)
from mlhf_optax.experiments.tables import bold_ratio, format_loss, markdown_table
from mlhf_optax.support.checks import FROM_ONE, check_choice, check_fields, require
from mlhf_optax.tasks import Task

NAMES = {
    ADAM_OR_SGD: "the best tuned Adam or momentum",
    "best Muon": "the best tuned Muon",
    "default Adam": "Adam at its defaults",
    "constant": "the best constant (`gauss_newton`)",
    "untrained": "itself before meta-training",
}
"""What tables call the rivals."""
_UNEVEN = 1.1
_PUBLISHED = {"quadratic-deep": 87.1, "mnist-vae": 30.9}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of this script."""

    tasks: tuple[str, ...] = ()
    """Which tasks; all by default."""
    meta_params: str = "general"
    """Shipped name or path."""
    learned: tuple[str, ...] = LEARNED_RIVALS
    """Learned optimizers of the literature to compare with."""
    dampings: tuple[float, ...] = (10.0,)
    """Dampings of the constant: the first is the rival, others are shown beside it."""
    num_cg_steps: int | None = None
    """CG steps per step of MLHF; by default what its record recommends."""
    steps: int | None = None
    """Length of every training; by default what takes some minutes per task on two cores."""
    seeds: int = 1
    """Trainings of every optimizer."""
    data_dir: Path | None = None
    """Where MNIST and CIFAR-10 lie; by default $TFDS_DATA_DIR."""
    cache_dir: Path | None = None
    """Where decoded data are kept."""
    cosine: bool = False
    """All rates fall along a cosine."""
    output: Path = Path("runs/held_out")
    """Folder for all that is written."""
    resume: bool = False
    """Go on from what lies in the folder."""
    quick: bool = False
    """100 steps and one seed of the digits: minutes on two cores."""

    def __post_init__(self):
        for name in self.tasks:
            check_choice("tasks", name, TASKS)
        for name in self.learned:
            check_choice("learned", name, LEARNED_RIVALS)
        is_met = self.dampings and all(damping > 0 for damping in self.dampings)
        require(is_met, "dampings", "positive numbers, at least one", self.dampings)
        check_fields(self, FROM_ONE, "num_cg_steps", "steps", or_none=True)
        check_fields(self, FROM_ONE, "seeds")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the tasks, prints a table, writes ``results.json``, ``figure.png`` and ``learned.png``."""
    options = parse_options(Options, __doc__, arguments)
    if options.quick:
        options = dataclasses.replace(options, tasks=("digits-mlp",), steps=100, seeds=1)
    command, rows = command_line(__file__, arguments), []
    for name in options.tasks or TASKS:
        task = TASKS[name]((options.data_dir, options.cache_dir))
        length = options.steps or LENGTHS[name]
        steps = [step for step in STEPS if step < length] + [length]
        contenders = contenders_for(task, options, length)
        with comparison_bar() as on_progress:
            found = compare(
                task,
                contenders,
                steps,
                seeds=range(options.seeds),
                folder=options.output / name,
                resume=options.resume,
                timed=not options.cosine,
                command=command,
                on_progress=on_progress,
            )
        if not found.is_complete:
            print("Stopped: --resume goes on from here; results and figure come at the end.")
            return
        rows.append(row_of(name, found, steps) | {"state_floats": state_floats(task, contenders)})
        print(f"\n{name}", *markdown_table(rows_of_task(rows[-1])), sep="\n", flush=True)
        if (spread := spread_of_times(rows[-1]["seconds_per_step"])) > _UNEVEN:
            print(
                f"The times per step of Adam differ by {spread - 1:.0%} between rates: the machine was busy. "
                f"Delete seconds_per_step.json in {options.output / name} and go on with --resume."
            )
    content = with_origin(command, seeds=options.seeds, num_cg_steps=options.num_cg_steps, rows=rows)
    print("", *medians(content).markdown(), sep="\n")
    write_json(options.output / "results.json", content)
    save_drawing(options.output / "figure.png", draw, content)
    if options.learned and not options.cosine:
        save_drawing(options.output / "learned.png", draw_learned, content)


def row_of(name: str, comparison: Comparison, steps: Sequence[int]) -> dict[str, Any]:
    """Returns what is kept of a task: ratios by step, losses, test accuracy and seconds per step."""
    curves = comparison.curves()
    own, *others = curves
    adams = [curve.accuracy for curve in others if curve.family == "adam"]
    return {
        "task": name,
        "seeds": own.seeds,
        "steps": list(steps),
        **nested(ratios(curves)),
        "losses": [finite_or_none(own.loss_at(step)) for step in steps],
        "test_losses": [None if loss is None else finite_or_none(loss) for loss in own.test_loss],
        "last_losses": [finite_or_none(loss) for loss in comparison.last_losses(own.optimizer)],
        "learned": {
            curve.label: [finite_or_none(x) for x in curve.train_loss]
            for curve in curves
            if curve.family in ON_THE_SHELF
        },
        "best_adam": [
            finite_or_none(min(c.loss_at(step) for c in others if c.family == "adam")) for step in steps
        ],
        "accuracy": finite_or_none(own.accuracy),
        "best_adam_accuracy": finite_or_none(max(adams)),
        "seconds_per_step": {curve.optimizer: curve.seconds_per_step for curve in curves},
    }


def spread_of_times(seconds: dict[str, float | None]) -> float:
    """Returns the longest time per step of Adam over its shortest, which no rate should change."""
    times = [time for name, time in seconds.items() if name.startswith("adam") and time]
    return max(times) / min(times) if times else 1.0


def state_floats(task: Task, contenders: Sequence[Contender]) -> dict[str, float]:
    """Returns the numbers per parameter in the state of MLHF, Adam and the learned optimizers."""
    params = jax.eval_shape(task.init_fn, jax.random.key(0))
    shown = [one for one in contenders if one.family in {*ON_THE_SHELF, default_adam().family}]
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    state = lambda one: jax.eval_shape(one.make_optimizer().init, params)
    return {one.names[0]: count(state(one)) / count(params) for one in shown}


def rows_of_task(entry: dict[str, Any]) -> list[list[str]]:
    """Returns the ratios of one task, a row for every contender, by steps and in equal time."""
    found, steps = long([entry]), entry["steps"]
    rows = [["loss of MLHF over that of", *(f"{step} steps" for step in steps)]]
    for contender in found["contender"].unique(maintain_order=True):
        for when, kind in (("", "ratios"), (", in equal time", "by_time")):
            if values := at(found, kind, contender, entry["task"]):
                rows.append([contender + when, *cells(values, steps)])
    return rows


def medians(content: dict[str, Any]) -> Table:
    """Returns the median over tasks of the loss over every rival's, by step."""
    steps = STEPS[:-1]  # few tasks go on to the last
    frame = long(content["rows"])
    rows = [["loss of MLHF over that of", *(f"{step} steps" for step in steps)]]
    shown = {
        (row["kind"], row["contender"], row["step"]): (
            f"{bold_ratio(row['median'])} ({row['ahead']} of {row['tasks']})"
        )
        for row in summary(frame).iter_rows(named=True)
    }
    # Constants take about as long per step, and test losses of what is not tuned say little.
    of_kind = {"ratios": ("", RIVALS), "by_time": (", in equal time", RIVALS[2:])}
    of_kind["by_test_loss"] = (", by test loss", RIVALS[3:])
    for kind, (when, rivals) in of_kind.items():
        for rival in (name for name in NAMES if name in rivals):
            rows.append([NAMES[rival] + when, *(shown.get((kind, rival, step), "") for step in steps)])
    ranks = mean_ranks(frame)
    of_steps = [f"{ranks[step]:.1f}" if step in ranks else "" for step in steps]
    rows.append([f"mean rank by training loss, of {len(RIVALS) + 1}", *of_steps])
    note = (
        f"Median over {len(content['rows'])} tasks that no meta-training met, in brackets on how many MLHF "
        "is ahead. A rival is tuned for each task and step anew, MLHF never. In equal time tasks are left "
        "out where a rival trained for less."
    )
    return Table(rows, note, brief(content))


def by_task(content: dict[str, Any]) -> Table:
    """Returns a row per rival and task: the loss over the rival's by step, accuracy, and time per step."""
    frame = long(content["rows"])
    heads = [*map(str, STEPS), "test accuracy, points", "step / Adam's"]
    rows = [["loss of MLHF / best of the grid, after step", *heads]]
    shown = [(rival, kind) for rival in (ADAM_OR_SGD, "best Muon") for kind in ("ratios", "by_time")]
    shown += [("constant", "ratios"), ("untrained", "ratios")]
    for rival, kind in shown:
        when = " in equal time" if kind == "by_time" else ""
        for entry in content["rows"]:
            last = [points(entry), time_over_adam(entry)] if (rival, kind) == shown[0] else ["", ""]
            values = cells(at(frame, kind, rival, entry["task"]))
            rows.append([f"{entry['task']}, {rival}{when}", *values, *last])
    note = (
        "The best of ten rates of Adam and of SGD with momentum, or of seven of Muon, is chosen anew at each "
        f"step. In equal time: empty where a rival did not train for as long. {seeds_text(content)}"
    )
    return Table(rows, note, brief(content))


def brief(content: dict[str, Any]) -> dict[str, Any]:
    """Returns results whose command leaves out a long list of tasks, which tables name."""
    return content | {"command": re.sub(r" --tasks( (?!--)[\w-]+){4,}", "", content["command"])}


def seeds_text(content: dict[str, Any]) -> str:
    """Returns a sentence that says of how many trainings losses are means, task by task where they differ."""
    tasks: dict[int, list[str]] = {}
    for row in content["rows"]:
        tasks.setdefault(row.get("seeds", content["seeds"]), []).append(row["task"])
    most = max(tasks, key=lambda seeds: len(tasks[seeds]))
    others = [f"{seeds} for {', '.join(names)}" for seeds, names in tasks.items() if seeds != most]
    return f"Seeds: {'; '.join([str(most), *others])}."


def points(entry: dict[str, Any]) -> str:
    """Returns how many points of test accuracy MLHF is ahead of the best Adam."""
    own, best = entry["accuracy"], entry["best_adam_accuracy"]
    return "" if None in (own, best) else f"{100 * (own - best):+.1f}"


def time_over_adam(entry: dict[str, Any]) -> str:
    """Returns MLHF's time per step over Adam's."""
    seconds = entry["seconds_per_step"]
    return f"{seconds['mlhf_general'] / seconds['adam defaults']:.1f}"


def last_losses(content: dict[str, Any]) -> Table:
    """Returns a row per task: training and test loss after the last step, of MLHF and of its rivals."""
    rivals = (ADAM_OR_SGD, "best Muon", "default Adam", "constant")
    frame, names = long(content["rows"]), ("MLHF", *rivals)
    rows = [["after the last step", "steps", *names, *(f"{name}, test" for name in names)]]
    show = lambda loss: f"<{SOLVED:g}" if loss <= SOLVED * 1.001 else format_loss(loss)
    for entry in content["rows"]:
        line, last = [entry["task"], str(entry["steps"][-1])], entry["steps"][-1]
        for measure, kind in (("losses", "ratios"), ("test_losses", "by_test_loss")):
            own = entry.get(measure, [None])[-1]
            if own is None:
                line += [""] * len(names)
                continue
            over = (at(frame, kind, rival, entry["task"])[last] for rival in rivals)
            line += map(show, (own, *(max(own, SOLVED) / ratio for ratio in over)))
        rows.append(line)
    published = ", ".join(f"{loss} for {task}" for task, loss in _PUBLISHED.items())
    note = (
        f"Losses below {SOLVED:g} count as that much. Test losses are the lowest of each grid by themselves. "
        f"DeepOBS has published, for its best tuned optimizer after its full budget: {published}."
    )
    return Table(rows, note, brief(content))


TABLES = {
    "held_out_medians": lambda folder: medians(*saved(folder, "held_out")),
    "held_out": lambda folder: by_task(*saved(folder, "held_out")),
    "held_out_losses": lambda folder: last_losses(*saved(folder, "held_out")),
}


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws the ratios, an axis per rival, a line per task; equal steps above, equal time below."""
    from matplotlib import colormaps

    figure.set_size_inches(9, 5.2)
    grid, frame = figure.subplots(2, len(RIVALS), sharex=True, sharey=True), long(content["rows"])
    for kind, row_of_axes in zip(("ratios", "by_time"), grid, strict=True):
        for axes, rival in zip(row_of_axes, RIVALS, strict=True):
            axes.set_prop_cycle(color=colormaps["tab20"].colors)  # ten are fewer than there are tasks
            for row in content["rows"]:
                values = at(frame, kind, rival, row["task"])
                axes.plot(list(values), list(values.values()), marker="o", markersize=3, label=row["task"])
            axes.axhline(1.0, color="black", linewidth=0.8)
            axes.set(xscale="log", yscale="log")
    for axes, rival in zip(grid[0], RIVALS, strict=True):
        axes.set_title(f"over {rival}", fontsize=9)
    for axes in grid[1]:
        axes.set_xlabel("steps of MLHF")
    for axes, when in zip(grid[:, 0], ("after equal steps", "in equal time"), strict=True):
        axes.set_ylabel(f"loss of MLHF / rival's\n{when}")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7)


def draw_learned(figure: Any, content: dict[str, Any]) -> None:
    """Draws loss against steps, an axis per task and a line per learned optimizer."""
    rows = [row for row in content["rows"] if len(row["learned"]) > 1]
    lines = lambda row: row["learned"] | {"best tuned Adam": row["best_adam"]}
    panels = {
        row["task"]: {label: (row["steps"], losses) for label, losses in lines(row).items()} for row in rows
    }
    # What has diverged would flatten all else.
    scales = {"xscale": "log", "yscale": "log", "ylim": (1e-7, 1e2)}
    draw_panels(figure, panels, xlabel="steps", ylabel="training loss", **scales)


if __name__ == "__main__":
    main()
