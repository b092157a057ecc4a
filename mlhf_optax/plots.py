"""A figure of what the steps of a training did."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from mlhf_optax.step_info import StepInfo

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_info(history: Sequence[StepInfo] | StepInfo, *, title: str = "") -> "Figure":
    """Draws loss, damping, CG residual and reduction ratio over the steps of a training.

    Grey lines mark skipped steps. Values that are zero or negative have no place on a logarithmic axis and
    leave a gap. How a good and a bad training look is in the documentation, *Reading info*.

    Args:
      history: ``optax.tree.get(opt_state, "info")`` of every step, in a list; or one :class:`StepInfo` whose
        fields have shape (steps,), as from :func:`jax.lax.scan`.
      title: of the figure.

    Returns:
      A :class:`matplotlib.figure.Figure`; ``savefig("training.png")`` writes it, and notebooks show it.

    Raises:
      ImportError: if matplotlib is missing.
      TypeError: for anything that is no :class:`StepInfo`.
      ValueError: for a history without steps.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from mlhf_optax import SquaredError, gauss_newton
      >>> predict_fn, loss_fn, batch = lambda w, x: x @ w, lambda z, x: jnp.mean((z - 1.0) ** 2), jnp.eye(3)
      >>> tx, params, history = gauss_newton(1.0, predict_fn, loss_fn), jnp.full(3, 0.1), []
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> for _ in range(3):
      ...     grads = jax.grad(lambda w: loss_fn(predict_fn(w, batch), batch))(params)
      ...     updates, state = update(grads, state, params, batch=batch)
      ...     params = optax.apply_updates(params, updates)
      ...     history.append(optax.tree.get(state, "info"))
      >>> figure = plot_info(history)
      >>> [axes.get_ylabel() for axes in figure.axes]
      ['loss', 'damping', 'norm of the CG residual', 'reduction ratio']
    """
    info = _stacked(history)
    try:
        # The figure object alone: pyplot keeps a global state and may look for a screen.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "`plot_info` needs matplotlib, which is not installed; run `pip install matplotlib`"
        ) from error

    steps = np.arange(1, len(info.loss) + 1)
    figure = Figure(figsize=(10, 6), layout="constrained")
    loss, damping, residual, ratio = figure.subplots(2, 2, sharex=True).flat
    figure.suptitle(title)
    loss.plot(steps, info.loss, color="0.6", linewidth=0.8, label="of the step")
    loss.plot(steps, info.smoothed_loss, color="C0", label="running mean")
    loss.legend()
    damping.fill_between(
        steps, info.damping_min, info.damping_max, color="C1", alpha=0.25, label="all coordinates"
    )
    damping.plot(steps, info.damping_mean, color="C1", label="mean")
    damping.legend()
    residual.plot(steps, info.cg_residual_norm, color="C2")
    ratio.plot(steps, info.reduction_ratio, color="C3")
    ratio.axhline(1.0, color="0.8", zorder=0)
    if not np.any(info.reduction_ratio):
        ratio.text(0.5, 0.5, "not measured", transform=ratio.transAxes, ha="center")
    skipped = steps[np.diff(info.skipped_steps, prepend=0) > 0]
    names = ("loss", "damping", "norm of the CG residual", "reduction ratio")
    for axes, name in zip((loss, damping, residual, ratio), names, strict=True):
        is_log = axes is not ratio and any(np.any(np.asarray(line.get_ydata()) > 0) for line in axes.lines)
        axes.set(ylabel=name, yscale="log" if is_log else "linear")
        axes.spines[["top", "right"]].set_visible(False)
        axes.vlines(skipped, 0, 1, transform=axes.get_xaxis_transform(), color="0.8", zorder=0)
    for axes in (residual, ratio):
        axes.set(xlabel="step")
    return figure


def _stacked(history: Any) -> Any:
    """Returns one info whose fields are NumPy arrays of shape (steps,)."""
    if isinstance(history, StepInfo):
        info = jax.tree.map(np.atleast_1d, history)
    else:
        history = list(history)
        wrong = [type(item).__name__ for item in history if not isinstance(item, StepInfo)]
        if wrong:
            raise TypeError(
                f"`history` must hold a StepInfo of each step, got {wrong[0]}; append "
                '`optax.tree.get(opt_state, "info")` after every update'
            )
        info = jax.tree.map(lambda *fields: np.stack(fields), *history) if history else None
    if info is None or not info.loss.size:
        raise ValueError("`history` must hold the info of at least one step, got none")
    return info
