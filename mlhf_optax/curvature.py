"""Products with the generalized Gauss-Newton matrix (GGN) of any model and any convex loss.

The GGN of ``loss_fn(predict_fn(params, batch), batch)`` with respect to ``params`` is
``G = J^T H_l J``: ``J`` is the Jacobian of the outputs, ``H_l`` the Hessian of the loss with
respect to the outputs (paper, equation 1). It is never formed. One product costs a forward-mode
pass, a product with ``H_l`` and a reverse-mode pass; all products of one step share one
linearization of the model (paper, section 2.2).
"""

from collections.abc import Callable
from typing import Any

import chex
import jax

Batch = Any
Outputs = Any
PredictFn = Callable[[chex.ArrayTree, Batch], Outputs]  # predict_fn(params, batch) -> outputs
LossFn = Callable[[Outputs, Batch], jax.Array]  # loss_fn(outputs, batch) -> scalar
Matvec = Callable[[chex.ArrayTree], chex.ArrayTree]
CurvatureBatch = int | float | Callable[[Batch], Batch] | None


def output_curvature(loss_fn: LossFn, outputs: Outputs, batch: Batch) -> Matvec:
    """Returns the product with ``H_l``, the Hessian of the loss with respect to the outputs.

    A loss with a method ``curvature(outputs, batch) -> matvec`` (every loss of
    :mod:`mlhf_optax.losses`) answers in closed form; any other loss is differentiated twice.

    Args:
      loss_fn: ``loss_fn(outputs, batch) -> scalar``, convex in ``outputs``.
      outputs: pytree of arrays, the point at which the curvature is taken.
      batch: the batch that the outputs belong to.

    Returns:
      A linear function from and to pytrees shaped like ``outputs``.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = lambda z, batch: jnp.sum(z**4)
      >>> output_curvature(loss, jnp.array([1.0, 2.0]), None)(jnp.ones(2))
      Array([12., 48.], dtype=float32)
    """
    closed_form = getattr(loss_fn, "curvature", None)
    if closed_form is not None:
        return closed_form(outputs, batch)
    return jax.linearize(jax.grad(lambda z: loss_fn(z, batch)), outputs)[1]


def ggn_matvec(predict_fn: PredictFn, loss_fn: LossFn, params: chex.ArrayTree, batch: Batch) -> Matvec:
    """Linearizes the model once and returns ``v -> G v`` for the GGN ``G = J^T H_l J``.

    The result is linear and symmetric positive semidefinite when the loss is convex, can be used
    under ``jit``, ``vmap`` and inside ``lax`` loops, and its derivative with respect to ``v`` is
    again a GGN product: no second derivative of the model is ever taken (paper, section 3.1).

    Args:
      predict_fn: ``predict_fn(params, batch) -> outputs``, any pytree of arrays of any shape.
      loss_fn: ``loss_fn(outputs, batch) -> scalar``, convex in ``outputs``.
      params: pytree of arrays, the point at which the matrix is taken.
      batch: whatever ``predict_fn`` and ``loss_fn`` understand.

    Returns:
      A function from and to pytrees shaped like ``params``.

    Raises:
      ValueError: if ``params`` has no array leaves or ``loss_fn`` does not return a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> predict = lambda w, batch: batch["x"] @ w
      >>> square = lambda z, batch: 0.5 * jnp.sum((z - batch["y"]) ** 2)
      >>> batch = {"x": jnp.array([[1.0, 2.0], [0.0, 1.0]]), "y": jnp.zeros(2)}
      >>> matvec = ggn_matvec(predict, square, jnp.zeros(2), batch)  # G = x^T x
      >>> matvec(jnp.array([1.0, 0.0]))
      Array([1., 2.], dtype=float32)
    """
    return loss_and_ggn(predict_fn, loss_fn, params, batch)[1]


