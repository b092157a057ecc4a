"""Metrics: in which directions damping is strong.

A metric is a positive definite operator M of mean eigenvalue about 1, made of the gradients of the training;
damping is a scale times M.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mlhf_optax.controllers.kronecker_factors import Factors, KroneckerRule
from mlhf_optax.controllers.protocol import Operators, Product, Scale
from mlhf_optax.support import placement, trees
from mlhf_optax.support.checks import DECAY, NOT_NEGATIVE, POSITIVE_SHARE, check_number, require
from mlhf_optax.support.packing import matrix_shape


class Metric(NamedTuple):
    """A metric, four functions.

    Attributes:
      init: ``init(params) -> state``.
      update: ``update(gradient, state, axis_name=None) -> state``. Along ``axis_name``, an axis of
        ``jax.shard_map`` or ``jax.pmap``, gradient and state are the same, and a metric may share work out.
      times: ``times(state, vector, inverse=False)``, the product with M, or with its inverse.
      values: ``values(state, like)``, a tree like ``like`` that shows how large M is: a scalar per tensor or
        a number per coordinate, float32.
    """

    init: Callable[[chex.ArrayTree], Any]
    update: Callable[..., Any]
    times: Callable[..., chex.ArrayTree]
    values: Callable[[Any, chex.ArrayTree], chex.ArrayTree]


def metric_operators(
    times: Callable[..., chex.ArrayTree],
    scales: chex.ArrayTree,
    values: Any = None,
    trust: Any = None,
    inverse_values: Any = None,
) -> Operators:
    """Returns the operators of a damping S that is, for every tensor, a scale times a metric M.

    They are on trees like the parameters; or on vectors of a packing, with scales that are spread over these.

    The preconditioner P is ``trust * S^-1``. So S P is no more than ``trust``, and a solve that is told so
    needs no product with S in its steps.

    Args:
      times: ``times(vector, inverse=False)``, the product with M, or with its inverse.
      scales: tree of scalars, one a tensor.
      values: what the info shows of S, if M has more to show than the scales.
      trust: tree of scalars; None is one for all.
      inverse_values: what the info shows of P, if not its scales.

    Returns:
      Damping, preconditioner, and the product of both.

    Example:
      >>> made = metric_operators(lambda v, inverse=False: v, [jnp.array(4.0)])
      >>> made.damping([jnp.ones(1)]), made.preconditioner([jnp.ones(1)])
      ([Array([4.], dtype=float32)], [Array([0.25], dtype=float32)])
    """
    trust = jax.tree.map(jnp.ones_like, scales) if trust is None else trust
    inverse_scales = jax.tree.map(jnp.divide, trust, scales)
    shown = inverse_scales if inverse_values is None else inverse_values
    return Operators(
        damping=Product(scales if values is None else values, lambda v: Scale(scales)(times(v))),
        preconditioner=Product(shown, lambda v: Scale(inverse_scales)(times(v, inverse=True))),
        damping_after_preconditioner=Scale(trust),
    )


def _ones(state: Any, like: chex.ArrayTree) -> chex.ArrayTree:
    del state
    return jax.tree.map(lambda leaf: jnp.ones((), jnp.float32), like)


def identity() -> Metric:
    """Returns the metric that treats all coordinates alike; no state.

    Example:
      >>> identity().times((), {"w": jnp.array([3.0])})
      {'w': Array([3.], dtype=float32)}
    """
    times = lambda state, vector, inverse=False: vector
    return Metric(lambda params: (), lambda gradient, state, axis_name=None: state, times, _ones)


class DiagonalState(NamedTuple):
    """State of :func:`diagonal`.

    Attributes:
      count: gradients averaged so far.
      mean_square: running mean of the squared gradient, shaped like the parameters, at least float32.
    """

    count: jax.Array  # shape=(), dtype=int32
    mean_square: chex.ArrayTree


def diagonal(decay: float = 0.98, floor: float = 1e-3) -> Metric:
    """Returns the root of the running mean of squared gradients, divided by its mean.

    Where damping outweighs curvature, a step in this metric is Adam's.

    Args:
      decay: weight of the past in the running mean, in [0, 1); the mean is bias-corrected.
      floor: added to the diagonal, in units of its mean, so that coordinates without gradient are damped.

    Returns:
      The metric; its state is one float32 per parameter.

    Raises:
      ValueError: for a number out of range.

    Example:
      >>> metric, g = diagonal(floor=0.0), jnp.array([1.0, 3.0])
      >>> metric.values(metric.update(g, metric.init(g)), g)
      Array([0.5, 1.5], dtype=float32)

    Source: Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015, for the running mean.
    """
    check_number("decay", decay, DECAY)
    check_number("floor", floor, NOT_NEGATIVE)

    def init(params):
        zeros = jax.tree.map(lambda p: placement.zeros_like(p, trees.wide_dtype(p)), params)
        return DiagonalState(jnp.zeros((), jnp.int32), zeros)

    def update(gradient, state, axis_name=None):
        del axis_name
        count = jnp.asarray(optax.safe_increment(state.count))
        squares = jax.tree.map(lambda g: jnp.square(trees.at_least_f32(g)), gradient)
        return DiagonalState(count, trees.running_mean(state.mean_square, squares, 1 - decay))

    def values(state, like):
        del like
        correction = trees.sum_of_weights(decay, state.count)
        roots = jax.tree.map(lambda v: _root(v / correction), state.mean_square)
        mean = sum(jnp.sum(root) for root in jax.tree.leaves(roots)) / max(1, trees.size(roots))
        return jax.tree.map(lambda root: _relative(root, mean) + floor, roots)

    def times(state, vector, inverse=False):
        scale = lambda m, v: ((1.0 / m if inverse else m) * v).astype(v.dtype)
        return jax.tree.map(scale, values(state, vector), vector)

    return Metric(init, update, times, values)


class KroneckerState(NamedTuple):
    """State of :func:`kronecker`.

    Attributes:
      count: gradients averaged so far.
      factors: :class:`mlhf_optax.controllers.kronecker_factors.Factors` of all matrices.
      squares: running mean of the squared gradient of vectors and scalars, a tree like the parameters,
        None for matrices.
    """

    count: jax.Array  # shape=(), dtype=int32
    factors: Factors
    squares: Any


def kronecker(
    power: float = 0.7,
    decay: float = 0.95,
    floor: float = 5e-2,
    block: int = 128,
    refresh_every: int = 10,
) -> Metric:
    r"""Returns Shampoo's Kronecker product ``L^power V R^power`` for every matrix, divided by its mean.

    L and R are running means of :math:`g g^\top` and :math:`g^\top g`. With the power 1/4 and damping that
    outweighs curvature, a step is Shampoo's. Higher powers, 1/2 as in K-FAC, hold more strongly against the
    directions in which gradients are large; 0.7 was best on networks that classify images.
    Tensors of higher rank are matrices split where they are nearest to a square; vectors and scalars have
    the metric of :func:`diagonal`, each tensor for itself.

    Args:
      power: of both factors, in (0, 1].
      decay: weight of the past in the running means, in [0, 1).
      floor: added to the eigenvalues of a factor, in units of their mean, so that inputs that are constant
        are damped.
      block: longest side of a factor. A longer side is cut into blocks of rows, each with a factor of its
        own. A side of n rows takes about ``3 * n * min(n, block)`` floats.
      refresh_every: steps between two eigendecompositions; the first ones are at steps 1, 2, 4, 8 and so on.

    Returns:
      The metric.

    Raises:
      ValueError: for a number out of range.

    Example:
      >>> metric = kronecker()
      >>> params = {"kernel": jnp.ones((300, 4)), "bias": jnp.ones(4)}
      >>> metric.init(params).factors.factor.shape  # 3 blocks of 100 x 100, one of 4 x 4
      (30016,)

    Source: Gupta, Koren, Singer, `Shampoo <https://arxiv.org/abs/1802.09568>`_, 2018.
    """
    check_number("power", power, POSITIVE_SHARE)
    rule = KroneckerRule(decay, floor, block, refresh_every)

    def init(params: chex.ArrayTree) -> KroneckerState:
        is_vector = lambda leaf: matrix_shape(leaf.shape) is None
        zeros = lambda leaf: placement.zeros_like(leaf, jnp.float32) if is_vector(leaf) else None
        return KroneckerState(jnp.zeros((), jnp.int32), rule.init(params), jax.tree.map(zeros, params))

    def update(
        gradient: chex.ArrayTree, state: KroneckerState, axis_name: placement.AxisName = None
    ) -> KroneckerState:
        def averaged(g, mean):
            if mean is None:
                return None
            return trees.running_mean(mean, jnp.square(g.astype(jnp.float32)), 1 - decay)

        count = jnp.asarray(optax.safe_increment(state.count))
        packing = rule.packing(gradient)
        powers = jnp.full(len(packing.sizes), power, jnp.float32)
        is_due = rule.is_refresh_due(count)
        factors = rule.update(state.factors, packing, packing.pack(gradient), is_due, powers, axis_name)
        return KroneckerState(count, factors, jax.tree.map(averaged, gradient, state.squares))

    def times(state: KroneckerState, vector: chex.ArrayTree, inverse: bool = False) -> chex.ArrayTree:
        correction = trees.sum_of_weights(decay, state.count)

        def of_vector(v, square):
            if square is None:
                return v
            root = _root(square / correction)
            values = _relative(root, jnp.mean(root)) + floor
            return ((1.0 / values if inverse else values) * v).astype(v.dtype)

        packing = rule.packing(vector)
        blocks = state.factors.inverse if inverse else state.factors.power
        product = packing.unpack(packing.sandwich(blocks, packing.pack(vector)))
        return jax.tree.map(of_vector, product, state.squares)

    return Metric(init, update, times, _ones)


def _root(x: jax.Array) -> jax.Array:
    # Gradients that have always been zero must not give infinite derivatives in meta-training.
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


def _relative(x: jax.Array, mean: Any) -> jax.Array:
    """Returns x over its mean, ones where the mean is zero."""
    return jnp.where(mean > 0, x / jnp.where(mean > 0, mean, 1.0), 1.0)


METRICS: dict[str, Callable[[], Metric]] = {
    "identity": identity,
    "diagonal": diagonal,
    "kronecker": kronecker,
}


def get_metric(metric: str | Metric) -> Metric:
    """Returns a metric by name, or the one that is given.

    Raises:
      ValueError: for an unknown name.

    Example:
      >>> get_metric("diagonal").init(jnp.zeros(2)).mean_square.shape
      (2,)
    """
    if isinstance(metric, Metric):
        return metric
    require(
        isinstance(metric, str) and metric in METRICS,
        "metric",
        f"one of {', '.join(map(repr, METRICS))} or a Metric",
        metric,
    )
    return METRICS[metric]()
