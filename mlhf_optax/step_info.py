"""What a step reports: :class:`StepInfo` in the state of every optimizer."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mlhf_optax.controllers.protocol import Observed, Operator, Operators, PerTensor
from mlhf_optax.solvers import Solution

_LOSS_DECAY = 0.9  # of the running mean of losses
_NO_LOSS = float(jnp.finfo(jnp.float32).max)  # before the first; infinity would stop `jax_debug_infs`


class StepInfo(NamedTuple):
    """What the last step did, for looking at: no step uses it.

    All fields but the counts of steps (``skipped_steps``, ``refused_steps``, ``changed_batches``) and the
    three after the first describe the last step that was tried, skipped or not.

    Attributes:
      skipped_steps: number of steps so far that moved no parameter, because something was not finite or the
        direction was not one of descent. If every step is skipped under ``optax.MultiSteps``, a NaN has
        stayed in its average: give it ``should_skip_update_fn=optax.skip_not_finite``.
      best_loss: lowest ``smoothed_loss`` so far; before the first step the largest float32, so that all
        fields are finite from the start.
      smoothed_loss: running mean of ``loss`` (decay 0.9).
      worst_rise: largest ``smoothed_loss / best_loss`` so far, at least 1. It never falls, so a past blow-up
        stays visible: many times 1 means that the training blew up although every number stayed finite.
        Losses that are not positive do not count.
      loss: loss before the step, on the part of the batch that curvature was taken on.
      descent: <d, b> with the right-hand side b, for most optimizers the gradient; positive for a direction
        of descent.
      cg_steps: number of CG steps that changed the direction.
      cg_residual_norm: norm of ``b - A d`` after them.
      damping_min, damping_mean, damping_max: statistics of the damping over all coordinates.
      preconditioner_min, preconditioner_mean, preconditioner_max: the same of the preconditioner; 1 if there
        is none.
      reduction_ratio: change of the loss over the change that the quadratic model predicts; 0 if the
        controller does not measure it.
      refused_steps: number of steps so far that would have raised the loss and were not taken, by a rule for
        losses without noise. The damping grew, and the next step is shorter. They are not among the skipped.
      changed_batches: number of steps so far that came with another batch than the step before, as told by
        the loss. For such a rule, which takes all batches for the same; should be 0.
    """

    skipped_steps: jax.Array  # shape=(), dtype=int32
    best_loss: jax.Array  # shape=(), dtype=float32, as all others but cg_steps
    smoothed_loss: jax.Array
    worst_rise: jax.Array
    loss: jax.Array
    descent: jax.Array
    cg_steps: jax.Array  # shape=(), dtype=int32
    cg_residual_norm: jax.Array
    damping_min: jax.Array
    damping_mean: jax.Array
    damping_max: jax.Array
    preconditioner_min: jax.Array
    preconditioner_mean: jax.Array
    preconditioner_max: jax.Array
    reduction_ratio: jax.Array
    refused_steps: jax.Array  # shape=(), dtype=int32
    changed_batches: jax.Array  # shape=(), dtype=int32


_COUNTS = ("skipped_steps", "cg_steps", "refused_steps", "changed_batches")


def initial_info() -> StepInfo:
    """Returns the info before the first step, each field in a buffer of its own."""
    zero = lambda name: jnp.zeros((), jnp.int32 if name in _COUNTS else jnp.float32)
    info = StepInfo(*map(zero, StepInfo._fields))
    return info._replace(best_loss=jnp.full((), _NO_LOSS, jnp.float32), worst_rise=jnp.ones((), jnp.float32))


def next_info(
    before: StepInfo,
    *,
    loss: jax.Array,
    descent: jax.Array,
    is_taken: jax.Array,
    solution: Solution,
    operators: Operators,
    observed: Observed,
) -> StepInfo:
    """Returns the info after a step.

    Args:
      before: the info of the step before.
      loss: loss before the step; NaN if the step was not valid.
      descent: <d, b>.
      is_taken: whether the parameters move, shape ().
      solution: what the solver found.
      operators: damping and preconditioner.
      observed: what the controller made of it.
    """
    loss, refused = jnp.asarray(loss, jnp.float32), jnp.asarray(observed.is_refused)
    is_first = before.best_loss == _NO_LOSS
    smoothed = jnp.where(is_first, loss, _LOSS_DECAY * before.smoothed_loss + (1 - _LOSS_DECAY) * loss)
    smoothed = jnp.where(jnp.isfinite(loss), smoothed, before.smoothed_loss)
    best = jnp.where(jnp.isfinite(loss), jnp.minimum(before.best_loss, smoothed), before.best_loss)
    is_ratio = (best != _NO_LOSS) & (best > 0)
    rise = jnp.where(is_ratio, smoothed / jnp.where(is_ratio, best, 1.0), 1.0)
    damping = _min_mean_max(operators.damping, solution.direction)
    preconditioner = _min_mean_max(operators.preconditioner, solution.direction)
    return StepInfo(
        skipped_steps=before.skipped_steps + (~is_taken & ~refused).astype(jnp.int32),
        best_loss=best,
        smoothed_loss=smoothed,
        worst_rise=jnp.maximum(before.worst_rise, rise),
        loss=loss,
        descent=descent,
        cg_steps=solution.num_steps,
        cg_residual_norm=solution.residual_norm,
        damping_min=damping[0],
        damping_mean=damping[1],
        damping_max=damping[2],
        preconditioner_min=preconditioner[0],
        preconditioner_mean=preconditioner[1],
        preconditioner_max=preconditioner[2],
        reduction_ratio=observed.reduction_ratio,
        refused_steps=before.refused_steps + refused.astype(jnp.int32),
        changed_batches=before.changed_batches + jnp.asarray(observed.is_another_batch).astype(jnp.int32),
    )


def _min_mean_max(operator: Operator | None, like: chex.ArrayTree) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns statistics over all coordinates; a leaf of the values may stand for a whole tensor."""
    if operator is None:
        one = jnp.ones((), jnp.float32)
        return one, one, one
    if isinstance(operator.values, PerTensor):
        numbers, sizes = operator.values
        return jnp.min(numbers), jnp.sum(sizes * numbers) / jnp.sum(sizes), jnp.max(numbers)
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(operator.values)]
    sizes = [leaf.size for leaf in jax.tree.leaves(like)]
    totals = [
        jnp.sum(leaf) * (size // leaf.size) if leaf.size else jnp.zeros(())
        for leaf, size in zip(leaves, sizes, strict=True)
    ]
    mean = jnp.sum(jnp.stack(totals)) / sum(sizes)
    smallest = jnp.min(jnp.stack([jnp.min(leaf) for leaf in leaves]))
    return smallest, mean, jnp.max(jnp.stack([jnp.max(leaf) for leaf in leaves]))
