"""Writes the tables of README.md and benchmarks/README.md from benchmarks/results.

    python benchmarks/readme_tables.py            rewrites the tables
    python benchmarks/readme_tables.py --check    fails if one is not up to date

A table lies between ``<!-- table NAME -->`` and ``<!-- end NAME -->``; its name is a key of ``TABLES``.
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from ablation_solvers import DAMPING_ALONE, TITLES
from held_out import ADAM_OR_SGD, LEARNED_RIVALS, STEPS, ratios_at

from mlhf_optax import load_pretrained
from mlhf_optax.comparison import Comparison, comparison_markdown
from mlhf_optax.comparison.record import origin
from mlhf_optax.comparison.results import best_at
from mlhf_optax.comparison.tables import format_loss, format_ratio, markdown_table
from mlhf_optax.learned import LEARNED

ROOT = Path(__file__).resolve().parents[1]
FILES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
SECOND_ORDER = {"hf-fixed": "HF(Fixed)", "hf-lm": "HF(LM)", "kfac": "K-FAC"}
STEP_COLUMNS = ("adam", "mlhf", "mlhf-half", "mlhf-quarter", "somax-ggn-cg4", "hessian-free-20")
_CONSTANTS = ("constant", "untrained")
FLOORS = {"evaluations": "evaluating 80 tanh and what else is elementary", "copies": "copying the states"}


def with_note(rows: list[list[str]], note: str, record: dict[str, Any]) -> list[str]:
    """Returns the lines of a table, and below it a note with where and how it was measured."""
    return [*markdown_table(rows), "", f"{note} {origin(record)}".strip()]


def bold(own: float, best: float) -> str:
    """Returns one loss as a multiple of another, bold where it is the lower one."""
    return f"**{format_ratio(own, best)}**" if own < best else format_ratio(own, best)


def by_step(found: Comparison) -> list[str]:
    """Returns losses by step, as of ``mlhf-optax train``."""
    seeds = found.curves()[0].seeds
    note = (
        f"`{found.record['task']}`, mean over {seeds} seeds, loss in nats on the whole training part. For "
        f"each first-order family we show the setting with the lowest final loss. {origin(found.record)}"
    )
    return [*comparison_markdown(found), "", note]


def by_epoch(found: Comparison) -> list[str]:
    """Returns losses by epoch, and against the best of the grid at equal time."""
    record, curves = found.record, found.curves()
    learned, others = ([c for c in curves if c.is_learned == wanted] for wanted in (True, False))
    note = (
        f"`{record['task']}`, {curves[0].steps[-1] // record['steps_per_epoch']} epochs of "
        f"{record['num_train']} images, batch {record['batch_size']}, seeds: {learned[0].seeds} for MLHF, "
        f"{others[0].seeds} for the grid."
    )
    if learned[0].seeds > 1:
        shown = [*learned, best_at(others, others[0].steps[-1])]
        losses = (f"{c.label} {', '.join(map(format_loss, found.last_losses(c.optimizer)))}" for c in shown)
        note += f" The last loss of every seed: {'; '.join(losses)}."
    return [*comparison_markdown(found, "epoch"), "", f"{note} {origin(record)}"]


def second_order(found: Comparison, longer: Comparison | None = None) -> list[str]:
    """Returns rows for each MLHF and for the best setting of each family at the end of the run.

    In brackets are the loss and the time of MLHF over those of the best setting of all. ``longer`` are
    results of a longer run with ``--only mlhf``, as its steps take less time.
    """
    curves, last = found.curves(), found.curves()[0].steps[-1]
    others = [curve for curve in curves if not curve.is_learned]
    first = best_at(others, last)
    rows = [["", "steps", "training loss", "test accuracy", "seconds in all"]]
    followed = {curve.optimizer: curve for curve in longer.curves()} if longer else {}
    for curve in (one for one in curves if one.is_learned):
        much = followed.get(curve.optimizer, curve)
        for step, loss, accuracy in zip(much.steps, much.train_loss, much.test_accuracy, strict=True):
            # The time per step is that of the comparison, where all were measured in turns.
            seconds, its = step * curve.seconds_per_step, last * first.seconds_per_step
            shown = f"{format_loss(loss)} ({bold(loss, first.loss_at(last))})", f"{accuracy:.1%}"
            rows.append([curve.label, f"{step}", *shown, f"{seconds:.0f} ({bold(seconds, its)})"])
    for family, title in SECOND_ORDER.items():
        members = [curve for curve in others if curve.family == family]
        if members:
            best, lost = best_at(members, last), sum(math.isinf(c.loss_at(last)) for c in members)
            name = (
                f"{title}, best of {len(members)}, {lost} diverged: {best.label.removeprefix(f'{family} ')}"
            )
            seconds = f"{last * best.seconds_per_step:.0f}"
            rows.append([name, f"{last}", format_loss(best.loss_at(last)), f"{best.accuracy:.1%}", seconds])
    record = found.record
    note = (
        f"`{record['task']}`, {record['num_train']} images, batch {record['batch_size']}, seeds: "
        f"{first.seeds}; in brackets over the best of all settings. {origin(record)}"
    )
    if longer:
        note += f" The losses of MLHF: `{longer.record['command']}`."
    return [*markdown_table(rows), "", note]


def transfer_digits(content: dict[str, Any]) -> list[str]:
    """Returns one row per variant: the loss of MLHF over that of the best of the grid."""
    first = content["rows"][0]
    head = ["loss of MLHF / best of the grid, after step", *map(str, first["steps"])]
    rows = [[*head, "test accuracy, points"]]
    for row in content["rows"]:
        pairs = zip(row["mlhf"], row["best_of_grid"], strict=True)
        points = f"{100 * (row['mlhf_test_accuracy'] - row['best_test_accuracy']):+.1f}"
        ratios = (bold(math.inf if own is None else own, best) for own, best in pairs)
        rows.append([row["variant"], *ratios, points])
    note = f"The same meta-parameters on networks and batches that they never saw, {first['seeds']} seeds."
    return with_note(rows, note, content)


def ablation(content: dict[str, Any]) -> list[str]:
    """Returns one row per configuration: l_p and residual at the end, and on the same systems."""
    rows = [["meta-training of", "l_p at the end", "residual", "same systems: l_p ratio", "residual"]]
    for result in content["results"]:
        same, ends = result["on_same_systems"], (result["l_p"][-1], result["residual_norm"][-1])
        values = (*ends, same["l_p_ratio"], same["residual_ratio"])
        rows.append([TITLES[result["name"]], *(f"{x:.3g}" for x in values)])
    same = content["damping_alone"]
    rows.append([DAMPING_ALONE, "", "", f"{same['l_p_ratio']:.3g}", f"{same['residual_ratio']:.3g}"])
    note = (
        f"`{content['task']}`, {content['iterations']} meta-iterations, seeds: {content['seeds']}, batch "
        f"{content['batch_size']}. A lower l_p is better. On the same systems l_p is given over that of 20 "
        "steps without LSTM_p (above 1 is better), and the residual over the gradient."
    )
    return with_note(rows, note, content)


def long_run(content: dict[str, Any]) -> list[str]:
    """Returns loss, accuracy, damping and preconditioner at some steps of the long run."""
    records = content["records"]
    count = len(records["step"])
    chosen = sorted({round(count ** (i / 5)) - 1 for i in range(6)})
    rows = [["after step", *(f"{records['step'][i]:.0f}" for i in chosen)]]
    formats = {"train_loss": ".3f", "test_accuracy": ".1%"}
    for name, form in (formats | dict.fromkeys(("damping_mean", "preconditioner_mean"), ".2g")).items():
        rows.append([name.replace("_", " "), *(format(records[name][i], form) for i in chosen)])
    skipped = f"{records['skipped_steps'][-1]:.0f} of {content['num_steps']} steps skipped"
    verdict = "no loss above the first record" if content["is_stable"] else "NOT stable"
    share = content["curvature_share"] or 1
    momentum = f", momentum {content['momentum']:g}" if content.get("momentum") else ""
    note = (
        f"`{content['task']}`, batch {content['batch_size']}, curvature on {share:g} of it, learning rate "
        f"{content['learning_rate']:g}{momentum}: {skipped}, {verdict}."
    )
    return with_note(rows, note, content)


def step_time(content: dict[str, Any]) -> list[str]:
    """Returns a row per task: SGD's time, those of others as multiples of it, and MLHF's over its parts."""
    ends = ("`mlhf` / (gradient + 5 products)", "first call of `mlhf`, s")
    rows = [["time per step / that of SGD", "SGD, ms", *STEP_COLUMNS, *ends]]
    for part in content["parts"]:
        where = part["task"], part["batch"]
        own = {row["optimizer"]: row for row in content["rows"] if (row["task"], row["batch"]) == where}
        ratios = [f"{own[name]['ratio_to_sgd']:.2g}" if name in own else "-" for name in STEP_COLUMNS]
        first = own["mlhf"]["compile_seconds"] + own["mlhf"]["seconds"]
        start = f"{part['task']}, batch {part['batch']}", f"{1e3 * own['sgd']['seconds']:.3g}"
        rows.append([*start, *ratios, f"{part['mlhf_over_parts']:.2f}", f"{first:.1f}"])
    return with_note(rows, "", content)


def ggn_in_loops(content: dict[str, Any]) -> list[str]:
    """Says how much slower GGN products of convolutions are in loops, with the library's and with lax's."""
    rows = [row for row in content["rows"] if row["layer"].startswith("conv")]
    own, rivals = ([row["ratio"] for row in rows if row["is_rival"] == wanted] for wanted in (False, True))
    missed = sum(value > content["target"] for value in own)
    verdict = f"{missed} of {len(own)} above" if missed else "all within"
    return [
        "A GGN product of a convolution inside `fori_loop` or `scan` takes "
        f"{min(own):.2f} to {max(own):.2f} times as long as outside ({verdict} the target of "
        f"{content['target']:g}); with `lax.conv_general_dilated` it takes {min(rivals):.1f} to "
        f"{max(rivals):.0f} times as long. {origin(content)}"
    ]


def lstm_throughput(content: dict[str, Any]) -> list[str]:
    """Returns nanoseconds per coordinate by number of coordinates, and the floor."""
    rows = [["both LSTMs, ns per coordinate", "forward", "with gradient", "floor", "forward / floor"]]
    for row in (one for one in content["rows"] if one["features"] == "log-global"):
        size = f"{row['coordinates']:.0e}".replace("e+0", "e")
        times = [row[f"{name}_ns"] for name in ("forward", "gradient", "floor")]
        cells = [f"{time:.0f}" if time else "-" for time in times]
        name = f"{size} coordinates, {row['carry_dtype']} states"
        rows.append([name, *cells, f"{row['forward_ratio']:.1f}"])
    return with_note(
        rows, f"The floor is the time of {FLOORS[content['floor']]}, on the same arrays.", content
    )


def meta_step_time(content: dict[str, Any]) -> list[str]:
    """Returns a row per configuration of meta-training."""
    head = ["ms per inner step", "/ step of SGD", "temporaries, MB", "compiling, s"]
    rows = [["meta-training: T, K, tasks", *head]]
    for row in content["rows"]:
        setting = f"{row['unroll_length']}, {row['num_cg_steps']}, {row['num_tasks']}"
        cells = [f"{1e3 * row['seconds_per_inner_step']:.3g}", f"{row['ratio']:.1f}"]
        cells += [f"{row['temp_bytes'] / 1e6:.0f}", f"{row['compile_seconds']:.0f}"]
        rows.append([f"{row['task']}, batch {row['batch']}: {setting}", *cells])
    return with_note(rows, "", content)


def held_out(content: dict[str, Any]) -> list[str]:
    """Returns a row per rival and task: the loss over the rival's by step, accuracy, and time per step."""
    heads = [*map(str, STEPS), "test accuracy, points", "step / Adam's"]
    rows = [["loss of MLHF / best of the grid, after step", *heads]]
    shown = [(ADAM_OR_SGD, "ratios"), (ADAM_OR_SGD, "by_time"), ("best Muon", "ratios")]
    for rival, kind in [*shown, ("best Muon", "by_time"), *((name, "ratios") for name in _CONSTANTS)]:
        for entry in content["rows"]:
            found = (ratios_at([entry], str(step), rival, kind) for step in STEPS)
            cells = [bold(ratio[0], 1.0) if ratio else "" for ratio in found]
            last = accuracy_and_time(entry) if (rival, kind) == shown[0] else ["", ""]
            when = " in equal time" if kind == "by_time" else ""
            rows.append([f"{entry['task']}, {rival}{when}", *cells, *last])
    note = (
        "MLHF with `load_pretrained()` on networks and data that it never met, nothing retuned, seeds: "
        f"{content['seeds']}. The best of ten learning rates of Adam and of SGD with momentum, or of seven "
        "of Muon, is chosen anew at every step. `constant` is the best constant with one unit of damping for "
        "all tensors, `untrained` is MLHF before meta-training, with one for each; both are the same for all "
        "tasks. "
        "In equal time: MLHF after that step against rivals that trained for as long, compilation apart; "
        f"empty where they did not. {content.get('note', '')}"
    )
    return with_note(rows, note, content)


