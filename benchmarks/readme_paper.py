"""Tables of the README for sections 4.2 and 4.3 of the paper, from the results of their scripts."""

import math
from typing import Any

from readme_markdown import origin, ratio, table

from mlhf_optax.experiments.epochs import EpochResult
from mlhf_optax.experiments.tables import format_loss

FAMILIES = {"hf-fixed": "HF(Fixed)", "hf-lm": "HF(LM)", "kfac": "K-FAC"}


def second_order_table(report: dict[str, Any], longer: dict[str, Any] | None = None) -> list[str]:
    """Returns rows for each MLHF and for the best setting of each family at the end of the run.

    Args:
      report: what ``second_order_cifar10.py`` wrote.
      longer: the same of a longer run with ``--only mlhf``, as its steps take less time.

    Returns:
      Markdown lines. In brackets are the loss and the time of MLHF over those of the best setting of all.
    """
    others = [result for result in _results(report) if result.family != "mlhf"]
    best = {
        title: min(members, key=lambda result: result.loss_at(result.steps[-1]))
        for family, title in FAMILIES.items()
        if (members := [result for result in others if result.family == family])
    }
    first = min(best.values(), key=lambda result: result.loss_at(result.steps[-1]))
    rows = [["", "steps", "training loss", "test accuracy", "seconds in all"]]
    for result in _results(report):
        if result.family != "mlhf":
            continue
        followed = _following(result, longer)
        for step, accuracy in zip(followed.steps, followed.test_curve, strict=True):
            loss, seconds = followed.loss_at(step), step * result.seconds_per_step
            of_loss = ratio(loss, first.loss_at(first.steps[-1]))
            of_time = ratio(seconds, first.steps[-1] * first.seconds_per_step)
            shown = (f"{format_loss(loss)} ({of_loss})", f"{accuracy:.1%}", f"{seconds:.0f} ({of_time})")
            rows.append([result.name, f"{step}", *shown])
    for title, result in best.items():
        members = [other for other in others if other.family == result.family]
        lost = sum(other.loss_at(other.steps[-1]) == math.inf for other in members)
        settings = result.name.removeprefix(f"{result.family} ")
        name = f"{title}, best of {len(members)}, {lost} diverged: {settings}"
        step = result.steps[-1]
        shown = (format_loss(result.loss_at(step)), f"{result.test_accuracy:.1%}")
        rows.append([name, f"{step}", *shown, f"{step * result.seconds_per_step:.0f}"])
    note = (
        f"`{report['task']}`, {report['num_train']} images, batch {report['batch_size']}, seeds: "
        f"{first.seeds}; in brackets over the best of all settings. {origin(report)}"
    )
    if longer:
        note += f" The losses of MLHF: `{longer['command']}`."
    return [*table(rows), "", note]


def ablation_table(report: dict[str, Any]) -> list[str]:
    """Returns a row a configuration: l_p and residual at the end, and on the same systems.

    Args:
      report: what ``ablation_preconditioner.py`` wrote.

    Returns:
      Markdown lines.
    """
    head = ["meta-training of", "l_p at the end", "residual", "same systems: l_p ratio", "residual"]
    rows = [[*head, "s a meta-iteration"]]
    for result in report["results"]:
        same = result["on_same_systems"]
        name = "with LSTM_p, 4 CG steps (MLHF)" if result["name"] == "mlhf" else result["name"]
        values = (result["l_p"][-1], result["residual_norm"][-1], same["l_p_ratio"], same["residual_ratio"])
        rows.append([name, *(f"{x:.3g}" for x in values), f"{result['seconds_per_iteration']:.2g}"])
    note = (
        f"`{report['task']}`, {report['iterations']} meta-iterations, seeds: {report['seeds']}, batch "
        f"{report['batch_size']}; l_p is lower the better; on the same systems it is given over that of 20 "
        f"steps without LSTM_p, where above 1 is better, and the residual over the gradient. {origin(report)}"
    )
    return [*table(rows), "", note]


def _results(report: dict[str, Any]) -> list[EpochResult]:
    return [EpochResult.from_json(entry, entry["name"].split()[0]) for entry in report["results"]]


def _following(result: EpochResult, longer: dict[str, Any] | None) -> EpochResult:
    """Returns the longer run of the same training, if there is one."""
    found = [other for other in _results(longer) if other.name == result.name] if longer else []
    return found[0] if found else result
