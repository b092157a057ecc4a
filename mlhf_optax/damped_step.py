"""The damped Gauss-Newton step: control, solve, judge, observe, advance. Every optimizer takes this one.

Symbols of the paper and names here: w ``params``, g ``gradient``, d ``direction``, r ``residual``, s and S
``damping``, P ``preconditioner``, A v = G v + S v ``matvec``, K ``num_cg_steps``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mlhf_optax.controllers.protocol import Control, Controller, Observed, Operators, Outcome, View
from mlhf_optax.dense import PackedGGN
from mlhf_optax.model import Model
from mlhf_optax.solvers import PCG, Solution, Solver, System
from mlhf_optax.step_info import StepInfo, initial_info, next_info
from mlhf_optax.support import placement, trees
from mlhf_optax.support.layer_types import check_params, check_whole_tree
from mlhf_optax.transforms import check_by_name, require_batch, require_params


class DampedStepState(NamedTuple):
    """State of :func:`scale_by_damped_step`.

    Attributes:
      count: number of steps that were not skipped.
      direction: d of the last such step, shaped like the parameters, where the next CG starts; empty if CG
        starts from zero. It is zero after a direction that was not one of descent. A stale start may not
        descend, and a skipped step changes nothing else, so full-batch training would repeat it forever;
        from zero CG always descends.
      residual: r of the last such step, if the controller looks at it; else empty.
      controller: state of the controller.
      initial_rms: root mean square of the parameters when the optimizer was initialised.
      info: what the last step did.
    """

    count: jax.Array  # shape=(), dtype=int32
    direction: chex.ArrayTree
    residual: Any
    controller: Any
    initial_rms: jax.Array  # shape=(), at least float32
    info: StepInfo


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


class Solved(NamedTuple):
    """A solution, and the system that it solves.

    Attributes:
      solution: direction and residual.
      operators: damping and preconditioner.
      right_hand_side: b.
    """

    solution: Solution
    operators: Operators
    right_hand_side: chex.ArrayTree


class _Verdict(NamedTuple):
    """What the numbers say of a solution; three flags of shape ().

    Attributes:
      descent: <d, b>.
      is_finite: gradient, direction, residual and the controller's next state are finite.
      is_optimum: the gradient is zero.
      is_sound: all is finite, and d descends or there is nothing to descend.
    """

    descent: jax.Array
    is_finite: jax.Array
    is_optimum: jax.Array
    is_sound: jax.Array


SolveFn = Callable[[Any], Solved]  # solve(signal) -> Solved


def _just_solve(solve: SolveFn, signal: Any) -> tuple[Solved, Any]:
    return solve(signal), None


def init_state(controller: Controller, params: chex.ArrayTree) -> DampedStepState:
    """Returns the state before the first step; each leaf has its own buffer, so that it may be donated."""
    placement.copied_to_mesh_of(params, ())  # an error of its own, where the parameters lie on several meshes
    vector = lambda is_kept: jax.tree.map(placement.zeros_like, params) if is_kept else ()
    state = DampedStepState(
        count=jnp.zeros((), jnp.int32),
        direction=vector(controller.is_warm_started),
        residual=vector(controller.keeps_residual),
        controller=controller.init(params),
        initial_rms=jnp.array(trees.root_mean_square(params)),
        info=initial_info(),
    )
    return placement.copied_to_mesh_of(params, state)


def linearize(
    controller: Controller,
    state: DampedStepState,
    model: Model,
    params: chex.ArrayTree,
    gradient: chex.ArrayTree,
    batch: Any,
) -> View:
    """Linearizes the model at the parameters and returns what the step sees.

    A step with numbers that are not finite is skipped, but still computed, on zeros: otherwise derivatives
    through it would be NaN although nothing of it was used.
    """
    packing = None if controller.packing is None else controller.packing(params)
    pack = (lambda tree: tree) if packing is None else packing.pack
    vector = pack(gradient)
    # A gradient whose square overflows is as bad: no inner product of the solve would be finite.
    is_valid = trees.is_finite([trees.vdot(leaf, leaf) for leaf in jax.tree.leaves(vector)])
    vector, batch = trees.zero_unless(is_valid, vector), _shielded(is_valid, batch)
    loss, ggn = model.linearized(params, batch)
    direction = pack(state.direction) if controller.is_warm_started else jax.tree.map(jnp.zeros_like, vector)
    return View(
        params=pack(params),
        gradient=vector,
        direction=direction,
        residual=pack(state.residual) if controller.keeps_residual else state.residual,
        ggn=ggn if packing is None else PackedGGN(ggn, packing),
        loss=jnp.where(is_valid, loss, jnp.nan),
        loss_at=lambda p: model.loss(p, batch),
        initial_rms=state.initial_rms,
        is_valid=is_valid,
        axis_name=model.axis_name,
        packing=packing,
    )


def _shielded(is_valid: jax.Array, batch: Any) -> Any:
    """Returns the batch, its floating-point numbers zero where the step is not valid."""

    def shield(leaf):
        is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return trees.zero_unless(is_valid, leaf) if is_float else leaf

    return jax.tree.map(shield, batch)


def damped_step(
    controller: Controller,
    solver: Solver,
    view: View,
    state: DampedStepState,
    around_solve: Callable[[SolveFn, Any], tuple[Solved, Any]] = _just_solve,
) -> Step:
    """Takes one step (paper, Algorithm 1).

    A step whose gradient, direction or controller state is not finite, or whose direction is not one of
    descent, gives a zero direction and leaves the state as it was, but for counters and info. At an exact
    optimum, where the gradient is zero, the step is taken and moves nothing.

    Args:
      controller: chooses damping and preconditioner.
      solver: solves the system.
      view: what the step sees, from :func:`linearize`.
      state: the state.
      around_solve: ``around_solve(solve, signal) -> (solved, extra)``, calls ``solve(signal)``;
        meta-training differentiates it here.

    Returns:
      A :class:`Step`.
    """
    control = controller.control(view, state.controller)
    solved, extra = around_solve(lambda signal: _solve(controller, solver, view, signal), control.signal)
    verdict = _judge(view, control, solved)
    observed = _observe(controller, view, state, control, solved, verdict)
    direction, new_state = _advance(controller, view, state, solved, verdict, observed)
    return Step(direction, new_state, observed.is_accepted, control.seen, extra)


def _solve(controller: Controller, solver: Solver, view: View, signal: Any) -> Solved:
    """Solves ``(G + S) d = b``, with S, P and b from the controller's signal."""
    operators = controller.operators(view, signal)
    b = view.gradient if operators.right_hand_side is None else operators.right_hand_side
    system = System(view.ggn, operators, b, view.direction if controller.is_warm_started else None)
    return Solved(solver.solve(system), operators, b)


