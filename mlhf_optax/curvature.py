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

from mlhf_optax.support import placement

Batch = Any
Outputs = Any
PredictFn = Callable[[chex.ArrayTree, Batch], Outputs]  # predict_fn(params, batch) -> outputs
LossFn = Callable[[Outputs, Batch], jax.Array]  # loss_fn(outputs, batch) -> scalar
Matvec = Callable[[chex.ArrayTree], chex.ArrayTree]


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

    On several devices use ``jax.jit`` on a global batch sharded over a mesh: the product is then that of
    the whole batch. Where the code runs per device and ``loss_fn`` is the mean over the device's own
    shard, products are *not* averaged as gradients are, and nothing fails. Under ``jax.pmap``, and under
    ``jax.shard_map`` with ``check_vma=False``, each device multiplies by the GGN of its own shard:
    directions differ from device to device, and so do the parameters after the first step. Under
    ``jax.shard_map`` with replicated parameters, JAX sums the product over the n devices, as it does for
    ``jax.grad``: the result is n times the product of the whole batch, n times too much beside an
    averaged gradient. There, a loss that averages over the devices itself, ``lambda z, b:
    jax.lax.pmean(loss(z, b), axis_name)``, gives the gradient and the product of the whole batch.

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
    predict_fn: PredictFn,
    loss_fn: LossFn,
    params: chex.ArrayTree,
    batch: Batch,
    axis_name: placement.AxisName = None,
) -> tuple[jax.Array, Matvec]:
    """Returns the loss at ``params``, which the linearization has the outputs for, and :func:`ggn_matvec`.

    With ``axis_name`` both are means over that mapped axis.
    """
    if not jax.tree.leaves(params):
        raise ValueError("`params` has no arrays, so there is no curvature to take; pass parameters")
    # What differs from device to device has derivatives of its own on each; they are averaged once, below.
    params = placement.mark_varying(params, axis_name)
    outputs, push_forward = jax.linearize(lambda p: predict_fn(p, batch), params)
    _check_scalar_loss(loss_fn, outputs, batch)
    pull_back = jax.linear_transpose(push_forward, params)
    curvature = output_curvature(loss_fn, outputs, batch)

    def matvec(vector: chex.ArrayTree) -> chex.ArrayTree:
        # v -> J v -> H_l J v -> J^T H_l J v
        product = pull_back(curvature(push_forward(placement.mark_varying(vector, axis_name))))[0]
        return placement.mean_over(product, axis_name)

    return placement.mean_over(loss_fn(outputs, batch), axis_name), matvec


def _check_scalar_loss(loss_fn: LossFn, outputs: Outputs, batch: Batch) -> None:
    shape = jax.eval_shape(loss_fn, outputs, batch)
    if not hasattr(shape, "shape") or shape.shape != ():
        raise ValueError(
            "`loss_fn(outputs, batch)` must return one scalar (reduce over the batch, for example with "
            f"`jnp.mean`), got {shape}"
        )
