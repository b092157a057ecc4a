"""Tables of learned optimizers on tasks that they never met, and on those of the literature."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from held_out import ADAM_OR_SGD, LEARNED_RIVALS, SOLVED, STEPS, label_of, ratios_at
from held_out_tasks import BATCH_SIZES
from table_cells import bold, with_note

from mlhf_optax import load_pretrained
from mlhf_optax.comparison.tables import format_loss
from mlhf_optax.learned import LEARNED

_CONSTANTS = ("constant", "untrained")
_RIVAL_NAMES = {
    ADAM_OR_SGD: "the best tuned Adam or momentum",
    "best Muon": "the best tuned Muon",
    "default Adam": "Adam at its defaults",
    "constant": "the best constant (`gauss_newton`)",
    "untrained": "itself before meta-training",
}


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
        "MLHF with `load_pretrained()` on networks and data that it never met, nothing retuned. "
        f"{seeds_text(content)} The best of ten learning rates of Adam and of SGD with momentum, or of seven "
        "of Muon, is chosen anew at every step. `constant` is the best constant with one unit of damping for "
        "all tensors, `untrained` is MLHF before meta-training, with one for each; both are the same for all "
        "tasks. In equal time: MLHF after that step against rivals that trained for as long, compilation "
        f"apart; empty where they did not. {content.get('note', '')}"
    )
    return with_note(rows, note, content)


def seeds_text(content: dict[str, Any]) -> str:
    """Returns a sentence that says of how many trainings losses are means, task by task where they differ."""
    tasks: dict[int, list[str]] = {}
    for row in content["rows"]:
        tasks.setdefault(row.get("seeds", content["seeds"]), []).append(row["task"])
    most = max(tasks, key=lambda seeds: len(tasks[seeds]))
    others = [f"{seeds} for {', '.join(names)}" for seeds, names in tasks.items() if seeds != most]
    return f"Seeds: {'; '.join([str(most), *others])}."


def accuracy_and_time(entry: dict[str, Any]) -> list[str]:
    """Returns how many points of accuracy MLHF is ahead of Adam, and its time per step over Adam's."""
    seconds = entry["seconds_per_step"]
    return [_points(entry), f"{seconds['mlhf_general'] / seconds['adam defaults']:.1f}"]


def _points(entry: dict[str, Any]) -> str:
    own, best = entry["accuracy"], entry["best_adam_accuracy"]
    return "" if None in (own, best) else f"{100 * (own - best):+.1f}"


def held_out_medians(content: dict[str, Any]) -> list[str]:
    """Returns the median over tasks of the loss over every rival's, by step."""
    steps = STEPS[:-1]  # few tasks go on to the last
    rows = [["loss of MLHF over that of", *(f"{step} steps" for step in steps)]]

    def cell(ratios: list[float]) -> str:
        ahead = f"({sum(ratio < 1 for ratio in ratios)} of {len(ratios)})"
        return f"{bold(statistics.median(ratios), 1.0)} {ahead}" if ratios else ""

    for kind, when in (("ratios", ""), ("by_time", ", in equal time")):
        for rival, name in _RIVAL_NAMES.items():
            if kind == "ratios" or rival not in _CONSTANTS:  # their steps take about as long
                found = (ratios_at(content["rows"], str(step), rival, kind) for step in steps)
                rows.append([f"{name}{when}", *map(cell, found)])
    note = (
        f"Median over {len(content['rows'])} tasks that no meta-training met; in brackets on how many MLHF "
        "is ahead. Nothing is retuned for MLHF; each rival is tuned for each task and step anew. In equal "
        "time a rival takes as many steps as fit into those of MLHF; tasks in which it trained for less are "
        f"left out. {seeds_text(content)} {content.get('note', '')}"
    )
    return with_note(rows, note, content)


