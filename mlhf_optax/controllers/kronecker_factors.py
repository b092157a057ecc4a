"""Kronecker factors of gradients: running means of ``g g^T`` and ``g^T g`` of a matrix, and their powers."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mlhf_optax.support import loops, placement, trees
from mlhf_optax.support.checks import DECAY, FROM_ONE, NOT_NEGATIVE, check_fields


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


Sides = tuple[Side, Side]


@dataclasses.dataclass(frozen=True)
class KroneckerRule:
    """How factors are kept for all matrices among the parameters; vectors and scalars have none.

    The factors of all tensors are one pair of sides, every field of which is a tree like the parameters, None
    for vectors. A state may hold trees like the parameters and arrays, not a pair in the place of every
    parameter: ``optax.tree.map_params`` and ``nnx.Optimizer`` know nothing else.

    Args:
      decay: weight of the past in the running means, in [0, 1).
      floor: added to the eigenvalues of a factor, in units of their mean, >= 0.
      block: longest side of a factor; a longer one is cut into blocks of rows of equal size.
      refresh_every: steps between two eigendecompositions; the first ones are at steps 1, 2, 4 and 8.

    Raises:
      ValueError: for a number out of range.

    Example:
      >>> rule, params = KroneckerRule(), {"kernel": jnp.ones((300, 4)), "bias": jnp.ones(4)}
      >>> factors = rule.update(rule.init(params), params, jnp.array(True), powers=[0.5, 0.5])
      >>> [side.factor["kernel"].shape for side in factors], factors[0].factor["bias"]
      ([(3, 100, 100), (1, 4, 4)], None)
    """

    decay: float = 0.95
    floor: float = 5e-2
    block: int = 128
    refresh_every: int = 10

    def __post_init__(self):
        check_fields(self, DECAY, "decay")
        check_fields(self, NOT_NEGATIVE, "floor")
        check_fields(self, FROM_ONE, "block", "refresh_every")

    def init(self, params: chex.ArrayTree) -> Sides:
        """Returns means of zero and powers of one."""
        leaves, treedef = jax.tree.flatten(params)
        return _to_trees(treedef, [init_sides(leaf.shape, self.block) for leaf in leaves])

    def is_refresh_due(self, count: jax.Array) -> jax.Array:
        """Returns whether powers are taken anew: often at first, when means change fast, then rarely."""
        is_early = (count < self.refresh_every) & (count & (count - 1) == 0)
        return (count % self.refresh_every == 0) | is_early

    def update(
        self,
        factors: Sides,
        gradient: chex.ArrayTree,
        is_due: jax.Array,
        powers: Sequence[Any] | jax.Array,
        axis_name: placement.AxisName = None,
    ) -> Sides:
        """Averages a gradient into the factors, and takes their powers anew if that is due.

        Args:
          factors: those before.
          gradient: tree like the parameters.
          is_due: whether powers are taken anew, shape ().
          powers: exponent for every tensor; those of vectors are not looked at.
          axis_name: as for :func:`refresh_sides`.

        Returns:
          The factors.
        """
        leaves, treedef = jax.tree.flatten(gradient)
        entries = enumerate(zip(sides_of_tensors(factors, gradient), leaves, strict=True))
        averaged = {i: average_sides(sides, g, self.decay) for i, (sides, g) in entries if sides is not None}
        exponents = [powers[i] for i in averaged]
        fresh = refresh_sides(is_due, list(averaged.values()), exponents, self.floor, axis_name)
        by_tensor = dict(zip(averaged, fresh, strict=True))
        return _to_trees(treedef, [by_tensor.get(i) for i in range(len(leaves))])


def sides_of_tensors(factors: Sides, like: chex.ArrayTree) -> list[Sides | None]:
    """Returns the sides of every tensor, of the factors of :class:`KroneckerRule`; None for vectors."""
    treedef = jax.tree.structure(like)
    columns = [[Side(*of) for of in zip(*map(treedef.flatten_up_to, side), strict=True)] for side in factors]
    return [None if left.factor is None else (left, right) for left, right in zip(*columns, strict=True)]


def _to_trees(treedef: Any, entries: Sequence[Sides | None]) -> Sides:
    """Returns the sides of many tensors as one pair whose fields are trees."""

    def side(index: int) -> Side:
        field = lambda name: [None if entry is None else getattr(entry[index], name) for entry in entries]
        return Side(*(treedef.unflatten(field(name)) for name in Side._fields))

    return side(0), side(1)


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


def init_sides(shape: tuple[int, ...], block: int) -> Sides | None:
    """Returns means of zero and powers of one for a matrix; None for a vector.

    Args:
      shape: of the tensor, which is a matrix as :func:`matrix_shape` splits it.
      block: longest side of a factor. A longer side is cut into blocks of rows of equal size.

    Example:
      >>> [side.factor.shape for side in init_sides((300, 4), 128)]
      [(3, 100, 100), (1, 4, 4)]
    """
    split = matrix_shape(shape)
    if split is None:
        return None

    def side(rows: int) -> Side:
        blocks = -(-rows // block)
        size = -(-rows // blocks)
        # No two leaves share a buffer: states are donated.
        eye = lambda: jnp.array(jnp.broadcast_to(jnp.eye(size, dtype=jnp.float32), (blocks, size, size)))
        return Side(jnp.zeros((blocks, size, size), jnp.float32), eye(), eye())

    return side(split[0]), side(split[1])


def average_sides(sides: Sides, gradient: jax.Array, decay: float) -> Sides:
    """Adds the outer products of a gradient to the running means."""
    return placement.placed_by_compiler(functools.partial(_averaged, decay=decay), sides, gradient)


def _averaged(sides: Sides, gradient: jax.Array, decay: float) -> Sides:
    matrix = gradient.astype(jnp.float32).reshape(matrix_shape(gradient.shape))
    if all(side.factor.shape[0] == 1 for side in sides):
        matrix = placement.replicated(matrix)  # no larger than the factors; else it would be gathered twice

    def averaged(side: Side, x: jax.Array) -> Side:
        rows = _blocked(x, side.factor)
        outer = jnp.einsum("bij,bkj->bik", rows, rows)
        return side._replace(factor=trees.running_mean(side.factor, outer, 1 - decay))

    return averaged(sides[0], matrix), averaged(sides[1], matrix.T)


def refresh_sides(
    is_due: jax.Array,
    matrices: Sequence[Sides],
    powers: Sequence[Any],
    floor: float,
    axis_name: placement.AxisName = None,
) -> list[Sides]:
    """Takes the powers of all running means anew by eigendecomposition, if that is due.

    On several devices, each block is decomposed on one of them, which sends the eigenvectors to the others:
    under ``jit`` for states on a mesh, and with ``axis_name``. Under ``vmap`` each device decomposes its own.

    Args:
      is_due: whether it is, shape (). Under ``vmap`` nothing is computed unless it is due for any.
      matrices: the factors.
      powers: the exponent of each matrix, > 0.
      floor: added to the eigenvalues of a factor, in units of their mean.
      axis_name: axis of ``jax.shard_map`` or ``jax.pmap`` along which the factors are the same.

    Returns:
      The factors. One whose decomposition failed, or that is zero, keeps the powers it had.
    """
    if not matrices:  # parameters that are all vectors
        return []
    pairs = [(sides, jnp.asarray(power, jnp.float32)) for sides, power in zip(matrices, powers, strict=True)]
    shared = functools.partial(placement.split_over_devices, _decomposed, axis_name=axis_name)
    fresh = cond_under_vmap(
        is_due,
        functools.partial(_refreshed, floor, shared),
        functools.partial(_refreshed, floor, _decomposed),
        pairs,
    )
    # Else the compiler would keep the factors of sharded gradients sharded, and gather them at every use.
    return [jax.tree.map(placement.replicated, sides) for sides, _ in fresh]


def times_sides(sides: Sides, vector: jax.Array, inverse: bool = False) -> jax.Array:
    """Returns ``L^power V R^power`` for a tensor V, or the product with the inverse, in its dtype."""
    left, right = (side.inverse if inverse else side.power for side in sides)
    return placement.placed_by_compiler(_times, left, right, vector, like=vector)


def _times(left: jax.Array, right: jax.Array, vector: jax.Array) -> jax.Array:
    x = vector.reshape(matrix_shape(vector.shape)).astype(jnp.float32)
    x = _times_right_blocks(right, _times_left_blocks(left, x))
    return x.reshape(vector.shape).astype(vector.dtype)


def _decomposed(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns eigenvalues (blocks, size) and eigenvectors of symmetric matrices (blocks, size, size)."""
    return tuple(jnp.linalg.eigh(matrices))


