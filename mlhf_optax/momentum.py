"""Averaging of successive directions, against the noise of mini-batches."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mlhf_optax.safeguards import is_any_nonzero, select_tree


class AverageDirectionsState(NamedTuple):
    """State of :func:`average_directions`.

    Attributes:
      num_averaged: number of directions averaged so far; those of skipped steps are not among them.
      average: ``m_t = momentum * m_(t-1) + (1 - momentum) * d_t``, shaped like the parameters.
    """

    num_averaged: jax.Array  # shape=(), dtype=int32
    average: chex.ArrayTree


def average_directions(momentum: float | jax.Array) -> optax.GradientTransformation:
    """Replaces each direction by the running average of all so far, with weights that decay.

    Every direction of MLHF solves the system of one mini-batch and carries its noise. The average has
    the noise of about ``(1 + momentum) / (1 - momentum)`` mini-batches, lags behind by about
    ``momentum / (1 - momentum)`` steps, and costs one more vector of state. It is not part of the
    paper's method. A zero update, which is what a skipped step gives, is passed on and changes nothing.

    Args:
      momentum: decay of the weights, in [0, 1).

    Returns:
      A gradient transformation. The average is divided by the sum of its weights, as in Adam, so the
      first steps are not shorter than the others.

    Raises:
      ValueError: if ``momentum`` is a number outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> tx = average_directions(0.5)
      >>> first, state = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
      >>> second, state = tx.update(jnp.array([1.0]), state)
      >>> first, second
      (Array([4.], dtype=float32), Array([2.], dtype=float32))

    Source: Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015, section 3, for the correction.
    """
    if isinstance(momentum, int | float) and not 0 <= momentum < 1:
        raise ValueError(f"`momentum` must be in [0, 1), 0 for none, got {momentum}")

    def init_fn(params):
        return AverageDirectionsState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update_fn(updates, state, params: Any = None):
        del params
        is_step = is_any_nonzero(updates)
        next_average = lambda m, d: (momentum * m + (1 - momentum) * d).astype(m.dtype)
        average = jax.tree.map(next_average, state.average, updates)
        new = AverageDirectionsState(jnp.asarray(optax.safe_increment(state.num_averaged)), average)
        sum_of_weights = 1 - jnp.asarray(momentum, jnp.result_type(float)) ** new.num_averaged
        correct = lambda m, d: jnp.where(is_step, m / sum_of_weights, 0.0).astype(d.dtype)
        return jax.tree.map(correct, average, updates), select_tree(is_step, new, state)

    return optax.GradientTransformation(init_fn, update_fn)


__all__ = ["AverageDirectionsState", "average_directions"]
