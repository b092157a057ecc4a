"""The Levenberg-Marquardt rule: damping that follows how well the quadratic model predicts the loss.

Source: Moré 1978; Martens 2010, section 4.1; paper, table 1, HF(LM). The authors' code measures the
ratio one step late on the previous batch; here it is measured on the batch of the step itself, so
that numerator and denominator speak of the same function and no batch needs to be kept.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mlhf_optax.pcg import vdot


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt:
    r"""The Levenberg-Marquardt rule for the damping.

    .. math::
      \rho = \frac{l(w - \eta d) - l(w)}{-\eta \langle d, g \rangle + \eta^2 \langle d, G d \rangle / 2}

    compares the change of the loss on the batch with the change that the undamped quadratic model
    of the same batch predicts, for the step that is taken. The damping is divided by ``decay``
    where the model promised too much (``ratio < low``) and multiplied by it where the model can be
    trusted (``ratio > high``).

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
        if not 0 < self.decay < 1:
            raise ValueError(f"`decay` must lie strictly between 0 and 1, got {self.decay}")
        if not self.low < self.high:
            raise ValueError(f"`low` must be below `high`, got {self.low} and {self.high}")
        if not 0 < self.min_damping <= self.initial_damping <= self.max_damping:
            raise ValueError(
                "0 < `min_damping` <= `initial_damping` <= `max_damping` must hold, got "
                f"{self.min_damping}, {self.initial_damping} and {self.max_damping}"
            )

    def adapt(self, damping: jax.Array, ratio: jax.Array) -> jax.Array:
        """Returns the damping of the next step.

        Args:
          damping: damping of this step, a scalar.
          ratio: its reduction ratio; one that is not a number counts as too low.

        Returns:
          A float32 scalar between the bounds.

        Example:
          >>> LevenbergMarquardt(initial_damping=0.1, decay=0.5).adapt(0.1, 0.0)
          Array(0.2, dtype=float32)
        """
        grown_or_kept = jnp.where(ratio >= self.low, 1.0, 1.0 / self.decay)
        factor = jnp.where(ratio > self.high, self.decay, grown_or_kept)
        return jnp.clip(damping * factor, self.min_damping, self.max_damping).astype(jnp.float32)


class Solution(NamedTuple):
    """A solve of ``(G + damping * I) d = g``.

    Attributes:
      gradient: g, shaped like the parameters, as are d and r.
      direction: d.
      residual: ``r = g - (G + damping * I) d``.
      damping: scalar.
    """

    gradient: chex.ArrayTree
    direction: chex.ArrayTree
    residual: chex.ArrayTree
    damping: jax.Array


def reduction_ratio(
    loss: Callable[[Any], jax.Array],
    params: chex.ArrayTree,
    solution: Solution,
    step_size: float | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the reduction ratio of the step ``-step_size * direction`` and the loss after it.

    Costs two evaluations of the loss; the quadratic model costs nothing, as
    ``G d = g - r - damping * d``.

    Args:
      loss: the loss of the parameters, on the batch that the gradient is from.
      params: the parameters before the step.
      solution: gradient, direction, residual and damping.
      step_size: factor on the direction.

    Returns:
      Two float32 scalars. The ratio is 0 where the model itself predicts no descent, which it does
      for steps of more than twice the direction, and then is no guide.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = lambda w: jnp.sum(w**2)  # its own quadratic model: G = 2 I, g = 2 w
      >>> one = jnp.ones(1)
      >>> reduction_ratio(loss, one, Solution(2 * one, one, 0 * one, jnp.zeros(())), 0.5)
      (Array(1., dtype=float32), Array(0.25, dtype=float32))
    """
    direction = solution.direction
    step = jax.tree.map(lambda d: (-step_size * d).astype(d.dtype), direction)
    new_loss = loss(optax.apply_updates(params, step))  # rounds to the dtype of the parameters
    slope = vdot(direction, solution.gradient)
    curvature = slope - vdot(direction, solution.residual) - solution.damping * vdot(direction, direction)
    predicted = -step_size * slope + 0.5 * step_size**2 * curvature
    promises = predicted < 0
    ratio = jnp.where(promises, (new_loss - loss(params)) / jnp.where(promises, predicted, 1.0), 0.0)
    return ratio.astype(jnp.float32), new_loss.astype(jnp.float32)


__all__ = ["LevenbergMarquardt", "Solution", "reduction_ratio"]
