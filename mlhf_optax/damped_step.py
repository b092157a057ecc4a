"""The damped Gauss-Newton step: controls, solve, guard, info. Every optimizer of the library takes this one.

Symbols of the paper and names here: w ``params``, g ``gradient``, d ``direction``, r ``residual``, s and S
``damping``, P ``preconditioner``, A v = G v + S v ``matvec``, K ``num_cg_steps``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mlhf_optax.controllers.protocol import Controller, Operators, Outcome, View
from mlhf_optax.curvature import (
    CurvatureBatch,
    LossFn,
    Matvec,
    PerExample,
    PredictFn,
    check_curvature_batch,
    curvature_subset,
    loss_and_ggn,
)
from mlhf_optax.pcg import check_num_steps, pcg
from mlhf_optax.support import placement, trees
from mlhf_optax.support.layer_types import check_params, check_whole_tree
from mlhf_optax.transforms import require_batch, require_params


class StepInfo(NamedTuple):
    """What the last step did, for looking at: nothing in it is used by the next step.

    All but ``skipped_steps`` and the three numbers after it describe the last step that was tried, skipped
    or not.

    Attributes:
      skipped_steps: number of steps so far that moved no parameter because something was not finite
        or the direction was not one of descent.
      best_loss: lowest ``smoothed_loss`` so far; infinite before the first step.
      smoothed_loss: running mean of ``loss`` (decay 0.9).
      worst_rise: largest ``smoothed_loss`` so far over the ``best_loss`` of that time, at least 1; it stays
        after the training has settled elsewhere. Many times 1 is the mark of a training that blew up although
        every number stayed finite. Losses that are not positive do not count.
      loss: loss on the batch of the GGN products before the step.
      descent: <d, b> for the right-hand side b, which is g for most; positive for a direction of descent.
      cg_steps: number of CG steps that changed the direction.
      cg_residual_norm: norm of ``g - A d`` after them.
      damping_min, damping_mean, damping_max: statistics of the damping over all coordinates.
      preconditioner_min, preconditioner_mean, preconditioner_max: the same for the preconditioner; 1 if
        there is none.
      reduction_ratio: change of the loss over the change that the quadratic model predicts; 0 if the
        damping is not adapted by it, for then it is not measured.
    """

    skipped_steps: jax.Array  # shape=(), dtype=int32
    best_loss: jax.Array  # shape=(), dtype=float32, as all others but cg_steps
    smoothed_loss: jax.Array
    worst_rise: jax.Array
    loss: jax.Array
    descent: jax.Array
    cg_steps: jax.Array  # dtype=int32
    cg_residual_norm: jax.Array
    damping_min: jax.Array
    damping_mean: jax.Array
    damping_max: jax.Array
    preconditioner_min: jax.Array
    preconditioner_mean: jax.Array
    preconditioner_max: jax.Array
    reduction_ratio: jax.Array


class DampedStepState(NamedTuple):
    """State of :func:`scale_by_damped_step`.

    Attributes:
      count: number of steps that were not skipped.
      direction: d of the last such step, shaped like the parameters, where the next CG starts; empty if CG
        starts from zero. It is zero after a direction that was not one of descent: from zero CG always
        descends. From a direction that no longer fits it may not, and as a skipped step leaves all else as it
        was, a training on one batch would try the same step for ever.
      residual: r of the last such step, if the controller looks at it; else empty.
      damped: S d of the last such step, likewise.
      controller: state of the controller.
      initial_rms: root mean square of the parameters when the optimizer was initialised.
      info: what the last step did.
    """

    count: jax.Array  # shape=(), dtype=int32
    direction: chex.ArrayTree
    residual: Any
    damped: Any
    controller: Any
    initial_rms: jax.Array  # shape=(), at least float32
    info: StepInfo


class Solver(NamedTuple):
    """How the system is solved; arguments of :func:`mlhf_optax.pcg.pcg`."""

    num_steps: int = 4
    tolerance: chex.Numeric = 0.0
    early_exit: bool = False
    unroll: bool | int = True


class Solution(NamedTuple):
    """What PCG found.

    Attributes:
      direction: d, shaped like the parameters.
      residual: r = g - A d, shaped like the parameters.
      num_steps: CG steps that changed the direction.
      residual_norm: norm of r.
      operators: damping and preconditioner.
      right_hand_side: what the system was solved for, usually g.
      damped: S d where PCG tells it (:class:`mlhf_optax.controllers.protocol.Outcome`); else empty.
    """

    direction: chex.ArrayTree
    residual: chex.ArrayTree
    num_steps: jax.Array
    residual_norm: jax.Array
    operators: Operators
    right_hand_side: chex.ArrayTree
    damped: Any = ()


class Step(NamedTuple):
    """One damped step.

    Attributes:
      direction: what replaces the gradient; zero if the step is skipped.
      state: the next state.
      is_taken: whether the step is taken, shape ().
      seen: what the controller has seen (:class:`mlhf_optax.controllers.Control`).
      extra: what ``around_solve`` returned beside the solution.
    """

    direction: chex.ArrayTree
    state: DampedStepState
    is_taken: jax.Array
    seen: Any
    extra: Any


SolveFn = Callable[[Any], Solution]  # solve(signal) -> Solution


def _just_solve(solve: SolveFn, signal: Any) -> tuple[Solution, Any]:
    return solve(signal), None


def init_state(controller: Controller, params: chex.ArrayTree) -> DampedStepState:
    """Returns the state before the first step; each leaf has its own buffer, so that it may be donated."""
    placement.on_mesh_of(params, ())  # an error of its own, where the parameters lie on several meshes
    vector = lambda is_kept: jax.tree.map(placement.zeros_like, params) if is_kept else ()
    direction = vector(controller.is_warm_started)
    residual, kept = vector(controller.keeps_residual), vector(controller.keeps_damped)
    info = StepInfo(
        *(jnp.zeros((), jnp.int32 if name in _COUNTS else jnp.float32) for name in StepInfo._fields)
    )
    info = info._replace(best_loss=jnp.full((), jnp.inf, jnp.float32), worst_rise=jnp.ones((), jnp.float32))
    count = jnp.zeros((), jnp.int32)
    rms = jnp.array(trees.root_mean_square(params))
    state = DampedStepState(count, direction, residual, kept, controller.init(params), rms, info)
    return placement.on_mesh_of(params, state)


_COUNTS = ("skipped_steps", "cg_steps")


def linearize(
    controller: Controller,
    state: DampedStepState,
    model: tuple[PredictFn, LossFn],
    params: chex.ArrayTree,
    gradient: chex.ArrayTree,
    batch: Any,
    curvature_batch_size: CurvatureBatch = None,
    per_example: PerExample = None,
    axis_name: placement.AxisName = None,
) -> View:
    """Returns what a step sees; linearizes the model.

    Args:
      controller: says where CG starts.
      state: the state.
      model: ``predict_fn`` and ``loss_fn``.
      params: w.
      gradient: g.
      batch: the batch.
      curvature_batch_size: part of it for GGN products.
      per_example: what of the batch has one entry per example.
      axis_name: mapped axis along which batches differ; loss and products are means over it.

    Returns:
      The view.
    """
    predict_fn, loss_fn = model
    # A step with numbers that are not finite is skipped. It is still computed, on zeros: derivatives through
    # a step would otherwise be NaN although nothing of it was used.
    # A gradient whose square overflows is as bad: no inner product of the solve would be finite.
    is_valid = trees.is_finite([trees.vdot(leaf, leaf) for leaf in jax.tree.leaves(gradient)])
    gradient, batch = trees.zero_unless(is_valid, gradient), _shielded(is_valid, batch)
    part = curvature_subset(predict_fn, params, batch, curvature_batch_size, per_example, loss_fn=loss_fn)
    loss, ggn = loss_and_ggn(predict_fn, loss_fn, params, part, axis_name)
    direction = state.direction if controller.is_warm_started else jax.tree.map(jnp.zeros_like, gradient)
    return View(
        params=params,
        gradient=gradient,
        direction=direction,
        residual=state.residual,
        damped=state.damped,
        ggn=ggn,
        loss=jnp.where(is_valid, loss, jnp.nan),
        loss_at=lambda p: placement.mean_over(loss_fn(predict_fn(p, batch), batch), axis_name),
        initial_rms=state.initial_rms,
        is_valid=is_valid,
        axis_name=axis_name,
    )


def _shielded(is_valid: jax.Array, batch: Any) -> Any:
    """Returns the batch, its floating-point numbers zero where the step is not valid."""

    def shield(leaf):
        is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.where(is_valid, leaf, jnp.zeros_like(leaf)) if is_float else leaf

    return jax.tree.map(shield, batch)


def damped_step(
    controller: Controller,
    solver: Solver,
    view: View,
    state: DampedStepState,
    around_solve: Callable[[SolveFn, Any], tuple[Solution, Any]] = _just_solve,
) -> Step:
    """Takes one step: controls, solve, guard, info (paper, Algorithm 1).

    A step whose gradient, direction or controller state is not finite, or whose direction is not one of
    descent, gives a zero direction and leaves the state as it was, but for counters and info. At an exact
    optimum, where the gradient is zero, the step is taken and moves nothing.

    Args:
      controller: chooses damping and preconditioner.
      solver: how the system is solved.
      view: what the step sees.
      state: the state.
      around_solve: ``around_solve(solve, signal) -> (solution, extra)``, calls ``solve(signal)``;
        meta-training differentiates it here.

    Returns:
      A :class:`Step`.
    """
    control = controller.control(view, state.controller)
    solution, extra = around_solve(lambda signal: _solve(controller, solver, view, signal), control.signal)
    descent = jnp.asarray(trees.vdot(solution.direction, solution.right_hand_side), jnp.float32)
    is_optimum = ~trees.is_any_nonzero(view.gradient)
    # A gradient may be finite and overflow in a product: then nothing was solved, and the norm shows it. A
    # number of the direction or the residual that is not finite makes its inner product so, too.
    checked = control.state if control.finite_witness is None else control.finite_witness
    is_finite = view.is_valid & trees.is_finite((descent, solution.residual_norm, checked))
    is_sound = is_finite & ((descent > 0) | is_optimum)
    kept = trees.select(is_sound, control.state, state.controller)
    b, s_d = solution.right_hand_side, solution.damped
    outcome = Outcome(solution.direction, solution.residual, is_sound, b, s_d)
    observed = controller.observe(view, outcome, kept)
    is_taken = observed.is_accepted
    direction, s_d = trees.zero_unless(is_taken & ~is_optimum, (solution.direction, s_d))
    scale = solution.operators.step_scale
    handed_on = direction
    if scale is not None:
        scale = jnp.where(is_taken, scale, 0.0)  # it may be what was not finite
        handed_on = jax.tree.map(lambda d: (scale * d).astype(d.dtype), direction)
    new_state = state._replace(
        count=jnp.where(is_taken, jnp.asarray(optax.safe_increment(state.count)), state.count),
        controller=observed.state,
        info=_info(state.info, view, solution, descent, is_taken, observed.reduction_ratio),
    )
    # From zero the next CG descends, where it has not from the direction before.
    kept, s_d_kept = trees.zero_unless(is_sound | ~is_finite, (state.direction, state.damped))
    if controller.is_warm_started:
        new_state = new_state._replace(direction=trees.select(is_taken, direction, kept))
    if controller.keeps_residual:
        residual = trees.select(is_taken, solution.residual, state.residual)
        new_state = new_state._replace(residual=residual)
    if controller.keeps_damped:
        new_state = new_state._replace(damped=trees.select(is_taken, s_d, s_d_kept))
    return Step(handed_on, placement.placed_like(state, new_state), is_taken, control.seen, extra)


def _solve(controller: Controller, solver: Solver, view: View, signal: Any) -> Solution:
    """Solves ``(G + S) d = g`` by PCG, with S and P from the controller's signal."""
    operators = controller.operators(view, signal)
    if controller.keeps_damped and operators.damping_after_preconditioner is None:
        raise ValueError(
            "the controller has `keeps_damped=True`, but operators without `damping_after_preconditioner`; "
            "without it no solve tells damping times direction, so give them one, or do not keep it"
        )
    b = view.gradient if operators.right_hand_side is None else operators.right_hand_side
    start = view.direction if operators.start is None else operators.start
    after = operators.damping_after_preconditioner
    direction, residual, info = pcg(
        damped_ggn(view.ggn, operators.damping) if after is None else view.ggn,
        b,
        start if controller.is_warm_started else None,
        shift=None if after is None else operators.damping,
        shift_after_preconditioner=after,
        shifted_x0=operators.damped_start,
        num_steps=solver.num_steps,
        preconditioner=operators.preconditioner,
        tolerance=solver.tolerance,
        early_exit=solver.early_exit,
        unroll=solver.unroll,
    )
    return Solution(direction, residual, info.steps, info.residual_norm, operators, b, info.shifted)


