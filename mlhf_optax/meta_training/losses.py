"""The two meta-losses of MLHF (paper, section 3.1) and their scales.

``l_p`` trains LSTM_p only, ``l_s`` trains LSTM_s only. The functions here take one step's values;
:mod:`mlhf_optax.meta_training.mlhf_gradient` knows where gradients are cut.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
import optax

StepLoss = Literal["difference", "relative", "log"]


def preconditioner_loss(
    direction: chex.ArrayTree, residual: chex.ArrayTree, gradient: chex.ArrayTree
) -> jax.Array:
    r"""Returns ``l_p`` of one step, :math:`-\langle d, g\rangle / \sqrt{\langle d, A d\rangle}`.

    ``A d = g - r`` is known from the residual and costs no product. The minimum over d is the
    natural-gradient direction (paper, equation 2).

    Args:
      direction: d.
      residual: ``r = g - A d``.
      gradient: g.

    Returns:
      A scalar; 0 where ``<d, A d>`` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> preconditioner_loss(jnp.array([2.0]), jnp.array([0.0]), jnp.array([1.0]))
      Array(-1.4142135, dtype=float32)
    """
    a_d = jax.tree.map(jnp.subtract, gradient, residual)
    squared = optax.tree.vdot(direction, a_d)
    is_positive = squared > 0
    norm = jnp.sqrt(jnp.where(is_positive, squared, 1.0))
    return jnp.where(is_positive, -optax.tree.vdot(direction, gradient) / norm, 0.0)


def step_gain(
    loss: jax.Array,
    next_loss: jax.Array,
    same_loss: jax.Array,
    scale: StepLoss = "difference",
    epsilon: float = 1e-3,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns ``l_s^t`` of one step and its derivatives by the two losses after the step.

    Args:
      loss: l(x[t], w[t]), before the step.
      next_loss: l(x[t+1], w[t+1]).
      same_loss: l(x[t], w[t+1]).
      scale: ``"difference"`` is the paper's equation 4,
        ``next_loss + same_loss - 2 loss``. It has nothing left to gain once losses are small;
        ``"relative"`` divides it by ``loss + epsilon``, ``"log"`` takes the difference of
        ``log(l + epsilon)``, so that halving a loss is worth the same early and late.
      epsilon: loss below which nothing more is to be gained, in the units of the loss.

    Returns:
      The value, its derivative by ``next_loss``, its derivative by ``same_loss``.

    Raises:
      ValueError: for an unknown ``scale``.

    Example:
      >>> import jax.numpy as jnp
      >>> [float(x) for x in step_gain(jnp.array(1.0), jnp.array(0.5), jnp.array(0.25))]
      [-1.25, 1.0, 1.0]
    """
    if scale == "difference":
        one = jnp.ones_like(loss)
        return next_loss + same_loss - 2 * loss, one, one
    if scale == "relative":
        weight = 1.0 / (loss + epsilon)
        return weight * (next_loss + same_loss - 2 * loss), weight, weight
    if scale == "log":
        log = lambda x: jnp.log(x + epsilon)
        value = log(next_loss) + log(same_loss) - 2 * log(loss)
        return value, 1.0 / (next_loss + epsilon), 1.0 / (same_loss + epsilon)
    raise ValueError(f"`step_loss` must be 'difference', 'relative' or 'log', got {scale!r}")


__all__ = ["StepLoss", "preconditioner_loss", "step_gain"]