def held_out_cosine(others: dict[str, Any], content: dict[str, Any]) -> list[str]:
    """Returns two rows per task: loss at the end over that of rivals whose rates have fallen to zero."""
    heads = [*_RIVAL_NAMES.values(), "loss", "test accuracy, points"]
    rows = [["at the end, loss of MLHF over that of", "steps", *heads]]
    constant = {row["task"]: row for row in others["rows"]}
    found: dict[str, list[list[float]]] = {"falling rate": [], "constant rate": []}
    for how, ratios in found.items():
        for entry in content["rows"]:
            steps = entry["steps"][-1]
            own = entry if how == "falling rate" else constant[entry["task"]]
            # From the same seeds as those with a falling rate, which may be fewer.
            last = own.get("last_losses", own["losses"][-1:])[: entry.get("seeds", content["seeds"])]
            loss = statistics.mean(last)
            gain = max(loss, SOLVED) / max(entry["losses"][-1], SOLVED)
            at_end = (ratios_at([entry], str(steps), rival)[0] for rival in _RIVAL_NAMES)
            ratios.append([gain * ratio for ratio in at_end])
            points = _points({**entry, "accuracy": own["accuracy"]})
            cells = [bold(ratio, 1.0) for ratio in ratios[-1]]
            rows.append([f"{entry['task']}, {how}", str(steps), *cells, format_loss(loss), points])
    for how, ratios in found.items():
        medians = [statistics.median(of_rival) for of_rival in zip(*ratios, strict=True)]
        rows.append([f"median, {how}", "", *(bold(ratio, 1.0) for ratio in medians), "", ""])
    note = (
        "The rates of all rivals, and of the constants, fall along a cosine to zero at the last step; their "
        f"grids are those of the other tables, tuned for the loss at the end. {seeds_text(content)}"
    )
    return with_note(rows, note, content)


def held_out_batches(others: dict[str, Any], content: dict[str, Any]) -> list[str]:
    """Returns a row per batch size of one network: the loss over the best rivals', by steps and by time."""
    sizes = {"mnist-mlp": 128, **BATCH_SIZES}
    entries = [row for row in (*content["rows"], *others["rows"]) if row["task"] in sizes]
    entries.sort(key=lambda row: sizes[row["task"]])
    rows = _over_the_best("batch", [(str(sizes[row["task"]]), row) for row in entries])
    note = (
        "MNIST, 784-100-100-10, at every batch size against its own grid. The rows of 128 and 1,024 are "
        "those of the table above."
    )
    return with_note(rows, note, content)


def held_out_cg_steps(others: dict[str, Any], content: dict[str, Any]) -> list[str]:
    """Returns two rows per task: with as many CG steps as the record recommends, and with more."""
    usual, more = load_pretrained().recommended["num_cg_steps"], content["num_cg_steps"]
    few = {row["task"]: row for row in others["rows"]}
    entries = [
        (f"{row['task']}, {count} CG steps", of_count)
        for row in content["rows"]
        for count, of_count in ((usual, few[row["task"]]), (more, row))
    ]
    note = f"Rivals are as above. {seeds_text(content)}"
    return with_note(_over_the_best("task", entries), note, content)


def _over_the_best(head: str, entries: Sequence[tuple[str, dict[str, Any]]]) -> list[list[str]]:
    """Returns a row per rival and entry: the loss over the best rivals', by steps and by time."""
    steps = [step for step in STEPS if all(step <= entry["steps"][-1] for _, entry in entries)]
    shown = [(rival, kind) for kind in ("ratios", "by_time") for rival in (ADAM_OR_SGD, "best Muon")]
    rows = [[head, "loss of MLHF over that of", *(f"{step} steps" for step in steps), "step / Adam's"]]
    for rival, kind in shown:
        for title, entry in entries:
            found = (ratios_at([entry], str(step), rival, kind) for step in steps)
            cells = [bold(ratio[0], 1.0) if ratio else "" for ratio in found]
            time = accuracy_and_time(entry)[1] if (rival, kind) == shown[0] else ""
            rows.append([title, rival + ", in equal time" * (kind == "by_time"), *cells, time])
    return rows


