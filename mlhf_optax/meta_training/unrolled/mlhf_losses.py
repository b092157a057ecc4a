"""The two meta-losses of MLHF (paper, section 3.1) and their scales.

``l_p`` trains LSTM_p only, ``l_s`` trains LSTM_s only. The functions here take one step's values;
:mod:`mlhf_optax.meta_training.unrolled.mlhf_gradient` knows where gradients are cut.
"""

from typing import Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import optax

from mlhf_optax.support import checks

StepLoss = Literal["difference", "relative", "log"]
STEP_LOSSES = get_args(StepLoss)


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
    squared = jnp.asarray(optax.tree.vdot(direction, a_d))
    is_positive = squared > 0
    norm = jnp.sqrt(jnp.where(is_positive, squared, 1.0))
    return jnp.where(is_positive, -jnp.asarray(optax.tree.vdot(direction, gradient)) / norm, 0.0)


class StepLosses(NamedTuple):
    """The losses around step t, scalars.

    Attributes:
      same_before: l(x[t], w[t]).
      next_before: l(x[t+1], w[t]); the paper's form takes ``same_before`` in its place.
      next_after: l(x[t+1], w[t+1]).
      same_after: l(x[t], w[t+1]).
    """

    same_before: jax.Array
    next_before: jax.Array
    next_after: jax.Array
    same_after: jax.Array


def step_gain(
    losses: StepLosses,
    scale: StepLoss = "difference",
    epsilon: float = 1e-6,
    same_batch_weight: float = 1.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns ``l_s^t`` of one step and its derivatives by the two losses after the step.

    By the paper's equation 4 there is nothing left to gain once losses are small, so late training is not
    learned. With the other scales, halving a loss is worth the same early and late. They compare each
    mini-batch with itself: late in training the losses of two mini-batches differ by factors, and that noise
    would decide the softmax over the steps.

    Args:
      losses: the losses before and after the step.
      scale: ``"difference"`` is equation 4, ``next_after + same_after - 2 same_before``;
        ``"relative"`` is ``(after - before) / (before + epsilon)`` summed over both mini-batches,
        which punishes a loss that grows in proportion; ``"log"`` the difference of
        ``log(loss + epsilon)``, which punishes it less.
      epsilon: loss below which nothing more is to be gained, in the units of the loss.
      same_batch_weight: weight of the gain on mini-batch t, on which the step was computed. The paper's 1
        rewards steps that fit that mini-batch alone. With 0 only the gain on the next one counts, which is
        what helps the training where mini-batches are small and losses far from zero.

    Returns:
      The value, its derivative by ``next_after``, its derivative by ``same_after``.

    Raises:
      ValueError: for an unknown ``scale``.

    Example:
      >>> import jax.numpy as jnp
      >>> losses = StepLosses(*map(jnp.float32, (1.0, 1.0, 0.5, 0.25)))
      >>> [float(x) for x in step_gain(losses)]
      [-1.25, 1.0, 1.0]
    """
    checks.check_choice("step_loss", scale, STEP_LOSSES)
    next_after, same_after, weight = losses.next_after, losses.same_after, same_batch_weight
    if scale == "difference":
        one = jnp.ones_like(next_after)
        gains = next_after - losses.same_before, same_after - losses.same_before
        return gains[0] + weight * gains[1], one, weight * one
    if scale == "relative":
        by_next, by_same = 1.0 / (losses.next_before + epsilon), weight / (losses.same_before + epsilon)
        value = by_next * (next_after - losses.next_before) + by_same * (same_after - losses.same_before)
        return value, by_next, by_same
    gain = lambda after, before: jnp.log((after + epsilon) / (before + epsilon))
    value = gain(next_after, losses.next_before) + weight * gain(same_after, losses.same_before)
    return value, 1.0 / (next_after + epsilon), weight / (same_after + epsilon)
