"""The unit of damping: the size of gradients over that of parameters, for all tensors or for each."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from mlhf_optax.support import trees

# A smaller gradient is rounding noise. Damping that went on shrinking with it would let a training jump away.
NOISE_FLOOR = 1e-7
# The same for meta-parameters of coordinate LSTMs. Each record holds its own, as they were trained with it.
COORDINATE_NOISE_FLOOR = 1e-5
# Where something else keeps damping up, as the largest gradient so far does in `tensor_lstm`, the floor only
# has to keep it above zero: preconditioners divide by it.
ZERO_FLOOR = 1e-15
# Smaller parameters are as good as zero: a layer that starts there will grow out of it at once.
PARAMETER_FLOOR = 1e-3
_SMALLEST_SHARE = 1e-8  # of a tensor's gradient in that of all, for tensors whose gradient is zero
_TINY = 1e-30
_LARGEST_JUMP = 30.0


def unit(
    gradient_rms: jax.Array,
    initial_rms: jax.Array,
    *,
    gradient_floor: float = NOISE_FLOOR,
    parameter_floor: float = PARAMETER_FLOOR,
    gradient_power: float = 1,
    parameter_power: float = 1,
) -> jax.Array:
    """Returns the unit of damping, ``rms(g) / rms(w0)``: the dimension of curvature.

    Damping in this unit shrinks with the gradient, and one constant suits networks of any width.

    Args:
      gradient_rms: root mean square of the gradient, a scalar or one number per tensor.
      initial_rms: that of the parameters at the start of the training, likewise; zero counts as 1.
      gradient_floor: smallest size of a gradient that counts.
      parameter_floor: smallest size of parameters that counts.
      gradient_power: exponent of the gradient's size; 1 but for other units
        (:class:`mlhf_optax.controllers.lstm_settings.Unit`).
      parameter_power: exponent of the parameters' size, likewise.

    Returns:
      Positive numbers, in units of the loss over parameter squared.

    Example:
      >>> float(unit(jnp.array(0.5), jnp.array(0.25)))
      2.0
    """
    size = jnp.maximum(gradient_rms, gradient_floor)
    parameters = jnp.where(initial_rms > 0, jnp.maximum(initial_rms, parameter_floor), 1.0)
    return size**gradient_power / parameters**parameter_power


def tensor_units(
    gradient_rms: jax.Array, of_tensors: jax.Array, of_all: jax.Array, initial_sizes: jax.Array
) -> jax.Array:
    """Returns the unit of every tensor, shape (tensors,), above zero.

    Layers may be in units of their own, such as inputs that are not standardised give to the first one.

    Args:
      gradient_rms: size of the gradient of all tensors, a scalar; the caller keeps it above noise.
      of_tensors: running root mean square of the gradient of every tensor, shape (tensors,).
      of_all: that of all, a scalar.
      initial_sizes: of :func:`initial_sizes`.

    Example:
      >>> tensor_units(jnp.array(6.0), jnp.array([0.5, 4.0]), jnp.array(2.0), jnp.array([1.5, 3.0]))
      Array([1., 4.], dtype=float32)
    """
    shares = jnp.maximum((of_tensors + _TINY) / (of_all + _TINY), _SMALLEST_SHARE)
    sizes = shares * jnp.maximum(gradient_rms, ZERO_FLOOR)
    # Already above zero, both; a floor on the product would undo the smallest share.
    return unit(sizes, initial_sizes, gradient_floor=0.0, parameter_floor=0.0)


def initial_sizes(params: Any) -> jax.Array:
    """Returns the root mean square of every tensor, shape (tensors,), and not below that of all.

    Tensors often start at zero or near it on purpose, such as biases and the last layer: they have no unit.

    Example:
      >>> initial_sizes({"kernel": jnp.full((2, 2), 3.0), "zero_bias": jnp.zeros(5)})
      Array([3., 2.], dtype=float32)
    """
    of_tensors = [trees.root_mean_square(leaf) for leaf in jax.tree.leaves(params)]
    of_all = trees.root_mean_square(params).astype(jnp.float32)
    return jnp.maximum(jnp.array(of_tensors, jnp.float32), size_of(of_all))


def size_of(rms: jax.Array) -> jax.Array:
    """Returns the root mean square of parameters; 1 for those that all start at zero and have no size."""
    return jnp.where(rms > 0, rms, 1.0)


def without_jump(gradient: chex.ArrayTree, running_rms: jax.Array) -> chex.ArrayTree:
    """Returns the gradient, scaled down to at most 30 times the size of those before it.

    A single gradient that is finite but far out of proportion would stay in running means for the rest of
    the training. Lasting growth comes through: the running size grows with it.

    Args:
      gradient: the gradient.
      running_rms: running root mean square of the gradients before it, a scalar; zero for none.

    Example:
      >>> without_jump(jnp.array([30.0, 40.0]), jnp.array(0.5)).round(2)
      Array([12.73, 16.97], dtype=float32)
    """
    return trees.scaled(jump_scale(trees.root_mean_square(gradient), running_rms), gradient)


def jump_scale(rms: jax.Array, running_rms: jax.Array) -> jax.Array:
    """Returns the factor of :func:`without_jump` for a gradient of that root mean square, a scalar."""
    return trees.share_within(_LARGEST_JUMP * running_rms, rms, running_rms > 0)
