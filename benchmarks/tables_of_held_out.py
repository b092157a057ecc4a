"""Tables of held_out.py: MLHF and its rivals on tasks that it never met."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from held_out import ADAM_OR_SGD, LEARNED_RIVALS, RIVALS, SOLVED, STEPS, name_and_label, ranks_at, ratios_at
from held_out_tasks import AUTOENCODERS, BATCH_SIZES
from table_cells import bold, with_note

from mlhf_optax import load_pretrained
from mlhf_optax.experiments.tables import format_loss

_CONSTANTS = ("constant", "untrained")
_RIVAL_NAMES = {
    ADAM_OR_SGD: "the best tuned Adam or momentum",
    "best Muon": "the best tuned Muon",
    "default Adam": "Adam at its defaults",
    "constant": "the best constant (`gauss_newton`)",
    "untrained": "itself before meta-training",
}


_DAMPING = "gauss_newton damping="
_PUBLISHED = {"quadratic-deep": 87.1, "mnist-vae": 30.9}


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

    # Constants take about as long per step, and test losses of what is not tuned say little.
    shown = {"": "ratios", ", in equal time": "by_time", ", by test loss": "by_test_loss"}
    left_out = {"ratios": (), "by_time": _CONSTANTS, "by_test_loss": (*_CONSTANTS, "default Adam")}
    for when, kind in shown.items():
        for rival, name in _RIVAL_NAMES.items():
            if rival not in left_out[kind]:
                found = (ratios_at(content["rows"], str(step), rival, kind) for step in steps)
                rows.append([f"{name}{when}", *map(cell, found)])
    ranks = (f"{statistics.mean(ranks_at(content['rows'], str(step))):.1f}" for step in steps)
    rows.append([f"mean rank by training loss, of {len(RIVALS) + 1}", *ranks])
    note = (
        f"Median over {len(content['rows'])} tasks that no meta-training met; in brackets on how many MLHF "
        "is ahead. Nothing is retuned for MLHF; each rival is tuned for each task and step anew. In equal "
        "time a rival takes as many steps as fit into those of MLHF; tasks in which it trained for less are "
        f"left out. {seeds_text(content)} {content.get('note', '')}"
    )
    return with_note(rows, note, content)


def held_out_losses(content: dict[str, Any]) -> list[str]:
    """Returns a row per task: training and test loss after the last step, of MLHF and of its rivals."""
    rivals = (ADAM_OR_SGD, "best Muon", "default Adam", "constant")
    names = ("MLHF", *rivals)
    rows = [["after the last step", "steps", *names, *(f"{name}, test" for name in names)]]
    for entry in content["rows"]:
        cells = []
        for measure, kind in (("losses", "ratios"), ("test_losses", "by_test_loss")):
            own = entry.get(measure, [None])[-1]
            if own is None:
                cells += [""] * len(names)
                continue
            ratios = (ratios_at([entry], str(entry["steps"][-1]), rival, kind)[0] for rival in rivals)
            cells += map(_loss_cell, (own, *(max(own, SOLVED) / ratio for ratio in ratios)))
        rows.append([entry["task"], str(entry["steps"][-1]), *cells])
    published = ", ".join(f"{loss} for {task}" for task, loss in _PUBLISHED.items())
    note = (
        f"Losses below {SOLVED:g} count as that much. Test losses are the lowest of each grid by themselves. "
        f"DeepOBS has published, for its best tuned optimizer after its full budget: {published}."
    )
    return with_note(rows, note, content)


def _loss_cell(loss: float) -> str:
    return f"<{SOLVED:g}" if loss <= SOLVED * 1.001 else format_loss(loss)


class _Aim(NamedTuple):
    """What was aimed at, what was measured, and whether the aim was reached."""

    aim: str
    found: str
    is_met: bool


def held_out_aims(content: dict[str, Any], others: dict[str, Any], long: dict[str, Any]) -> list[str]:
    """Returns a row per aim that was set before the meta-training, with what was measured."""
    rows, batches = content["rows"], [*content["rows"], *others["rows"]]
    aims = [
        _median_aim(rows, ADAM_OR_SGD, 0.85, 30),
        _worst_aim(rows, ADAM_OR_SGD, 1.10, 30),
        _median_aim(rows, "best Muon", 1.0, 10),
        _median_aim(rows, "constant", 0.85, 100),
        _share_aim(rows, "constant", 0.8, 100),
        _time_aim(batches),
        _default_adam_aim(rows),
        _accuracy_aim(rows),
        _stability_aim(long),
    ]
    lines = [["aim", "measured", ""], *([a.aim, a.found, "met" if a.is_met else "**missed**"] for a in aims)]
    note = "The aims were set before the meta-training; medians are over tasks, and nothing is retuned."
    return with_note(lines, note, content)


_WHERE_TIME_PAYS = ("poisson", "burgers", *AUTOENCODERS, "mnist-mlp-1024", "mnist-mlp-4096")


def _steps_from(first: int) -> list[int]:
    return [step for step in STEPS[:-1] if step >= first]


def _from(first: int) -> str:
    return f" from {first} steps on" if first > STEPS[0] else ""


def _by_step(values: dict[int, float | str]) -> str:
    shown = ", ".join(x if isinstance(x, str) else f"{x:.2f}" for x in values.values())
    return f"{shown} at {', '.join(map(str, values))} steps"


def _median_aim(rows, rival: str, most: float, first: int) -> _Aim:
    found = {step: statistics.median(ratios_at(rows, str(step), rival)) for step in _steps_from(first)}
    aim = f"loss over that of {_RIVAL_NAMES[rival]} at most {most:.2f}{_from(first)}, in the median"
    return _Aim(aim, _by_step(found), max(found.values()) <= most)


def _worst_aim(rows, rival: str, most: float, first: int) -> _Aim:
    worst = max(
        (ratios_at([row], str(step), rival)[0], row["task"], step)
        for row in rows
        for step in _steps_from(first)
        if ratios_at([row], str(step), rival)
    )
    aim = f"on no task above {most:.2f} of {_RIVAL_NAMES[rival]}{_from(first)}"
    return _Aim(aim, "at worst {:.2f}, {} at {} steps".format(*worst), worst[0] <= most)


def _share_aim(rows, rival: str, least: float, first: int) -> _Aim:
    found = {step: ratios_at(rows, str(step), rival) for step in _steps_from(first)}
    ahead = {step: sum(ratio < 1 for ratio in ratios) for step, ratios in found.items()}
    shown = _by_step({step: f"{ahead[step]} of {len(found[step])}" for step in found})
    aim = f"ahead of {_RIVAL_NAMES[rival]} on {least:.0%} of the tasks{_from(first)}"
    return _Aim(aim, shown, all(ahead[step] >= least * len(found[step]) for step in found))


def _behind(rows, rivals: Sequence[str], first: int) -> list[str]:
    """Returns, for every task on which MLHF is behind in equal time, how far at worst."""
    behind = []
    for row in rows:
        found = [
            (ratio, rival, step)
            for rival in rivals
            for step in _steps_from(first)
            for ratio in ratios_at([row], str(step), rival, "by_time")
        ]
        if found and max(found)[0] >= 1:
            behind.append("{} ({:.2f} of {} at {} steps)".format(row["task"], *max(found)))
    return behind


def _time_aim(rows) -> _Aim:
    chosen = [row for row in rows if row["task"] in _WHERE_TIME_PAYS]
    behind = _behind(chosen, (ADAM_OR_SGD, "best Muon"), STEPS[0])
    found = f"behind on {len(behind)} of {len(chosen)}: {'; '.join(behind)}" if behind else "ahead on all"
    where = "differential equations, autoencoders, batches of 1,024 and more"
    return _Aim(f"in equal time ahead of all that is tuned: {where}", found, not behind)


def _default_adam_aim(rows) -> _Aim:
    behind = _behind(rows, ("default Adam",), 30)
    found = f"behind on {len(behind)} of {len(rows)}: {'; '.join(behind)}" if behind else "ahead on all"
    return _Aim(
        "in equal time ahead of Adam at its defaults on all tasks from 30 steps on", found, not behind
    )


def _accuracy_aim(rows) -> _Aim:
    gaps = [
        (100 * (row["accuracy"] - row["best_adam_accuracy"]), row["task"])
        for row in rows
        if None not in (row["accuracy"], row["best_adam_accuracy"])
    ]
    aim = "test accuracy at most 0.3 points below the best Adam's"
    return _Aim(aim, "at worst {:+.1f} points, {}".format(*min(gaps)), min(gaps)[0] >= -0.3)


def _stability_aim(content: dict[str, Any]) -> _Aim:
    own = [row for row in content["rows"] if row["is_learned"]]
    bad = [row["task"] for row in own if row["blows_up"] or row["ends_at_chance"]]
    aim = "at ten times the horizon no training that blows up or ends at chance"
    return _Aim(aim, f"{', '.join(bad) or 'none'} of {len(own)} tasks, one training each", not bad)


def held_out_dampings(content: dict[str, Any]) -> list[str]:
    """Returns a row per damping of the constant: its loss over that of the one which is the rival."""
    rows, steps = content["rows"], [step for step in STEPS if str(step) in content["rows"][0]["ratios"]]
    lines = [["damping of the constant", *(f"{step} steps" for step in steps)]]
    first = rows[0]["ratios"][str(steps[0])]
    for label in (name for name in first if name.startswith(_DAMPING)):
        cells = []
        for step in map(str, steps):
            found = [
                ratios_at([row], step, "constant")[0] / ratios_at([row], step, label)[0]
                for row in rows
                if step in row["ratios"]
            ]
            lower = sum(ratio < 1 for ratio in found)
            cells.append(f"{bold(statistics.median(found), 1.0)} ({lower} of {len(found)})")
        lines.append([label.removeprefix(_DAMPING), *cells])
    note = (
        "Loss over that of the constant in the tables above, whose damping is 10; medians, in brackets on "
        f"how many tasks it is lower. {seeds_text(content)}"
    )
    return with_note(lines, note, content)


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
        name, label = name_and_label(name)
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