def accuracy_and_time(entry: dict[str, Any]) -> list[str]:
    """Returns how many points of accuracy MLHF is ahead of Adam, and its time per step over Adam's."""
    own, best = entry["accuracy"], entry["best_adam_accuracy"]
    seconds = entry["seconds_per_step"]
    points = "" if None in (own, best) else f"{100 * (own - best):+.1f}"
    return [points, f"{seconds['mlhf_general'] / seconds['adam defaults']:.1f}"]


def held_out_medians(content: dict[str, Any]) -> list[str]:
    """Returns the median over tasks of the loss over every rival's, by step."""
    steps = STEPS[:-1]  # few tasks go on to the last
    rows = [["loss of MLHF over that of", *(f"{step} steps" for step in steps)]]
    names = {
        ADAM_OR_SGD: "the best tuned Adam or momentum",
        "best Muon": "the best tuned Muon",
        "default Adam": "Adam at its defaults",
        "constant": "the best constant (`gauss_newton`)",
        "untrained": "itself before meta-training",
    }

    def cell(ratios: list[float]) -> str:
        ahead = f"({sum(ratio < 1 for ratio in ratios)} of {len(ratios)})"
        return f"{bold(statistics.median(ratios), 1.0)} {ahead}" if ratios else ""

    for kind, when in (("ratios", ""), ("by_time", ", in equal time")):
        for rival, name in names.items():
            if kind == "ratios" or rival not in _CONSTANTS:  # their steps take about as long
                found = (ratios_at(content["rows"], str(step), rival, kind) for step in steps)
                rows.append([f"{name}{when}", *map(cell, found)])
    note = (
        f"Median over {len(content['rows'])} tasks that no meta-training met; in brackets on how many MLHF "
        "is ahead. Nothing is retuned for MLHF; each rival is tuned for each task and step anew. In equal "
        "time a rival takes as many steps as fit into those of MLHF; tasks in which it trained for less are "
        f"left out. {content.get('note', '')}"
    )
    return with_note(rows, note, content)


