"""The first pass of MLHF's meta-gradient: a step of the optimizer, and the cotangents of LSTM outputs."""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mlhf_optax.controllers.coordinate_lstm import Outputs
from mlhf_optax.controllers.lstm_settings import Inputs
from mlhf_optax.controllers.protocol import Controller
from mlhf_optax.curvature_batch import CurvatureBatch, PerExample
from mlhf_optax.damped_step import DampedStepState, damped_step, linearize
from mlhf_optax.meta_training.interface import task_loss
from mlhf_optax.meta_training.unrolled.mlhf_losses import (
    STEP_LOSSES,
    StepLoss,
    StepLosses,
    preconditioner_loss,
    step_gain,
)
from mlhf_optax.model import Model
from mlhf_optax.solvers import PCG
from mlhf_optax.support import checks, trees
from mlhf_optax.support.layer_types import LayerTypesFn
from mlhf_optax.transforms import after_solve


@dataclasses.dataclass(frozen=True)
class UnrollOptions:
    """How MLHF is run and judged in meta-training.

    Args:
      learning_rate: inner learning rate while meta-training.
      num_cg_steps: CG steps K.
      curvature_batch_size: part of the batch for GGN products.
      per_example: what of the batch has one entry per example (:func:`mlhf_optax.mlhf`).
      max_update_ratio: bound on the update, in meta-training as in use (None: no bound, the paper).
      update_noise: each coordinate of an update is multiplied by uniform noise in
        ``[1 - update_noise, 1 + update_noise]``, as in the authors' code (0: none, the paper).
      step_loss: scale of ``l_s^t`` (:func:`mlhf_optax.meta_training.unrolled.mlhf_losses.step_gain`);
        ``"difference"`` is the paper's.
      step_loss_epsilon: its epsilon, in units of the loss.
      same_batch_weight: weight in it of the gain on the mini-batch of the step itself (paper: 1).
      damping_loss_scale: factor on the gradient of ``l_s`` (authors' code: 10, paper: 1).
      layer_types_fn: layer types of the parameters; :func:`mlhf_optax.layer_types` if None.
      unroll: unroll the CG loop.

    Raises:
      ValueError: for a value out of range, naming it.

    Example:
      >>> UnrollOptions().step_loss
      'relative'
    """

    learning_rate: float = 1.0
    num_cg_steps: int = 4
    curvature_batch_size: CurvatureBatch = None
    per_example: PerExample = None
    max_update_ratio: float | None = 0.25
    update_noise: float = 0.02
    step_loss: StepLoss = "relative"
    step_loss_epsilon: float = 1e-6
    same_batch_weight: float = 1.0
    damping_loss_scale: float = 10.0
    layer_types_fn: LayerTypesFn | None = None
    unroll: bool | int = True

    def __post_init__(self):
        checks.check_fields(self, checks.SHARE, "update_noise")
        checks.check_fields(
            self, checks.NOT_NEGATIVE, "step_loss_epsilon", "same_batch_weight", "damping_loss_scale"
        )
        checks.check_choice("step_loss", self.step_loss, STEP_LOSSES)

    @property
    def after_solve(self) -> optax.GradientTransformation:
        """What follows the solve."""
        return after_solve(self.learning_rate, max_update_ratio=self.max_update_ratio)


class Inner(NamedTuple):
    """Carry of the scan over the steps.

    Attributes:
      params: w[t].
      state: state of :func:`mlhf_optax.scale_by_mlhf`.
      after_state: state of what follows the solve.
      loss: l(x[t], w[t]).
      gradient: its gradient, g.
    """

    params: Any
    state: DampedStepState
    after_state: Any
    loss: jax.Array
    gradient: chex.ArrayTree


class StepTrace(NamedTuple):
    """What one step leaves for the second pass.

    Attributes:
      damping_inputs: what LSTM_s has seen; zeros where the step was skipped, as is all that follows.
      preconditioner_inputs: what LSTM_p has seen.
      is_taken: whether the step was taken.
      has_gain: whether l_s^t is known: the step was taken and the losses after it are finite.
      cotangents: derivative of l_s^t by the outputs of LSTM_s, of l_p^t by those of LSTM_p.
      l_s: l_s^t; means nothing without ``has_gain``.
      l_p: l_p^t.
      loss: l(x[t], w[t]), also where the step was skipped.
    """

    damping_inputs: Inputs
    preconditioner_inputs: Inputs
    is_taken: jax.Array
    has_gain: jax.Array
    cotangents: Outputs
    l_s: jax.Array
    l_p: jax.Array
    loss: jax.Array


class _Judged(NamedTuple):
    """How a step is judged by the losses after it."""

    l_s: jax.Array
    of_update: chex.ArrayTree  # derivative of l_s^t by the update
    next_loss: jax.Array
    next_gradient: chex.ArrayTree


