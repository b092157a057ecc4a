"""Martens' Hessian-free optimization with hand-made damping, the baseline that MLHF replaces.

The direction solves ``(G + damping * I) d = g`` by conjugate gradient from zero, without a
preconditioner; the damping is a number, a schedule, or adapted by the Levenberg-Marquardt rule
(:mod:`mlhf_optax.controllers.levenberg_marquardt`).
Source: paper, section 4.2 and table 1, HF(Fixed) and HF(LM); Martens 2010.
"""

import jax
import optax

from mlhf_optax.controllers.levenberg_marquardt import LevenbergMarquardt, levenberg_marquardt
from mlhf_optax.controllers.protocol import Controller
from mlhf_optax.controllers.scheduled import scheduled
from mlhf_optax.curvature import LossFn, PredictFn
from mlhf_optax.curvature_batch import CurvatureBatch, PerExample
from mlhf_optax.damped_step import scale_by_damped_step
from mlhf_optax.model import Model
from mlhf_optax.solvers import Solver, TolerancePCG
from mlhf_optax.support.checks import suggests_arguments
from mlhf_optax.support.placement import AxisName
from mlhf_optax.transforms import chain

Damping = optax.ScalarOrSchedule | LevenbergMarquardt


def scale_by_hessian_free(
    model: Model,
    *,
    damping: Damping = 0.1,
    step_size: optax.ScalarOrSchedule = 1.0,
    num_cg_steps: int = 20,
    tolerance: float | jax.Array = 1e-5,
    early_exit: bool = True,
    solver: Solver | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient g by the Hessian-free direction d, in the sign of the gradient.

    .. math::
      d \approx (J^T H_l J + \lambda I)^{-1} g

    A step whose gradient or direction is not finite, or whose direction is not one of descent,
    gives a zero update and leaves the state as it was, but for counters. With adapted damping
    a step to a loss that is not finite gives a zero update, too, and the damping grows.

    Args:
      model: what is predicted, the loss, and where curvature is taken.
      damping: a number >= 0, an optax schedule of the step, or a :class:`LevenbergMarquardt` rule.
      step_size: the factor, a number or schedule, that later transformations put on the direction;
        only used to measure the reduction ratio at the step that is taken.
      num_cg_steps: largest number of CG steps; each costs a GGN product.
      tolerance: absolute norm of the residual at which CG stops.
      early_exit: leave the CG loop at the tolerance (:class:`mlhf_optax.solvers.TolerancePCG`).
      solver: another solver in the place of CG with these settings, such as
        :class:`mlhf_optax.solvers.Exact`; None for CG.

    Returns:
      A transformation whose ``update(grads, state, params, *, batch)`` needs the batch; its state is a
      :class:`mlhf_optax.DampedStepState` without vectors.

    Raises:
      TypeError: for arguments of a wrong type, and from ``update`` if ``batch`` is missing.
      ValueError: for arguments out of range, missing ``params`` or parameters hidden by a wrapper.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mlhf_optax import Model, SquaredError
      >>> model = Model(lambda w, batch: batch["x"] @ w, SquaredError())
      >>> batch = {"x": jnp.array([[2.0, 0.0], [0.0, 1.0]]), "label": jnp.ones(2)}
      >>> tx = scale_by_hessian_free(model, damping=0.0)
      >>> params = jnp.zeros(2)
      >>> grads = jax.grad(model.loss)(params, batch)
      >>> direction, state = jax.jit(tx.update)(grads, tx.init(params), params, batch=batch)
      >>> direction.round(3)  # minus the way to the minimum of this quadratic
      Array([-0.5, -1. ], dtype=float32)

    References:
      Martens, `Deep learning via Hessian-free optimization
      <https://www.cs.toronto.edu/~jmartens/docs/Deep_HessianFree.pdf>`_, 2010.
    """
    return scale_by_damped_step(
        _controller(damping, step_size, model.curvature_batch_size is None),
        model,
        name="hessian_free",
        solver=TolerancePCG(num_cg_steps, tolerance, early_exit) if solver is None else solver,
    )


@suggests_arguments
def hessian_free(
    learning_rate: optax.ScalarOrSchedule,
    predict_fn: PredictFn,
    loss_fn: LossFn,
    *,
    damping: Damping = 0.1,
    num_cg_steps: int = 20,
    tolerance: float | jax.Array = 1e-5,
    curvature_batch_size: CurvatureBatch = None,
    per_example: PerExample = None,
    axis_name: AxisName = None,
    early_exit: bool = True,
    solver: Solver | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Hessian-free optimization: :func:`scale_by_hessian_free` and the learning rate.

    The defaults are those of the paper's table 1: 20 CG steps, tolerance 1e-5, no preconditioner
    and no momentum. HF(Fixed) is ``damping=0.1``, HF(LM) is ``damping=LevenbergMarquardt()``.

    Args:
      learning_rate: a number or an optax schedule (paper: 1, 0.1, 0.01 or 0.001). The reduction
        ratio of adapted damping is measured for the step of this length.
      predict_fn: the model, with ``loss_fn``, ``curvature_batch_size``, ``per_example`` and ``axis_name``
        those of :class:`mlhf_optax.Model`.
      loss_fn: the loss.
      damping: a number, a schedule or a :class:`LevenbergMarquardt` rule.
      num_cg_steps: largest number of CG steps.
      tolerance: norm of the residual at which CG stops.
      curvature_batch_size: part of the batch for GGN products.
      per_example: what of the batch has one entry per example.
      axis_name: axis along which batches differ.
      early_exit: leave the CG loop at the tolerance.
      solver: another solver in the place of CG.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; call ``update(grads, state, params, batch=batch)``.

    Raises:
      TypeError: from ``update`` if ``batch`` is missing.
      ValueError: as :func:`scale_by_hessian_free`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from mlhf_optax import LevenbergMarquardt, SquaredError
      >>> predict_fn = lambda w, batch: jnp.tanh(batch["x"] @ w)
      >>> batch = {"x": jnp.eye(2), "label": jnp.array([0.5, -0.5])}
      >>> tx = hessian_free(1.0, predict_fn, SquaredError(), damping=LevenbergMarquardt(0.1))
      >>> params = jnp.zeros(2)
      >>> grads = jax.grad(lambda w: SquaredError()(predict_fn(w, batch), batch))(params)
      >>> updates, state = jax.jit(tx.update)(grads, tx.init(params), params, batch=batch)
      >>> state[0].controller["damping"]  # the model could be trusted
      Array(0.06666667, dtype=float32)
    """
    direction = scale_by_hessian_free(
        Model(predict_fn, loss_fn, curvature_batch_size, per_example, axis_name),
        damping=damping,
        step_size=learning_rate,
        num_cg_steps=num_cg_steps,
        tolerance=tolerance,
        early_exit=early_exit,
        solver=solver,
    )
    return chain("hessian_free", direction, optax.scale_by_learning_rate(learning_rate))


def _controller(damping: Damping, step_size: optax.ScalarOrSchedule, is_whole_batch: bool) -> Controller:
    if isinstance(damping, LevenbergMarquardt):
        return levenberg_marquardt(damping, step_size, is_whole_batch)
    is_number = isinstance(damping, int | float) or getattr(damping, "shape", None) == ()
    if not (is_number or callable(damping)):
        raise TypeError(
            "`damping` must be a number, a schedule or a LevenbergMarquardt rule, got "
            f"{type(damping).__name__}"
        )
    return scheduled(damping)
