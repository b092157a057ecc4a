"""Curvature and gradients of a batch that is too large for memory, one micro-batch after the other."""

from collections.abc import Hashable, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mlhf_optax.curvature import LossFn, Matvec, Outputs, PredictFn, output_curvature
from mlhf_optax.support.checks import require_function


def over_micro_batches(
    predict_fn: PredictFn, loss_fn: LossFn, *, shared: Sequence[Hashable] = (), remat: bool = True
) -> tuple[PredictFn, LossFn]:
    """Returns model and loss for a batch of several micro-batches: the loss is the mean over them.

    Give both to an optimizer, and take the gradient of them, too. Then gradient and curvature are those of
    all micro-batches, and only one of them is in the model at a time. ``curvature_batch_size`` then counts
    micro-batches: 1 is the first one, 0.25 every fourth, None all.

    ``optax.MultiSteps(tx, k)`` by itself averages the gradients of k calls and takes curvature on the
    micro-batch of the last one. For curvature on all of them, make ``tx`` of these functions and give each
    call, or the last, the whole batch: ``update(grads_of_one, state, params, batch=all_of_them)``.

    One gradient that is not finite stays in the average of ``optax.MultiSteps`` for ever: no parameter moves
    any more, and ``skipped_steps`` in the info grows with every step. Give it
    ``should_skip_update_fn=optax.skip_not_finite``, and it leaves such a micro-batch out.

    Args:
      predict_fn: ``predict_fn(params, micro_batch) -> outputs``.
      loss_fn: ``loss_fn(outputs, micro_batch) -> scalar``, convex in the outputs, a mean over the examples.
      shared: names in the batch of what all micro-batches share, such as ``("batch_stats",)``; the batch is
        then a mapping. Each array below all other names begins with the axis of micro-batches.
      remat: recompute what lies between layers in every pass, instead of storing it for all micro-batches
        (:func:`jax.checkpoint`). Without it memory is that of the whole batch, and a GGN product costs a
        forward pass less.

    Returns:
      ``predict_fn(params, batch) -> outputs`` and ``loss_fn(outputs, batch) -> scalar``, for batches with
      leaves (micro-batches, examples, ...) and outputs likewise.

    Raises:
      TypeError: if ``shared`` is a string.
      ValueError: from both functions, if arrays of the batch have no common first axis, or a name of
        ``shared`` is not there.

    Example:
      >>> from mlhf_optax import SquaredError, gauss_newton
      >>> predict_fn, loss_fn = over_micro_batches(lambda w, batch: batch["x"] @ w, SquaredError())
      >>> batch = {"x": jnp.ones((4, 8, 3)), "label": jnp.ones((4, 8))}  # four micro-batches of eight
      >>> tx, w = gauss_newton(1.0, predict_fn, loss_fn), jnp.full(3, 0.1)
      >>> loss, grads = jax.value_and_grad(lambda w: loss_fn(predict_fn(w, batch), batch))(w)
      >>> updates, _ = tx.update(grads, tx.init(w), w, batch=batch)
      >>> loss.round(3), updates.shape
      (Array(0.245, dtype=float32), (3,))
    """
    if isinstance(shared, str) or not isinstance(shared, Sequence | Set):
        raise TypeError(f'`shared` must be names such as `("batch_stats",)`, got {shared!r}')
    names = frozenset(shared)
    run = jax.checkpoint(predict_fn) if remat else predict_fn

    def predict_all(params: Any, batch: Any) -> Outputs:
        cut, whole = _parted(batch, names)
        return lax.map(lambda part: run(params, _joined(part, whole)), cut)

    return predict_all, _MeanLoss(loss_fn, names)


class _MeanLoss:
    """The mean of a loss over micro-batches; its curvature is in closed form if that of the loss is."""

    def __init__(self, loss_fn: LossFn, names: frozenset):
        require_function("loss_fn", loss_fn)
        self._loss_fn, self._names = loss_fn, names

    def __call__(self, outputs: Outputs, batch: Any) -> jax.Array:
        cut, whole = _parted(batch, self._names)
        return jnp.mean(jax.vmap(lambda z, part: self._loss_fn(z, _joined(part, whole)))(outputs, cut))

    def curvature(self, outputs: Outputs, batch: Any) -> Matvec:
        """Returns the product with the Hessian of the mean, which has a block for each micro-batch."""
        cut, whole = _parted(batch, self._names)
        count = jax.tree.leaves(cut)[0].shape[0]

        def one(z, part, vector):
            return output_curvature(self._loss_fn, z, _joined(part, whole))(vector)

        def product(vector: Any) -> Any:
            blocks = jax.vmap(one)(outputs, cut, vector)
            return jax.tree.map(lambda block: (block / count).astype(block.dtype), blocks)

        return product


def _parted(batch: Any, names: frozenset) -> tuple[Any, Any]:
    """Returns what has an axis of micro-batches, and what all of them share."""
    whole = {}
    if names:
        if not isinstance(batch, Mapping) or not names <= batch.keys():
            there = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"`shared` names {', '.join(sorted(map(str, names)))}, but the batch is {there}")
        whole = {name: batch[name] for name in names}
        batch = {name: part for name, part in batch.items() if name not in names}
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    if not shapes or len({shape[:1] for shape in shapes}) > 1 or not shapes[0]:
        raise ValueError(
            "each array of the batch must begin with the axis of micro-batches, got shapes "
            f"{', '.join(map(str, shapes)) or 'of no arrays'}; name what all of them share in `shared`"
        )
    return batch, whole


def _joined(part: Any, whole: Any) -> Any:
    return {**part, **whole} if whole else part
