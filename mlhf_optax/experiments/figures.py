"""The figure of a comparison: training loss and test accuracy, by steps and by time."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlhf_optax.experiments.results import Comparison, Curve, best_at
from mlhf_optax.experiments.tables import Unit

_LEARNED_COLOURS = ("#c1121f", "#7b2cbf", "#f77f00")
_OTHER_COLOURS = ("#1f77b4", "#2a9d5c", "#b8860b", "#17becf", "#8c564b")


def require_matplotlib() -> None:
    """Raises ImportError, with the remedy, if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib, which is not installed; run `pip install 'mlhf-optax[experiments]'`"
        ) from error


def save_figure(comparison: Comparison, path: str | Path, title: str, unit: Unit = "step") -> Path:
    """Draws loss, and accuracy where it was recorded, by steps or epochs and by time.

    Shown are the learned optimizers; of every other family the setting of lowest loss at the end, and the
    one of highest accuracy; and the best of all others at each step, a different one at a time.

    Args:
      comparison: with at least one optimizer.
      path: where to write, and what is returned; the ending says the format (png, svg, pdf).
      title: of the figure.
      unit: ``"step"`` for a logarithmic axis of steps, ``"epoch"`` for one of epochs.

    Raises:
      ImportError: if matplotlib is missing.
      ValueError: if there are no results.
    """
    curves = comparison.curves()
    if not curves:
        raise ValueError("`comparison` is empty; there is nothing to draw")
    require_matplotlib()
    # The figure object alone: pyplot keeps a global state and may look for a screen.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    has_accuracy = all(value is not None for curve in curves for value in curve.test_accuracy)
    rows = ["train_loss", "test_accuracy"] if has_accuracy else ["train_loss"]
    figure = Figure(figsize=(12, 1.5 + 3.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2, sharey="row", sharex="col", squeeze=False)
    figure.suptitle(title, fontweight="bold")
    others = [curve for curve in curves if not curve.is_learned]
    drawn = [*_styled(curves), *([(_best_of(others), _style("0.2", 1.2, ":"))] if others else [])]
    for curve, style in drawn:
        per_unit = (curve.steps_per_epoch or 1) if unit == "epoch" else 1
        # A line through a single point cannot be seen.
        style = style | ({"marker": "o", "markersize": 4} if len(curve.steps) <= 10 else {})
        for row, measure in zip(axes, rows, strict=True):
            values = [math.nan if x is None or math.isinf(x) else x for x in getattr(curve, measure)]
            row[0].plot([step / per_unit for step in curve.steps], values, label=curve.label, **style)
            if curve.seconds_per_step is not None:
                row[1].plot([step * curve.seconds_per_step for step in curve.steps], values, **style)
    axes[0, 0].set(yscale="log", ylabel="training loss (mean over seeds)")
    axes[0, 0].yaxis.set_major_formatter(LogFormatter())
    # Labels between the decades where there are few of them.
    axes[0, 0].yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))
    if has_accuracy:
        axes[1, 0].set(ylabel="test accuracy (mean over seeds)")
    axes[-1, 0].set(xscale="log" if unit == "step" else "linear", xlabel=f"{unit}s")
    axes[-1, 1].set(xscale="log", xlabel="seconds of training (steps x seconds per step)")
    for axis in axes.flat:
        axis.grid(True, which="major", color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=150)
    return Path(path)


def _style(colour: str, width: float, dash: str = "-") -> dict[str, Any]:
    return {"color": colour, "linewidth": width, "linestyle": dash, "zorder": 2 + width}


def _styled(curves: Sequence[Curve]) -> list[tuple[Curve, dict[str, Any]]]:
    """Returns the curves to show one by one, with their styles."""
    learned = [curve for curve in curves if curve.is_learned]
    pick = lambda colours, number: colours[number % len(colours)]
    styled = [(curve, _style(pick(_LEARNED_COLOURS, i), 2.5)) for i, curve in enumerate(learned)]
    families = dict.fromkeys(curve.family for curve in curves if not curve.is_learned)
    for number, family in enumerate(families):
        members = [curve for curve in curves if curve.family == family]
        lowest = best_at(members, members[0].steps[-1])
        highest = max(members, key=lambda curve: curve.accuracy)
        styled.append((lowest, _style(pick(_OTHER_COLOURS, number), 1.3)))
        if highest is not lowest:
            styled.append((highest, _style(pick(_OTHER_COLOURS, number), 1.3, "--")))
    return styled


def _best_of(others: Sequence[Curve]) -> Curve:
    """Returns lowest loss and highest accuracy of all at each step, which takes no time of its own."""
    loss = [min(values) for values in zip(*(curve.train_loss for curve in others), strict=True)]
    known = zip(*(curve.test_accuracy for curve in others), strict=True)
    accuracy = [max((x for x in values if x is not None), default=None) for values in known]
    return others[0]._replace(
        label=f"best of {len(others)} hand-made at each step",
        train_loss=loss,
        test_accuracy=accuracy,
        seconds_per_step=None,
    )
