"""The Levenberg-Marquardt rule: damping that follows how well the quadratic model predicts the loss.

The authors' code measures the reduction ratio one step late, on the batch before. Here it is measured on the
batch of the step itself: numerator and denominator are then of the same function, and no batch is kept.
Source: Moré 1978; Martens 2010, section 4.1; paper, table 1, HF(LM).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from mlhf_optax.controllers.protocol import (
    Control,
    Controller,
    Observed,
    Operator,
    Operators,
    Outcome,
    Scale,
    View,
)
from mlhf_optax.support import placement, trees
from mlhf_optax.support.checks import check_choice, require


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
      growth: factor > 1 by which the damping grows; None for ``1 / decay``.
      refuses: a step that does not lower the loss is not taken, and the damping grows. For losses without
        noise: all data in every batch.
      scaling: ``"identity"``, or ``"marquardt"``: the damping of a parameter is in units of the largest
        diagonal entry that G has had there, so it does not matter in which unit a parameter is measured. The
        diagonal takes as many GGN products as there are parameters, so use it with
        :class:`mlhf_optax.solvers.Exact`, which needs them anyway.

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
    growth: float | None = None
    refuses: bool = False
    scaling: Literal["identity", "marquardt"] = "identity"

    @classmethod
    def without_noise(cls, **changes: Any) -> "LevenbergMarquardt":
        """Returns the rule for losses without noise, as of fits to measurements.

        Together with :class:`mlhf_optax.solvers.Exact` it is the classical method. For networks, whose
        parameters are alike, ``scaling="identity"`` is better.

        Example:
          >>> LevenbergMarquardt.without_noise(initial_damping=1.0).refuses
          True
        """
        rule = cls(1e-2, 1 / 3, 1e-4, 0.75, 1e-15, 1e10, growth=2.0, refuses=True, scaling="marquardt")
        return dataclasses.replace(rule, **changes)

    def __post_init__(self):
        require(0 < self.decay < 1, "decay", "strictly between 0 and 1", self.decay)
        require(self.low < self.high, "low", f"below `high`, {self.high}", self.low)
        least, most = self.min_damping, self.max_damping
        require(0 < least <= most, "min_damping", f"above 0 and at most `max_damping`, {most}", least)
        bounds = f"from `min_damping` to `max_damping`, from {least} to {most}"
        require(least <= self.initial_damping <= most, "initial_damping", bounds, self.initial_damping)
        require(self.growth is None or self.growth > 1, "growth", "above 1, or None", self.growth)
        check_choice("scaling", self.scaling, ("identity", "marquardt"))

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
        growth = 1.0 / self.decay if self.growth is None else self.growth
        grown_or_kept = jnp.where(ratio >= self.low, 1.0, growth)
        factor = jnp.where(ratio > self.high, self.decay, grown_or_kept)
        return jnp.clip(damping * factor, self.min_damping, self.max_damping).astype(jnp.float32)


def levenberg_marquardt(
    rule: LevenbergMarquardt = LevenbergMarquardt(), step_size: optax.ScalarOrSchedule = 1.0
) -> Controller:
    """Returns the controller whose damping follows the rule.

    A step to a loss that is not finite is not taken, and the damping grows. So it does where the rule refuses
    and the system was singular.

    Args:
      rule: the rule.
      step_size: the factor, a number or schedule, that later transformations put on the direction. The
        reduction ratio is measured at the step that is taken.

    Returns:
      The controller; its state is the number of steps, the damping of the next one, and with Marquardt's
      scaling one number per parameter.

    Example:
      >>> levenberg_marquardt(LevenbergMarquardt(0.5)).init({"w": jnp.ones(2)})["damping"]
      Array(0.5, dtype=float32)
    """
    is_scaled = rule.scaling == "marquardt"

    def init(params):
        state = {"count": jnp.zeros((), jnp.int32), "damping": jnp.asarray(rule.initial_damping, jnp.float32)}
        zeros = lambda p: placement.zeros_like(p, trees.wide_dtype(p))
        return state | ({"diagonal": jax.tree.map(zeros, params)} if is_scaled else {})

    def control(view: View, state: Any) -> Control:
        if is_scaled:
            flat, unravel = ravel_pytree(jax.tree.map(trees.at_least_f32, view.gradient))
            diagonal = unravel(jnp.diag(view.ggn.matrix).astype(flat.dtype))
            state = state | {"diagonal": jax.tree.map(jnp.maximum, state["diagonal"], diagonal)}
        return Control(state, state)

    def operators(view: View, signal: Any) -> Operators:
        if not is_scaled:
            return Operators(Scale(jax.tree.map(lambda _: signal["damping"], view.gradient)))
        # What nothing depends on has no unit, but the matrix needs damping there to have an inverse.
        scale = lambda x: signal["damping"] * jnp.where(x > 0, x, 1.0)
        return Operators(Scale(jax.tree.map(scale, signal["diagonal"])))

    def observe(view: View, outcome: Outcome, state: Any) -> Observed:
        damping, size = state["damping"], step_size(state["count"]) if callable(step_size) else step_size
        ratio, loss, new_loss = reduction_ratio(view, outcome, operators(view, state).damping, size)
        moves = outcome.is_sound
        adapted = jnp.where(moves, rule.adapt(damping, ratio), damping)
        if rule.refuses:
            moves &= (new_loss < loss) | ~trees.is_any_nonzero(view.gradient)
            # Nothing was solved although the gradient is fine: the matrix is singular to rounding.
            adapted = jnp.where(view.is_valid, rule.adapt(damping, jnp.where(moves, ratio, -1.0)), damping)
        next_state = state | {"count": jnp.asarray(optax.safe_increment(state["count"])), "damping": adapted}
        return Observed(next_state, moves & jnp.isfinite(new_loss), ratio)

    return Controller(init, control, operators, observe, is_warm_started=False)


def reduction_ratio(
    view: View, outcome: Outcome, damping: Operator, step_size: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the reduction ratio of the step ``-step_size * direction``, and the losses before and after it.

    This costs two evaluations of the loss. The quadratic model costs nothing, as the solve left
    ``G d = g - r - S d``.

    Args:
      view: parameters, gradient and loss before the step.
      outcome: direction and residual of the solve of ``(G + S) d = g``.
      damping: S.
      step_size: factor on the direction.

    Returns:
      The ratio, float32, and two losses in their own dtype. The ratio is 0 where the model itself predicts
      no descent, as for a step of more
      than twice the direction: then it is no guide.
    """
    direction = outcome.direction
    step = jax.tree.map(lambda d: (-step_size * d).astype(d.dtype), direction)
    new_loss = view.loss_at(optax.apply_updates(view.params, step))  # rounds to the dtype of the parameters
    slope = trees.vdot(direction, view.gradient)
    curvature = slope - trees.vdot(direction, outcome.residual) - trees.vdot(direction, damping(direction))
    predicted = -step_size * slope + 0.5 * step_size**2 * curvature
    promises = predicted < 0
    loss = view.loss_at(view.params)
    ratio = jnp.where(promises, (new_loss - loss) / jnp.where(promises, predicted, 1.0), 0.0)
    return ratio.astype(jnp.float32), loss, new_loss