def inner_step(
    options: UnrollOptions, controller: Controller, task, inner: Inner, inputs
) -> tuple[Inner, StepTrace]:
    """Takes a step as the optimizer does, and pulls both meta-losses back to the LSTMs' outputs.

    Args:
      options: how MLHF is run and judged.
      controller: :func:`mlhf_optax.controllers.coordinate_lstm`.
      task: the task.
      inner: where the training is.
      inputs: mini-batches t and t + 1, and a random key.

    Returns:
      Where the training is after the step, and what the second pass needs.
    """
    # Take the step, and keep how its outcome depends on the LSTMs' outputs.
    batch, next_batch, key = inputs
    model = Model(task.predict_fn, task.loss_fn, options.curvature_batch_size, options.per_example)
    view = linearize(controller, inner.state, model, inner.params, inner.gradient, batch)
    noise = _update_noise(options, inner.params, key)

    def around_solve(solve, signal: Outputs):
        def outcome(signal: Outputs):
            solved = solve(signal)
            direction, residual = solved.solution.direction, solved.solution.residual
            update, after_state = options.after_solve.update(direction, inner.after_state, inner.params)
            l_p = preconditioner_loss(direction, residual, view.gradient)
            return (l_p, noise(update)), (solved, after_state)

        (l_p, update), pull_back, (solved, after_state) = jax.vjp(outcome, signal, has_aux=True)
        return solved, (l_p, update, pull_back, after_state)

    solver = PCG(options.num_cg_steps, options.unroll)
    step = damped_step(controller, solver, view, inner.state, around_solve)
    l_p, update, pull_back, after_state = step.extra
    moves = step.is_taken & trees.is_any_nonzero(step.direction)
    params = optax.apply_updates(inner.params, trees.zero_unless(moves, update))
    after_state = trees.select(
        moves, after_state, inner.after_state
    )  # in use a zero direction changes nothing

    # Judge it by the losses after it.
    judged = _judge(options, task, inner, params, batch, next_batch)
    has_gain = moves & trees.is_finite((judged.l_s, judged.of_update))

    # Pull both losses back.
    cotangents = _pull_back_both(pull_back, l_p, judged.of_update)
    trace = StepTrace(
        # A number that is not finite would make NaN of the zero cotangents in the second pass.
        *trees.zero_unless(moves, step.seen),
        is_taken=step.is_taken,
        has_gain=has_gain,
        cotangents=Outputs(
            trees.zero_unless(has_gain, cotangents.damping),
            trees.zero_unless(moves, cotangents.preconditioner),
        ),
        l_s=judged.l_s,
        l_p=jnp.where(moves, l_p, 0.0),
        loss=inner.loss,
    )
    return Inner(params, step.state, after_state, judged.next_loss, judged.next_gradient), trace


def _update_noise(options: UnrollOptions, params: chex.ArrayTree, key: chex.PRNGKey):
    """Returns the function that multiplies an update by noise."""
    if not options.update_noise:
        return lambda update: update
    draw = lambda leaf, k: (
        1.0 + options.update_noise * jax.random.uniform(k, leaf.shape, leaf.dtype, -1.0, 1.0)
    )
    noise = jax.tree.map(draw, params, optax.tree.split_key_like(key, params))
    return lambda update: jax.tree.map(jnp.multiply, update, noise)


def _judge(options: UnrollOptions, task, inner: Inner, params, batch, next_batch) -> _Judged:
    """Returns l_s^t, and the loss and gradient on the next mini-batch, which the next step needs anyway."""
    value_and_grad = jax.value_and_grad(functools.partial(task_loss, task))
    next_loss, next_gradient = value_and_grad(params, next_batch)
    if options.same_batch_weight:
        same_loss, same_gradient = value_and_grad(params, batch)
    else:  # not needed, and it costs as much as a step of SGD
        same_loss, same_gradient = inner.loss, jax.tree.map(jnp.zeros_like, next_gradient)
    next_before = inner.loss
    if options.step_loss != "difference":
        next_before = task_loss(task, inner.params, next_batch)
    losses = StepLosses(inner.loss, next_before, next_loss, same_loss)
    l_s, by_next, by_same = step_gain(
        losses, options.step_loss, options.step_loss_epsilon, options.same_batch_weight
    )
    of_update = jax.tree.map(lambda a, b: by_next * a + by_same * b, next_gradient, same_gradient)
    return _Judged(l_s, of_update, next_loss, next_gradient)


def _pull_back_both(pull_back, l_p: jax.Array, of_update: chex.ArrayTree) -> Outputs:
    """Pulls both losses' cotangents back through one batched backward solve."""
    pair = lambda first, second: jnp.stack([first, second])
    of_l_p = pair(jnp.ones_like(l_p), jnp.zeros_like(l_p))
    of_updates = jax.tree.map(lambda u: pair(jnp.zeros_like(u), u), of_update)
    both = jax.vmap(pull_back)((of_l_p, of_updates))[0]
    return Outputs(
        jax.tree.map(lambda x: x[1], both.damping), jax.tree.map(lambda x: x[0], both.preconditioner)
    )
