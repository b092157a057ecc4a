"""Metrics: in which directions damping is strong.

A metric is a positive diagonal M of mean 1, learned from the gradients of the training; damping is a scale
times M.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mlhf_optax import trees


class Metric(NamedTuple):
    """A metric, three functions.

    Attributes:
      init: ``init(params) -> state``.
      update: ``update(gradient, state) -> state``.
      values: ``values(gradient, state)``, the diagonal of M: a tree like the parameters, a scalar 1 per
        tensor or a number per coordinate, float32.
    """

    init: Callable[[chex.ArrayTree], Any]
    update: Callable[[chex.ArrayTree, Any], Any]
    values: Callable[[chex.ArrayTree, Any], chex.ArrayTree]


def identity() -> Metric:
    """Returns the metric that treats all coordinates alike; no state.

    Example:
      >>> identity().values({"w": jnp.ones(3)}, ())
      {'w': Array(1., dtype=float32)}
    """
    ones = lambda gradient, state: jax.tree.map(lambda g: jnp.ones((), jnp.float32), gradient)
    return Metric(lambda params: (), lambda gradient, state: state, ones)


class DiagonalState(NamedTuple):
    """State of :func:`diagonal`.

    Attributes:
      count: gradients averaged so far.
      mean_square: running mean of the squared gradient, shaped like the parameters, float32.
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
      >>> metric = diagonal(floor=0.0)
      >>> g = jnp.array([1.0, 3.0])
      >>> metric.values(g, metric.update(g, metric.init(g)))
      Array([0.5, 1.5], dtype=float32)

    Source: Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015, for the running mean.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"`decay` must be in [0, 1), got {decay}")
    if not floor >= 0:
        raise ValueError(f"`floor` must be a number >= 0, got {floor}")

    def init(params):
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        return DiagonalState(jnp.zeros((), jnp.int32), zeros)

    def update(gradient, state):
        mix = lambda v, g: decay * v + (1 - decay) * jnp.square(g.astype(jnp.float32))
        count = jnp.asarray(optax.safe_increment(state.count))
        return DiagonalState(count, jax.tree.map(mix, state.mean_square, gradient))

    def values(gradient, state):
        del gradient
        correction = 1 - decay ** jnp.maximum(state.count, 1).astype(jnp.float32)
        roots = jax.tree.map(lambda v: _root(v / correction), state.mean_square)
        mean = sum(jnp.sum(root) for root in jax.tree.leaves(roots)) / max(1, trees.size(roots))
        return jax.tree.map(
            lambda r: jnp.where(mean > 0, r / jnp.where(mean > 0, mean, 1.0), 1.0) + floor, roots
        )

    return Metric(init, update, values)


def _root(x: jax.Array) -> jax.Array:
    # Gradients that have always been zero must not give infinite derivatives in meta-training.
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


METRICS: dict[str, Callable[[], Metric]] = {"identity": identity, "diagonal": diagonal}


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
    if metric not in METRICS:
        known = ", ".join(map(repr, METRICS))
        raise ValueError(f"`metric` must be one of {known} or a Metric, got {metric!r}")
    return METRICS[metric]()