def held_out_learned(content: dict[str, Any]) -> list[str]:
    """Returns a row per learned optimizer: MLHF's loss over its loss, and what it costs."""
    steps = STEPS[:-1]
    entries = [row for row in content["rows"] if len(row.get("learned", {})) > 1]
    heads = ["step / Adam's", "state, floats per parameter", "diverged"]
    rows = [["loss of MLHF over that of", *(f"{step} steps" for step in steps), *heads]]
    for name in ("mlhf_general", *LEARNED_RIVALS):
        label = LEARNED[name].label
        found = [ratios_at(entries, str(step), label) for step in steps]
        times = [row["seconds_per_step"][name] / row["seconds_per_step"]["adam defaults"] for row in entries]
        floats = statistics.median(row["state_floats"][name] for row in entries)
        diverged = sum(has_diverged(row["learned"][label]) for row in entries)
        costs = [f"{statistics.median(times):.1f}", f"{floats:.0f}", f"{diverged} of {len(entries)}"]
        rows.append([label, *(bold(statistics.median(x), 1.0) if x else "" for x in found), *costs])
    note = (
        f"Medians over {len(entries)} tasks that no meta-training met. Each has the meta-parameters that are "
        "shipped, as little retuned as MLHF; the rivals' were meta-trained for far shorter than in their "
        "papers. Diverged: not finite at the end, or twice the loss of the tenth step."
    )
    return with_note(rows, note, content)


