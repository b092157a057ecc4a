"""Gauss-Newton damped by one constant: the control for everything learned, and good by itself."""

import jax
import optax

from mlhf_optax.controllers.constant import constant
from mlhf_optax.controllers.metrics import Metric
from mlhf_optax.curvature import LossFn, PredictFn
from mlhf_optax.curvature_batch import CurvatureBatch, PerExample
from mlhf_optax.damped_step import scale_by_damped_step
from mlhf_optax.model import Model
from mlhf_optax.solvers import PCG
from mlhf_optax.support.checks import suggests_arguments
from mlhf_optax.support.placement import AxisName
from mlhf_optax.transforms import after_solve, chain


@suggests_arguments
def gauss_newton(
    learning_rate: optax.ScalarOrSchedule,
    predict_fn: PredictFn,
    loss_fn: LossFn,
    *,
    damping: float | jax.Array = 3.0,
    metric: str | Metric = "identity",
    gradient_decay: float | None = None,
    unit_decay: float | None = None,
    num_cg_steps: int = 4,
    curvature_batch_size: CurvatureBatch = None,
    per_example: PerExample = None,
    axis_name: AxisName = None,
    max_growth: float | None = None,
    max_update_ratio: float | None = 0.25,
    momentum: float | None = None,
    weight_decay: float = 0.0,
    unroll: bool | int = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Gauss-Newton whose damping is one constant in the unit ``rms(g) / rms(w0)``.

    .. math::
      d \approx \left(J^T H_l J + x \frac{\operatorname{rms}(g)}{\operatorname{rms}(w_0)} M\right)^{-1} g

    by a few steps of CG from the previous direction. The unit makes one constant x suit networks of any
    width, and lets the damping shrink with the gradient.

    Args:
      learning_rate: a number or an optax schedule; 1 for the whole direction, less for small mini-batches.
      predict_fn: the model, with ``loss_fn``, ``curvature_batch_size``, ``per_example`` and ``axis_name``
        those of :class:`mlhf_optax.Model`.
      loss_fn: the loss.
      damping: the constant x, > 0. From 1 to 3 suits the first hundred steps, 3 to 10 later ones. For
        mini-batches and long trainings the metric ``"kronecker"`` with ``damping=10``,
        ``gradient_decay=0.86``, ``unit_decay=0.98``, ``num_cg_steps=2`` and ``max_growth=1`` was best.
      metric: M (:mod:`mlhf_optax.controllers.metrics`): ``"identity"``, without state; ``"diagonal"``, the
        root of the running mean of squared gradients, one float per parameter; or ``"kronecker"``, factors
        of every matrix as in Shampoo.
      gradient_decay: solve for the running mean of gradients with this decay, against the noise of
        mini-batches (:func:`mlhf_optax.controllers.constant`); None for the gradient of the step.
      unit_decay: keep the unit from following single small gradients; None for none.
      num_cg_steps: CG steps K; the step costs K + 1 GGN products.
      curvature_batch_size: part of the batch for GGN products.
      per_example: what of the batch has one entry per example.
      axis_name: axis along which batches differ.
      max_growth: bound on the direction, with ``max_update_ratio``, ``momentum`` and ``weight_decay`` those
        of :func:`mlhf_optax.transforms.after_solve`.
      max_update_ratio: bound on the update.
      momentum: decay of a running average over updates.
      weight_decay: decoupled weight decay.
      unroll: unroll the CG loop (:func:`mlhf_optax.pcg.pcg`).

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; call ``update(grads, state, params, batch=batch)``.
      Its state has the last direction, one vector more with ``gradient_decay`` and ``momentum``, and that
      of the metric.

    Raises:
      TypeError: for arguments of a wrong type, and from ``update`` if ``batch`` is missing.
      ValueError: for arguments out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from mlhf_optax import SquaredError
      >>> predict_fn = lambda p, batch: batch["x"] @ p
      >>> loss = lambda p: SquaredError()(predict_fn(p, batch), batch)
      >>> batch = {"x": jnp.diag(jnp.array([1.0, 10.0])), "label": jnp.ones(2)}
      >>> params = jnp.full(2, 0.5)
      >>> tx = gauss_newton(1.0, predict_fn, SquaredError(), damping=0.1)
      >>> grads = jax.grad(loss)(params)
      >>> updates, state = jax.jit(tx.update)(grads, tx.init(params), params, batch=batch)
      >>> bool(loss(optax.apply_updates(params, updates)) < loss(params))
      True
    """
    direction = scale_by_damped_step(
        constant(damping, metric, gradient_decay=gradient_decay, unit_decay=unit_decay),
        Model(predict_fn, loss_fn, curvature_batch_size, per_example, axis_name),
        name="gauss_newton",
        solver=PCG(num_cg_steps, unroll),
    )
    after = after_solve(
        learning_rate,
        max_growth=max_growth,
        max_update_ratio=max_update_ratio,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    return chain("gauss_newton", direction, after)
