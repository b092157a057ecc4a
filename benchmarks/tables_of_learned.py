"""Tables of learned optimizers: meta-training, long trainings, and the tasks of the literature."""

import math
from typing import Any

from table_cells import bold, with_note

from mlhf_optax import load_pretrained
from mlhf_optax.experiments.tables import format_loss
from mlhf_optax.learned import LEARNED


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