def has_diverged(losses: list[float | None]) -> bool:
    """Returns whether a training ended with no finite loss, or far above its first recorded one."""
    first, last = losses[0], losses[-1]
    return last is None or first is None or last > 2 * first


def scaling(content: dict[str, Any]) -> list[str]:
    """Returns what a step sends on the most devices, and the efficiency predicted for them."""
    most = max(row["devices"] for row in content["rows"])
    found = {
        (row["optimizer"], row["placement"], row["scaling"]): row
        for row in content["rows"]
        if row["devices"] == most
    }
    rows = [["optimizer", "parameters", "collectives per step", "MB per step", "weak", "strong"]]
    for optimizer, placement in dict.fromkeys(key[:2] for key in found):
        weak, strong = (found[optimizer, placement, kind] for kind in ("weak", "strong"))
        sent = ", ".join(f"{count} {kind}" for kind, count in weak["collectives"].items())
        efficiencies = [f"{row['efficiency']:.2f}" for row in (weak, strong)]
        rows.append([optimizer, placement, sent, f"{weak['bytes'] / 1e6:.0f}", *efficiencies])
    each = {kind: next(r["batch"] for k, r in found.items() if k[2] == kind) for kind in ("weak", "strong")}
    note = (
        f"A dense network 256-1024-1024-128 on {most} devices; {each['weak']:,} examples in weak scaling, "
        f"{each['strong']:,} in strong. The efficiencies are predicted by the model that the script writes "
        f"out: links of {content['model']['bandwidth'] / 1e9:.0f} GB/s, nothing overlaps. No devices were at "
        "hand to measure them on."
    )
    return with_note(rows, note, content)


