"""The end of a training, on data not seen: general meta-parameters against tuned AdamW and Muon.

Trains a mini ResNet with batch normalisation on CIFAR-10 with augmentation, a transformer on a part of
Shakespeare that it learns by heart, and a deep autoencoder. AdamW and Muon have a cosine to zero at the end,
and a grid of rates and weight decays; schedule-free AdamW has its default rate, and a grid of weight decays.
MLHF has its defaults, and in rows of their own what may lower the test loss: weight decay, a bound on the
rate that falls along a cosine, both. An average of the weights, over a twentieth of the training, is judged
beside the weights in each training. Settings are chosen by the loss on a part for validation: for the best
moment by the lowest, for the end by the last. The test part chooses nothing.

Targets: test loss at the end at most 1.00 of that of the best AdamW and at most 1.02 of Muon's, in the
median; accuracy no lower on any.

    python benchmarks/held_out/to_the_end.py --data-dir DIR --output runs/to_the_end

At full length, on one GPU:

    python benchmarks/held_out/to_the_end.py --problems cifar10 --whole --channels 16 --epochs 250

What is finished is kept: ``--resume`` goes on after a stop. ``--quick`` takes a minute.
"""

import dataclasses
import functools
import itertools
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import optax
from end_trainings import Judge, Problem, Training, autoencoder, cifar10, digits, shakespeare, train
from held_out import brief
from optax import contrib

from mlhf_optax import load_pretrained
from mlhf_optax.experiments.origin import with_origin, write_json
from mlhf_optax.experiments.progress import progress_bar
from mlhf_optax.experiments.scripts import (
    Table,
    command_line,
    draw_panels,
    parse_options,
    save_drawing,
    saved,
)
from mlhf_optax.experiments.tables import bold_ratio, format_loss
from mlhf_optax.support.checks import FROM_ONE, check_choice, check_fields
from mlhf_optax.support.files import locked_folder

ProblemName = Literal["cifar10", "shakespeare", "autoencoder", "digits"]
GRIDS = {
    "AdamW": ((1e-3, 3e-3, 1e-2), (1e-4, 0.1)),
    "Muon": ((5e-3, 2e-2, 5e-2), (0.0, 0.1)),
}
"""Rates, and weight decays, which both multiply by the rate."""
_DECAYS = (0.0, 0.1)  # of schedule-free
_OWN_DECAYS = (1e-4, 5e-4)  # of MLHF, whose rate is about 1
OWN = "MLHF"
FAMILIES = (OWN, "MLHF, weight decay", "MLHF, falling", "MLHF, both", *GRIDS, "schedule-free AdamW")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of this script."""

    problems: tuple[ProblemName, ...] = ("cifar10", "shakespeare", "autoencoder")
    """Which problems."""
    families: tuple[str, ...] = FAMILIES
    """Which optimizers."""
    meta_params: str = "general"
    """Shipped name or path."""
    epochs: int = 30
    """Length of the trainings on CIFAR-10."""
    channels: int = 8
    """Channels of the first blocks of the ResNet; the paper has 16."""
    whole: bool = False
    """Train on 45,000 images of CIFAR-10, not on 20,000."""
    steps: int | None = None
    """Greatest length of all trainings."""
    records: int = 15
    """How often a training is judged."""
    seeds: int = 1
    """Trainings of every setting."""
    data_dir: Path | None = None
    """Where the data lie; by default $TFDS_DATA_DIR."""
    cache_dir: Path | None = None
    """Where decoded data are kept."""
    output: Path = Path("runs/to_the_end")
    """Folder for all that is written."""
    resume: bool = False
    """Go on from what lies in the folder."""
    quick: bool = False
    """60 steps of the digits."""

    def __post_init__(self):
        for name in self.problems:
            check_choice("problems", name, get_args(ProblemName))
        for name in self.families:
            check_choice("families", name, FAMILIES)
        check_fields(self, FROM_ONE, "steps", or_none=True)
        check_fields(self, FROM_ONE, "epochs", "channels", "records", "seeds")


def problem_of(name: str, options: Options) -> Problem:
    """Returns a problem by name."""
    folders = options.data_dir, options.cache_dir
    make: Mapping[str, Callable[[], Problem]] = {
        "cifar10": functools.partial(cifar10, folders, options.epochs, options.channels, options.whole),
        "shakespeare": functools.partial(shakespeare, folders),
        "autoencoder": functools.partial(autoencoder, folders),
        "digits": digits,
    }
    found = make[name]()
    return found._replace(length=min(options.steps or found.length, found.length))


def trainings(family: str, problem: Problem, meta_params: str) -> list[Training]:
    """Returns a training for every setting of a family of optimizers."""
    length = problem.length
    falling = lambda rate: optax.cosine_decay_schedule(rate, length)
    if family in GRIDS:
        make = optax.adamw if family == "AdamW" else contrib.muon
        settings = [
            {"learning_rate": rate, "weight_decay": decay}
            for rate, decay in itertools.product(*GRIDS[family])
        ]
        build = lambda learning_rate, weight_decay: make(falling(learning_rate), weight_decay=weight_decay)
        return [Training(setting, functools.partial(build, **setting)) for setting in settings]
    if family.startswith("schedule-free"):
        free = contrib.schedule_free_adamw
        judged = contrib.schedule_free_eval_params
        return [
            Training({"weight_decay": decay}, functools.partial(free, weight_decay=decay), judged)
            for decay in _DECAYS
        ]
    learned, task = load_pretrained(meta_params), problem.task
    decays = _OWN_DECAYS if family in ("MLHF, weight decay", "MLHF, both") else (0.0,)
    bound = {"learning_rate": falling(1.0)} if family in ("MLHF, falling", "MLHF, both") else {}
    build = functools.partial(learned.optimizer, task.predict_fn, task.loss_fn, **bound)
    return [
        Training({"weight_decay": decay}, functools.partial(build, weight_decay=decay)) for decay in decays
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, prints a table, writes ``results.json`` and ``figure.png``."""
    options = parse_options(Options, __doc__, arguments)
    if options.quick:
        options = dataclasses.replace(options, problems=("digits",), records=min(6, options.records))
    command, rows = command_line(__file__, arguments), []
    with locked_folder(options.output) as folder, progress_bar("trainings") as update:
        for name in options.problems:
            problem = problem_of(name, options)
            judge = Judge(problem)
            steps = np.linspace(0, problem.length, options.records + 1).round().astype(int)[1:]
            steps = sorted(set(steps[steps > 0].tolist()))
            plan = [
                (family, number, training, seed)
                for family in options.families
                for number, training in enumerate(trainings(family, problem, options.meta_params))
                for seed in range(options.seeds)
            ]
            for done, (family, number, training, seed) in enumerate(plan):
                update(completed=done, total=len(plan), loss=f"{name}, {family}")
                stem = re.sub(r"[^a-z0-9]+", "-", f"{name} {family} {number} {seed}".lower())
                path = folder / f"{stem}.json"
                found = train(problem, judge, training, steps, seed, path, options.resume)
                rows.append({"problem": name, "family": family} | found)
        rows = [{key: value for key, value in row.items() if key != "about"} for row in rows]
        content = with_origin(command, rows=rows)
        write_json(folder / "results.json", content)
        save_drawing(folder / "figure.png", draw, content)
    for show in (table, ratios):
        print("", *show(content).markdown(), sep="\n", flush=True)


