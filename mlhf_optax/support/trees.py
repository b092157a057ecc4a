"""Arithmetic on pytrees of arrays that optax.tree lacks: scalars in float32, derivatives that stay finite."""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from mlhf_optax.support import placement


def common_dtype(*arrays: Any) -> Any:
    """Returns the dtype that arrays, dtypes and numbers are promoted to, also under strict promotion.

    Example:
      >>> with jax.numpy_dtype_promotion("strict"):
      ...     common_dtype(jnp.bfloat16, jnp.float32)
      dtype('float32')
    """
    with jax.numpy_dtype_promotion("standard"):  # the caller casts by what comes out
        return jnp.result_type(*arrays)


def wide_dtype(array: Any) -> Any:
    """Returns float32, or the dtype of the array where that is wider."""
    return common_dtype(array.dtype, jnp.float32)


def at_least_f32(array: jax.Array) -> jax.Array:
    """Returns the array in float32, or in its own dtype where that is wider."""
    return array.astype(wide_dtype(array))


def vdot(a: Any, b: Any) -> Any:
    """Returns the inner product of two trees, a scalar of at least float32."""

    def leaf(x, y):
        dtype = common_dtype(x, y, jnp.float32)
        return jnp.sum(x.astype(dtype) * y.astype(dtype))

    leaves, treedef = jax.tree.flatten(a)
    return total(list(map(leaf, *_joined(leaves, treedef.flatten_up_to(b)))))


def scaled(scale: Any, tree: chex.ArrayTree) -> chex.ArrayTree:
    """Returns a tree times a scalar, in the dtypes of the tree.

    Example:
      >>> scaled(0.5, {"w": jnp.array([2.0, 4.0])})
      {'w': Array([1., 2.], dtype=float32)}
    """
    return jax.tree.map(lambda leaf: (scale * leaf).astype(leaf.dtype), tree)


def share_within(most: Any, size: Any, is_bounded: Any = True) -> jax.Array:
    """Returns the factor in (0, 1] by which what is of some size becomes no larger than the most.

    Args:
      most: largest size, a scalar.
      size: the size, a scalar.
      is_bounded: whether there is a bound at all.

    Example:
      >>> [float(share_within(2.0, size)) for size in (1.0, 8.0)]
      [1.0, 0.25]
    """
    is_larger = is_bounded & (size > most)
    return jnp.where(is_larger, most / jnp.where(is_larger, size, 1.0), 1.0)


def total(parts: Sequence[jax.Array]) -> Any:
    """Returns the sum of scalars, one per leaf of a tree; 0 for none."""
    return sum(parts) if len(parts) < 3 else jnp.sum(_gathered(parts))


def norm(tree: chex.ArrayTree) -> jax.Array:
    """Returns the Euclidean norm of a tree, a scalar of at least float32 whose derivative at zero is zero.

    Example:
      >>> jax.value_and_grad(norm)(jnp.zeros(2))
      (Array(0., dtype=float32), Array([0., 0.], dtype=float32))
    """
    return safe_sqrt(_sum_of_squares(tree))


def root_mean_square(tree: chex.ArrayTree) -> jax.Array:
    """Returns the root mean square of all numbers in a tree; scalar and derivative as those of :func:`norm`.

    Example:
      >>> float(root_mean_square({"kernel": jnp.array([3.0, 5.0]), "bias": jnp.array([-4.0, 0.0])}))
      3.535533905029297
    """
    # A tree without leaves is what optax.tree.map_params initialises an optimizer with.
    return safe_sqrt(_sum_of_squares(tree) / max(1, size(tree)))


