"""General meta-parameters, never retuned, on networks and data that they never met.

Trains every task with MLHF, and against it two constants, Adam at its defaults, and grids of Adam, SGD with
momentum and Muon with three learning rates per decade. The constants are ``gauss_newton``, with one unit of
damping for all tensors, and MLHF before meta-training, with one for each. A grid counts with its best entry
at every step, so it is tuned for each step anew. Ratios below 1 say that MLHF has the lower training loss:
after as many steps, and in as much time, in which a rival takes more steps. The learned optimizers of the
literature are there too, with the meta-parameters that are shipped, as little retuned as MLHF; LODO, which
has none, with the settings that its authors use for a ResNet on CIFAR-10. So is the MLHF of the paper
(``cifar10``), where a task has only layers that it knows.

    python benchmarks/held_out.py --data-dir DIR --output runs/held_out

With ``--cosine`` all rates, that of MLHF too, fall along a cosine to zero at the end of the training, where
losses are then compared; learned optimizers that have no rate are left out, and nothing is timed.

What is finished is kept: ``--resume`` goes on after a stop. ``--quick`` takes minutes on two cores.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from experiment import command_line, finite_or_none, parse_options, require_at_least_one, save_drawing
from held_out_tasks import LENGTHS, TASKS, check_tasks

from mlhf_optax import load_pretrained, lodo, mlhf
from mlhf_optax.controllers.tensor_network import init_tensor_lstm
from mlhf_optax.experiments import (
    Comparison,
    Contender,
    compare,
    constant_contender,
    default_adam,
    grid_contenders,
    learned_contender,
    rates_per_decade,
)
from mlhf_optax.experiments.origin import with_origin, write_json
from mlhf_optax.experiments.progress import comparison_bar
from mlhf_optax.experiments.results import Curve
from mlhf_optax.learned import LEARNED
from mlhf_optax.tasks import Task

STEPS = (10, 30, 100, 300, 1000, 3000)
STEP_OPTIONS = {"max_growth": 1.0, "num_cg_steps": 2, "curvature_batch_size": 0.25}
BEST_CONSTANT = {"metric": "kronecker", "gradient_decay": 0.86, "unit_decay": 0.98, **STEP_OPTIONS}
RATES = {
    "adam": rates_per_decade(1e-4, 1e-1),
    "sgd": rates_per_decade(1e-3, 1.0),
    "muon": rates_per_decade(1e-3, 1e-1),
}
ADAM_OR_SGD = "best Adam or SGD"
RIVALS = ("constant", "untrained", "default Adam", ADAM_OR_SGD, "best Muon")
_LODO_SETTING = {"learning_rate": 0.08459, "meta_learning_rate": 7.946e-6, "momentum": 0.9343}
LODO = Contender("lodo", ("lodo",), (_LODO_SETTING,), lambda: lodo(**_LODO_SETTING), labels=("LODO",))
SOLVED = 1e-6
"""Losses below it count as this much."""
_UNEVEN = 1.1
FAITHFUL = "cifar10"
"""MLHF as in the paper, with an LSTM per coordinate and layer type: of convolutions and dense layers."""
LEARNED_RIVALS = (
    *("l2l", "rnnprop", "hyperadam", "variational_hyperadam", "hierarchical"),
    *(LODO.family, FAITHFUL),
)
ON_THE_SHELF = {*LEARNED, LODO.family}
"""Families of all learned optimizers, MLHF among them."""


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
        check_tasks(self.tasks)
        if unknown := sorted(set(self.learned) - set(LEARNED_RIVALS)):
            raise ValueError(f"--learned must be among {', '.join(LEARNED_RIVALS)}, got {', '.join(unknown)}")
        if not self.dampings or not all(damping > 0 for damping in self.dampings):
            raise ValueError(f"--dampings must be positive numbers, at least one, got {self.dampings}")
        require_at_least_one(self, "num_cg_steps", "steps", "seeds")


def contenders_for(task: Task, options: Options, length: int) -> list[Contender]:
    """Returns MLHF and its rivals for trainings of so many steps."""
    pretrained = load_pretrained(options.meta_params)
    changes: dict[str, Any] = {} if options.num_cg_steps is None else {"num_cg_steps": options.num_cg_steps}
    rivals = [
        learned_contender(task, pretrained, source=options.meta_params, **changes),
        constant_contender(task, options.dampings[:1], **BEST_CONSTANT),
        untrained_contender(task),
        default_adam(),
        *(grid_contenders([family], rates=rates)[0] for family, rates in RATES.items()),
    ]
    if options.dampings[1:]:
        rivals.append(constant_contender(task, options.dampings[1:], **BEST_CONSTANT))
    if options.cosine:
        own, *others = (with_cosine(contender, length) for contender in rivals)
        # A schedule bounds the learned rate of MLHF; what is multiplied by it would fall twice.
        changes["learning_rate"] = optax.cosine_decay_schedule(1.0, length)
        bounded = functools.partial(pretrained.optimizer, task.predict_fn, task.loss_fn, **changes)
        return [dataclasses.replace(own, make_optimizer=bounded), *others]
    return [*rivals, *(rival_contender(task, name) for name in options.learned if knows_layers(name, task))]


def with_cosine(contender: Contender, length: int) -> Contender:
    """Returns optimizers whose updates fall along a cosine to zero after so many steps."""
    schedule = optax.cosine_decay_schedule(1.0, length)

    def make(**setting: Any) -> optax.GradientTransformation:
        return optax.chain(contender.make_optimizer(**setting), optax.scale_by_schedule(schedule))

    settings = tuple({**setting, "cosine_steps": length} for setting in contender.settings)
    return dataclasses.replace(contender, make_optimizer=make, settings=settings)


def rival_contender(task: Task, name: str) -> Contender:
    """Returns a learned optimizer of the literature."""
    if name == LODO.family:
        return LODO
    return learned_contender(task, load_pretrained(name), name=name * (name == FAITHFUL), source=name)


def knows_layers(name: str, task: Task) -> bool:
    """Returns whether a task has only layers for which an optimizer was meta-trained."""
    if name != FAITHFUL:
        return True
    params = jax.eval_shape(task.init_fn, jax.random.key(0))
    try:
        jax.eval_shape(rival_contender(task, name).make_optimizer().init, params)
    except ValueError as error:
        if "layer type" in str(error):
            return False
        raise
    return True


def name_and_label(name: str) -> tuple[str, str]:
    """Returns what results and what tables call a learned optimizer."""
    if name == LODO.family:
        return LODO.names[0], LODO.labels[0]
    if name == FAITHFUL:
        return f"mlhf {name}", f"{LEARNED['mlhf'].label} {name}"
    return name, LEARNED[name].label


def untrained_contender(task: Task) -> Contender:
    """Returns MLHF before meta-training, which is a constant with a unit of damping for every tensor."""
    meta_params = init_tensor_lstm(jax.random.key(0))
    optimizer = mlhf(meta_params, task.predict_fn, task.loss_fn, **STEP_OPTIONS)
    return Contender("untrained", ("untrained",), (STEP_OPTIONS,), lambda: optimizer)


def ratios(curves: Sequence[Curve], step: int) -> dict[str, float]:
    """Returns MLHF's loss over that of every rival after a step, means over seeds.

    Losses below :data:`SOLVED` count as that: by then a task is solved.
    """
    return _ratios(curves, lambda curve: curve.loss_at(step), lambda rival: rival.loss_at(step))


def ratios_by_test_loss(curves: Sequence[Curve], step: int) -> dict[str, float]:
    """Returns the ratios of test losses after a step; none for a task without test data.

    Of a grid the entry counts whose test loss is lowest, which may be another than that of the training loss.
    """

    def loss_of(curve: Curve) -> float:
        loss = curve.test_loss[curve.steps.index(step)]
        return math.inf if loss is None else loss

    is_measured = any(loss is not None for loss in curves[0].test_loss)
    return _ratios(curves, loss_of, loss_of) if is_measured else {}


def ratios_by_time(curves: Sequence[Curve], step: int) -> dict[str, float]:
    """Returns the ratios that MLHF has after a step, to rivals that trained for as long; NaN if they did not.

    A loss between two recorded steps is interpolated, both on logarithmic scales.
    """
    seconds = step * (curves[0].seconds_per_step or math.nan)
    then = lambda rival: _loss_between(rival, seconds / (rival.seconds_per_step or 1))
    return _ratios(curves, lambda curve: curve.loss_at(step), then)


def _ratios(
    curves: Sequence[Curve], own_loss: Callable[[Curve], float], loss_of: Callable[[Curve], float]
) -> dict[str, float]:
    own, constant, untrained, default, *grid = curves
    families: dict[str, Sequence[Curve]] = {"constant": [constant], "untrained": [untrained]}
    families["default Adam"] = [default]
    families[ADAM_OR_SGD] = [curve for curve in grid if curve.family in ("adam", "sgd")]
    families["best Muon"] = [curve for curve in grid if curve.family == "muon"]
    families |= {curve.label: [curve] for curve in grid if curve.family in {*ON_THE_SHELF, constant.family}}
    best = {name: np.min([loss_of(curve) for curve in of_name]) for name, of_name in families.items()}
    loss = max(own_loss(own), SOLVED)
    return {name: loss / float(np.maximum(lowest, SOLVED)) for name, lowest in best.items()}


def _loss_between(curve: Curve, step: float) -> float:
    """Returns the loss after a step that need not be whole, and NaN after the last."""
    if not step <= curve.steps[-1]:
        return math.nan
    losses = np.log(np.maximum(curve.train_loss, 1e-12))
    after = int(np.searchsorted(curve.steps, step))
    if after == 0 or not np.isfinite(losses[after]):  # before the first, or about to diverge
        return curve.train_loss[after]
    return float(np.exp(np.interp(np.log(step), np.log(curve.steps), losses)))


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
        print_row(rows[-1])
        if (spread := spread_of_times(rows[-1]["seconds_per_step"])) > _UNEVEN:
            print(
                f"The times per step of Adam differ by {spread - 1:.0%} between rates: the machine was busy. "
                f"Delete seconds_per_step.json in {options.output / name} and go on with --resume."
            )
    for kind in ("ratios", "by_test_loss") if options.cosine else ("ratios", "by_time", "by_test_loss"):
        print_median(rows, kind)
    content = with_origin(command, seeds=options.seeds, num_cg_steps=options.num_cg_steps, rows=rows)
    write_json(options.output / "results.json", content)
    save_drawing(options.output / "figure.png", draw, content)
    if options.learned and not options.cosine:
        save_drawing(options.output / "learned.png", draw_learned, content)


def row_of(name: str, comparison: Comparison, steps: Sequence[int]) -> dict[str, Any]:
    """Returns what is kept of a task: ratios by step, losses, test accuracy and seconds per step."""
    curves = comparison.curves()
    own, *others = curves
    adams = [curve.accuracy for curve in others if curve.family == "adam"]
    kinds = {"ratios": ratios, "by_time": ratios_by_time, "by_test_loss": ratios_by_test_loss}
    found = {kind: {step: of_kind(curves, step) for step in steps} for kind, of_kind in kinds.items()}
    return {
        "task": name,
        "seeds": own.seeds,
        "steps": list(steps),
        **{
            kind: {step: {k: finite_or_none(v) for k, v in at.items()} for step, at in by_step.items()}
            for kind, by_step in found.items()
        },
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


def print_row(row: dict[str, Any]) -> None:
    """Prints a task: two lines per rival, by steps and by time."""
    accuracies = [row["accuracy"], row["best_adam_accuracy"]]
    about = "" if None in accuracies else ": accuracy {:.3f}, best Adam {:.3f}".format(*accuracies)
    print(f"\n{row['task']}{about}")
    print(f"{'loss over that of':21s}" + "".join(f"{step:>9}" for step in row["steps"]))
    for rival in row["ratios"][row["steps"][0]]:
        for kind, unknown in (("ratios", "diverged"), ("by_time", "-")):
            values = [row[kind][step][rival] for step in row["steps"]]
            if kind == "by_time" and set(values) == {None}:
                continue
            name = rival if kind == "ratios" else "  in equal time"
            print(f"{name:21s}" + "".join(f"{unknown if x is None else format(x, '.2f'):>9}" for x in values))
    print(f"{'(loss)':21s}" + "".join(f"{x:9.4f}" if x is not None else f"{'-':>9}" for x in row["losses"]))


def ratios_at(rows: Sequence[dict[str, Any]], step: Any, rival: str, kind: str = "ratios") -> list[float]:
    """Returns the ratios of all tasks that are trained so far; infinity where MLHF diverged.

    By time, those tasks are left out in which the rival did not train for as long.
    """
    found = [row[kind][step][rival] for row in rows if rival in row.get(kind, {}).get(step, {})]
    if kind == "by_time":
        return [ratio for ratio in found if ratio is not None]
    return [math.inf if ratio is None else ratio for ratio in found]


def ranks_at(rows: Sequence[dict[str, Any]], step: Any) -> list[int]:
    """Returns the place of MLHF among itself and :data:`RIVALS` by loss after a step, for every task.

    Equal losses share a place, so where all have solved a task, all are first.
    """
    found = [[ratios_at([row], step, rival) for rival in RIVALS] for row in rows if step in row["ratios"]]
    return [1 + sum(ratio > 1 for of_rival in of_task for ratio in of_rival) for of_task in found]


def print_median(rows: Sequence[dict[str, Any]], kind: str) -> None:
    """Prints the median over tasks of every ratio, and of how many tasks."""
    steps = sorted({step for row in rows for step in row["steps"] if step in STEPS})
    title = {"ratios": "median over tasks", "by_time": "in equal time", "by_test_loss": "by test loss"}[kind]
    print(f"\n{title:21s}", end="")
    print("".join(f"{step:>14}" for step in steps))
    for rival in dict.fromkeys(rival for row in rows for rival in row[kind][row["steps"][0]]):
        found = [ratios_at(rows, step, rival, kind) for step in steps]
        cells = [f"{statistics.median(x):.2f} (of {len(x)})" if x else "-" for x in found]
        print(f"{rival:21s}" + "".join(f"{cell:>14}" for cell in cells), flush=True)


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws the ratios, an axis per rival, a line per task; equal steps above, equal time below."""
    from matplotlib import colormaps

    figure.set_size_inches(9, 5.2)
    grid = figure.subplots(2, len(RIVALS), sharex=True, sharey=True)
    for kind, row_of_axes in zip(("ratios", "by_time"), grid, strict=True):
        for axes, rival in zip(row_of_axes, RIVALS, strict=True):
            axes.set_prop_cycle(color=colormaps["tab20"].colors)  # ten are fewer than there are tasks
            for row in content["rows"]:
                values = [row[kind][step][rival] or math.nan for step in row["steps"]]
                axes.plot(row["steps"], values, marker="o", markersize=3, label=row["task"])
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
    figure.set_size_inches(9, 2.5 * math.ceil(len(rows) / 3))
    grid = figure.subplots(math.ceil(len(rows) / 3), 3, squeeze=False).flat
    for axes in grid[len(rows) :]:
        axes.set_axis_off()
    for axes, row in zip(grid[: len(rows)], rows, strict=True):
        lines = row["learned"] | {"best tuned Adam": row["best_adam"]}
        for label, losses in lines.items():
            style = {"color": "black", "linestyle": "--"} if label == "best tuned Adam" else {}
            axes.plot(row["steps"], [math.nan if x is None else x for x in losses], label=label, **style)
        axes.set(xscale="log", yscale="log", title=row["task"], xlabel="steps", ylabel="training loss")
        axes.set_ylim(1e-7, 1e2)  # what has diverged would flatten all else
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7)


if __name__ == "__main__":
    main()