def mean_curves(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a row for every problem, family and setting: means over seeds, infinite where one diverged.

    Each has ``steps``, and for ``"raw"`` and ``"average"`` lists of numbers by name, such as ``test_loss``.
    """
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in content["rows"]:
        groups.setdefault((row["problem"], row["family"], repr(row["setting"])), []).append(row)
    means = []
    for rows in groups.values():
        first = {key: rows[0][key] for key in ("problem", "family", "setting", "steps")}
        first["seconds_per_step"] = statistics.median(row["seconds_per_step"] for row in rows)
        for kind in ("raw", "average"):
            names = rows[0][kind][0]
            first[kind] = {
                name: [_mean(rows, kind, index, name) for index in range(len(first["steps"]))]
                for name in names
            }
        means.append(first)
    return means


def _mean(rows: Sequence[dict[str, Any]], kind: str, index: int, name: str) -> float:
    """Returns a mean over seeds; what diverged ends early, with no more records. NaN without classes."""
    is_accuracy = name.endswith("accuracy")
    if is_accuracy and rows[0][kind][0][name] is None:
        return np.nan
    values = [row[kind][index][name] if index < len(row[kind]) else None for row in rows]
    return float(np.mean([(0.0 if is_accuracy else np.inf) if x is None else x for x in values]))


def chosen(curves: Sequence[dict[str, Any]], kind: str, at_end: bool) -> tuple[dict[str, Any], int]:
    """Returns the setting with the lowest validation loss, at the best moment or at the end, and when."""
    losses = [one[kind]["validation_loss"] for one in curves]
    when = [len(each) - 1 if at_end else int(np.argmin(each)) for each in losses]
    best = min(range(len(curves)), key=lambda index: losses[index][when[index]])
    return curves[best], when[best]


def _judged(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a row for every problem, family and kind of weights: what is found at both moments."""
    curves, rows = mean_curves(content), []
    for problem in dict.fromkeys(one["problem"] for one in curves):
        for family in dict.fromkeys(one["family"] for one in curves):
            own = [one for one in curves if (one["problem"], one["family"]) == (problem, family)]
            for kind in ("raw", "average") if own else ():
                row = {"problem": problem, "family": family, "kind": kind}
                for moment, at_end in (("best", False), ("end", True)):
                    one, index = chosen(own, kind, at_end)
                    found = {key: values[index] for key, values in one[kind].items()}
                    row[moment] = found | {"step": one["steps"][index], "setting": one["setting"]}
                    row["seconds_per_step"] = one["seconds_per_step"]
                rows.append(row)
    return rows


def _name(row: dict[str, Any]) -> str:
    return row["family"] + ", weights averaged" * (row["kind"] == "average")


def table(content: dict[str, Any]) -> Table:
    """Returns a row per problem, family and kind of weights: test loss and accuracy at both moments."""
    heads = ["test loss at the best moment", "accuracy", "step", "test loss at the end", "accuracy"]
    rows = [["problem, optimizer", *heads, "training loss", "setting at the end", "ms per step"]]
    share = lambda x: "" if np.isnan(x) else f"{100 * x:.1f}%"
    for row in _judged(content):
        best, end = row["best"], row["end"]
        cells = [format_loss(best["test_loss"]), share(best["test_accuracy"]), f"{best['step']:,}"]
        cells += [format_loss(end["test_loss"]), share(end["test_accuracy"]), format_loss(end["train_loss"])]
        setting = ", ".join(f"{x:g}" for x in end["setting"].values())
        milliseconds = f"{1000 * row['seconds_per_step']:.3g}"
        rows.append([f"{row['problem']}, {_name(row)}", *cells, setting, milliseconds])
    note = (
        "The best moment is that of the lowest validation loss. Settings are rate and weight decay, or "
        "weight decay alone, chosen by validation loss for each moment."
    )
    return Table(rows, note, brief(content))


def ratios(content: dict[str, Any]) -> Table:
    """Returns a row per kind of MLHF: its test loss at the end over that of the best of each rival."""
    judged = _judged(content)
    problems = list(dict.fromkeys(row["problem"] for row in judged))
    rivals = [name for name in (*GRIDS, FAMILIES[-1]) if any(row["family"] == name for row in judged)]
    heads = [text for rival in rivals for text in (f"loss over {rival}'s", "accuracy, points")]
    rows = [["at the end", *heads]]
    for kind in dict.fromkeys(_name(row) for row in judged if row["family"].startswith(OWN)):
        own, cells = {row["problem"]: row["end"] for row in judged if _name(row) == kind}, [kind]
        for rival in rivals:
            pairs = [
                (own[problem], _best_of(judged, problem, rival)) for problem in problems if problem in own
            ]
            over = [mine["test_loss"] / its["test_loss"] for mine, its in pairs if its]
            points = [100 * (mine["test_accuracy"] - its["test_accuracy"]) for mine, its in pairs if its]
            shown = f"{bold_ratio(statistics.median(over))} ({', '.join(f'{x:.2f}' for x in over)})"
            cells += [shown if over else "", ", ".join(f"{x:+.1f}" for x in points if not np.isnan(x))]
        rows.append(cells)
    note = (
        f"Medians, in brackets {', '.join(problems)}. Targets: at most 1.00 of AdamW's loss and 1.02 of "
        "Muon's, no accuracy lower. A rival has the better of its weights and their average, by validation "
        "loss."
    )
    return Table(rows, note, brief(content))


def _best_of(judged: Sequence[dict[str, Any]], problem: str, family: str) -> dict[str, Any]:
    own = [row["end"] for row in judged if (row["problem"], row["family"]) == (problem, family)]
    return min(own, key=lambda one: one["validation_loss"]) if own else {}


TABLES = {
    name: lambda folder, make=make: make(*saved(folder, "to_the_end"))
    for name, make in (("to_the_end", table), ("to_the_end_ratios", ratios))
    if (Path(__file__).parent / "results" / "to_the_end.json").exists()  # a table comes with its results
}


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draws the test loss against steps, an axis per problem, a line per family at its setting of the end."""
    curves, panels = mean_curves(content), {}
    for problem in dict.fromkeys(one["problem"] for one in curves):
        for family in dict.fromkeys(one["family"] for one in curves):
            if own := [one for one in curves if (one["problem"], one["family"]) == (problem, family)]:
                one, _ = chosen(own, "raw", True)
                panels.setdefault(problem, {})[family] = (one["steps"], one["raw"]["test_loss"])
    draw_panels(figure, panels, yscale="log", xlabel="steps", ylabel="test loss")


if __name__ == "__main__":
    main()
