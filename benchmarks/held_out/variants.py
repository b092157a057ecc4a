"""Tables of ``held_out.py`` with other options, and of what meta-training brings."""

import statistics
from collections.abc import Sequence
from typing import Any

import polars as pl
from held_out import NAMES, brief, points, seeds_text, time_over_adam
from ratios import ADAM_OR_SGD, SOLVED, STEPS, at, cells, long, summary
from rivals import LEARNED_RIVALS, name_and_label
from tasks import BATCH_SIZES

from mlhf_optax import load_pretrained
from mlhf_optax.experiments.scripts import Table, saved
from mlhf_optax.experiments.tables import bold_ratio, format_loss

_DAMPING = "gauss_newton damping="


def dampings(content: dict[str, Any]) -> Table:
    """``--dampings``: a row per damping of the constant, its loss over that of the one which is the rival."""
    frame = long(content["rows"]).filter(pl.col("kind") == "ratios", pl.col("step").is_in(STEPS[:4]))
    rival = frame.filter(pl.col("contender") == "constant").select("task", "step", rival="ratio")
    others = frame.filter(pl.col("contender").str.starts_with(_DAMPING))
    # Both are MLHF's loss over that of a constant.
    over = others.join(rival, on=["task", "step"], maintain_order="left")
    found = summary(over.with_columns(ratio=pl.col("rival") / pl.col("ratio")))
    steps = found["step"].unique(maintain_order=True).to_list()
    lines = [["damping of the constant", *(f"{step} steps" for step in steps)]]
    for label, own in found.group_by("contender", maintain_order=True):
        shown = own.select("median", "ahead", "tasks").iter_rows()
        texts = (f"{bold_ratio(median)} ({lower} of {count})" for median, lower, count in shown)
        lines.append([label[0].removeprefix(_DAMPING), *texts])
    note = (
        "Loss over that of the constant in the tables above, whose damping is 10; medians, in brackets on "
        f"how many tasks it is lower. {seeds_text(content)}"
    )
    return Table(lines, note, brief(content))


def cosine(others: dict[str, Any], content: dict[str, Any]) -> Table:
    """``--cosine``: two rows per task, loss at the end over that of rivals whose rates fall to zero."""
    heads = [*NAMES.values(), "loss", "test accuracy, points"]
    rows = [["at the end, loss of MLHF over that of", "steps", *heads]]
    constant = {row["task"]: row for row in others["rows"]}
    frame = long(content["rows"])
    found: dict[str, list[list[float]]] = {"falling rate": [], "constant rate": []}
    for how, ratios in found.items():
        for entry in content["rows"]:
            task, steps = entry["task"], entry["steps"][-1]
            own = entry if how == "falling rate" else constant[task]
            # From the same seeds as those with a falling rate, which may be fewer.
            last = own.get("last_losses", own["losses"][-1:])[: entry.get("seeds", content["seeds"])]
            loss = statistics.mean(last)
            gain = max(loss, SOLVED) / max(entry["losses"][-1], SOLVED)
            ratios.append([gain * at(frame, "ratios", rival, task)[steps] for rival in NAMES])
            gap = points({**entry, "accuracy": own["accuracy"]})
            rows.append([f"{task}, {how}", str(steps), *map(bold_ratio, ratios[-1]), format_loss(loss), gap])
    for how, ratios in found.items():
        medians = (bold_ratio(statistics.median(of_rival)) for of_rival in zip(*ratios, strict=True))
        rows.append([f"median, {how}", "", *medians, "", ""])
    note = (
        "The rates of all rivals, and of the constants, fall along a cosine to zero at the last step; their "
        f"grids are those of the other tables, tuned for the loss at the end. {seeds_text(content)}"
    )
    return Table(rows, note, brief(content))


def batches(others: dict[str, Any], content: dict[str, Any]) -> Table:
    """A row per batch size of one network: the loss over the best rivals', by steps and by time."""
    sizes = {"mnist-mlp": 128, **BATCH_SIZES}
    entries = [row for row in (*content["rows"], *others["rows"]) if row["task"] in sizes]
    entries.sort(key=lambda row: sizes[row["task"]])
    rows = _over_the_best("batch", [(str(sizes[row["task"]]), row) for row in entries])
    note = (
        "MNIST, 784-100-100-10, at every batch size against its own grid. The rows of 128 and 1,024 are "
        "those of the table above."
    )
    return Table(rows, note, brief(content))


