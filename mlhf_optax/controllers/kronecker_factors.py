"""Kronecker factors of gradients: running means of ``g g^T`` and ``g^T g`` of a matrix, and their powers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mlhf_optax.support import loops, placement, trees
from mlhf_optax.support.checks import DECAY, FROM_ONE, NOT_NEGATIVE, check_fields
from mlhf_optax.support.packing import AnyPacking, Blocks, Vector, join, packing_of, split


class Factors(NamedTuple):
    """The factors of all matrices, block by block in a flat array (:func:`mlhf_optax.support.packing.split`).

    Attributes:
      factor: running means of the outer products of the gradient's rows and columns, block by block.
      power: a power of each, with mean eigenvalue 1 over the blocks of a side.
      inverse: the inverse of ``power``.
    """

    factor: jax.Array
    power: jax.Array
    inverse: jax.Array


@dataclasses.dataclass(frozen=True)
class KroneckerRule:
    """How factors are kept for all matrices among the parameters; vectors and scalars have none.

    Blocks of one size lie in one array, whichever tensor they belong to, so that a network of any depth has a
    few products and decompositions (:mod:`mlhf_optax.support.packing`).

    Args:
      decay: weight of the past in the running means, in [0, 1).
      floor: added to the eigenvalues of a factor, in units of their mean, >= 0.
      block: longest side of a factor; a longer one is cut into blocks of rows of equal size.
      refresh_every: steps between two eigendecompositions; the first ones are at steps 1, 2, 4, 8 and so on.

    Raises:
      ValueError: for a number out of range.

    Example:
      >>> rule, params = KroneckerRule(), {"kernel": jnp.ones((300, 4)), "bias": jnp.ones(4)}
      >>> packing = rule.packing(params)
      >>> factors = rule.update(
      ...     rule.init(params), packing, packing.pack(params), jnp.array(True), powers=jnp.full(2, 0.5)
      ... )
      >>> [blocks.shape for blocks in split(packing.blocks, factors.power)]
      [(3, 100, 100), (1, 4, 4)]
    """

    decay: float = 0.95
    floor: float = 5e-2
    block: int = 128
    refresh_every: int = 10

    def __post_init__(self):
        check_fields(self, DECAY, "decay")
        check_fields(self, NOT_NEGATIVE, "floor")
        check_fields(self, FROM_ONE, "block", "refresh_every")

    def packing(self, params: chex.ArrayTree) -> AnyPacking:
        """Returns how the parameters, or a tree like them, are packed."""
        return packing_of(params, self.block)

    def init(self, params: chex.ArrayTree) -> Factors:
        """Returns means of zero and powers of one."""
        blocks = self.packing(params).blocks
        shape = lambda own: (len(own.tensors), own.size, own.size)
        ones = lambda: join(
            jnp.broadcast_to(jnp.eye(own.size, dtype=jnp.float32)[None], shape(own)) for own in blocks
        )
        return Factors(jnp.zeros_like(ones()), ones(), ones())  # buffers of their own, which may be donated

    def is_refresh_due(self, count: jax.Array) -> jax.Array:
        """Returns whether powers are taken anew: often at first, when means change fast, then rarely."""
        is_early = (count < self.refresh_every) & (count & (count - 1) == 0)
        return (count % self.refresh_every == 0) | is_early

    def update(
        self,
        factors: Factors,
        packing: AnyPacking,
        gradient: Vector,
        is_due: jax.Array,
        powers: jax.Array,
        axis_name: placement.AxisName = None,
    ) -> Factors:
        """Averages a gradient into the factors, and takes their powers anew if that is due.

        On several devices, each block is decomposed on one of them, which sends the result to the others:
        under ``jit`` for states on a mesh, and with ``axis_name``. Under ``vmap`` each device decomposes its
        own.

        Args:
          factors: those before.
          packing: that of the parameters.
          gradient: a vector of it.
          is_due: whether powers are taken anew, shape (). Under ``vmap`` nothing is computed unless it is due
            for any.
          powers: exponent for every tensor, shape (tensors,); those of vectors are not looked at.
          axis_name: axis of ``jax.shard_map`` or ``jax.pmap`` along which the factors are the same.

        Returns:
          The factors. A side whose decomposition failed, or that is zero, keeps the powers it had.
        """
        if not packing.blocks:  # parameters that are all vectors
            return factors
        means = trees.running_mean(factors.factor, packing.outer(gradient), 1 - self.decay)
        shared = functools.partial(placement.split_over_devices, _decomposed, axis_name=axis_name)
        power, inverse = cond_under_vmap(
            is_due,
            functools.partial(_refreshed, self.floor, packing.blocks, shared),
            functools.partial(_refreshed, self.floor, packing.blocks, _decomposed),
            (factors.power, factors.inverse),
            (means, powers.astype(jnp.float32)),
        )
        # Else the compiler would keep the factors of sharded gradients sharded, and gather them at every use.
        return jax.tree.map(placement.replicated, Factors(means, power, inverse))


def _decomposed(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns eigenvalues (blocks, size) and eigenvectors of symmetric matrices (blocks, size, size)."""
    return tuple(jnp.linalg.eigh(matrices))