def _judge(view: View, control: Control, solved: Solved) -> _Verdict:
    """Says whether the direction may be stepped along."""
    solution = solved.solution
    descent = jnp.asarray(trees.vdot(solution.direction, solved.right_hand_side), jnp.float32)
    is_optimum = ~trees.is_any_nonzero(view.gradient)
    # Three numbers witness for all: whatever is not finite in the direction or the residual makes its inner
    # product so, too, and a finite gradient that overflows in a product shows in the norm of the residual.
    witness = control.state if control.finite_witness is None else control.finite_witness
    is_finite = view.is_valid & trees.is_finite((descent, solution.residual_norm, witness))
    return _Verdict(descent, is_finite, is_optimum, is_finite & ((descent > 0) | is_optimum))


def _observe(
    controller: Controller,
    view: View,
    state: DampedStepState,
    control: Control,
    solved: Solved,
    verdict: _Verdict,
) -> Observed:
    """Shows the controller what came of its choice; its state is kept only if the step was sound."""
    solution, is_sound = solved.solution, verdict.is_sound
    b, s_d = solved.right_hand_side, solution.damped
    outcome = Outcome(solution.direction, solution.residual, is_sound, b, s_d)
    return controller.observe(view, outcome, trees.select(is_sound, control.state, state.controller))


def _advance(
    controller: Controller,
    view: View,
    state: DampedStepState,
    solved: Solved,
    verdict: _Verdict,
    observed: Observed,
) -> tuple[chex.ArrayTree, DampedStepState]:
    """Returns the direction that is handed on, zero for a skipped step, and the next state."""
    solution, is_taken = solved.solution, observed.is_accepted
    moves = is_taken & ~verdict.is_optimum
    direction = trees.zero_unless(moves, solution.direction)
    handed_on = _scaled(solved.operators.step_scale, is_taken, direction)
    info = next_info(
        state.info,
        loss=view.loss,
        descent=verdict.descent,
        is_taken=is_taken,
        solution=solution,
        operators=solved.operators,
        observed=observed,
    )
    new_state = state._replace(
        count=jnp.where(is_taken, jnp.asarray(optax.safe_increment(state.count)), state.count),
        controller=observed.state,
        info=info,
    )
    unpack = (lambda vector: vector) if view.packing is None else view.packing.unpack
    if controller.is_warm_started:
        # A start that did not lead down is forgotten: from zero the next CG descends.
        fits = verdict.is_sound | ~verdict.is_finite
        kept = trees.select(is_taken, direction, trees.zero_unless(fits, view.direction))
        new_state = new_state._replace(direction=unpack(kept))
    if controller.keeps_residual:
        residual = trees.select(is_taken, solution.residual, view.residual)
        new_state = new_state._replace(residual=unpack(residual))
    return unpack(handed_on), placement.placed_like(state, new_state)


