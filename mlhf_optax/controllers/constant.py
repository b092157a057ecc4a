"""Controllers without learning or adaptation: damping is one number."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mlhf_optax import trees
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


def unit(gradient: Any, initial_rms: jax.Array) -> jax.Array:
    """Returns the unit of damping, ``rms(g) / rms(w0)`` over all parameters: the dimension of curvature.

    Damping in this unit shrinks with the gradient, and one constant suits networks of any width.

    Args:
      gradient: g.
      initial_rms: root mean square of the parameters at the start of the training, a scalar; zero counts
        as 1.

    Returns:
      A positive scalar, in units of the loss over parameter squared.

    Example:
      >>> float(unit(jnp.array([0.5, -0.5]), jnp.array(0.25)))
      2.0
    """
    size = jnp.maximum(trees.root_mean_square(gradient), _SMALLEST_GRADIENT)
    # Parameters that all start at zero have no size to measure damping by.
    parameters = jnp.where(initial_rms > 0, jnp.maximum(initial_rms, _SMALLEST_PARAMETERS), 1.0)
    return size / parameters


def constant(damping: float | jax.Array = 3.0, metric: str | Metric = "identity") -> Controller:
    r"""Returns the controller whose damping is one constant in the unit ``rms(g) / rms(w0)``.

    .. math::
      S = x \cdot \frac{\operatorname{rms}(g)}{\operatorname{rms}(w_0)} \cdot M

    Everything that is learned has to beat it.

    Args:
      damping: the constant x, > 0.
      metric: M, ``"identity"``, ``"diagonal"``, ``"kronecker"`` or a
        :class:`mlhf_optax.controllers.metrics.Metric`; one that is not the identity also preconditions CG.

    Returns:
      The controller.

    Raises:
      ValueError: if ``damping`` is not positive or the metric is unknown.

    Example:
      >>> constant(10.0, metric="diagonal").init({"w": jnp.ones(2)}).count
      Array(0, dtype=int32)
    """
    if isinstance(damping, int | float) and not damping > 0:
        raise ValueError(f"`damping` must be a positive number, got {damping}")
    rule, is_identity = get_metric(metric), metric == "identity"

    def control(view: View, state: Any) -> Control:
        state = rule.update(view.gradient, state)
        return Control(state, state)

    def operators(view: View, signal: Any) -> Operators:
        scale = damping * unit(view.gradient, view.initial_rms)
        values = jax.tree.map(lambda m: scale * m, rule.values(signal, view.gradient))
        if is_identity:
            return Operators(Scale(values))
        times = functools.partial(rule.times, signal)
        return Operators(
            Product(values, lambda v: scaled(scale, times(v))),
            Product(values, lambda v: scaled(1.0 / scale, times(v, inverse=True))),
            is_damping_inverted=True,
        )

    return Controller(rule.init, control, operators)


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
