"""The unit of damping: the size of gradients over that of parameters, for all tensors or for each."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from mlhf_optax.support import trees

# Below it a gradient is rounding noise: damping that shrank with it would let the training jump away.
SMALLEST_GRADIENT = 1e-7
_SMALLEST_PARAMETERS = 1e-3
_SMALLEST_SHARE = 1e-8  # of a tensor's gradient in that of all, for tensors whose gradient is zero
_TINY = 1e-30
_LARGEST_JUMP = 30.0


def unit(gradient_rms: jax.Array, initial_rms: jax.Array) -> jax.Array:
    """Returns the unit of damping, ``rms(g) / rms(w0)``: the dimension of curvature.

    Damping in this unit shrinks with the gradient, and one constant suits networks of any width.

    Args:
      gradient_rms: root mean square of the gradient, a scalar or one number per tensor.
      initial_rms: that of the parameters at the start of the training, likewise; zero counts as 1.

    Returns:
      Positive numbers, in units of the loss over parameter squared.

    Example:
      >>> float(unit(jnp.array(0.5), jnp.array(0.25)))
      2.0
    """
    size = jnp.maximum(gradient_rms, SMALLEST_GRADIENT)
    # Parameters that all start at zero have no size to measure damping by.
    parameters = jnp.where(initial_rms > 0, jnp.maximum(initial_rms, _SMALLEST_PARAMETERS), 1.0)
    return size / parameters


def initial_sizes(params: Any) -> jax.Array:
    """Returns the root mean square of every tensor, shape (tensors,), and not below that of all.

    Tensors often start at zero or near it on purpose, such as biases and the last layer: they have no unit.

    Example:
      >>> initial_sizes({"kernel": jnp.full((2, 2), 3.0), "zero_bias": jnp.zeros(5)})
      Array([3., 2.], dtype=float32)
    """
    return jnp.maximum(tensor_sizes(params), size_of(trees.root_mean_square(params).astype(jnp.float32)))


def tensor_sizes(tree: Any) -> jax.Array:
    """Returns the root mean square of every tensor, shape (tensors,), float32."""
    return jnp.array([trees.root_mean_square(leaf) for leaf in jax.tree.leaves(tree)], jnp.float32)


def size_of(rms: jax.Array) -> jax.Array:
    """Returns the root mean square of parameters, 1 for those that all start at zero."""
    return jnp.where(rms > 0, rms, 1.0)


def tensor_shares(of_tensors: jax.Array, of_all: jax.Array) -> jax.Array:
    """Returns the size of every tensor's gradient over that of all, shape (tensors,), above zero.

    Args:
      of_tensors: root mean square of the gradient of every tensor, shape (tensors,).
      of_all: that of all, a scalar.

    Example:
      >>> tensor_shares(jnp.array([0.5, 4.0]), jnp.array(2.0))
      Array([0.25, 2.  ], dtype=float32)
    """
    return jnp.maximum((of_tensors + _TINY) / (of_all + _TINY), _SMALLEST_SHARE)


def without_jump(gradient: chex.ArrayTree, running_rms: jax.Array) -> chex.ArrayTree:
    """Returns a gradient that is at most 30 times as large as those before it.

    One gradient that is finite and out of all proportion would stay in running means for the rest of the
    training. A lasting growth comes through: the running size grows with it.

    Args:
      gradient: the gradient.
      running_rms: running root mean square of the gradients before it, a scalar; zero for none.

    Example:
      >>> without_jump(jnp.array([30.0, 40.0]), jnp.array(0.5)).round(2)
      Array([12.73, 16.97], dtype=float32)
    """
    size = trees.root_mean_square(gradient)
    most = _LARGEST_JUMP * running_rms
    is_jump = (running_rms > 0) & (size > most)
    scale = jnp.where(is_jump, most / jnp.where(is_jump, size, 1.0), 1.0)
    return jax.tree.map(lambda g: (scale * g).astype(g.dtype), gradient)
