"""Martens' Hessian-free optimization with hand-made damping, the baseline that MLHF replaces.

The direction solves ``(G + damping * I) d = g`` by conjugate gradient from zero, without a
preconditioner; the damping is a number, a schedule, or adapted by the Levenberg-Marquardt rule
(:mod:`mlhf_optax.levenberg_marquardt`).
Source: paper, section 4.2 and table 1, HF(Fixed) and HF(LM); Martens 2010.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlhf_optax.curvature import (
    CurvatureBatch,
    LossFn,
    Matvec,
    PredictFn,
    check_curvature_batch,
    curvature_subset,
    ggn_matvec,
)
from mlhf_optax.layer_types import check_whole_tree
from mlhf_optax.levenberg_marquardt import LevenbergMarquardt, Solution, reduction_ratio
from mlhf_optax.pcg import check_num_steps, pcg, vdot
from mlhf_optax.safeguards import require_batch, require_params, select_tree, tree_is_finite

Damping = optax.ScalarOrSchedule | LevenbergMarquardt


class HessianFreeInfo(NamedTuple):
    """What the last step did, for looking at, never for computing the next one.

    All but ``skipped_steps`` describe the last step that was tried, also if it was skipped.

    Attributes:
      skipped_steps: number of steps so far that moved no parameter because something was not
        finite or the direction was not one of descent.
      descent: <d, g>; positive for a descent direction.
      cg_steps: number of CG steps until the tolerance or the limit.
      cg_residual_norm: norm of ``g - (G + damping) d`` after them.
      reduction_ratio: change of the loss over the change that the quadratic model predicts; 0 if
        the damping is not adapted by it, for then it is not measured.
    """

    skipped_steps: jax.Array  # shape=(), dtype=int32
    descent: jax.Array  # shape=(), dtype=float32
    cg_steps: jax.Array  # shape=(), dtype=int32
    cg_residual_norm: jax.Array  # shape=(), dtype=float32
    reduction_ratio: jax.Array  # shape=(), dtype=float32


class ScaleByHessianFreeState(NamedTuple):
    """State of :func:`scale_by_hessian_free`.

    Attributes:
      count: number of updates, skipped ones included, so that schedules run as in the rest of a
        chain.
      damping_value: the damping that the next step uses if it is adapted, else the one that the
        last step used.
      info: what the last step did.
    """

    count: jax.Array  # shape=(), dtype=int32
    damping_value: jax.Array  # shape=(), dtype=float32
    info: HessianFreeInfo


def scale_by_hessian_free(
    predict_fn: PredictFn,
    loss_fn: LossFn,
    *,
    damping: Damping = 0.1,
    step_size: optax.ScalarOrSchedule = 1.0,
    num_cg_steps: int = 20,
    tolerance: float | jax.Array = 1e-5,
    curvature_batch_size: CurvatureBatch = None,
    early_exit: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient g by the Hessian-free direction d, in the sign of the gradient.

    .. math::
      d \approx (J^T H_l J + \lambda I)^{-1} g

    A step whose gradient or direction is not finite, or whose direction is not one of descent,
    gives a zero update and leaves the state as it was, but for its counters. With adapted damping
    a step to a loss that is not finite gives a zero update, too, and the damping grows.

    Args:
      predict_fn: ``predict_fn(params, batch) -> outputs``, any pytree of arrays.
      loss_fn: ``loss_fn(outputs, batch) -> scalar``, convex in the outputs; the gradients given to
        ``update`` are those of ``loss_fn(predict_fn(params, batch), batch)``.
      damping: a number >= 0, an optax schedule of the step, or a :class:`LevenbergMarquardt` rule.
      step_size: the factor, a number or schedule, that later transformations put on the direction;
        only used to measure the reduction ratio at the step that is taken.
      num_cg_steps: largest number of CG steps; each costs a GGN product.
      tolerance: absolute norm of the residual at which CG stops.
      curvature_batch_size: take GGN products on part of the batch: a number of examples, a
        fraction or a function of the batch (:func:`mlhf_optax.curvature.curvature_subset`).
      early_exit: leave the CG loop at the tolerance. Without it the loop is unrolled and idles to
        its end, which can be differentiated in reverse mode, takes longer to compile, and is
        faster for convolutional networks on CPUs (:func:`mlhf_optax.pcg.pcg`).

    Returns:
      A transformation whose ``update(grads, state, params, *, batch)`` needs the batch.

    Raises:
      TypeError: for arguments of a wrong type, and from ``update`` if ``batch`` is missing.
      ValueError: for arguments out of range, missing ``params`` or parameters hidden by a wrapper.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mlhf_optax import SquaredError
      >>> predict_fn = lambda w, batch: batch["x"] @ w
      >>> batch = {"x": jnp.array([[2.0, 0.0], [0.0, 1.0]]), "label": jnp.ones(2)}
      >>> tx = scale_by_hessian_free(predict_fn, SquaredError(), damping=0.0)
      >>> params = jnp.zeros(2)
      >>> grads = jax.grad(lambda w: SquaredError()(predict_fn(w, batch), batch))(params)
      >>> direction, state = tx.update(grads, tx.init(params), params, batch=batch)
      >>> direction.round(3)  # minus the way to the minimum of this quadratic
      Array([-0.5, -1. ], dtype=float32)

    References:
      Martens, `Deep learning via Hessian-free optimization
      <https://www.cs.toronto.edu/~jmartens/docs/Deep_HessianFree.pdf>`_, 2010.
    """
    _check_arguments(predict_fn, loss_fn, damping, num_cg_steps, tolerance, curvature_batch_size)
    rule = damping if isinstance(damping, LevenbergMarquardt) else None

    def init_fn(params):
        check_whole_tree(params)
        start = rule.initial_damping if rule else _at(damping, 0)
        # Every leaf has a buffer of its own, so that the state may be donated.
        none, nothing = lambda: jnp.zeros((), jnp.int32), lambda: jnp.zeros((), jnp.float32)
        info = HessianFreeInfo(none(), nothing(), none(), nothing(), nothing())
        return ScaleByHessianFreeState(none(), jnp.asarray(start, jnp.float32), info)

    def update_fn(updates, state, params: Any = None, *, batch=None, **extra_args):
        del extra_args
        require_params(params, "hessian_free")
        require_batch(batch, "hessian_free")
        check_whole_tree(params)
        value = state.damping_value if rule else jnp.asarray(_at(damping, state.count), jnp.float32)
        part = curvature_subset(predict_fn, params, batch, curvature_batch_size)
        matvec = _shifted(ggn_matvec(predict_fn, loss_fn, params, part), value)
        solver = {"num_steps": num_cg_steps, "tolerance": tolerance, "early_exit": early_exit}
        direction, residual, cg = pcg(matvec, updates, **solver)
        descent = vdot(direction, updates).astype(jnp.float32)
        is_sound = tree_is_finite((updates, direction, residual)) & (descent > 0)
        ratio, is_taken = jnp.zeros((), jnp.float32), is_sound
        if rule:
            loss = lambda p: loss_fn(predict_fn(p, batch), batch)
            solution = Solution(updates, direction, residual, value)
            ratio, new_loss = reduction_ratio(loss, params, solution, _at(step_size, state.count))
            value = jnp.where(is_sound, rule.adapt(value, ratio), value)
            is_taken = is_sound & jnp.isfinite(new_loss)
        update = select_tree(is_taken, direction, jax.tree.map(jnp.zeros_like, direction))
        skipped = state.info.skipped_steps + jnp.logical_not(is_taken).astype(jnp.int32)
        info = HessianFreeInfo(skipped, descent, cg.steps, cg.residual_norm, ratio)
        count = jnp.asarray(optax.safe_increment(state.count))
        return update, ScaleByHessianFreeState(count, value, info)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def hessian_free(
    learning_rate: optax.ScalarOrSchedule,
    predict_fn: PredictFn,
    loss_fn: LossFn,
    *,
    damping: Damping = 0.1,
    num_cg_steps: int = 20,
    tolerance: float | jax.Array = 1e-5,
    curvature_batch_size: CurvatureBatch = None,
    early_exit: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Hessian-free optimization: :func:`scale_by_hessian_free` and the learning rate.

    The defaults are those of the paper's table 1: 20 CG steps, tolerance 1e-5, no preconditioner
    and no momentum. HF(Fixed) is ``damping=0.1``, HF(LM) is ``damping=LevenbergMarquardt()``.

    Args:
      learning_rate: a number or an optax schedule (paper: 1, 0.1, 0.01 or 0.001). The reduction
        ratio of adapted damping is measured for the step of this length.
      predict_fn: the model, see :func:`scale_by_hessian_free` as for all arguments below.
      loss_fn: the loss.
      damping: a number, a schedule or a :class:`LevenbergMarquardt` rule.
      num_cg_steps: largest number of CG steps.
      tolerance: norm of the residual at which CG stops.
      curvature_batch_size: part of the batch for GGN products.
      early_exit: leave the CG loop at the tolerance.

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
      >>> updates, state = tx.update(grads, tx.init(params), params, batch=batch)
      >>> optax.tree.get(state, "damping_value")  # the model could be trusted
      Array(0.06666667, dtype=float32)
    """
    direction = scale_by_hessian_free(
        predict_fn,
        loss_fn,
        damping=damping,
        step_size=learning_rate,
        num_cg_steps=num_cg_steps,
        tolerance=tolerance,
        curvature_batch_size=curvature_batch_size,
        early_exit=early_exit,
    )
    return optax.chain(direction, optax.scale_by_learning_rate(learning_rate))


def _shifted(ggn: Matvec, shift: jax.Array) -> Matvec:
    return lambda vector: jax.tree.map(lambda gv, v: gv + (shift * v).astype(gv.dtype), ggn(vector), vector)


def _at(value: Any, count: jax.Array | int) -> Any:
    return value(count) if callable(value) else value


def _check_arguments(predict_fn, loss_fn, damping, num_cg_steps, tolerance, curvature_batch_size) -> None:
    for name, function in (("predict_fn", predict_fn), ("loss_fn", loss_fn)):
        if not callable(function):
            raise TypeError(f"`{name}` must be a function, got {type(function).__name__}")
    check_num_steps(num_cg_steps, "num_cg_steps")
    if num_cg_steps < 1:
        raise ValueError("`num_cg_steps` must be at least 1: without a step there is no direction")
    for name, value in (("damping", damping), ("tolerance", tolerance)):
        if isinstance(value, int | float) and not value >= 0:
            raise ValueError(f"`{name}` must be a number >= 0, got {value}")
    is_number = isinstance(damping, int | float) or getattr(damping, "shape", None) == ()
    if not (is_number or callable(damping) or isinstance(damping, LevenbergMarquardt)):
        raise TypeError(
            "`damping` must be a number, a schedule or a LevenbergMarquardt rule, got "
            f"{type(damping).__name__}"
        )
    check_curvature_batch(curvature_batch_size)


__all__ = [
    "HessianFreeInfo",
    "ScaleByHessianFreeState",
    "hessian_free",
    "scale_by_hessian_free",
]
