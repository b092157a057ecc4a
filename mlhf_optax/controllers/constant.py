"""The controller without learning or adaptation: damping is one constant in a unit, times a metric."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlhf_optax.controllers.metrics import Metric, get_metric, metric_operators
from mlhf_optax.controllers.protocol import Control, Controller, Operators, Scale, View
from mlhf_optax.controllers.units import unit, without_jump
from mlhf_optax.support import placement, trees
from mlhf_optax.support.checks import DECAY, POSITIVE, check_number

_SIZE_DECAY = 0.98  # of the running size of gradients that tells jumps, where no `unit_decay` is given


class ConstantState(NamedTuple):
    """State of :func:`constant`.

    Attributes:
      count: steps so far.
      mean_gradient: running mean of gradients, shaped like the parameters; empty without ``gradient_decay``.
      mean_square: running mean of ``rms(g)^2``, a scalar.
      metric: state of the metric.
    """

    count: jax.Array  # shape=(), dtype=int32
    mean_gradient: Any
    mean_square: jax.Array
    metric: Any


def constant(
    damping: float | jax.Array = 3.0,
    metric: str | Metric = "identity",
    *,
    gradient_decay: float | None = None,
    unit_decay: float | None = None,
) -> Controller:
    r"""Returns the controller whose damping is one constant in the unit ``rms(g) / rms(w0)``.

    .. math::
      S = x \cdot \frac{\operatorname{rms}(g)}{\operatorname{rms}(w_0)} \cdot M

    Everything that is learned has to beat it.

    Args:
      damping: the constant x, > 0.
      metric: M, ``"identity"``, ``"diagonal"``, ``"kronecker"`` or a
        :class:`mlhf_optax.controllers.metrics.Metric`; one that is not the identity also preconditions CG.
      gradient_decay: the system is solved for the running mean of gradients with this decay in [0, 1),
        bias-corrected; None for the gradient of the step. A gradient more than 30 times as large as those
        before it counts as 30 times as large, in this mean and in the metric.
      unit_decay: rms(g) in the unit is at least the root of its running mean square with this decay in
        [0, 1). A training that is nearly done has steps with a tiny gradient; with damping as small they
        would jump away. None for the gradient of the step alone.

    Returns:
      The controller.

    Raises:
      ValueError: if a number is out of range or the metric is unknown.

    Example:
      >>> constant(10.0, metric="diagonal").init({"w": jnp.ones(2)}).metric.count
      Array(0, dtype=int32)
    """
    check_number("damping", damping, POSITIVE)
    check_number("gradient_decay", gradient_decay, DECAY, or_none=True)
    check_number("unit_decay", unit_decay, DECAY, or_none=True)
    rule, size_decay = get_metric(metric), _SIZE_DECAY if unit_decay is None else unit_decay

    def init(params: Any) -> ConstantState:
        mean = () if gradient_decay is None else jax.tree.map(placement.zeros_like, params)
        return ConstantState(jnp.zeros((), jnp.int32), mean, jnp.zeros((), jnp.float32), rule.init(params))

    def control(view: View, state: ConstantState) -> Control:
        gradient, mean = without_jump(view.gradient, running_rms(state)), state.mean_gradient
        if gradient_decay is not None:
            mean = trees.running_mean(mean, gradient, 1 - gradient_decay)
        square = jnp.square(trees.root_mean_square(gradient).astype(jnp.float32))
        state = ConstantState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            mean_gradient=mean,
            mean_square=trees.running_mean(state.mean_square, square, 1 - size_decay),
            metric=rule.update(gradient, state.metric, view.axis_name),
        )
        return Control(state, state)

    def running_rms(state: ConstantState) -> jax.Array:
        """Returns the running size of gradients, zero before the first step."""
        return trees.safe_sqrt(state.mean_square / trees.sum_of_weights(size_decay, state.count))

    def operators(view: View, signal: ConstantState) -> Operators:
        size = trees.root_mean_square(view.gradient)
        if unit_decay is not None:
            size = jnp.maximum(size, running_rms(signal))
        scale = damping * unit(size, view.initial_rms)
        scales = jax.tree.map(lambda _: scale, view.gradient)
        b = None
        if gradient_decay is not None:
            correction = 1 / trees.sum_of_weights(gradient_decay, signal.count)
            b = jax.tree.map(lambda m: (correction * m).astype(m.dtype), signal.mean_gradient)
        if metric == "identity":  # a multiple of the identity as preconditioner would change nothing
            return Operators(Scale(scales), right_hand_side=b)
        values = jax.tree.map(jnp.multiply, scales, rule.values(signal.metric, view.gradient))
        made = metric_operators(functools.partial(rule.times, signal.metric), scales, values)
        return made._replace(right_hand_side=b)

    return Controller(init, control, operators)
