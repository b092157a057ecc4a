"""The Levenberg-Marquardt rule: damping that follows how well the quadratic model predicts the loss.

The authors' code measures the reduction ratio one step late, on the batch before. Here it is measured on the
batch of the step itself: numerator and denominator are then of the same function, and no batch is kept.
Source: Moré 1978; Martens 2010, section 4.1; paper, table 1, HF(LM).
"""

import dataclasses
from typing import Any, Literal, get_args

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
from mlhf_optax.dense import cheaper_space
from mlhf_optax.support import loops, placement, trees
from mlhf_optax.support.checks import POSITIVE, check_choice, check_number, require

Scaling = Literal["identity", "marquardt", "geometric", "by size"]
_FEW_PARAMETERS = 32  # of a fit to measurements, each with a unit of its own


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt:
    r"""The Levenberg-Marquardt rule for the damping.

    .. math::
      \rho = \frac{l(w - \eta d) - l(w)}{-\eta \langle d, g \rangle + \eta^2 \langle d, G d \rangle / 2}

    compares two changes of the loss on the batch: that of the step taken, and that which the undamped
    quadratic model predicted. Where the model promised too much (``ratio < low``), the damping is divided by
    ``decay``; where it can be trusted (``ratio > high``), multiplied.

    Args:
      initial_damping: damping of the first step, > 0 (paper: 1, 0.1, 0.01 or 0.001). None for 0.01 with
        Marquardt's scaling, else 1.
      decay: factor in (0, 1) (paper: 2/3, 0.9, 0.99 or 0.999).
      low: reduction ratio below which the damping grows.
      high: reduction ratio above which it shrinks.
      min_damping: lower bound on the damping, as in the authors' code.
      max_damping: upper bound on it.
      growth: factor > 1 by which the damping grows; None for ``1 / decay``.
      refuses: a step that does not lower the loss is not taken, and the damping grows. For losses without
        noise: all data in every batch.
      scaling: the unit of the damping.

        - ``"identity"``: 1.
        - ``"marquardt"``: for each parameter the largest diagonal entry that G has had there, so it does not
          matter in which unit a parameter is measured. For fits to measurements.
        - ``"geometric"``: for each parameter the root of the product of its diagonal entry and the mean of
          all of them, half way between Marquardt's and one number for all. For networks: on all that were
          tried it was as good as the better of the two. Where the matrix is too large to be formed
          (:func:`mlhf_optax.dense.cheaper_space`), the mean for all, estimated by one product.
        - ``"by size"``: Marquardt's for up to 32 parameters, else the geometric.

        Both need the Jacobian, so use them with :class:`mlhf_optax.solvers.Exact` or
        :class:`mlhf_optax.solvers.BySize`, which form it anyway.

      first_radius: for up to 32 parameters with Marquardt's scaling, and without ``initial_damping``: the
        damping of a step is such that the direction is as long as a radius, or zero where it is shorter by
        itself. Lengths are in units of the scaling. The first radius is this share of the length of the
        parameters; later it follows the reduction ratio, halved below 0.25 and doubled above 0.75. This takes
        the eigenvalues of the matrix. None, and for more parameters: the damping itself is adapted.

    Raises:
      ValueError: for a value out of range.

    Example:
      >>> LevenbergMarquardt(initial_damping=0.1, decay=0.9).max_damping
      1.0
    """

    initial_damping: float | None = 1.0
    decay: float = 2 / 3
    low: float = 0.25
    high: float = 0.75
    min_damping: float = 1e-3
    max_damping: float = 1.0
    growth: float | None = None
    refuses: bool = False
    scaling: Scaling = "identity"
    first_radius: float | None = None

    @classmethod
    def without_noise(cls, **changes: Any) -> "LevenbergMarquardt":
        """Returns the rule for losses without noise: fits to measurements, differential equations, all data.

        Together with :class:`mlhf_optax.solvers.Exact` it is the classical method. The unit of the damping is
        chosen by the number of parameters.

        Example:
          >>> LevenbergMarquardt.without_noise(initial_damping=1.0).refuses
          True
        """
        rule = cls(None, 1 / 3, 1e-4, 0.75, 1e-15, 1e10, growth=2.0, refuses=True, scaling="by size")
        changes = {"first_radius": 0.1} | changes
        return dataclasses.replace(rule, **changes)

    def __post_init__(self):
        require(0 < self.decay < 1, "decay", "strictly between 0 and 1", self.decay)
        require(self.low < self.high, "low", f"below `high`, {self.high}", self.low)
        least, most = self.min_damping, self.max_damping
        require(0 < least <= most, "min_damping", f"above 0 and at most `max_damping`, {most}", least)
        bounds = f"from `min_damping` to `max_damping`, from {least} to {most}"
        first = self.initial_damping
        require(first is None or least <= first <= most, "initial_damping", bounds, first)
        require(self.growth is None or self.growth > 1, "growth", "above 1, or None", self.growth)
        check_choice("scaling", self.scaling, get_args(Scaling))
        check_number("first_radius", self.first_radius, POSITIVE, or_none=True)

    def adapt(self, damping: jax.Array, ratio: jax.Array) -> jax.Array:
        """Returns the damping of the next step.

        Args:
          damping: that of this step, a scalar.
          ratio: its reduction ratio; NaN counts as too low.

        Returns:
          A scalar between the bounds, in the dtype of the damping, float32 of a number.

        Example:
          >>> LevenbergMarquardt(initial_damping=0.1, decay=0.5).adapt(0.1, 0.0)
          Array(0.2, dtype=float32)
        """
        # Compared so that NaN, which is never >= anything, makes the damping grow.
        growth = 1.0 / self.decay if self.growth is None else self.growth
        grown_or_kept = jnp.where(ratio >= self.low, 1.0, growth)
        factor = jnp.where(ratio > self.high, self.decay, grown_or_kept)
        dtype = getattr(damping, "dtype", jnp.float32)
        return jnp.clip(damping * factor, self.min_damping, self.max_damping).astype(dtype)

    def has_radius(self, num_params: int) -> bool:
        """Returns whether the damping follows from a radius, for so many parameters."""
        is_scaled = self.scaling_of(num_params) == "marquardt" and num_params <= _FEW_PARAMETERS
        return is_scaled and self.first_radius is not None and self.initial_damping is None

    def adapt_radius(self, radius: jax.Array, length: jax.Array, ratio: jax.Array) -> jax.Array:
        """Returns the radius of the next step, from the length of the direction and its reduction ratio.

        Example:
          >>> rule = LevenbergMarquardt.without_noise()
          >>> [float(rule.adapt_radius(jnp.array(1.0), jnp.array(0.8), ratio)) for ratio in (0.1, 0.5, 0.9)]
          [0.4000000059604645, 1.0, 1.600000023841858]
        """
        known = jnp.where(jnp.isfinite(length), length, radius)
        grown = jnp.where(ratio > 0.75, jnp.maximum(2 * known, radius), radius)
        return jnp.where(ratio >= 0.25, grown, jnp.minimum(known, radius) / 2)  # NaN is too low

    def scaling_of(self, num_params: int) -> Scaling:
        """Returns the scaling for so many parameters.

        Example:
          >>> LevenbergMarquardt.without_noise().scaling_of(5)
          'marquardt'
        """
        if self.scaling != "by size":
            return self.scaling
        return "marquardt" if num_params <= _FEW_PARAMETERS else "geometric"


