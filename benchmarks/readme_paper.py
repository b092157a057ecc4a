"""Tables of the README for sections 4.2 and 4.3 of the paper, from the results of their scripts."""

import math
from pathlib import Path
from typing import Any

from ablation_solvers import DAMPING_ALONE, TITLES
from readme_markdown import epoch_results, load, origin, ratio, table

from mlhf_optax.comparison.epoch_results import EpochResult
from mlhf_optax.comparison.results import best_of
from mlhf_optax.comparison.tables import format_loss

FAMILIES = {"hf-fixed": "HF(Fixed)", "hf-lm": "HF(LM)", "kfac": "K-FAC"}


def second_order_section(results: Path) -> list[str]:
    """Returns the Markdown lines of section 4.2 of the paper for a folder of results."""
    found, longer = (load(results, f"second_order_cifar10{part}") for part in ("", "_mlhf"))
    return second_order_table(found, longer) if found else []


def ablation_section(results: Path) -> list[str]:
    """Returns the Markdown lines of section 4.3."""
    return ablation_table(found) if (found := load(results, "ablation_preconditioner")) else []


def second_order_table(report: dict[str, Any], longer: dict[str, Any] | None = None) -> list[str]:
    """Returns rows for each MLHF and for the best setting of each family at the end of the run.

    Args:
      report: what ``second_order_cifar10.py`` wrote.
      longer: the same of a longer run with ``--only mlhf``, as its steps take less time.

    Returns:
      Markdown lines. In brackets are the loss and the time of MLHF over those of the best setting of all.
    """
    results = epoch_results(report)
    last = results[0].steps[-1]
    first = best_of([result for result in results if result.family != "mlhf"], last)
    rows = [["", "steps", "training loss", "test accuracy", "seconds in all"]]
    for result in results:
        if result.family != "mlhf":
            continue
        followed = _following(result, longer)
        for step, accuracy in zip(followed.steps, followed.test_curve, strict=True):
            loss, seconds = followed.loss_at(step), step * result.seconds_per_step
            of_loss = ratio(loss, first.loss_at(last))
            of_time = ratio(seconds, last * first.seconds_per_step)
            shown = (f"{format_loss(loss)} ({of_loss})", f"{accuracy:.1%}", f"{seconds:.0f} ({of_time})")
            rows.append([result.name, f"{step}", *shown])
    for family, title in FAMILIES.items():
        members = [result for result in results if result.family == family]
        if not members:
            continue
        best = best_of(members, last)
        lost = sum(result.loss_at(last) == math.inf for result in members)
        name = f"{title}, best of {len(members)}, {lost} diverged: {best.name.removeprefix(f'{family} ')}"
        shown = (format_loss(best.loss_at(last)), f"{best.test_accuracy:.1%}")
        rows.append([name, f"{last}", *shown, f"{last * best.seconds_per_step:.0f}"])
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
    rows = [head]
    for result in report["results"]:
        same = result["on_same_systems"]
        values = (result["l_p"][-1], result["residual_norm"][-1], same["l_p_ratio"], same["residual_ratio"])
        rows.append([TITLES[result["name"]], *(f"{x:.3g}" for x in values)])
    same = report["damping_alone"]
    rows.append([DAMPING_ALONE, "", "", f"{same['l_p_ratio']:.3g}", f"{same['residual_ratio']:.3g}"])
    note = (
        f"`{report['task']}`, {report['iterations']} meta-iterations, seeds: {report['seeds']}, batch "
        f"{report['batch_size']}; l_p is lower the better; on the same systems it is given over that of 20 "
        f"steps without LSTM_p, where above 1 is better, and the residual over the gradient. {origin(report)}"
    )
    return [*table(rows), "", note]


def _following(result: EpochResult, longer: dict[str, Any] | None) -> EpochResult:
    """Returns the longer run of the same training, if there is one."""
    found = [other for other in epoch_results(longer) if other.name == result.name] if longer else []
    return found[0] if found else result