def damped_ggn(ggn: Matvec, damping: Matvec) -> Matvec:
    """Returns ``v -> G v + S v``."""
    return lambda vector: jax.tree.map(jnp.add, ggn(vector), damping(vector))


def _info(before: StepInfo, view: View, solution: Solution, descent, is_taken, reduction_ratio) -> StepInfo:
    loss = jnp.asarray(view.loss, jnp.float32)
    is_first = jnp.isinf(before.best_loss)
    smoothed = jnp.where(is_first, loss, 0.9 * before.smoothed_loss + 0.1 * loss)
    smoothed = jnp.where(jnp.isfinite(loss), smoothed, before.smoothed_loss)
    best = jnp.where(jnp.isfinite(loss), jnp.minimum(before.best_loss, smoothed), before.best_loss)
    is_ratio = jnp.isfinite(best) & (best > 0)
    rise = jnp.where(is_ratio, smoothed / jnp.where(is_ratio, best, 1.0), 1.0)
    preconditioner = solution.operators.preconditioner
    one = (jnp.ones((), jnp.float32),) * 3
    like = view.gradient
    damping = _min_mean_max(solution.operators.damping.values, like)
    preconditioning = one if preconditioner is None else _min_mean_max(preconditioner.values, like)
    return StepInfo(
        skipped_steps=before.skipped_steps + jnp.logical_not(is_taken).astype(jnp.int32),
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
        preconditioner_min=preconditioning[0],
        preconditioner_mean=preconditioning[1],
        preconditioner_max=preconditioning[2],
        reduction_ratio=reduction_ratio,
    )