def levenberg_marquardt(
    rule: LevenbergMarquardt = LevenbergMarquardt(),
    step_size: optax.ScalarOrSchedule = 1.0,
    is_whole_batch: bool = False,
) -> Controller:
    """Returns the controller whose damping follows the rule.

    A step to a loss that is not finite is not taken, and the damping grows. So it does where the rule refuses
    and the system was singular.

    Args:
      rule: the rule.
      step_size: the factor, a number or schedule, that later transformations put on the direction. The
        reduction ratio is measured at the step that is taken.
      is_whole_batch: curvature is taken on all of the batch, so the loss there is that of the batch.

    Returns:
      The controller; its state is the number of steps, the damping of the next one, and with Marquardt's
      scaling one number per parameter. A rule that refuses keeps two losses more: that of the first step, and
      what the loss of the next one will be if it comes with the same batch.

    Example:
      >>> levenberg_marquardt(LevenbergMarquardt(0.5)).init({"w": jnp.ones(2)})["damping"]
      Array(0.5, dtype=float32)
    """

    def init(params):
        scaling = rule.scaling_of(trees.size(params))
        dtype = trees.common_dtype(jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(params)))
        first = rule.initial_damping
        if first is None:
            first = 0.01 if scaling == "marquardt" else 1.0
        first = min(max(first, rule.min_damping), rule.max_damping)
        state = {"count": jnp.zeros((), jnp.int32), "damping": jnp.asarray(first, dtype)}
        if scaling == "marquardt":
            zeros = lambda p: placement.zeros_like(p, trees.wide_dtype(p))
            state["diagonal"] = jax.tree.map(zeros, params)
        if rule.has_radius(trees.size(params)):
            # Zero until the first step; the length is that of the direction without acceleration.
            state |= {"radius": jnp.zeros((), dtype), "length": jnp.zeros((), dtype)}
        if rule.refuses:
            state |= {"first_loss": jnp.zeros((), dtype), "next_loss": jnp.zeros((), dtype)}
        return state

    def signal_of(view: View, state: Any) -> dict[str, Any]:
        signal, scaling = {"damping": state["damping"]}, rule.scaling_of(trees.size(view.params))
        if scaling == "marquardt":
            # What nothing depends on has no unit, but the matrix needs damping there to have an inverse.
            signal["unit"] = jax.tree.map(lambda x: jnp.where(x > 0, x, 1.0), state["diagonal"])
        elif scaling == "geometric":
            signal["unit"] = _geometric(view)
        return signal

    def control(view: View, state: Any) -> Control:
        if "diagonal" in state:
            state = state | {"diagonal": jax.tree.map(jnp.maximum, state["diagonal"], _diagonal(view))}
        if "radius" in state:
            state = state | _within_radius(rule, view, state, signal_of(view, state)["unit"])
        return Control(signal_of(view, state), state)

    def operators(view: View, signal: Any) -> Operators:
        if "unit" not in signal:
            return Operators(Scale(jax.tree.map(lambda _: signal["damping"], view.gradient)))
        return Operators(Scale(jax.tree.map(lambda unit: signal["damping"] * unit, signal["unit"])))

    def observe(view: View, outcome: Outcome, state: Any) -> Observed:
        damping, size = state["damping"], step_size(state["count"]) if callable(step_size) else step_size
        loss = view.loss if is_whole_batch else view.loss_at(view.params)
        damped = operators(view, signal_of(view, state)).damping(outcome.direction)
        ratio, new_loss = _ratio(view, outcome, damped, loss, size)
        moves = outcome.is_sound
        adapted = jnp.where(moves, rule.adapt(damping, ratio), damping)
        is_first = state["count"] == 0
        next_state, refused, changed = state, jnp.asarray(False), jnp.asarray(False)
        if rule.refuses:
            falls = (new_loss < loss) | ~trees.is_any_nonzero(view.gradient)
            refused, moves = moves & ~falls, moves & falls
            # Nothing was solved although the gradient is fine: the matrix is singular to rounding.
            adapted = jnp.where(view.is_valid, rule.adapt(damping, jnp.where(moves, ratio, -1.0)), damping)
            first = jnp.where(is_first & view.is_valid, loss, state["first_loss"])
            changed = ~is_first & view.is_valid & _is_another(loss, state["next_loss"], first)
            kept = jnp.where(view.is_valid, jnp.where(moves, new_loss, loss), state["next_loss"])
            losses = {"first_loss": first, "next_loss": kept}
            next_state = state | {name: value.astype(damping.dtype) for name, value in losses.items()}
        if "radius" in state:
            radius = rule.adapt_radius(state["radius"], state["length"], jnp.where(moves, ratio, -1.0))
            # Damping is that of this step, and worked out anew in the next.
            next_state = next_state | {"radius": jnp.where(view.is_valid, radius, state["radius"])}
            adapted = damping
        count = jnp.asarray(optax.safe_increment(state["count"]))
        next_state = next_state | {"count": count, "damping": adapted}
        is_accepted = moves & jnp.isfinite(new_loss)
        refused = view.is_valid & ~is_accepted if rule.refuses else refused
        return Observed(next_state, is_accepted, ratio, refused, changed)

    return Controller(init, control, operators, observe, is_warm_started=False)