def loss_and_ggn(
    predict_fn: PredictFn, loss_fn: LossFn, params: chex.ArrayTree, batch: Batch
) -> tuple[jax.Array, Matvec]:
    """Returns the loss at ``params``, which the linearization has the outputs for, and :func:`ggn_matvec`."""
    if not jax.tree.leaves(params):
        raise ValueError("`params` has no arrays, so there is no curvature to take; pass parameters")
    outputs, push_forward = jax.linearize(lambda p: predict_fn(p, batch), params)
    _check_scalar_loss(loss_fn, outputs, batch)
    pull_back = jax.linear_transpose(push_forward, params)
    curvature = output_curvature(loss_fn, outputs, batch)

    def matvec(vector: chex.ArrayTree) -> chex.ArrayTree:
        # v -> J v -> H_l J v -> J^T H_l J v
        return pull_back(curvature(push_forward(vector)))[0]

    return loss_fn(outputs, batch), matvec


def curvature_subset(predict_fn: PredictFn, params: chex.ArrayTree, batch: Batch, part: CurvatureBatch):
    """Returns the part of ``batch`` on which curvature is taken: its first examples.

    Mini-batches are drawn at random, so their first examples are a random sample. The number of
    examples ``B`` is the leading dimension of the outputs; every leaf of ``batch`` with that
    leading dimension is cut, every other leaf (model state, keys) is kept whole. Where that rule
    does not fit, pass a function of the batch.

    Args:
      predict_fn: ``predict_fn(params, batch) -> outputs``; only its output shape is used.
      params: parameters for ``predict_fn``.
      batch: pytree of arrays.
      part: ``None`` (whole batch), a number of examples (``int`` >= 1), a fraction (``float`` in
        (0, 1]) or a function ``batch -> smaller batch``.

    Returns:
      The smaller batch.

    Raises:
      TypeError: if ``part`` is of another type.
      ValueError: if ``part`` is out of range or the number of examples cannot be told.

    Example:
      >>> import jax.numpy as jnp
      >>> predict = lambda w, batch: batch["x"] @ w
      >>> batch = {"x": jnp.ones((8, 2)), "state": jnp.ones(3)}
      >>> small = curvature_subset(predict, jnp.ones(2), batch, 0.25)
      >>> small["x"].shape, small["state"].shape
      ((2, 2), (3,))
    """
    check_curvature_batch(part)
    if part is None:
        return batch
    if callable(part):
        return part(batch)
    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(predict_fn, params, batch))]
    leading = {shape[0] if shape else 0 for shape in shapes}
    if len(leading) != 1 or 0 in leading:
        raise ValueError(
            "`curvature_batch_size` needs outputs that share one leading batch dimension, got output "
            f"shapes {shapes}; pass a function `batch -> smaller batch` instead of {part!r}"
        )
    size = leading.pop()
    count = part if isinstance(part, int) else max(1, round(part * size))
    if count > size:
        raise ValueError(
            f"`curvature_batch_size`={part} is larger than the batch of {size} examples; use a "
            "smaller number, a fraction such as 0.25, or None for the whole batch"
        )

    def cut(leaf):
        is_per_example = getattr(leaf, "ndim", 0) > 0 and leaf.shape[0] == size
        return leaf[:count] if is_per_example else leaf

    return jax.tree.map(cut, batch)


def check_curvature_batch(part: CurvatureBatch) -> None:
    """Raises an error that says what is wanted if ``part`` cannot name a part of a batch."""
    if part is None or callable(part):
        return
    if isinstance(part, bool) or not isinstance(part, int | float):
        raise TypeError(
            "`curvature_batch_size` must be None, an int (examples), a float (fraction) or a function "
            f"`batch -> smaller batch`, got {type(part).__name__}"
        )
    if isinstance(part, int) and part < 1:
        raise ValueError(f"`curvature_batch_size` must be at least 1 example, got {part}")
    if isinstance(part, float) and not 0.0 < part <= 1.0:
        raise ValueError(f"`curvature_batch_size` as a fraction must lie in (0, 1], got {part}")


def _check_scalar_loss(loss_fn: LossFn, outputs: Outputs, batch: Batch) -> None:
    shape = jax.eval_shape(loss_fn, outputs, batch)
    if not hasattr(shape, "shape") or shape.shape != ():
        raise ValueError(
            "`loss_fn(outputs, batch)` must return one scalar (reduce over the batch, for example with "
            f"`jnp.mean`), got {shape}"
        )


__all__ = [
    "Batch",
    "CurvatureBatch",
    "LossFn",
    "Matvec",
    "Outputs",
    "PredictFn",
    "check_curvature_batch",
    "curvature_subset",
    "ggn_matvec",
    "output_curvature",
]
