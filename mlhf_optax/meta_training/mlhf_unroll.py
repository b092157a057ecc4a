"""The first pass of MLHF's meta-gradient: a step of the optimizer, and what it says of the LSTMs' outputs."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mlhf_optax.controls import Inputs, control_unit, damping_values, run_network
from mlhf_optax.curvature import CurvatureBatch, curvature_subset, ggn_matvec
from mlhf_optax.layer_types import LayerTypesFn
from mlhf_optax.meta_params import MetaParams
from mlhf_optax.meta_training.learned_optimizer import task_loss
from mlhf_optax.meta_training.losses import StepLoss, StepLosses, preconditioner_loss, step_gain
from mlhf_optax.mlhf_step import Controls, ScaleByMLHFState, Solution, damped, solve, start_vector
from mlhf_optax.safeguards import limit_update_ratio, select_tree, tree_is_finite


class Options(NamedTuple):
    """How MLHF is run and judged in meta-training; see :func:`mlhf_optimizer`."""

    learning_rate: Any
    num_cg_steps: int
    curvature_batch_size: CurvatureBatch
    max_update_ratio: float | None
    update_noise: float
    step_loss: StepLoss
    step_loss_epsilon: float
    same_batch_weight: float
    damping_loss_scale: float
    layer_types_fn: LayerTypesFn
    unroll: bool | int
    scan_unroll: bool | int


class Inner(NamedTuple):
    """Carry of the scan over the steps.

    Attributes:
      params: w[t].
      state: state of :func:`mlhf_optax.scale_by_mlhf`.
      after_state: states of what follows it: learning rate, bound.
      loss: l(x[t], w[t]).
      gradient: its gradient, g.
    """

    params: Any
    state: ScaleByMLHFState
    after_state: Any
    loss: jax.Array
    gradient: chex.ArrayTree


class Record(NamedTuple):
    """What one step leaves for the second pass.

    Attributes:
      damping_inputs: what LSTM_s has seen; zeros where the step was skipped, as is all that follows.
      preconditioner_inputs: what LSTM_p has seen.
      is_sound: whether the step was taken.
      has_gain: whether l_s^t is known: the step was taken and the losses after it are finite.
      cotangents: derivative of l_s^t by the outputs of LSTM_s, of l_p^t by those of LSTM_p.
      l_s: l_s^t; means nothing without ``has_gain``.
      l_p: l_p^t.
      loss: l(x[t], w[t]), also where the step was skipped.
    """

    damping_inputs: Inputs
    preconditioner_inputs: Inputs
    is_sound: jax.Array
    has_gain: jax.Array
    cotangents: Controls
    l_s: jax.Array
    l_p: jax.Array
    loss: jax.Array


class _Judged(NamedTuple):
    """What the losses after a step say of it."""

    l_s: jax.Array
    of_update: chex.ArrayTree  # derivative of l_s^t by the update
    next_loss: jax.Array
    next_gradient: chex.ArrayTree


def inner_step(options: Options, meta_params: MetaParams, task, inner: Inner, inputs) -> tuple[Inner, Record]:
    """Takes a step as the optimizer does, and pulls both meta-losses back to the LSTMs' outputs.

    Args:
      options: how MLHF is run and judged.
      meta_params: the LSTMs.
      task: the task.
      inner: where the training is.
      inputs: mini-batches t and t + 1, and a random key.

    Returns:
      Where the training is after the step, and what the second pass needs.
    """
    batch, next_batch, key = inputs
    before = inner.state
    inner = inner._replace(state=before._replace(direction=start_vector(before)))
    part = curvature_subset(task.predict_fn, inner.params, batch, options.curvature_batch_size)
    ggn = ggn_matvec(task.predict_fn, task.loss_fn, inner.params, part)
    settings = meta_params.settings
    unit = control_unit(settings, inner.gradient, before.parameter_size)
    controls, carries, seen = _run_step_networks(options, meta_params, ggn, unit, inner)
    after, start = _after_solve(options, inner, key), inner.state.direction

    def outcome(controls: Controls):
        solution = solve(
            settings, ggn, inner.gradient, start, controls, unit, options.num_cg_steps, options.unroll
        )
        update, after_state = after(solution.direction)
        l_p = preconditioner_loss(solution.direction, solution.residual, inner.gradient)
        return (l_p, update), (solution, after_state)

    (l_p, update), pull_back, (solution, after_state) = jax.vjp(outcome, controls, has_aux=True)
    state, is_sound = _next_state(before, inner.gradient, solution, carries)
    params = optax.apply_updates(inner.params, _zero_unless(is_sound, update))

    judged = _judge(options, task, inner, params, batch, next_batch)
    has_gain = is_sound & tree_is_finite((judged.l_s, judged.of_update))
    cotangents = _pull_back_both(pull_back, l_p, judged.of_update)
    cotangents = Controls(
        _zero_unless(has_gain, cotangents.damping), _zero_unless(is_sound, cotangents.preconditioner)
    )
    # A number that is not finite would make NaN of the zero cotangents in the second pass.
    s_inputs, p_inputs = _zero_unless(is_sound, seen)
    l_p = jnp.where(is_sound, l_p, 0.0)
    record = Record(s_inputs, p_inputs, is_sound, has_gain, cotangents, judged.l_s, l_p, inner.loss)
    return Inner(params, state, after_state, judged.next_loss, judged.next_gradient), record


def _next_state(before: ScaleByMLHFState, gradient: chex.ArrayTree, solution: Solution, carries):
    """Returns the state after the step, and whether the step is sound: as in use, else it is skipped."""
    descent = jnp.asarray(optax.tree.vdot(solution.direction, gradient))
    new = (solution.direction, solution.residual, *carries)
    is_sound = tree_is_finite((gradient, new)) & (descent > 0)
    old = (before.direction, before.residual, before.damping_carry, before.preconditioner_carry)
    skipped = before.info.skipped_steps + jnp.logical_not(is_sound).astype(jnp.int32)
    info = before.info._replace(skipped_steps=skipped, descent=descent.astype(jnp.float32))
    direction, residual, s_carry, p_carry = select_tree(is_sound, new, old)
    after = before._replace(
        count=before.count + is_sound,
        direction=direction,
        residual=residual,
        damping_carry=s_carry,
        preconditioner_carry=p_carry,
        info=info,
    )
    return after, is_sound


def _judge(options: Options, task, inner: Inner, params, batch, next_batch) -> _Judged:
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


def _run_step_networks(options: Options, meta_params: MetaParams, ggn, unit, inner: Inner):
    """Runs both LSTMs; returns their outputs, carries and what each has seen."""
    settings, state = meta_params.settings, inner.state
    types = options.layer_types_fn(inner.params)
    s_inputs = Inputs(state.direction, state.residual, inner.gradient)
    s_out, s_carry = run_network(meta_params.damping, settings, types, state.damping_carry, s_inputs)
    p_inputs = s_inputs
    if settings.preconditioner_residual == "current":
        a_d0 = damped(ggn, damping_values(settings, s_out, unit))(state.direction)
        p_inputs = s_inputs._replace(residual=jax.tree.map(jnp.subtract, inner.gradient, a_d0))
    p_out, p_carry = run_network(
        meta_params.preconditioner, settings, types, state.preconditioner_carry, p_inputs
    )
    return Controls(s_out, p_out), (s_carry, p_carry), (s_inputs, p_inputs)


def _after_solve(options: Options, inner: Inner, key):
    """Returns what turns a direction into an update: learning rate, noise, bound."""
    leaves, treedef = jax.tree.flatten(inner.params)
    noise = treedef.unflatten(
        1.0 + options.update_noise * jax.random.uniform(k, leaf.shape, leaf.dtype, -1.0, 1.0)
        for k, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
    )
    parts = [optax.scale_by_learning_rate(options.learning_rate)]
    if options.max_update_ratio is not None:
        parts.append(limit_update_ratio(options.max_update_ratio))

    def after(direction: chex.ArrayTree):
        update, states = direction, []
        for part, part_state in zip(parts, inner.after_state, strict=True):
            update, part_state = part.update(update, part_state, inner.params)
            states.append(part_state)
        if options.update_noise:
            update = jax.tree.map(jnp.multiply, update, noise)
        return update, tuple(states)

    return after


def _pull_back_both(pull_back, l_p: jax.Array, of_update: chex.ArrayTree) -> Controls:
    """Pulls both losses' cotangents back through one batched backward solve."""
    pair = lambda first, second: jnp.stack([first, second])
    of_l_p = pair(jnp.ones_like(l_p), jnp.zeros_like(l_p))
    of_updates = jax.tree.map(lambda u: pair(jnp.zeros_like(u), u), of_update)
    both = jax.vmap(pull_back)((of_l_p, of_updates))[0]
    return Controls(
        jax.tree.map(lambda x: x[1], both.damping), jax.tree.map(lambda x: x[0], both.preconditioner)
    )


def _zero_unless(condition: jax.Array, tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.where(condition, x, jnp.zeros_like(x)), tree)


__all__ = ["Inner", "Options", "Record", "inner_step"]