def cg_steps(others: dict[str, Any], content: dict[str, Any]) -> Table:
    """``--num-cg-steps``: two rows per task, with as many as the record recommends, and with more."""
    usual, more = load_pretrained().recommended["num_cg_steps"], content["num_cg_steps"]
    few = {row["task"]: row for row in others["rows"]}
    entries = [
        (f"{row['task']}, {count} CG steps", of_count)
        for row in content["rows"]
        for count, of_count in ((usual, few[row["task"]]), (more, row))
    ]
    note = f"Rivals are as above. {seeds_text(content)}"
    return Table(_over_the_best("task", entries), note, brief(content))


def _over_the_best(head: str, entries: Sequence[tuple[str, dict[str, Any]]]) -> list[list[str]]:
    """Returns a row per rival and entry: the loss over the best rivals', by steps and by time."""
    steps = [step for step in STEPS if all(step <= entry["steps"][-1] for _, entry in entries)]
    shown = [(rival, kind) for kind in ("ratios", "by_time") for rival in (ADAM_OR_SGD, "best Muon")]
    rows = [[head, "loss of MLHF over that of", *(f"{step} steps" for step in steps), "step / Adam's"]]
    for rival, kind in shown:
        for title, entry in entries:
            values = cells(at(long([entry]), kind, rival, entry["task"]), steps)
            time = time_over_adam(entry) if (rival, kind) == shown[0] else ""
            rows.append([title, rival + ", in equal time" * (kind == "by_time"), *values, time])
    return rows


def learned(content: dict[str, Any]) -> Table:
    """Returns a row per learned optimizer: MLHF's loss over its loss, and what it costs."""
    steps = STEPS[:-1]
    entries = [row for row in content["rows"] if len(row.get("learned", {})) > 1]
    frame = long(entries)
    heads = ["step / Adam's", "state, floats per parameter", "diverged"]
    rows = [["loss of MLHF over that of", *(f"{step} steps" for step in steps), *heads]]
    for name, label in map(name_and_label, ("mlhf_general", *LEARNED_RIVALS)):
        own = [row for row in entries if label in row["learned"]]
        if not own:
            continue
        times = [row["seconds_per_step"][name] / row["seconds_per_step"]["adam defaults"] for row in own]
        floats = statistics.median(row["state_floats"][name] for row in own)
        diverged = sum(has_diverged(row["learned"][label]) for row in own)
        costs = [f"{statistics.median(times):.1f}", f"{floats:.0f}", f"{diverged} of {len(own)}"]
        rows.append([label, *cells(at(frame, "ratios", label), steps), *costs])
    note = (
        f"Medians over {len(entries)} tasks. Each has the meta-parameters that are shipped, as little "
        "retuned as MLHF's. Diverged: not finite at the end, or twice the loss of the tenth step."
    )
    return Table(rows, note, brief(content))


def has_diverged(losses: Sequence[float | None]) -> bool:
    """Returns whether a training ended with no finite loss, or far above its first recorded one."""
    first, last = losses[0], losses[-1]
    return last is None or first is None or last > 2 * first


def validation() -> Table:
    """Returns a row per validation of the meta-training of the shipped general meta-parameters."""
    found = load_pretrained().record
    steps = found["meta_training"]["validation_steps"]
    rows = [["meta-iterations", *(f"{step} steps" for step in steps), "worst of all"]]
    for each in found["validation"]:
        name = str(each["iteration"]) + ", shipped" * (each["iteration"] == found["best_iteration"])
        rows.append([name, *map(bold_ratio, each["losses"]), f"{each['worst_loss']:.2f}"])
    note = (
        "Loss over that of the constant from which the LSTM starts, geometric mean over two trainings of "
        f"{len(found['meta_training']['validation_tasks'])} larger networks that it is not trained on. "
        f"{found['seconds'] / 60:.0f} minutes, from {found['meta_training']['start'] or 'nothing'}."
    )
    return Table(rows, note, found)


TABLES = {
    "held_out_dampings": lambda folder: dampings(*saved(folder, "held_out_dampings")),
    "held_out_cosine": lambda folder: cosine(*saved(folder, "held_out", "held_out_cosine")),
    "held_out_batches": lambda folder: batches(*saved(folder, "held_out", "held_out_batches")),
    "held_out_cg_steps": lambda folder: cg_steps(*saved(folder, "held_out", "held_out_cg_steps")),
    "held_out_learned": lambda folder: learned(*saved(folder, "held_out")),
    "general_validation": lambda folder: validation(),
}