_Powers = tuple[jax.Array, jax.Array]
_Refresh = Callable[[_Powers, tuple[jax.Array, jax.Array]], _Powers]
_Decompose = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def _refreshed(
    floor: float,
    all_blocks: list[Blocks],
    decompose: _Decompose,
    old: _Powers,
    inputs: tuple[jax.Array, jax.Array],
) -> _Powers:
    """Takes all powers anew, one decomposition for every size of blocks."""
    flat, powers = inputs
    arrays = [split(all_blocks, each) for each in (flat, *old)]
    fresh: tuple[list[jax.Array], list[jax.Array]] = ([], [])
    done = jnp.zeros((), jnp.float32)
    for own, factor, *before in zip(all_blocks, *arrays, strict=True):
        # Adding 0 times the result of the decomposition before makes this one wait for it. On CPUs several at
        # once in a loop may all wait for the same thread, and never end.
        made = _with_powers(own, factor + 0.0 * done, powers[own.tensors], floor, decompose, before)
        done = jnp.ravel(made[0])[0]
        for kept, new in zip(fresh, made, strict=True):
            kept.append(new)
    return join(fresh[0]), join(fresh[1])


def _with_powers(
    blocks: Blocks,
    factor: jax.Array,
    powers: jax.Array,
    floor: float,
    decompose: _Decompose,
    old: list[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Returns powers and inverse powers of the blocks of one size."""
    sides = jnp.asarray(blocks.sides)
    share = sides / jnp.sum(sides, axis=1, keepdims=True)
    of_sides = lambda x: share @ x  # means over the blocks of a side
    of_blocks = lambda x: (x @ sides)[:, None, None]
    mean = of_sides(jnp.trace(factor, axis1=1, axis2=2) / blocks.size)
    # In units of the mean eigenvalue of the whole side, the floor and float32 suit gradients of any size.
    units = of_blocks(jnp.maximum(mean, jnp.finfo(jnp.float32).tiny))
    eigenvalues, vectors = decompose(factor / units)
    values = (jnp.maximum(eigenvalues, 0.0) + floor) ** powers[:, None]
    values = (values / of_blocks(of_sides(jnp.mean(values, axis=1)))[..., 0])[:, None, :]
    product = lambda scaled: jnp.einsum("bij,bkj->bik", scaled, vectors)
    new = product(vectors * values), product(vectors / values)
    # A side is replaced as a whole or not at all: half of its blocks anew would not fit the other half.
    is_finite = jnp.all(jnp.isfinite(new[0]) & jnp.isfinite(new[1]), axis=(1, 2))
    is_sound = (mean > 0) & (of_sides(is_finite.astype(jnp.float32)) > 1 - 1e-6)
    chosen = of_blocks(is_sound.astype(jnp.float32)) > 0
    return jnp.where(chosen, new[0], old[0]), jnp.where(chosen, new[1], old[1])


def cond_under_vmap(
    is_due: jax.Array, function: _Refresh, each_of_many: _Refresh, old: Any, inputs: Any
) -> Any:
    """Returns ``function(old, inputs)`` if it is due, else what is old; under ``vmap`` only if any is due.

    Args:
      is_due: shape ().
      function: returns a tree of the shapes of ``old``.
      each_of_many: called in its place, once for each, under ``vmap``.
      old: a tree of arrays.
      inputs: a tree of arrays.
    """
    if loops.is_known(is_due, old, inputs):
        return function(old, inputs) if is_due else old

    @jax.custom_batching.custom_vmap
    def run(is_due, old, inputs):
        return jax.lax.cond(is_due, function, lambda old, _: old, old, inputs)

    @run.def_vmap
    def batched(axis_size, in_batched, is_due, old, inputs):
        # With a batched condition `lax.cond` becomes a select: it would decompose at every step.
        spread = lambda leaf, is_batched: (
            leaf if is_batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))
        )
        due, old, inputs = jax.tree.map(spread, (is_due, old, inputs), tuple(in_batched))

        def some(old, inputs):
            due, inputs = inputs
            pick = lambda new, own: jnp.where(due.reshape((-1,) + (1,) * (own.ndim - 1)), new, own)
            return jax.tree.map(pick, jax.vmap(each_of_many)(old, inputs), old)

        # By this function again: a vmap around this one then finds a condition that it can keep, too.
        made = cond_under_vmap(jnp.any(due), some, some, old, (due, inputs))
        return made, jax.tree.map(lambda _: True, old)

    return run(is_due, old, inputs)
