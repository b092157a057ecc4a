"""LODO: learns its preconditioner while it optimises, without meta-training (Liao et al. 2023).

Source: Liao, Dangovski, Foerster, Soljacic 2023, "Learning to Optimize Quasi-Newton Methods",
arXiv 2210.06171, sections 3 and 4.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from mlhf_optax.support import trees
from mlhf_optax.support.checks import DECAY, FROM_ONE, POSITIVE, check_number, require
from mlhf_optax.support.layer_types import check_leaves

_META_EPS = 1e-7


class LODOState(NamedTuple):
    """State of :func:`lodo` for n parameters, with M = 2 n rounded up to a multiple of k, at least 2 n + 1.

    Attributes:
      momentum: running mean of gradients, shape (n,).
      blocks: weights of the L layers, shape (L, M / k, k, k); 128 numbers per parameter for 16 layers of 4.
      blocks_opt_state: of the Adam that trains them, 256 numbers per parameter.
      permutations: order of the coordinates before every layer, int32, shape (L, M).
    """

    momentum: jax.Array
    blocks: jax.Array
    blocks_opt_state: optax.OptState
    permutations: jax.Array


def lodo(
    learning_rate: float | jax.Array = 1.0,
    meta_learning_rate: optax.ScalarOrSchedule = 1e-3,
    momentum: float | jax.Array = 0.9,
    *,
    num_layers: int = 16,
    block_size: int = 4,
    seed: int = 0,
) -> optax.GradientTransformation:
    r"""Returns LODO, a quasi-Newton method whose inverse Hessian is a sparse neural network.

    The step is ``-G m`` for the running mean m of gradients and ``G = learning_rate * A^T A``, where A is
    a product of random permutations and block-diagonal matrices on the gradient, padded to twice its length.
    G starts as ``learning_rate`` times the identity. Every gradient, taken where the last step led, tells how
    that step should have been; by its derivative with respect to A, Adam improves A.

    That derivative is right only if the update is applied as it is returned: chain nothing behind it that
    changes it. It needs 385 numbers per parameter, so it is for small networks.

    Args:
      learning_rate: a number. Times the largest curvature it must be below 2, or the training diverges.
      meta_learning_rate: learning rate of the Adam that trains the preconditioner.
      momentum: decay of the running mean, in [0, 1).
      num_layers: L.
      block_size: k, at least 2.
      seed: of permutations and first blocks.

    Returns:
      A gradient transformation with a :class:`LODOState`.

    Raises:
      ValueError: for a number out of range, at once, or for parameters without any number, in ``init``.
      TypeError: for a schedule as ``learning_rate``.

    Example:
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> tx = lodo(0.1, momentum=0.0)
      >>> updates, state = tx.update(params, tx.init(params))
      >>> updates["kernel"][0].round(3), state.blocks.shape
      (Array([-0.1, -0.1], dtype=float32), (16, 4, 4, 4))

    Source: Liao et al. 2023, section 3, algorithm 1.
    """
    _check(learning_rate, momentum, num_layers, block_size)
    adam = optax.adam(meta_learning_rate, eps=_META_EPS)

    def init(params):
        check_leaves(params, "lodo")
        flat = _flat(params)
        if not flat.size:
            raise ValueError("`lodo` needs parameters with at least one number, got none")
        width = 2 * flat.size + block_size - 2 * flat.size % block_size
        permutation_key, block_key = jax.random.split(jax.random.key(seed))
        order = jnp.arange(width, dtype=jnp.int32)
        keys = jax.random.split(permutation_key, num_layers)
        permutations = jax.vmap(lambda key: jax.random.permutation(key, order))(keys)
        shape = (num_layers, width // block_size, block_size, block_size)
        blocks = jnp.linalg.qr(jax.random.normal(block_key, shape, flat.dtype))[0]
        return LODOState(jnp.zeros_like(flat), blocks, adam.init(blocks), permutations)

    def update(updates, state, params=None):
        del params
        gradient = _flat(updates).astype(state.momentum.dtype)
        hypergradient = _hypergradient(state, gradient, learning_rate)
        with jax.numpy_dtype_promotion("standard"):  # Adam of optax raises a number to an integer count
            change, opt_state = adam.update(hypergradient, state.blocks_opt_state)
        blocks: Any = optax.apply_updates(state.blocks, change)
        mean = momentum * state.momentum + (1 - momentum) * gradient
        mean = mean.astype(state.momentum.dtype)
        _, top = _forward(blocks, state.permutations, mean)
        _, preconditioned = _backward(blocks, state.permutations, top, mean.size)
        step = _like(-learning_rate * preconditioned, updates)
        return step, LODOState(mean, blocks, opt_state, state.permutations)

    return optax.GradientTransformation(init, update)


def _hypergradient(state: LODOState, gradient: jax.Array, learning_rate: Any) -> jax.Array:
    """Returns the derivative of ``-learning_rate <g, A^T A m>`` with respect to the blocks of A.

    The inner product is that of A g and A m, so what enters a layer for one meets what comes back to it for
    the other; two applications of G give everything.
    """
    size = gradient.size
    pair = jnp.stack([gradient, state.momentum])
    run = jax.vmap(lambda x: _forward(state.blocks, state.permutations, x))
    inputs, tops = run(pair)
    signals, _ = jax.vmap(lambda y: _backward(state.blocks, state.permutations, y, size))(tops)
    outer = lambda a, b: jnp.einsum("lbi,lbj->lbij", a, b)
    both = outer(inputs[0], signals[1]) + outer(inputs[1], signals[0])
    return (-learning_rate * both).astype(state.blocks.dtype)


def _forward(blocks: jax.Array, permutations: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what enters every layer, shape (L, M / k, k), and A x, shape (M,)."""
    padded = jnp.pad(x, (0, permutations.shape[1] - x.size))
    top, inputs = jax.lax.scan(_layer, padded, (blocks, permutations))
    return inputs, top