def meta_training_processes(content: dict[str, Any]) -> list[str]:
    """Returns a row per trainer: seconds of a meta-iteration, and how much faster two processes are."""
    sizes = content["sizes"]
    rows = [["trainer", "one process, s", "two, s", "speed-up", "two that exchange nothing"]]
    for row in content["rows"]:
        name = {"long horizons": "`make_long_horizon_step`", "meta_step": "`make_meta_step`"}[row["trainer"]]
        seconds = [f"{row[way]:.2f}" for way in ("one", "two")]
        rows.append([name, *seconds, *(f"{row[f'{way}_speed_up']:.2f}" for way in ("two", "apart"))])
    note = (
        f"A meta-iteration of {sizes['trainings']} inner trainings (pairs with long horizons) of "
        f"{sizes['steps']} steps, `{sizes['task']}`, batch {sizes['batch']}; medians of "
        f"{len(content['rows'][0]['rounds'])} rounds, of the ratios within a round."
    )
    return with_note(rows, note, content)


def ten_times_horizon(content: dict[str, Any]) -> list[str]:
    """Returns a row per task: last loss and worst rise of MLHF, and of Adam at its defaults."""
    rows = [["task", "last loss", "lowest", "worst rise", "Adam's last loss", "lowest", "worst rise"]]
    for task in dict.fromkeys(row["task"] for row in content["rows"]):
        cells = [task]
        for row in (one for one in content["rows"] if one["task"] == task):
            losses = ["-" if row[name] is None else format_loss(row[name]) for name in ("last", "best")]
            rise = "not finite" if row["worst_rise"] is None else f"{row['worst_rise']:.1f}"
            cells += [*losses, rise + " (at chance)" * row["ends_at_chance"]]
        rows.append(cells)
    own = [row for row in content["rows"] if row["is_learned"]]
    note = (
        f"{own[0]['steps'][-1]:,} steps of one training each; meta-training ends at 3,000. The worst rise is "
        "the largest ratio of the training loss to its lowest until then, where losses below "
        f"{content['floor']:g} of the loss before the first step count as that much. MLHF is above "
        f"{content['spike']:g} on {sum(row['blows_up'] for row in own)} of {len(own)}, and ends at chance on "
        f"{sum(row['ends_at_chance'] for row in own)}."
    )
    return with_note(rows, note, content)


def general_validation() -> list[str]:
    """Returns a row per validation of the meta-training of the shipped general meta-parameters."""
    found = load_pretrained().record
    steps = found["meta_training"]["validation_steps"]
    rows = [["meta-iterations", *(f"{step} steps" for step in steps), "worst of all"]]
    for each in found["validation"]:
        name = str(each["iteration"]) + ", shipped" * (each["iteration"] == found["best_iteration"])
        rows.append([name, *(bold(ratio, 1.0) for ratio in each["losses"]), f"{each['worst_loss']:.2f}"])
    note = (
        "Loss over that of the constant from which the LSTM starts, geometric mean over two trainings of "
        f"{len(found['meta_training']['validation_tasks'])} larger networks that it is not trained on. "
        f"{found['seconds'] / 60:.0f} minutes on one core. Made at commit {found['commit'][:7]}, from "
        f"{found['meta_training']['start'] or 'nothing'}. {found.get('note', '')}"
    )
    return with_note(rows, note, found)


