"""Tables of the README for sections 4.2 and 4.3 of the paper, from the results of their scripts."""

from typing import Any

from readme_markdown import origin, ratio, table

from mlhf_optax.experiments.epochs import EpochResult
from mlhf_optax.experiments.tables import format_loss

FAMILIES = {"hf-fixed": "HF(Fixed)", "hf-lm": "HF(LM)", "kfac": "K-FAC"}


def second_order_table(report: dict[str, Any]) -> list[str]:
    """Returns a row for each MLHF and for the best setting of each family at the end of the run.

    Args:
      report: what ``second_order_cifar10.py`` wrote.

    Returns:
      Markdown lines. In brackets are the loss of MLHF and its time a step over those of that best.
    """
    results = [EpochResult.from_json(entry, entry["name"].split()[0]) for entry in report["results"]]
    last = results[0].steps[-1]
    own = [result for result in results if result.family == "mlhf"]
    rows = [["", "training loss", "MLHF / it", "test accuracy", "ms a step", "MLHF / it", "diverged"]]
    for result in own:
        rows.append([result.name, *_values(result, last), ""])
    for family, title in FAMILIES.items():
        members = [result for result in results if result.family == family]
        if not members:
            continue
        best = min(members, key=lambda result: result.loss_at(last))
        loss, _, accuracy, milliseconds, _ = _values(best, last)
        settings = best.name.removeprefix(f"{family} ")
        rows.append(
            [
                f"{title}, best of {len(members)}: {settings}",
                loss,
                ratio(own[0].loss_at(last), best.loss_at(last)),
                accuracy,
                milliseconds,
                ratio(own[0].seconds_per_step, best.seconds_per_step),
                f"{sum(result.loss_at(last) == float('inf') for result in members)}",
            ]
        )
    note = (
        f"`{report['task']}`, {last} steps ({_epochs(report)} of {report['num_train']} images), batch "
        f"{report['batch_size']}, seeds: {results[0].seeds}. {origin(report)}"
    )
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


def _values(result: EpochResult, step: int) -> list[str]:
    milliseconds = f"{1e3 * result.seconds_per_step:.0f}"
    return [format_loss(result.loss_at(step)), "", f"{result.test_accuracy:.1%}", milliseconds, ""]


def _epochs(report: dict[str, Any]) -> str:
    count = report["num_epochs"]
    return f"{count} epoch" if count == 1 else f"{count} epochs"