# Without `jit`, a scan over a function that is made anew in every call would be compiled in every call.
def _layer(z: jax.Array, weights: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    matrices, order = weights
    entering = z[order].reshape(-1, matrices.shape[-1])
    return jnp.einsum("bi,bij->bj", entering, matrices).reshape(-1), entering


def _layer_transposed(u: jax.Array, weights: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    matrices, order = weights
    arriving = u.reshape(-1, matrices.shape[-1])
    back = jnp.einsum("bj,bij->bi", arriving, matrices).reshape(-1)
    return jnp.zeros_like(u).at[order].set(back), arriving


def _backward(
    blocks: jax.Array, permutations: jax.Array, y: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """Returns what comes back to the output of every layer, (L, M / k, k), and A^T y, shape (size,)."""
    bottom, signals = jax.lax.scan(_layer_transposed, y, (blocks, permutations), reverse=True)
    return signals, bottom[:size]


def _flat(tree: Any) -> jax.Array:
    """Returns all numbers of a tree as one vector of float32 or wider."""
    return trees.at_least_f32(ravel_pytree(tree)[0])


def _like(vector: jax.Array, tree: Any) -> Any:
    """Returns a vector in the shape and the dtypes of a tree."""
    leaves, treedef = jax.tree.flatten(tree)
    ends = [sum(leaf.size for leaf in leaves[:i]) for i in range(1, len(leaves))]
    parts = jnp.split(vector, ends)
    return treedef.unflatten([p.reshape(x.shape).astype(x.dtype) for p, x in zip(parts, leaves, strict=True)])


def _check(learning_rate: Any, momentum: Any, num_layers: int, block_size: int) -> None:
    if callable(learning_rate):
        raise TypeError(
            "`learning_rate` of `lodo` must be a number, got a schedule: the preconditioner learns the size "
            "of steps; use `optax.inject_hyperparams` if it has to change"
        )
    check_number("num_layers", num_layers, FROM_ONE)
    check_number("learning_rate", learning_rate, POSITIVE)
    check_number("momentum", momentum, DECAY)
    require(block_size >= 2, "block_size", "at least 2", block_size)