_LARGE = 2**17  # a product with a matrix of at least so many numbers is taken block by block
_MOST_PRODUCTS = 16  # but not with more blocks: programs must not grow with the width of layers

_Update = Callable[[Any], Any]
_Decompose = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def _refreshed(
    floor: float, decompose: _Decompose, pairs: list[tuple[Sides, jax.Array]]
) -> list[tuple[Sides, jax.Array]]:
    """Takes all powers anew, one decomposition for every size of blocks."""
    by_size: dict[int, list[tuple[int, int]]] = {}
    for index, (sides, _) in enumerate(pairs):
        for which, side in enumerate(sides):
            by_size.setdefault(side.factor.shape[1], []).append((index, which))
    fresh, done = {}, jnp.zeros((), jnp.float32)
    for places in by_size.values():
        sides = [pairs[index][0][which] for index, which in places]
        powers = jnp.stack([pairs[index][1] for index, _ in places])
        new, done = _with_powers(sides, powers, floor, decompose, done)
        fresh |= dict(zip(places, new, strict=True))
    return [((fresh[index, 0], fresh[index, 1]), power) for index, (_, power) in enumerate(pairs)]


def _with_powers(
    sides: list[Side], powers: jax.Array, floor: float, decompose: _Decompose, before: jax.Array
) -> tuple[list[Side], jax.Array]:
    """Takes the powers of sides with blocks of one size in one decomposition, however many sides there are.

    Returns the sides, and a number of the result that the next decomposition waits for.
    """
    counts = [side.factor.shape[0] for side in sides]
    owner = np.repeat(np.arange(len(sides)), counts)  # the side that a block belongs to
    of_sides = lambda x: jax.ops.segment_sum(x, owner, len(sides)) / np.array(counts, np.float32)
    # Adding 0 times the result of the decomposition before makes this one wait for it. On CPUs several at
    # once in a loop may all wait for the same thread, and never end.
    factors = jnp.concatenate([side.factor for side in sides]) + 0.0 * before
    mean = of_sides(jnp.trace(factors, axis1=1, axis2=2) / factors.shape[1])
    # In units of the mean eigenvalue of the whole side, the floor and float32 suit gradients of any size.
    units = jnp.maximum(mean, jnp.finfo(jnp.float32).tiny)[owner][:, None, None]
    eigenvalues, vectors = decompose(factors / units)
    values = (jnp.maximum(eigenvalues, 0.0) + floor) ** powers[owner][:, None]
    values = values / of_sides(jnp.mean(values, axis=1))[owner][:, None]
    product = lambda scale: jnp.einsum("bij,bj,bkj->bik", vectors, scale, vectors)
    power, inverse = product(values), product(1.0 / values)
    # A side is replaced as a whole or not at all: half of its blocks anew would not fit the other half.
    is_finite = jnp.all(jnp.isfinite(power) & jnp.isfinite(inverse), axis=(1, 2))
    is_sound = (mean > 0) & (of_sides(is_finite.astype(jnp.float32)) == 1)
    fresh, ends = [], np.cumsum(counts)
    for number, (side, end, count) in enumerate(zip(sides, ends, counts, strict=True)):
        old, new = (side.power, side.inverse), (power[end - count : end], inverse[end - count : end])
        fresh.append(Side(side.factor, *trees.select(is_sound[number], new, old)))
    return fresh, jnp.ravel(power)[0]


