"""Tables of the README for sections 4.1 and 4.4 of the paper, and the long run, from their results."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from readme_markdown import epoch_results, load, origin, ratio, table

from mlhf_optax.comparison.epoch_results import EpochResult
from mlhf_optax.comparison.results import best_of
from mlhf_optax.comparison.tables import format_loss


def first_order_section(results: Path) -> list[str]:
    """Returns the Markdown lines of section 4.1 of the paper for a folder of results."""
    found = [load(results, f"first_order_cifar10{part}") for part in ("", "_narrow")]
    tables = [epochs_table(report) for report in found if report]
    return [line for lines in tables for line in (*lines, "")][:-1]


def transfer_section(results: Path) -> list[str]:
    """Returns the Markdown lines of section 4.4."""
    return epochs_table(found) if (found := load(results, "transfer_resnet18")) else []


def long_run_section(results: Path) -> list[str]:
    """Returns the Markdown lines of the long run."""
    return long_run_table(found) if (found := load(results, "long_run_cifar10")) else []


def epochs_table(report: dict[str, Any]) -> list[str]:
    """Returns a row for each MLHF and some for the best of the grid, at up to seven epochs."""
    results = epoch_results(report)
    own = [result for result in results if result.family == "mlhf"]
    others = [result for result in results if result.family != "mlhf"]
    steps = own[0].steps
    epochs = [step // own[0].steps_per_epoch for step in steps]
    best = [best_of(others, step).loss_at(step) for step in steps]
    accuracy = max(result.test_accuracy for result in others)
    shown = _spread(epochs)
    head = [f"{epochs[i]}" for i in shown]
    rows = [["training loss after epoch", *head, "test accuracy", "ms a step"]]
    for result in own:
        pairs = [(result.train_loss[i], best[i]) for i in shown]
        values = [f"{format_loss(x)} ({ratio(x, y)})" for x, y in pairs]
        milliseconds = f"{1e3 * result.seconds_per_step:.0f}"
        rows.append([result.name, *values, f"{result.test_accuracy:.1%}", milliseconds])
    seconds = min(result.seconds_per_step for result in others)
    last = [
        f"best of {len(others)} in that column",
        *(format_loss(best[i]) for i in shown),
        f"{accuracy:.1%}",
    ]
    rows.append([*last, f"{1e3 * seconds:.0f}"])
    for result in own:
        by_then = best_by_time(best, epochs, result.seconds_per_step / seconds)
        if any(map(math.isfinite, by_then)):
            rows.append(
                [
                    f"best of {len(others)} by the time of {result.name}",
                    *(_against(result.train_loss[i], by_then[i]) for i in shown),
                    "",
                    "",
                ]
            )
    note = (
        f"`{report['task']}`, {report['num_epochs']} epochs of {report['num_train']} images, batch "
        f"{report['batch_size']}, seeds: {own[0].seeds} for MLHF, {others[0].seeds} for the grid; in "
        f"brackets MLHF's loss over the best of the grid.{_by_seed(own, others)} {origin(report)}"
    )
    return [*table(rows), "", note]


def _by_seed(own: list[EpochResult], others: list[EpochResult]) -> str:
    """Returns a sentence with the last loss of every seed, of each MLHF and of the best of the grid."""
    if own[0].seeds == 1:
        return ""
    best = best_of(others, others[0].steps[-1])
    losses = [f"{one.name} {', '.join(map(format_loss, one.final_losses))}" for one in (*own, best)]
    return f" The last loss of every seed: {'; '.join(losses)}."


def _spread(epochs: list[int], most: int = 7) -> list[int]:
    """Returns the indices of epochs that are evenly spaced in the logarithm, first and last included."""
    wanted = np.geomspace(epochs[0], epochs[-1], most)
    return sorted({int(np.argmin(np.abs(np.subtract(epochs, epoch)))) for epoch in wanted})


def best_by_time(best: list[float], epochs: list[int], factor: float) -> list[float]:
    """Returns the best losses at the time of each epoch of steps that take ``factor`` times as long.

    Between two epochs of the grid the loss is taken on a straight line; NaN where its trainings had not
    done their first epoch by then, or were over.
    """
    times = [epoch * factor for epoch in epochs]
    return np.interp(times, epochs, best, left=math.nan, right=math.nan).tolist()


def _against(loss: float, best: float) -> str:
    """Returns the best loss by some time, and how many times of it MLHF has by then."""
    return f"{format_loss(best)} ({ratio(loss, best)})" if math.isfinite(best) else "-"


def long_run_table(report: dict[str, Any]) -> list[str]:
    """Returns loss, accuracy, damping and preconditioner at some steps of the long run."""
    records = report["records"]
    count = len(records["step"])
    chosen = sorted({round(count ** (i / 5)) - 1 for i in range(6)})
    head = ["long run, after step", *(f"{records['step'][i]:.0f}" for i in chosen)]
    rows = [head]
    formats = {
        "train_loss": ".3f",
        "test_accuracy": ".1%",
        "damping_mean": ".2g",
        "preconditioner_mean": ".2g",
    }
    for name, form in formats.items():
        rows.append([name.replace("_", " "), *(format(records[name][i], form) for i in chosen)])
    skipped = f"{records['skipped_steps'][-1]:.0f} of {report['num_steps']} steps skipped"
    verdict = "no loss above the first record" if report["is_stable"] else "NOT stable"
    share = report["curvature_share"] or 1
    momentum = f", momentum {report['momentum']:g}" if report.get("momentum") else ""
    note = (
        f"`{report['task']}`, batch {report['batch_size']}, curvature on {share:g} of it, learning rate "
        f"{report['learning_rate']:g}{momentum}: {skipped}, {verdict}. {origin(report)}"
    )
    return [*table(rows), "", note]
