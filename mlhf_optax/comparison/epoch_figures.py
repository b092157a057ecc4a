"""The curves of trainings for epochs: loss and accuracy, by epochs and by time, as in the paper."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlhf_optax.comparison.epoch_results import EpochResult
from mlhf_optax.comparison.figures import require_matplotlib

_LEARNED = ("#c1121f", "#7b2cbf", "#f77f00")
_OTHERS = ("#1f77b4", "#2a9d5c", "#b8860b", "#17becf", "#8c564b")


def save_epoch_comparison(results: Sequence[EpochResult], path: str | Path, title: str) -> Path:
    """Draws training loss and test accuracy by epochs and by time, and writes the figure to a file.

    Shown are MLHF, of every other family the setting of lowest loss at the end and the one of highest
    accuracy, and for each measure the best of all others at each epoch, a different one at a time.

    Args:
      results: of one comparison, at least one.
      path: where to write; the ending says the format (png, svg, pdf).
      title: title of the figure.

    Returns:
      The path.

    Raises:
      ImportError: if matplotlib is missing.
      ValueError: if there are no results.

    Example:
      >>> import tempfile
      >>> result = EpochResult("mlhf", "mlhf", {}, 1, (5, 10), (2.0, 1.0), 0.9, 1e-3, 5, (0.8, 0.9), (1.0,))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_epoch_comparison([result], f"{folder}/curves.png", "one curve").name
      'curves.png'
    """
    if not results:
        raise ValueError("`results` is empty; there is nothing to draw")
    require_matplotlib()
    # The figure object alone: pyplot keeps a global state and may look for a screen.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row", sharex="col")
    figure.suptitle(title, fontweight="bold")
    for result, style in _styles(results):
        _draw(axes, result, style)
    others = [result for result in results if not _is_learned(result)]
    if others:
        _draw_best(axes, others)
    axes[0, 0].set(yscale="log", ylabel="training loss (nats, mean over seeds)")
    axes[1, 0].set(ylabel="test accuracy (mean over seeds)", xlabel="epochs")
    axes[1, 1].set(xscale="log", xlabel="seconds of training (steps x seconds a step)")
    for axis in (axes[0, 0].yaxis, axes[1, 1].xaxis):
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))  # labels where decades are few
    for axis in axes.flat:
        axis.grid(True, which="major", color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=150)
    return Path(path)


def _is_learned(result: EpochResult) -> bool:
    return result.family == "mlhf"


def _styles(results: Sequence[EpochResult]) -> list[tuple[EpochResult, dict[str, Any]]]:
    learned = [result for result in results if _is_learned(result)]
    styled: list[tuple[EpochResult, dict[str, Any]]] = []
    for number, result in enumerate(learned):
        colour = _LEARNED[number % len(_LEARNED)]
        styled.append((result, {"color": colour, "linewidth": 2.5, "zorder": 4}))
    families = dict.fromkeys(result.family for result in results if not _is_learned(result))
    for number, family in enumerate(families):
        members = [result for result in results if result.family == family]
        lowest = min(members, key=lambda result: result.train_loss[-1])
        highest = max(members, key=lambda result: result.test_accuracy)
        colour = _OTHERS[number % len(_OTHERS)]
        for result, dash in ((lowest, "-"), (highest, "--")):
            if dash == "-" or result is not lowest:
                styled.append((result, {"color": colour, "linewidth": 1.3, "linestyle": dash}))
    return styled


def _draw(axes, result: EpochResult, style: dict[str, Any]) -> None:
    steps = np.asarray(result.steps)
    style = style | _marked(steps)
    label = result.name.replace("mlhf", "MLHF", 1)
    for row, values in enumerate((_drawable(result.train_loss), result.test_curve)):
        axes[row, 0].plot(steps / result.steps_per_epoch, values, label=label, **style)
        axes[row, 1].plot(steps * result.seconds_per_step, values, **style)


def _draw_best(axes, others: Sequence[EpochResult]) -> None:
    steps = np.asarray(others[0].steps)
    style = {"color": "0.2", "linewidth": 1.2, "linestyle": ":", **_marked(steps)}
    lowest = np.min([result.train_loss for result in others], axis=0)
    highest = np.max([result.test_curve for result in others], axis=0)
    label = f"best of the other {len(others)} at each epoch"
    for row, values in enumerate((_drawable(lowest.tolist()), highest)):
        axes[row, 0].plot(steps / others[0].steps_per_epoch, values, label=label, **style)


def _marked(steps: np.ndarray) -> dict[str, Any]:
    """Marks the points of a curve of few of them: a line through a single one cannot be seen."""
    return {"marker": "o", "markersize": 4} if len(steps) <= 10 else {}


def _drawable(losses: Sequence[float]) -> list[float]:
    return [loss if math.isfinite(loss) else math.nan for loss in losses]


__all__ = ["save_epoch_comparison"]
