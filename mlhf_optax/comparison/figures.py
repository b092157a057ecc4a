"""The curves of a comparison, by steps and by time."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlhf_optax.comparison.results import Result, best_of, leaders
from mlhf_optax.comparison.training import TABLE_STEPS

_COLOURS = {"mlhf": "#c1121f", "sgd": "#1f77b4", "rmsprop": "#2a9d5c", "adam": "#e08a1e"}
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))


def require_matplotlib() -> None:
    """Raises ImportError, with the remedy, if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib, which is not installed; run `pip install 'mlhf-optax[experiments]'`"
        ) from error


def save_comparison(results: Sequence[Result], path: str | Path, title: str) -> Path:
    """Draws training loss by steps and by time, and writes the figure to a file.

    Shown are MLHF, the optimizers that are the best of their family halfway (in the logarithm of the
    steps) and at the end, and, by steps, the lowest loss of all others at each step.

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
      >>> result = Result("mlhf", "mlhf", {}, 1, (1, 10), (2.0, 1.0), 0.9, 1e-3)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_comparison([result], f"{folder}/curves.png", "one curve").name
      'curves.png'
    """
    if not results:
        raise ValueError("`results` is empty; there is nothing to draw")
    require_matplotlib()
    # The figure object alone: pyplot keeps a global state and may look for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    figure.suptitle(title, fontweight="bold")
    labels = [_draw_curve(by_step, by_time, result, style) for result, style in _styles(_shown(results))]
    others = [result for result in results if result.family != "mlhf"]
    if others:
        labels.append(_draw_envelope(by_step, others))
    for axes, name in ((by_step, "steps"), (by_time, "seconds of training (steps x seconds a step)")):
        axes.set(xscale="log", yscale="log", xlabel=name)
        axes.grid(True, which="major", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    ticks = [step for step in (1, 3, *TABLE_STEPS, 1000, 10000) if step <= results[0].steps[-1]]
    by_step.set_xticks(ticks, [str(step) for step in ticks])
    by_step.minorticks_off()
    by_step.set_ylabel("training loss (nats, mean over seeds)")
    _label_ends(by_step, labels)
    figure.savefig(path, dpi=150)
    return Path(path)


def _shown(results: Sequence[Result]) -> list[Result]:
    steps = results[0].steps
    halfway = min(steps, key=lambda step: abs(math.log(step) - math.log(steps[-1]) * 0.6))
    shown = []
    for family in dict.fromkeys(result.family for result in results):
        shown += leaders([result for result in results if result.family == family], [halfway, steps[-1]])
    return shown


def _styles(results: Sequence[Result]) -> list[tuple[Result, dict[str, Any]]]:
    styled, seen = [], dict[str, int]()
    for result in results:
        number = seen.get(result.family, 0)
        seen[result.family] = number + 1
        style = {"color": _COLOURS.get(result.family, "0.4"), "linestyle": _DASHES[number % len(_DASHES)]}
        is_learned = result.family == "mlhf"
        styled.append(
            (result, style | {"linewidth": 3.0 if is_learned else 1.5, "zorder": 4 if is_learned else 3})
        )
    return styled


class _Label(NamedTuple):
    """Text for the end of a curve by steps."""

    text: str
    colour: str
    weight: str
    step: int
    loss: float


def _draw_curve(by_step, by_time, result: Result, style: dict[str, Any]) -> _Label:
    """Draws one curve on both axes and returns the label for its end."""
    losses = [result.loss_at(step) for step in result.steps]
    by_step.plot(result.steps, _drawable(losses), **style)
    by_time.plot([step * result.seconds_per_step for step in result.steps], _drawable(losses), **style)
    is_learned = result.family == "mlhf"
    text, weight = ("MLHF", "bold") if is_learned else (result.name, "normal")
    return _Label(text, style["color"], weight, *_end(result.steps, losses))


def _draw_envelope(by_step, others: Sequence[Result]) -> _Label:
    steps = others[0].steps
    lowest = [best_of(others, step).loss_at(step) for step in steps]
    by_step.plot(steps, _drawable(lowest), color="0.2", linewidth=1.2, linestyle=":", zorder=3.5)
    text = f"best of the other {len(others)} at each step"
    return _Label(text, "0.2", "normal", *_end(steps, lowest))


def _drawable(losses: Sequence[float]) -> list[float]:
    return [loss if math.isfinite(loss) else math.nan for loss in losses]


def _end(steps: Sequence[int], losses: Sequence[float]) -> tuple[int, float]:
    """Returns the last point that a logarithmic axis can show; the loss is 0 if there is none."""
    points = [(step, loss) for step, loss in zip(steps, losses, strict=True) if 0 < loss < math.inf]
    return points[-1] if points else (steps[-1], 0.0)


def _label_ends(axes, labels: Sequence[_Label], gap: float = 0.05) -> None:
    """Writes each label right of the axes at the height of its curve's end, apart from the others."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    placed = sorted((label for label in labels if label.loss > 0), key=lambda label: label.loss)
    height = -math.inf
    for label in placed:
        height = max((math.log(label.loss) - low) / (high - low), height + gap)
        axes.annotate(
            label.text,
            xy=(label.step, label.loss),
            xytext=(1.04, height),
            textcoords="axes fraction",
            color=label.colour,
            fontweight=label.weight,
            fontsize=9,
            verticalalignment="center",
            arrowprops={
                "arrowstyle": "-",
                "color": label.colour,
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


__all__ = ["require_matplotlib", "save_comparison"]