def held_out_learned(content: dict[str, Any]) -> list[str]:
    """Returns a row per learned optimizer: MLHF's loss over its loss, and what it costs."""
    steps = STEPS[:-1]
    entries = [row for row in content["rows"] if len(row.get("learned", {})) > 1]
    heads = ["step / Adam's", "state, floats per parameter", "diverged"]
    rows = [["loss of MLHF over that of", *(f"{step} steps" for step in steps), *heads]]
    for name in ("mlhf_general", *LEARNED_RIVALS):
        label = label_of(name)
        own = [row for row in entries if label in row["learned"]]
        if not own:
            continue
        found = [ratios_at(own, str(step), label) for step in steps]
        times = [row["seconds_per_step"][name] / row["seconds_per_step"]["adam defaults"] for row in own]
        floats = statistics.median(row["state_floats"][name] for row in own)
        diverged = sum(has_diverged(row["learned"][label]) for row in own)
        costs = [f"{statistics.median(times):.1f}", f"{floats:.0f}", f"{diverged} of {len(own)}"]
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
        shown = [_final(losses[activation]) for activation in activations]
        rows.append([_title(name), *map("".join, zip(shown, beside, strict=True))])
    note = (
        f"784-20-10 on MNIST, {content['rows'][0]['steps']} steps of batch 128, {content['starts']} starts "
        "(published: 100). All were meta-trained on the network with sigmoid and images of 7 x 7 pixels, and "
        "then L2L on images of 28 x 28."
    )
    return with_note(rows, note, content)


def learned_optimizers_long(*contents: dict[str, Any]) -> list[str]:
    """Returns the final losses with sigmoid after longer trainings, a column for each length."""
    columns = {}
    for content in contents:
        for row in content["rows"]:
            columns.setdefault(row["steps"], {})[row["optimizer"]] = row
    rows = [["final loss with sigmoid", *(f"{steps:,} steps" for steps in columns)]]
    for name in next(iter(columns.values())):
        rows.append([_title(name), *(_final(column[name]["loss"]) for column in columns.values())])
    starts = " and ".join(str(content["starts"]) for content in contents)
    note = (
        f"The same protocol for longer, starts: {starts}. The rate of Adam is tuned for each length; the "
        "learned ones are as above, meta-trained on 100 steps."
    )
    commands = " && ".join(content["command"] for content in contents)
    return with_note(rows, note, contents[-1] | {"command": commands})


def _title(name: str) -> str:
    return LEARNED[name].label if name in LEARNED else "tuned Adam"


def _final(loss: float | None) -> str:
    return format_loss(math.inf if loss is None else loss)  # JSON has no infinity


def lodo_bowl(content: dict[str, Any]) -> list[str]:
    """Returns what each optimizer reaches on the noisy bowl of LODO's paper."""
    note = (
        f"The noisy quadratic bowl, {content['steps']:,} steps. The floor is "
        f"{content['rows'][0]['floor']:.2f}; published for LODO is about 9.0."
    )
    return with_note(_last_tenth(content, 2), note, content)


def lodo_pixels(content: dict[str, Any]) -> list[str]:
    """Returns what each optimizer reaches on the autoregression of pixels."""
    note = (
        f"The grey value of a pixel of MNIST from the 40 nearest above and to the left, {content['steps']:,} "
        "steps of batch 256; nats. 0.08459 is the learning rate that LODO's authors use for a ResNet."
    )
    return with_note(_last_tenth(content, 3), note, content)


def _last_tenth(content: dict[str, Any], digits: int) -> list[list[str]]:
    shown = lambda loss: "diverged" if loss is None else f"{loss:.{digits}f}"
    rows = [[row["optimizer"], shown(row["losses"][-1])] for row in content["rows"]]
    return [["", "mean loss of the last tenth"], *rows]