def _min_mean_max(values: chex.ArrayTree, like: chex.ArrayTree) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Statistics over all coordinates of a tree whose leaves may each stand for a whole tensor."""
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(values)]
    sizes = [leaf.size for leaf in jax.tree.leaves(like)]
    totals = [
        jnp.sum(leaf) * (size // leaf.size) if leaf.size else jnp.zeros(())
        for leaf, size in zip(leaves, sizes, strict=True)
    ]
    mean = jnp.sum(jnp.stack(totals)) / sum(sizes)
    smallest = jnp.min(jnp.stack([jnp.min(leaf) for leaf in leaves]))
    return smallest, mean, jnp.max(jnp.stack([jnp.max(leaf) for leaf in leaves]))


def scale_by_damped_step(
    controller: Controller,
    predict_fn: PredictFn,
    loss_fn: LossFn,
    *,
    name: str = "scale_by_damped_step",
    solver: Solver = Solver(),
    curvature_batch_size: CurvatureBatch = None,
    per_example: PerExample = None,
    axis_name: placement.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by the direction of a damped step, in the sign of the gradient.

    Mixed precision: norms, inner products and all else that is one number are at least float32, and so are
    the statistics of controllers and metrics. Direction, residual and GGN products have the dtype of the
    parameters. Keep parameters in float32 and let ``predict_fn`` compute in bfloat16, with outputs in float32
    or a loss that sums in float32, as those of the package do. Parameters in bfloat16 work, too, but lose
    small updates in rounding, whatever the optimizer.

    In float16 products are lost below its range, as gradients are. Multiply the loss by ``2**k`` for both, in
    ``loss_fn`` and in what the gradients are taken of: the direction is the same, for the general
    meta-parameters and :func:`mlhf_optax.gauss_newton` (as long as the root mean square of its gradient is
    above 1e-7). Keep k as it is: residual and running means of the steps before have its unit. LSTMs per
    coordinate may see absolute sizes, and :func:`mlhf_optax.hessian_free` damps by absolute numbers; both
    need the loss as it is.

    Args:
      controller: chooses damping and preconditioner (:mod:`mlhf_optax.controllers`).
      predict_fn: ``predict_fn(params, batch) -> outputs``, any pytree of arrays.
      loss_fn: ``loss_fn(outputs, batch) -> scalar``, convex in the outputs; the gradients given to
        ``update`` are those of ``loss_fn(predict_fn(params, batch), batch)``.
      name: what error messages call the optimizer.
      solver: how the system is solved.
      curvature_batch_size: take GGN products on part of the batch: a number of examples, a
        fraction or a function of the batch (:func:`mlhf_optax.curvature.curvature_subset`). Under
        ``optax.MultiSteps`` the batch is that of its last call; :func:`mlhf_optax.over_micro_batches` takes
        curvature on all. Layers may be recomputed (``nn.remat``) or scanned (``nn.scan``); a scanned one is
        one tensor, so that a controller with one answer per tensor has one for all of its layers.
      per_example: with a number or a fraction, the names in the batch below which every array has one
        entry per example; None if that is so for all of the batch.
      axis_name: name, or names, of the axis of ``jax.shard_map`` or ``jax.pmap`` along which batches differ.
        Loss and GGN products are averaged over it. The user averages the gradients: under ``pmap`` by
        ``jax.lax.pmean(grads, axis_name)``; ``shard_map`` sums gradients by itself, so there take the
        gradient of ``jax.lax.pmean(loss, axis_name)``. ``loss_fn`` is the mean over the device's own
        examples. Without ``axis_name`` under a mapped axis, every device takes the curvature of its own
        batch, or the sum of all (:func:`mlhf_optax.curvature.ggn_matvec`). Not needed with ``jax.jit``
        on a sharded batch.

    Returns:
      A transformation whose ``update(grads, state, params, *, batch)`` needs the batch.

    Raises:
      TypeError: for arguments of a wrong type, and from ``update`` if ``batch`` is missing.
      ValueError: for arguments out of range, missing ``params`` or parameters hidden by a wrapper, for an
        axis that is not bound, and for gradients that differ along it.

    Example:
      >>> from mlhf_optax import SquaredError
      >>> from mlhf_optax.controllers import scheduled
      >>> predict_fn = lambda w, batch: batch["x"] @ w
      >>> batch = {"x": jnp.array([[2.0, 0.0], [0.0, 1.0]]), "label": jnp.ones(2)}
      >>> tx = scale_by_damped_step(scheduled(0.0), predict_fn, SquaredError())
      >>> params = jnp.zeros(2)
      >>> grads = jax.grad(lambda w: SquaredError()(predict_fn(w, batch), batch))(params)
      >>> tx.update(grads, tx.init(params), params, batch=batch)[0].round(3)
      Array([-0.5, -1. ], dtype=float32)
    """
    for argument, function in (("predict_fn", predict_fn), ("loss_fn", loss_fn)):
        if not callable(function):
            raise TypeError(f"`{argument}` must be a function, got {type(function).__name__}")
    check_num_steps(solver.num_steps, "num_cg_steps")
    if solver.num_steps < 1:
        raise ValueError("`num_cg_steps` must be at least 1: without a step there is no direction")
    if isinstance(solver.tolerance, int | float) and not solver.tolerance >= 0:
        raise ValueError(f"`tolerance` must be a number >= 0, got {solver.tolerance}")
    check_curvature_batch(curvature_batch_size, per_example)

    def init_fn(params):
        check_params(params, name)
        return init_state(controller, params)

    def update_fn(updates, state, params: Any = None, *, batch=None, **extra_args):
        del extra_args
        require_params(params, name)
        require_batch(batch, name)
        check_whole_tree(params)
        placement.check_axis(axis_name)
        placement.check_averaged(updates, axis_name)
        model = (predict_fn, loss_fn)
        view = linearize(
            controller, state, model, params, updates, batch, curvature_batch_size, per_example, axis_name
        )
        step = damped_step(controller, solver, view, state)
        return step.direction, step.state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