def _scaled(scale: jax.Array | None, is_taken: jax.Array, direction: chex.ArrayTree) -> chex.ArrayTree:
    """Returns the direction times the controller's rate."""
    if scale is None:
        return direction
    scale = jnp.where(is_taken, scale, 0.0)  # the rate itself may be what was not finite
    return trees.scaled(scale, direction)


def scale_by_damped_step(
    controller: Controller,
    model: Model,
    *,
    name: str = "scale_by_damped_step",
    solver: Solver = PCG(),
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by the direction of a damped step, in the sign of the gradient.

    Mixed precision: norms, inner products and all else that is one number are at least float32, and so are
    the statistics of controllers and metrics. Direction, residual and GGN products have the dtype of the
    parameters. Keep parameters in float32 and let ``predict_fn`` compute in bfloat16, with outputs in float32
    or a loss that sums in float32, as those of the package do. Parameters in bfloat16 work, too, but lose
    small updates in rounding, whatever the optimizer.

    In float16, products below its range are lost, as gradients are. Multiply the loss by ``2**k`` for both,
    in ``loss_fn`` and in what the gradients are taken of: the direction stays the same, for the general
    meta-parameters and :func:`mlhf_optax.gauss_newton` (as long as the root mean square of its gradient is
    above 1e-7). Keep k as it is: residual and running means of the steps before are in its unit. LSTMs per
    coordinate may see absolute sizes, and :func:`mlhf_optax.hessian_free` damps by absolute numbers; both
    need the loss as it is.

    Layers may be recomputed (``nn.remat``) or scanned (``nn.scan``). A scanned one is one tensor, so a
    controller with one answer per tensor has one for all of its layers.

    Args:
      controller: chooses damping and preconditioner (:mod:`mlhf_optax.controllers`).
      model: what is predicted, the loss, and where curvature is taken.
      name: what error messages call the optimizer.
      solver: how the system is solved (:mod:`mlhf_optax.solvers`).

    Returns:
      A transformation whose ``update(grads, state, params, *, batch)`` needs the batch; its state is a
      :class:`DampedStepState`.

    Raises:
      TypeError: for a ``model`` or ``solver`` of another type, and from ``update`` if ``batch`` is missing.
      ValueError: from ``update``, for missing ``params`` or parameters hidden by a wrapper, for an axis that
        is not bound, and for gradients that differ along it.

    Example:
      >>> from mlhf_optax import Model, SquaredError
      >>> from mlhf_optax.controllers import scheduled
      >>> model = Model(lambda w, batch: batch["x"] @ w, SquaredError())
      >>> batch = {"x": jnp.array([[2.0, 0.0], [0.0, 1.0]]), "label": jnp.ones(2)}
      >>> tx = scale_by_damped_step(scheduled(0.0), model)
      >>> params = jnp.zeros(2)
      >>> grads = jax.grad(model.loss)(params, batch)
      >>> tx.update(grads, tx.init(params), params, batch=batch)[0].round(3)
      Array([-0.5, -1. ], dtype=float32)
    """
    if not isinstance(model, Model):
        raise TypeError(
            f"`model` must be a `mlhf_optax.Model`, got {type(model).__name__}; pass "
            "`Model(predict_fn, loss_fn)`"
        )
    if isinstance(solver, type) or not hasattr(solver, "solve"):
        got = f"the class {solver.__name__}" if isinstance(solver, type) else type(solver).__name__
        raise TypeError(
            f"`solver` must be an object such as `PCG(num_steps=4)` or `solvers.Exact()`, got {got}"
        )

    def init_fn(params):
        check_params(params, name)
        return init_state(controller, params)

    def update_fn(updates, state, params: Any = None, *others, batch=None, **extra_args):
        del extra_args
        check_by_name(others, name)
        require_params(params, name)
        require_batch(batch, name)
        check_whole_tree(params)
        placement.check_axis(model.axis_name)
        placement.check_averaged(updates, model.axis_name)
        view = linearize(controller, state, model, params, updates, batch)
        step = damped_step(controller, solver, view, state)
        return step.direction, step.state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
