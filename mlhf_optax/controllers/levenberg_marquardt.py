"""The Levenberg-Marquardt rule: damping that follows how well the quadratic model predicts the loss.

The authors' code measures the reduction ratio one step late, on the batch before. Here it is measured on the
batch of the step itself: numerator and denominator are then of the same function, and no batch is kept.
Source: Moré 1978; Martens 2010, section 4.1; paper, table 1, HF(LM).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mlhf_optax.controllers.protocol import Control, Controller, Observed, Operators, Outcome, Scale, View
from mlhf_optax.support import trees
from mlhf_optax.support.checks import require


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt:
    r"""The Levenberg-Marquardt rule for the damping.

    .. math::
      \rho = \frac{l(w - \eta d) - l(w)}{-\eta \langle d, g \rangle + \eta^2 \langle d, G d \rangle / 2}

    compares two changes of the loss on the batch: that of the step taken, and that which the undamped
    quadratic model predicted. Where the model promised too much (``ratio < low``), the damping is divided by
    ``decay``; where it can be trusted (``ratio > high``), multiplied.

    Args:
      initial_damping: damping of the first step, > 0 (paper: 1, 0.1, 0.01 or 0.001).
      decay: factor in (0, 1) (paper: 2/3, 0.9, 0.99 or 0.999).
      low: reduction ratio below which the damping grows.
      high: reduction ratio above which it shrinks.
      min_damping: lower bound on the damping, as in the authors' code.
      max_damping: upper bound on it.

    Raises:
      ValueError: for a value out of range.

    Example:
      >>> LevenbergMarquardt(initial_damping=0.1, decay=0.9).max_damping
      1.0
    """

    initial_damping: float = 1.0
    decay: float = 2 / 3
    low: float = 0.25
    high: float = 0.75
    min_damping: float = 1e-3
    max_damping: float = 1.0

    def __post_init__(self):
        require(0 < self.decay < 1, "decay", "strictly between 0 and 1", self.decay)
        require(self.low < self.high, "low", f"below `high`, {self.high}", self.low)
        least, most = self.min_damping, self.max_damping
        require(0 < least <= most, "min_damping", f"above 0 and at most `max_damping`, {most}", least)
        bounds = f"from `min_damping` to `max_damping`, from {least} to {most}"
        require(least <= self.initial_damping <= most, "initial_damping", bounds, self.initial_damping)

    def adapt(self, damping: jax.Array, ratio: jax.Array) -> jax.Array:
        """Returns the damping of the next step.

        Args:
          damping: that of this step, a scalar.
          ratio: its reduction ratio; NaN counts as too low.

        Returns:
          A float32 scalar between the bounds.

        Example:
          >>> LevenbergMarquardt(initial_damping=0.1, decay=0.5).adapt(0.1, 0.0)
          Array(0.2, dtype=float32)
        """
        # Compared so that NaN, which is never >= anything, makes the damping grow.
        grown_or_kept = jnp.where(ratio >= self.low, 1.0, 1.0 / self.decay)
        factor = jnp.where(ratio > self.high, self.decay, grown_or_kept)
        return jnp.clip(damping * factor, self.min_damping, self.max_damping).astype(jnp.float32)


def levenberg_marquardt(
    rule: LevenbergMarquardt = LevenbergMarquardt(), step_size: optax.ScalarOrSchedule = 1.0
) -> Controller:
    """Returns the controller whose damping follows the rule.

    A step to a loss that is not finite is not taken, and the damping grows.

    Args:
      rule: the rule.
      step_size: the factor, a number or schedule, that later transformations put on the direction. The
        reduction ratio is measured at the step that is taken.

    Returns:
      The controller; its state is the number of steps, and the damping of the next one.

    Example:
      >>> levenberg_marquardt(LevenbergMarquardt(0.5)).init({"w": jnp.ones(2)})["damping"]
      Array(0.5, dtype=float32)
    """

    def init(params):
        del params
        return {"count": jnp.zeros((), jnp.int32), "damping": jnp.asarray(rule.initial_damping, jnp.float32)}

    def control(view: View, state: Any) -> Control:
        del view
        return Control(state["damping"], state)

    def operators(view: View, signal: Any) -> Operators:
        return Operators(Scale(jax.tree.map(lambda _: signal, view.gradient)))

    def observe(view: View, outcome: Outcome, state: Any) -> Observed:
        damping, size = state["damping"], step_size(state["count"]) if callable(step_size) else step_size
        ratio, new_loss = reduction_ratio(view, outcome, damping, size)
        adapted = jnp.where(outcome.is_sound, rule.adapt(damping, ratio), damping)
        next_state = {"count": jnp.asarray(optax.safe_increment(state["count"])), "damping": adapted}
        return Observed(next_state, outcome.is_sound & jnp.isfinite(new_loss), ratio)

    return Controller(init, control, operators, observe, is_warm_started=False)


def reduction_ratio(
    view: View, outcome: Outcome, damping: jax.Array, step_size: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns the reduction ratio of the step ``-step_size * direction`` and the loss after it.

    This costs two evaluations of the loss. The quadratic model costs nothing, as the solve left
    ``G d = g - r - damping * d``.

    Args:
      view: parameters, gradient and loss before the step.
      outcome: direction and residual of the solve of ``(G + damping * I) d = g``.
      damping: scalar.
      step_size: factor on the direction.

    Returns:
      Two float32 scalars. The ratio is 0 where the model itself predicts no descent, as for a step of more
      than twice the direction: then it is no guide.
    """
    direction = outcome.direction
    step = jax.tree.map(lambda d: (-step_size * d).astype(d.dtype), direction)
    new_loss = view.loss_at(optax.apply_updates(view.params, step))  # rounds to the dtype of the parameters
    slope = trees.vdot(direction, view.gradient)
    curvature = slope - trees.vdot(direction, outcome.residual) - damping * trees.vdot(direction, direction)
    predicted = -step_size * slope + 0.5 * step_size**2 * curvature
    promises = predicted < 0
    change = new_loss - view.loss_at(view.params)
    ratio = jnp.where(promises, change / jnp.where(promises, predicted, 1.0), 0.0)
    return ratio.astype(jnp.float32), new_loss.astype(jnp.float32)