def _diagonal(view: View) -> Any:
    """Returns the diagonal of G, a tree like the parameters."""
    flat, unravel = ravel_pytree(jax.tree.map(trees.at_least_f32, view.gradient))
    return unravel(view.ggn.diagonal.astype(flat.dtype))


def _length(unit: Any, vector: Any) -> jax.Array:
    """Returns the length of a tree like the parameters, each in its unit."""
    return trees.norm(jax.tree.map(lambda u, v: jnp.sqrt(u) * v, unit, vector))


def _within_radius(rule: LevenbergMarquardt, view: View, state: Any, unit: Any) -> dict[str, jax.Array]:
    """Returns the radius, and the damping with which the direction is as long."""
    share: Any = rule.first_radius
    ones = jax.tree.map(jnp.ones_like, view.params)
    length = _length(unit, view.params)
    first = share * jnp.where(length > 0, length, _length(unit, ones))
    radius = jnp.where(state["radius"] > 0, state["radius"], first.astype(state["radius"].dtype))
    scale = jax.lax.rsqrt(ravel_pytree(unit)[0])
    values, vectors = jnp.linalg.eigh(scale[:, None] * view.ggn.matrix * scale[None])
    gradient = vectors.T @ (scale * ravel_pytree(view.gradient)[0])
    length_at = lambda damping: jnp.linalg.norm(gradient / (jnp.maximum(values, 0.0) + damping))
    low, high = jnp.log(rule.min_damping), jnp.log(rule.max_damping)

    def halved(ends: Any) -> Any:
        middle = (ends[0] + ends[1]) / 2
        is_long = length_at(jnp.exp(middle)) > radius
        return jnp.where(is_long, middle, ends[0]), jnp.where(is_long, ends[1], middle)

    ends = tuple(jnp.asarray(end, gradient.dtype) for end in (low, high))
    damping = jnp.exp(loops.repeat(50, halved, ends)[1])
    found = {"radius": radius, "length": length_at(damping), "damping": damping}
    return {name: value.astype(state["damping"].dtype) for name, value in found.items()}


