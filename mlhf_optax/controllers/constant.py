"""Controllers without learning or adaptation: damping is one number."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlhf_optax import devices, trees
from mlhf_optax.controllers.metrics import Metric, get_metric
from mlhf_optax.controllers.protocol import (
    Control,
    Controller,
    Operators,
    Outcome,
    Product,
    Scale,
    View,
    accept,
)

# Below it a gradient is rounding noise: damping that shrank with it would let the training jump away.
_SMALLEST_GRADIENT = 1e-7
_SMALLEST_PARAMETERS = 1e-3


def unit(gradient_rms: jax.Array, initial_rms: jax.Array) -> jax.Array:
    """Returns the unit of damping, ``rms(g) / rms(w0)`` over all parameters: the dimension of curvature.

    Damping in this unit shrinks with the gradient, and one constant suits networks of any width.

    Args:
      gradient_rms: root mean square of the gradient, a scalar.
      initial_rms: that of the parameters at the start of the training, a scalar; zero counts as 1.

    Returns:
      A positive scalar, in units of the loss over parameter squared.

    Example:
      >>> float(unit(jnp.array(0.5), jnp.array(0.25)))
      2.0
    """
    size = jnp.maximum(gradient_rms, _SMALLEST_GRADIENT)
    # Parameters that all start at zero have no size to measure damping by.
    parameters = jnp.where(initial_rms > 0, jnp.maximum(initial_rms, _SMALLEST_PARAMETERS), 1.0)
    return size / parameters


class ConstantState(NamedTuple):
    """State of :func:`constant`.

    Attributes:
      count: steps so far.
      mean_gradient: running mean of gradients, shaped like the parameters; empty without ``gradient_decay``.
      mean_square: running mean of ``rms(g)^2``, a scalar; empty without ``unit_decay``.
      metric: state of the metric.
    """

    count: jax.Array  # shape=(), dtype=int32
    mean_gradient: Any
    mean_square: Any
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
        bias-corrected; None for the gradient of the step.
      unit_decay: rms(g) in the unit is at least the root of its running mean square with this decay in
        [0, 1). A training that is nearly done has steps with a tiny gradient, and with the damping as
        small they jump away. None for the gradient of the step alone.

    Returns:
      The controller.

    Raises:
      ValueError: if a number is out of range or the metric is unknown.

    Example:
      >>> constant(10.0, metric="diagonal").init({"w": jnp.ones(2)}).metric.count
      Array(0, dtype=int32)
    """
    if isinstance(damping, int | float) and not damping > 0:
        raise ValueError(f"`damping` must be a positive number, got {damping}")
    for name, decay in (("gradient_decay", gradient_decay), ("unit_decay", unit_decay)):
        if isinstance(decay, int | float) and not 0 <= decay < 1:
            raise ValueError(f"`{name}` must be in [0, 1), or None for none, got {decay}")
    rule, is_identity = get_metric(metric), metric == "identity"

    def init(params: Any) -> ConstantState:
        mean = () if gradient_decay is None else jax.tree.map(devices.zeros_like, params)
        square = () if unit_decay is None else jnp.zeros((), jnp.float32)
        return ConstantState(jnp.zeros((), jnp.int32), mean, square, rule.init(params))

    def control(view: View, state: ConstantState) -> Control:
        mean, square = state.mean_gradient, state.mean_square
        if gradient_decay is not None:
            own, new = gradient_decay, 1 - gradient_decay
            mean = jax.tree.map(lambda m, g: (own * m + new * g).astype(m.dtype), mean, view.gradient)
        if unit_decay is not None:
            rms = trees.root_mean_square(view.gradient).astype(jnp.float32)
            square = unit_decay * square + (1 - unit_decay) * jnp.square(rms)
        count = jnp.asarray(optax.safe_increment(state.count))
        state = ConstantState(count, mean, square, rule.update(view.gradient, state.metric, view.axis_name))
        return Control(state, state)

    def operators(view: View, signal: ConstantState) -> Operators:
        size = trees.root_mean_square(view.gradient)
        if unit_decay is not None:
            running = signal.mean_square / _sum_of_weights(unit_decay, signal.count)
            size = jnp.maximum(size, jnp.sqrt(jnp.maximum(running, _SMALLEST_GRADIENT**2)))
        scale = damping * unit(size, view.initial_rms)
        b = None
        if gradient_decay is not None:
            b = scaled(1 / _sum_of_weights(gradient_decay, signal.count), signal.mean_gradient)
        values = jax.tree.map(lambda m: scale * m, rule.values(signal.metric, view.gradient))
        if is_identity:
            return Operators(Scale(values), right_hand_side=b)
        times = functools.partial(rule.times, signal.metric)
        return Operators(
            Product(values, lambda v: scaled(scale, times(v))),
            Product(values, lambda v: scaled(1.0 / scale, times(v, inverse=True))),
            right_hand_side=b,
            damping_after_preconditioner=lambda r: r,
        )

    return Controller(init, control, operators)


def _sum_of_weights(decay: float, count: jax.Array) -> jax.Array:
    """Sum of the weights of a running mean after so many steps."""
    return 1 - jnp.asarray(decay, jnp.float32) ** count


def scaled(scale: jax.Array, tree: Any) -> Any:
    """Returns the tree times a scalar, in its own dtypes."""
    return jax.tree.map(lambda x: (scale * x).astype(x.dtype), tree)


def scheduled(damping: optax.ScalarOrSchedule) -> Controller:
    """Returns the controller whose damping is a number or a schedule of the step, without unit or warm start.

    Args:
      damping: >= 0, or a schedule; it counts all steps, skipped ones included, as the rest of a chain does.

    Returns:
      The controller; its state is the number of steps.

    Raises:
      ValueError: for a negative number.

    Example:
      >>> scheduled(0.1).init({"w": jnp.ones(2)})
      Array(0, dtype=int32)
    """
    if isinstance(damping, int | float) and not damping >= 0:
        raise ValueError(f"`damping` must be a number >= 0, got {damping}")

    def control(view: View, state: Any) -> Control:
        del view
        value = damping(state) if callable(damping) else damping
        return Control(jnp.asarray(value, jnp.float32), state)

    def operators(view: View, signal: Any) -> Operators:
        return Operators(Scale(jax.tree.map(lambda _: signal, view.gradient)))

    def observe(view: View, outcome: Outcome, state: Any):
        return accept(view, outcome, jnp.asarray(optax.safe_increment(state)))

    return Controller(
        lambda params: jnp.zeros((), jnp.int32), control, operators, observe, is_warm_started=False
    )
