"""Metrics: in which directions damping is strong.

A metric is a positive definite operator M of mean eigenvalue about 1, made of the gradients of the training;
damping is a scale times M.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mlhf_optax import trees


class Metric(NamedTuple):
    """A metric, four functions.

    Attributes:
      init: ``init(params) -> state``.
      update: ``update(gradient, state) -> state``.
      times: ``times(state, vector, inverse=False)``, the product with M, or with its inverse.
      values: ``values(state, like)``, a tree like ``like`` that shows how large M is: a scalar per tensor or
        a number per coordinate, float32.
    """

    init: Callable[[chex.ArrayTree], Any]
    update: Callable[[chex.ArrayTree, Any], Any]
    times: Callable[..., chex.ArrayTree]
    values: Callable[[Any, chex.ArrayTree], chex.ArrayTree]


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
    return Metric(lambda params: (), lambda gradient, state: state, times, _ones)


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
    _check(decay, floor)

    def init(params):
        zeros = jax.tree.map(lambda p: trees.at_least_f32(jnp.zeros(p.shape, p.dtype)), params)
        return DiagonalState(jnp.zeros((), jnp.int32), zeros)

    def update(gradient, state):
        count = jnp.asarray(optax.safe_increment(state.count))
        mix = lambda v, g: _mix(decay, v, jnp.square(trees.at_least_f32(g)))
        return DiagonalState(count, jax.tree.map(mix, state.mean_square, gradient))

    def values(state, like):
        del like
        correction = 1 - decay ** jnp.maximum(state.count, 1)
        roots = jax.tree.map(lambda v: _root(v / correction), state.mean_square)
        mean = sum(jnp.sum(root) for root in jax.tree.leaves(roots)) / max(1, trees.size(roots))
        return jax.tree.map(lambda root: _relative(root, mean) + floor, roots)

    def times(state, vector, inverse=False):
        scale = lambda m, v: ((1.0 / m if inverse else m) * v).astype(v.dtype)
        return jax.tree.map(scale, values(state, vector), vector)

    return Metric(init, update, times, values)


class Side(NamedTuple):
    """One side of a matrix, in blocks of rows; leaves (blocks, size, size), float32.

    Attributes:
      factor: running mean of the outer products of the gradient's rows, block by block.
      power: a power of it, with mean eigenvalue 1.
      inverse: the inverse of ``power``.
    """

    factor: jax.Array
    power: jax.Array
    inverse: jax.Array


class KroneckerState(NamedTuple):
    """State of :func:`kronecker`.

    Attributes:
      count: gradients averaged so far.
      sides: one entry per tensor: its left and right :class:`Side`, or for vectors and scalars the running
        mean of the squared gradient.
    """

    count: jax.Array  # shape=(), dtype=int32
    sides: tuple[Any, ...]


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
      refresh_every: steps between two eigendecompositions; the first ones are at steps 1, 2, 4 and 8.

    Returns:
      The metric.

    Raises:
      ValueError: for a number out of range.

    Example:
      >>> metric = kronecker()
      >>> params = {"kernel": jnp.ones((300, 4)), "bias": jnp.ones(4)}
      >>> [side.factor.shape for side in metric.init(params).sides[1]]
      [(3, 100, 100), (1, 4, 4)]

    Source: Gupta, Koren, Singer, `Shampoo <https://arxiv.org/abs/1802.09568>`_, 2018.
    """
    _check(decay, floor)
    if not 0 < power <= 1:
        raise ValueError(f"`power` must be in (0, 1], got {power}")
    for name, value in (("block", block), ("refresh_every", refresh_every)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    rule = _KroneckerRule(power, decay, floor, block, refresh_every)
    return Metric(rule.init, rule.update, rule.times, _ones)


@dataclasses.dataclass(frozen=True)
class _KroneckerRule:
    power: float
    decay: float
    floor: float
    block: int
    refresh_every: int

    def init(self, params: chex.ArrayTree) -> KroneckerState:
        def side(size: int) -> Side:
            blocks = -(-size // self.block)
            shape = (blocks, *[-(-size // blocks)] * 2)
            eye = lambda: jnp.array(jnp.broadcast_to(jnp.eye(shape[1]), shape))
            return Side(jnp.zeros(shape), eye(), eye())

        def of(leaf) -> Any:
            split = matrix_shape(leaf.shape)
            if split is None:
                return jnp.zeros(leaf.shape, jnp.float32)
            return tuple(map(side, split))

        return KroneckerState(jnp.zeros((), jnp.int32), tuple(map(of, jax.tree.leaves(params))))

    def update(self, gradient: chex.ArrayTree, state: KroneckerState) -> KroneckerState:
        count = jnp.asarray(optax.safe_increment(state.count))
        leaves = [g.astype(jnp.float32) for g in jax.tree.leaves(gradient)]
        sides = tuple(map(self._averaged, state.sides, leaves))
        # At steps 1, 2, 4, 8, as the means change fast at first, and then every so many.
        is_due = (count % self.refresh_every == 0) | (
            (count < self.refresh_every) & (count & (count - 1) == 0)
        )
        matrices = [entry for entry in sides if isinstance(entry, tuple)]
        fresh = iter(_when(is_due, self._refreshed, matrices))
        return KroneckerState(
            count, tuple(next(fresh) if isinstance(entry, tuple) else entry for entry in sides)
        )

    def times(self, state: KroneckerState, vector: chex.ArrayTree, inverse: bool = False) -> chex.ArrayTree:
        leaves, treedef = jax.tree.flatten(vector)
        correction = 1 - self.decay ** jnp.maximum(state.count, 1).astype(jnp.float32)

        def one(entry, v):
            if not isinstance(entry, tuple):
                root = _root(entry / correction)
                values = _relative(root, jnp.mean(root)) + self.floor
                return ((1.0 / values if inverse else values) * v).astype(v.dtype)
            x = v.reshape(matrix_shape(v.shape)).astype(jnp.float32)
            left, right = (side.inverse if inverse else side.power for side in entry)
            return _times_blocks(right, _times_blocks(left, x).T).T.reshape(v.shape).astype(v.dtype)

        return treedef.unflatten(map(one, state.sides, leaves))

    def _averaged(self, entry: Any, g: jax.Array) -> Any:
        if not isinstance(entry, tuple):
            return _mix(self.decay, entry, jnp.square(g))
        matrix = g.reshape(matrix_shape(g.shape))

        def side(own: Side, x: jax.Array) -> Side:
            rows = _blocked(x, own.factor)
            outer = jnp.einsum("bij,bkj->bik", rows, rows)
            return own._replace(factor=_mix(self.decay, own.factor, outer))

        return side(entry[0], matrix), side(entry[1], matrix.T)

    def _refreshed(self, matrices: list) -> list:
        fresh, done = [], jnp.zeros(())
        for sides in matrices:
            left, done = self._with_powers(sides[0], done)
            right, done = self._with_powers(sides[1], done)
            fresh.append((left, right))
        return fresh

    def _with_powers(self, side: Side, before: jax.Array) -> tuple[Side, jax.Array]:
        # Each decomposition waits for the one before: on CPUs, several at once in a loop may all wait for
        # the same thread, and never end.
        factor = side.factor + 0.0 * before
        mean = jnp.mean(jnp.trace(factor, axis1=1, axis2=2)) / factor.shape[1]
        eigenvalues, vectors = jnp.linalg.eigh(factor / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny))
        values = (jnp.maximum(eigenvalues, 0.0) + self.floor) ** self.power
        values = values / jnp.mean(values)
        product = lambda scale: jnp.einsum("bij,bj,bkj->bik", vectors, scale, vectors)
        fresh = product(values), product(1.0 / values)
        # A decomposition that did not converge, or a gradient of zeros, keeps what was there.
        is_sound = (mean > 0) & trees.is_finite(fresh)
        power, inverse = trees.select(is_sound, fresh, (side.power, side.inverse))
        return Side(side.factor, power, inverse), jnp.ravel(power)[0]


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Returns the split of a shape into rows and columns that is nearest to a square; None for vectors.

    Example:
      >>> matrix_shape((3, 3, 16, 32)), matrix_shape((10,)), matrix_shape((1, 7))
      ((144, 32), None, None)
    """
    splits = []
    for axis in range(1, len(shape)):
        rows = functools.reduce(lambda a, b: a * b, shape[:axis], 1)
        columns = functools.reduce(lambda a, b: a * b, shape[axis:], 1)
        splits.append((rows, columns))
    best = min(splits, key=sum, default=None)
    return best if best is not None and min(best) > 1 else None


def _blocked(x: jax.Array, like: jax.Array) -> jax.Array:
    """Cuts the rows of x into blocks (blocks, size, columns), with zeros at the end."""
    blocks, size, _ = like.shape
    return jnp.pad(x, ((0, blocks * size - x.shape[0]), (0, 0))).reshape(blocks, size, x.shape[1])


def _times_blocks(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """Product of a block-diagonal matrix (blocks, size, size) and x (rows, columns)."""
    if matrix.shape[0] == 1:
        return matrix[0] @ x
    product = jnp.einsum("bij,bjk->bik", matrix, _blocked(x, matrix))
    return product.reshape(-1, x.shape[1])[: x.shape[0]]


def _when(is_due: jax.Array, function: Callable[[Any], Any], tree: Any) -> Any:
    """Returns ``function(tree)`` if it is due, else the tree; under ``vmap`` computes only if any is."""

    @jax.custom_batching.custom_vmap
    def run(is_due, tree):
        return jax.lax.cond(is_due, function, lambda t: t, tree)

    @run.def_vmap
    def batched(axis_size, in_batched, is_due, tree):
        # A batched condition would turn the branch into a selection, and decompose at every step.
        due_is_batched, tree_is_batched = in_batched
        due = is_due if due_is_batched else jnp.broadcast_to(is_due, (axis_size,))
        spread = lambda leaf, is_batched: (
            leaf if is_batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))
        )
        tree = jax.tree.map(spread, tree, tree_is_batched)

        def some(tree):
            fresh = jax.vmap(function)(tree)
            pick = lambda new, old: jnp.where(due.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)
            return jax.tree.map(pick, fresh, tree)

        return jax.lax.cond(jnp.any(due), some, lambda t: t, tree), jax.tree.map(lambda _: True, tree)

    return run(is_due, tree)


def _mix(decay: float, old: jax.Array, new: jax.Array) -> jax.Array:
    return decay * old + (1 - decay) * new


def _root(x: jax.Array) -> jax.Array:
    # Gradients that have always been zero must not give infinite derivatives in meta-training.
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


def _relative(x: jax.Array, mean: Any) -> jax.Array:
    """Returns x over its mean, ones where the mean is zero."""
    return jnp.where(mean > 0, x / jnp.where(mean > 0, mean, 1.0), 1.0)


def _check(decay: float, floor: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"`decay` must be in [0, 1), got {decay}")
    if not floor >= 0:
        raise ValueError(f"`floor` must be a number >= 0, got {floor}")


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
    if metric not in METRICS:
        known = ", ".join(map(repr, METRICS))
        raise ValueError(f"`metric` must be one of {known} or a Metric, got {metric!r}")
    return METRICS[metric]()