def learned_optimizers(content: dict[str, Any]) -> list[str]:
    """Returns the final losses on the protocol of the literature, with what is published beside them."""
    activations = list(dict.fromkeys(row["activation"] for row in content["rows"]))
    rows = [["final loss (published)", *activations]]
    for name in dict.fromkeys(row["optimizer"] for row in content["rows"]):
        losses = {row["activation"]: row["loss"] for row in content["rows"] if row["optimizer"] == name}
        known = content["published"].get(name, {})
        beside = [f" ({known[activation]:.2f})" if activation in known else "" for activation in activations]
        shown = [format_loss(losses[activation]) for activation in activations]
        title = LEARNED[name].label if name in LEARNED else "tuned Adam"
        rows.append([title, *map("".join, zip(shown, beside, strict=True))])
    note = (
        f"784-20-10 on MNIST, {content['rows'][0]['steps']} steps of batch 128, {content['starts']} starts "
        "(published: 100). All were meta-trained on the network with sigmoid and images of 7 x 7 pixels, and "
        "then L2L on images of 28 x 28."
    )
    return with_note(rows, note, content)


def lodo_bowl(content: dict[str, Any]) -> list[str]:
    """Returns what each optimizer reaches on the noisy bowl of LODO's paper."""
    rows = [["", "mean loss of the last tenth"]]
    rows += [[row["optimizer"], f"{row['losses'][-1]:.2f}"] for row in content["rows"]]
    note = (
        f"The noisy quadratic bowl, {content['steps']} steps. The floor is "
        f"{content['rows'][0]['floor']:.2f}; published for LODO is about 9.0."
    )
    return with_note(rows, note, content)


# Name: what makes the lines, and the files that it is given.
TABLES = {
    "held_out_medians": (held_out_medians, ["held_out"]),
    "held_out": (held_out, ["held_out"]),
    "held_out_learned": (held_out_learned, ["held_out"]),
    "scaling": (scaling, ["scaling"]),
    "meta_training_processes": (meta_training_processes, ["meta_training_processes"]),
    "general_validation": (general_validation, []),
    "ten_times_horizon": (ten_times_horizon, ["ten_times_horizon"]),
    "learned_optimizers": (learned_optimizers, ["learned_optimizers"]),
    "lodo_bowl": (lodo_bowl, ["lodo_bowl"]),
    "digits-mlp": (by_step, ["digits-mlp"]),
    "transfer_digits": (transfer_digits, ["transfer_digits"]),
    "first_order_cifar10": (by_epoch, ["first_order_cifar10"]),
    "first_order_cifar10_narrow": (by_epoch, ["first_order_cifar10_narrow"]),
    "second_order_cifar10": (second_order, ["second_order_cifar10", "second_order_cifar10_mlhf"]),
    "ablation_preconditioner": (ablation, ["ablation_preconditioner"]),
    "transfer_resnet18": (by_epoch, ["transfer_resnet18"]),
    "long_run_cifar10": (long_run, ["long_run_cifar10"]),
    "step_time": (step_time, ["step_time"]),
    "ggn_in_loops": (ggn_in_loops, ["ggn_in_loops"]),
    "lstm_throughput": (lstm_throughput, ["lstm_throughput"]),
    "meta_step_time": (meta_step_time, ["meta_step_time"]),
}


def table(name: str, results: Path) -> list[str]:
    """Returns the lines of a table."""
    make, files = TABLES[name]
    paths = [results / f"{file}.json" for file in files]
    is_comparison = make in (by_step, by_epoch, second_order)
    return make(*(Comparison.load(p) if is_comparison else json.loads(p.read_text()) for p in paths))


def rewritten(text: str, results: Path) -> str:
    """Returns a text with its tables made anew from a folder of results."""
    marks = re.compile(r"<!-- table (\S+) -->\n.*?<!-- end \1 -->", re.DOTALL)

    def fill(found: re.Match) -> str:
        lines = table(found[1], results)
        return "\n".join([f"<!-- table {found[1]} -->", "", *lines, "", f"<!-- end {found[1]} -->"])

    return marks.sub(fill, text)


def main() -> None:
    """Rewrites or checks the files."""
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        new = rewritten(text, ROOT / "benchmarks" / "results")
        if "--check" not in sys.argv[1:]:
            file.write_text(new, encoding="utf-8")
        elif new != text:
            sys.exit(f"the tables in {file} are not those of benchmarks/results; run this without --check")


if __name__ == "__main__":
    main()