def _geometric(view: View) -> Any:
    """Returns the unit of every parameter: the root of its diagonal entry times the mean of all."""
    if cheaper_space(view.ggn.num_params, view.ggn.num_outputs) is None:
        mean = view.ggn.mean_diagonal
        return jax.tree.map(lambda _: jnp.where(mean > 0, mean, 1.0), view.gradient)
    mean = jnp.mean(view.ggn.diagonal)
    mean = jnp.where(mean > 0, mean, 1.0)
    # What nothing depends on gets a little, so that the matrix has an inverse.
    return jax.tree.map(lambda x: jnp.sqrt(mean * jnp.maximum(x, 1e-8 * mean)), _diagonal(view))


def _is_another(loss: jax.Array, expected: jax.Array, first: jax.Array) -> jax.Array:
    """Whether a loss differs from what it would be on the batch of the step before, by more than rounding."""
    rounding = 100 * jnp.finfo(loss.dtype).eps * jnp.abs(first)
    return jnp.abs(loss - expected) > 0.01 * jnp.maximum(jnp.abs(loss), jnp.abs(expected)) + rounding


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
    loss = view.loss_at(view.params)
    ratio, new_loss = _ratio(view, outcome, damping(outcome.direction), loss, step_size)
    return ratio, loss, new_loss


def _ratio(
    view: View, outcome: Outcome, damped: Any, loss: jax.Array, step_size: Any
) -> tuple[jax.Array, jax.Array]:
    direction = outcome.direction
    step = jax.tree.map(lambda d: (-step_size * d).astype(d.dtype), direction)
    new_loss = view.loss_at(optax.apply_updates(view.params, step))  # rounds to the dtype of the parameters
    slope = trees.vdot(direction, view.gradient)
    curvature = slope - trees.vdot(direction, outcome.residual) - trees.vdot(direction, damped)
    predicted = -step_size * slope + 0.5 * step_size**2 * curvature
    promises = predicted < 0
    ratio = jnp.where(promises, (new_loss - loss) / jnp.where(promises, predicted, 1.0), 0.0)
    return ratio.astype(jnp.float32), new_loss
