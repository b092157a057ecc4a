"""Controllers without learning or adaptation: damping is one number."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlhf_optax.controllers.metrics import Metric, get_metric
from mlhf_optax.controllers.protocol import (
    Control,
    Controller,
    Operators,
    Outcome,
    Product,
    Quotient,
    Scale,
    View,
    accept,
)
from mlhf_optax.controllers.units import (
    SMALLEST_GRADIENT,
    initial_sizes,
    tensor_shares,
    tensor_sizes,
    unit,
    without_jump,
)
from mlhf_optax.support import placement, trees

_SIZE_DECAY = 0.98  # of the running size of gradients by which jumps are told
_TINY = 1e-15  # size of a gradient that is zero, for the derivative of a root


class ConstantState(NamedTuple):
    """State of :func:`constant`.

    Attributes:
      count: steps so far.
      mean_gradient: running mean of gradients, shaped like the parameters; empty without ``gradient_decay``.
      mean_square: running mean of ``rms(g)^2``, a scalar, or with ``per_tensor`` that of every tensor, shape
        (tensors,).
      metric: state of the metric.
      initial_sizes: root mean square of every tensor at the start, and not below that of all, shape
        (tensors,); empty without ``per_tensor``.
    """

    count: jax.Array  # shape=(), dtype=int32
    mean_gradient: Any
    mean_square: jax.Array
    metric: Any
    initial_sizes: Any = ()


def constant(
    damping: float | jax.Array = 3.0,
    metric: str | Metric = "identity",
    *,
    gradient_decay: float | None = None,
    unit_decay: float | None = None,
    per_tensor: bool = False,
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
        bias-corrected; None for the gradient of the step. One that is more than 30 times as large as those
        before it counts as 30 times as large, in this mean and in the metric.
      unit_decay: rms(g) in the unit is at least the root of its running mean square with this decay in
        [0, 1). A training that is nearly done has steps with a tiny gradient, and with the damping as
        small they jump away. None for the gradient of the step alone.
      per_tensor: every tensor has a unit of its own, ``rms(g) / rms(w0)`` of that tensor, with rms(w0) not
        below that of all, and CG is preconditioned by it. For networks whose layers are in other units, as
        from inputs that are not standardised.

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
    rule, is_scalar = get_metric(metric), metric == "identity" and not per_tensor
    size_decay = _SIZE_DECAY if unit_decay is None else unit_decay

    def init(params: Any) -> ConstantState:
        mean = () if gradient_decay is None else jax.tree.map(placement.zeros_like, params)
        sizes = initial_sizes(params) if per_tensor else ()
        square = jnp.zeros((len(jax.tree.leaves(params)),) if per_tensor else (), jnp.float32)
        return ConstantState(jnp.zeros((), jnp.int32), mean, square, rule.init(params), sizes)

    def control(view: View, state: ConstantState) -> Control:
        before = trees.safe_sqrt(of_all_tensors(view, lately(state)))
        view = view._replace(gradient=without_jump(view.gradient, before))
        mean = state.mean_gradient
        if gradient_decay is not None:
            own, new = gradient_decay, 1 - gradient_decay
            mean = jax.tree.map(lambda m, g: (own * m + new * g).astype(m.dtype), mean, view.gradient)
        state = state._replace(
            count=jnp.asarray(optax.safe_increment(state.count)),
            mean_gradient=mean,
            metric=rule.update(view.gradient, state.metric, view.axis_name),
        )
        rms = tensor_sizes(view.gradient) if per_tensor else trees.root_mean_square(view.gradient)
        square = jnp.square(rms.astype(jnp.float32))
        state = state._replace(mean_square=size_decay * state.mean_square + (1 - size_decay) * square)
        return Control(state, state)

    def lately(state: ConstantState) -> jax.Array:
        """Returns the running mean square, zero before the first step."""
        weights = _sum_of_weights(size_decay, jnp.maximum(state.count, 1))
        return state.mean_square / weights

    def of_all_tensors(view: View, squares: jax.Array) -> jax.Array:
        """Returns the mean square of all, of those of every tensor."""
        if not per_tensor:
            return squares
        numbers = [leaf.size for leaf in jax.tree.leaves(view.gradient)]
        return jnp.average(squares, weights=jnp.array(numbers, jnp.float32))

    def units(view: View, state: ConstantState) -> Any:
        """Returns the unit of every tensor, scalars in a tree like the parameters."""
        size = of_all = trees.root_mean_square(view.gradient)
        of_tensors = tensor_sizes(view.gradient) if per_tensor else None
        if unit_decay is not None:
            squares = lately(state)
            if per_tensor:
                of_tensors = jnp.sqrt(jnp.maximum(squares, _TINY**2))
            of_all = jnp.sqrt(jnp.maximum(of_all_tensors(view, squares), SMALLEST_GRADIENT**2))
            size = jnp.maximum(size, of_all)
        if of_tensors is None:
            return jax.tree.map(lambda _: unit(size, view.initial_rms), view.gradient)
        each = tensor_shares(of_tensors, of_all) * unit(size, state.initial_sizes)
        return jax.tree.structure(view.gradient).unflatten(list(each))

    def operators(view: View, signal: ConstantState) -> Operators:
        scales = jax.tree.map(lambda one: damping * one, units(view, signal))
        b = None
        if gradient_decay is not None:
            b = scaled(1 / _sum_of_weights(gradient_decay, signal.count), signal.mean_gradient)
        values = jax.tree.map(jnp.multiply, scales, rule.values(signal.metric, view.gradient))
        if is_scalar:
            return Operators(Scale(values), right_hand_side=b)
        times = functools.partial(rule.times, signal.metric)
        return Operators(
            Product(values, lambda v: Scale(scales)(times(v))),
            Product(values, lambda v: Quotient(scales)(times(v, inverse=True))),
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