def _blocked(x: jax.Array, like: jax.Array) -> jax.Array:
    """Cuts the rows of x into blocks (blocks, size, columns), with zeros at the end."""
    blocks, size, _ = like.shape
    return jnp.pad(x, ((0, blocks * size - x.shape[0]), (0, 0))).reshape(blocks, size, x.shape[1])


def _times_left_blocks(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the product of a block-diagonal matrix (blocks, size, size) and x (rows, columns)."""
    if matrix.shape[0] == 1:
        return matrix[0] @ x
    product = jnp.einsum("bij,bjk->bik", matrix, _blocked(x, matrix))
    return product.reshape(-1, x.shape[1])[: x.shape[0]]


def _times_right_blocks(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the product of x (rows, columns) and a symmetric block-diagonal matrix (blocks, size, size)."""
    blocks, size, _ = matrix.shape
    if blocks == 1:
        return x @ matrix[0]
    if blocks > _MOST_PRODUCTS or x.size < _LARGE or placement.is_on_mesh(x):
        return _times_left_blocks(matrix, x.T).T
    # One product per block: on CPUs a large x takes longer to transpose. Not on a mesh, where each part would
    # be gathered by itself.
    parts = [x[:, start : start + size] for start in range(0, x.shape[1], size)]
    products = [
        part @ block[: part.shape[1], : part.shape[1]] for part, block in zip(parts, matrix, strict=True)
    ]
    return jnp.concatenate(products, axis=1)


def cond_under_vmap(is_due: jax.Array, function: _Update, each_of_many: _Update, tree: Any) -> Any:
    """Returns ``function(tree)`` if it is due, else the tree; under ``vmap`` computes only if any is.

    Args:
      is_due: shape ().
      function: from and to trees of the same shapes.
      each_of_many: called in its place, once for each, under ``vmap``.
      tree: a tree of arrays.
    """
    if loops.is_known(is_due, tree):
        return function(tree) if is_due else tree

    @jax.custom_batching.custom_vmap
    def run(is_due, tree):
        return jax.lax.cond(is_due, function, lambda t: t, tree)

    @run.def_vmap
    def batched(axis_size, in_batched, is_due, tree):
        # With a batched condition `lax.cond` becomes a select: it would decompose at every step.
        due_is_batched, tree_is_batched = in_batched
        due = is_due if due_is_batched else jnp.broadcast_to(is_due, (axis_size,))
        spread = lambda leaf, is_batched: (
            leaf if is_batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))
        )
        tree = jax.tree.map(spread, tree, tree_is_batched)

        def some(inputs):
            due, tree = inputs
            pick = lambda new, old: jnp.where(due.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)
            return due, jax.tree.map(pick, jax.vmap(each_of_many)(tree), tree)

        # By this function again: a vmap around this one then finds a condition that it can keep, too.
        return cond_under_vmap(jnp.any(due), some, some, (due, tree))[1], jax.tree.map(lambda _: True, tree)

    return run(is_due, tree)