def size(tree: chex.ArrayTree) -> int:
    """Returns how many numbers a tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def is_finite(tree: chex.ArrayTree) -> jax.Array:
    """Returns whether every number in the tree is finite."""
    sizes = _largest(tree)
    return jnp.all(jnp.isfinite(_gathered(sizes))) if sizes else jnp.asarray(True)


def is_any_nonzero(tree: chex.ArrayTree) -> jax.Array:
    """Returns whether any number in the tree is not zero."""
    sizes = _largest(tree)
    return jnp.any(_gathered(sizes) != 0) if sizes else jnp.asarray(False)


def _largest(tree: chex.ArrayTree) -> list[jax.Array]:
    """Returns the largest absolute number of every leaf that has any; NaN if any is."""
    # One maximum per leaf: on CPUs it takes a quarter of the time of a flag per number.
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    (leaves,) = _joined([leaf for leaf in leaves if leaf.size])
    return [jnp.max(jnp.abs(at_least_f32(leaf))) for leaf in leaves]


def select(condition: jax.Array, on_true: Any, on_false: Any) -> Any:
    """Returns one of two trees of equal shapes, by a traced condition."""
    return jax.tree.map(lambda t, f: jnp.where(condition, t, f).astype(f.dtype), on_true, on_false)


def zero_unless(condition: jax.Array, tree: Any) -> Any:
    """Returns the tree, or zeros in its place unless the condition holds."""
    # One zero for all of an array: zeros would have to lie on the devices as it does.
    return jax.tree.map(lambda x: jnp.where(condition, x, lax.full_like(x, 0, shape=())), tree)


def running_mean(mean: Any, new: Any, share: Any) -> Any:
    """Returns running means moved towards new numbers, in the dtypes of the means.

    ``optax.tree.update_moment`` is the same for a fixed decay; here the share may be learned, and change from
    step to step. Of gradients in low precision, a mean in float32 loses nothing.

    Args:
      mean: tree of arrays.
      new: tree of the same structure; a leaf may be a Python number.
      share: weight of the new numbers, in [0, 1]: 1 - decay.

    Example:
      >>> running_mean({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 2.0])}, 0.25)
      {'w': Array([1.5, 2. ], dtype=float32)}
    """

    def one(old, leaf):
        return ((1 - share) * old + share * jnp.asarray(leaf, common_dtype(old, leaf))).astype(old.dtype)

    return jax.tree.map(one, mean, new)


def sum_of_weights(decay: Any, count: jax.Array) -> jax.Array:
    """Returns the sum of the weights in a running mean that began at zero; the mean over it has no bias.

    Args:
      decay: weight of the past, 1 - share.
      count: numbers averaged so far; none counts as one, for a division by the result.

    Example:
      >>> sum_of_weights(0.5, jnp.array(2))
      Array(0.75, dtype=float32)
    """
    # Not `**`, which compiles a program for each exponent whose value it knows, without `jit`.
    return 1 - lax.pow(jnp.asarray(decay, jnp.float32), jnp.maximum(count, 1))


def _sum_of_squares(tree: chex.ArrayTree) -> Any:
    (leaves,) = _joined(jax.tree.leaves(tree))
    return total([jnp.sum(jnp.square(at_least_f32(leaf))) for leaf in leaves])


def _joined(*lists: list[jax.Array]) -> tuple[list[jax.Array], ...]:
    """Returns lists of arrays, each joined to one array where that gathers nothing from other devices.

    One reduction for all compiles in a fraction of the time of one for each.
    """
    arrays = [leaf for leaves in lists for leaf in leaves]
    is_here = all(isinstance(leaf, Tracer) and not placement.is_on_mesh(leaf) for leaf in arrays)
    if len(lists[0]) < 3 or not is_here:
        return lists
    dtype = common_dtype(jnp.float32, *arrays)
    return tuple([jnp.concatenate([leaf.ravel().astype(dtype) for leaf in leaves])] for leaves in lists)


def _gathered(scalars: Sequence[jax.Array]) -> jax.Array:
    # The barrier stops XLA from fusing these reductions into each later pass. Programs, and the time to
    # compile them, would grow with the square of the number of leaves.
    return lax.optimization_barrier(jnp.stack(scalars))


def once(x: jax.Array) -> jax.Array:
    """Returns numbers as they are, worked out once: XLA does not copy what they are made of into other loops.

    On CPUs it fuses what small numbers are made of into every loop that uses them, and each of these then
    takes longer to compile. A remainder is among the few operations that it does not copy.

    Example:
      >>> once(jnp.array([2.0, -3.0]))
      Array([ 2., -3.], dtype=float32)
    """
    if not isinstance(x, Tracer):
        return x
    return lax.rem(x, lax.full_like(x, jnp.finfo(x.dtype).max))


def safe_sqrt(x: Any) -> jax.Array:
    """Returns the square root, with zero as its derivative at zero."""
    # The true derivative is infinite, and meta-training differentiates norms.
    is_positive = x > jnp.finfo(common_dtype(x, jnp.float32)).tiny
    return jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, x, 1.0)), 0.0)


def shapes_of(function: Callable, *trees: Any) -> Any:
    """Returns the shapes of what a function returns: ``jax.eval_shape``, which keeps no array alive.

    JAX remembers what it has traced, with all that the traced function closes over. So arrays are arguments
    here; other leaves, such as names of modes, are not.

    Example:
      >>> shapes_of(lambda x, mode: x.T if mode == "turn" else x, jnp.ones((2, 3)), "turn").shape
      (3, 2)
    """
    leaves, treedef = jax.tree.flatten(trees)
    is_array = [isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct) for leaf in leaves]
    others = [None if known else leaf for leaf, known in zip(leaves, is_array, strict=True)]

    def run(arrays: list[Any]) -> Any:
        own = iter(arrays)
        full = [next(own) if known else other for other, known in zip(others, is_array, strict=True)]
        return function(*treedef.unflatten(full))

    return jax.eval_shape(run, [leaf for leaf, known in zip(leaves, is_array, strict=True) if known])


def attempt(function: Callable, *args: Any) -> Any:
    """Returns what a function of the user returns, None if it raises whatever it may.

    Example:
      >>> attempt(shapes_of, jnp.matmul, jnp.ones((2, 3)), jnp.ones(2)) is None
      True
    """
    try:
        return function(*args)
    except Exception:
        return None
