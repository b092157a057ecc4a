"""The meta-gradient of MLHF, in two passes that its cut points make exact.

The paper stops gradients at w, g, d0 and r0 (section 3.1), so what happens inside step t reaches
the meta-loss only through that step's LSTM outputs, and through time only the LSTM states carry
gradient. Hence

1. a forward scan of T steps runs the optimizer and, at each step, pulls the cotangents of both
   losses back through that step's PCG to the two LSTM outputs. Both share one backward solve, and
   the gradient of ``l_s`` at w[t+1] is the gradient that the next step needs anyway;
2. back-propagation through time runs through the LSTMs alone.

Nothing of the model is kept for a later backward pass: memory grows with T only by a few vectors.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from mlhf_optax.curvature import CurvatureBatch, curvature_subset, ggn_matvec
from mlhf_optax.layer_types import LayerTypesFn, layer_types
from mlhf_optax.meta_params import Inputs, MetaParams, damping_values, run_network
from mlhf_optax.meta_training.learned_optimizer import LearnedOptimizer, MetaGradient, task_loss
from mlhf_optax.meta_training.losses import StepLoss, StepLosses, preconditioner_loss, step_gain
from mlhf_optax.mlhf import Controls, ScaleByMLHFState, damped, mlhf, solve, start_vector
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
    damping_loss_scale: float
    layer_types_fn: LayerTypesFn
    unroll: bool | int
    scan_unroll: bool | int


def mlhf_optimizer(
    learning_rate: float = 1.0,
    *,
    num_cg_steps: int = 4,
    curvature_batch_size: CurvatureBatch = None,
    max_update_ratio: float | None = 0.25,
    update_noise: float = 0.02,
    step_loss: StepLoss = "relative",
    step_loss_epsilon: float = 1e-6,
    damping_loss_scale: float = 10.0,
    layer_types_fn: LayerTypesFn = layer_types,
    unroll: bool | int = True,
    scan_unroll: bool | int = 1,
) -> LearnedOptimizer:
    """Returns MLHF as a learned optimizer for meta-training.

    Args:
      learning_rate: inner learning rate while meta-training.
      num_cg_steps: CG steps K.
      curvature_batch_size: part of the batch for GGN products.
      max_update_ratio: bound on the update, in meta-training as in use (None: no bound, the paper).
      update_noise: each coordinate of an update is multiplied by uniform noise in
        ``[1 - update_noise, 1 + update_noise]``, as in the authors' code (0: none, the paper).
      step_loss: scale of ``l_s^t`` (:func:`mlhf_optax.meta_training.losses.step_gain`);
        ``"difference"`` is the paper's.
      step_loss_epsilon: its epsilon, in units of the loss.
      damping_loss_scale: factor on the gradient of ``l_s`` (authors' code: 10, paper: 1).
      layer_types_fn: layer types of the parameters.
      unroll: unroll the CG loop.
      scan_unroll: unroll the loop over the T steps.

    Returns:
      A :class:`LearnedOptimizer` with the meta-losses ``l_p`` and ``l_s``.

    Example:
      >>> learned = mlhf_optimizer(learning_rate=1.0, step_loss="difference")
      >>> sorted(learned._fields)
      ['build', 'meta_gradient']
    """
    options = Options(
        learning_rate,
        num_cg_steps,
        curvature_batch_size,
        max_update_ratio,
        update_noise,
        step_loss,
        step_loss_epsilon,
        damping_loss_scale,
        layer_types_fn,
        unroll,
        scan_unroll,
    )

    def build(meta_params: MetaParams, task) -> optax.GradientTransformationExtraArgs:
        return mlhf(
            learning_rate,
            meta_params,
            task.predict_fn,
            task.loss_fn,
            num_cg_steps=num_cg_steps,
            curvature_batch_size=curvature_batch_size,
            max_update_ratio=max_update_ratio,
            layer_types_fn=layer_types_fn,
            unroll=unroll,
        )

    return LearnedOptimizer(build, functools.partial(mlhf_meta_gradient, options))


class _Inner(NamedTuple):
    """Carry of the forward scan."""

    params: Any
    state: ScaleByMLHFState
    after_state: Any
    loss: jax.Array
    gradient: chex.ArrayTree


class _Record(NamedTuple):
    """What one step leaves for the second pass."""

    damping_inputs: Inputs
    preconditioner_inputs: Inputs
    is_sound: jax.Array
    cotangents: Controls  # of l_s^t for LSTM_s, of l_p^t for LSTM_p
    l_s: jax.Array
    l_p: jax.Array
    loss: jax.Array


def mlhf_meta_gradient(
    options: Options, meta_params: MetaParams, task, params, opt_state, batches, key
) -> MetaGradient:
    """Returns the gradients of ``l_p`` for LSTM_p and of ``l_s`` for LSTM_s over one unroll."""
    state, *after_state = opt_state
    first = jax.tree.map(lambda x: x[0], batches)
    loss, gradient = jax.value_and_grad(functools.partial(task_loss, task))(params, first)
    inner = _Inner(params, state, tuple(after_state), loss, gradient)
    batch_pairs = (jax.tree.map(lambda x: x[:-1], batches), jax.tree.map(lambda x: x[1:], batches))
    num_steps = jax.tree.leaves(batches)[0].shape[0] - 1
    keys = jax.random.split(key, num_steps)
    step = functools.partial(_inner_step, options, meta_params, task)
    last, records = lax.scan(step, inner, (*batch_pairs, keys), unroll=options.scan_unroll)

    weights = jax.nn.softmax(records.l_s)  # equation 5, weights are constants
    scale = lambda weight, tree: jax.tree.map(lambda x: weight.reshape((-1,) + (1,) * (x.ndim - 1)) * x, tree)
    cotangents = Controls(
        scale(options.damping_loss_scale * weights, records.cotangents.damping),
        scale(jnp.full_like(weights, 1.0 / num_steps), records.cotangents.preconditioner),
    )
    types = options.layer_types_fn(params)
    run = functools.partial(_run_networks, types=types, state=state, records=records)
    gradient = jax.vjp(run, meta_params)[1](cotangents)[0]
    meta_losses = {"l_p": jnp.mean(records.l_p), "l_s": jnp.sum(weights * records.l_s)}
    return MetaGradient(
        gradient,
        meta_losses,
        last.params,
        (last.state, *last.after_state),
        jnp.append(records.loss, last.loss),
        optax.tree.norm(last.gradient),
        meta_losses["l_s"],
    )


def _inner_step(options: Options, meta_params: MetaParams, task, inner: _Inner, inputs):
    batch, next_batch, key = inputs
    settings = meta_params.settings
    before = inner.state
    state = before._replace(direction=start_vector(before))
    inner = inner._replace(state=state)
    part = curvature_subset(task.predict_fn, inner.params, batch, options.curvature_batch_size)
    ggn = ggn_matvec(task.predict_fn, task.loss_fn, inner.params, part)
    controls, carries, seen = _run_step_networks(options, meta_params, ggn, inner)
    after = _after_solve(options, inner, key)

    def outcome(controls: Controls):
        solution = solve(
            settings, ggn, inner.gradient, state.direction, controls, options.num_cg_steps, options.unroll
        )
        update, after_state = after(solution.direction)
        l_p = preconditioner_loss(solution.direction, solution.residual, inner.gradient)
        return (l_p, update), (solution, after_state)

    (l_p, update), pull_back, (solution, after_state) = jax.vjp(outcome, controls, has_aux=True)
    descent = jnp.asarray(optax.tree.vdot(solution.direction, inner.gradient))
    is_sound = tree_is_finite((inner.gradient, solution.direction, solution.residual, carries)) & (
        descent > 0
    )
    update = jax.tree.map(lambda u: jnp.where(is_sound, u, jnp.zeros_like(u)), update)
    params = optax.apply_updates(inner.params, update)

    value_and_grad = jax.value_and_grad(functools.partial(task_loss, task))
    next_loss, next_gradient = value_and_grad(params, next_batch)
    same_loss, same_gradient = value_and_grad(params, batch)
    next_before = inner.loss
    if options.step_loss != "difference":
        next_before = task_loss(task, inner.params, next_batch)
    losses = StepLosses(inner.loss, next_before, next_loss, same_loss)
    l_s, by_next, by_same = step_gain(losses, options.step_loss, options.step_loss_epsilon)
    of_update = jax.tree.map(lambda a, b: by_next * a + by_same * b, next_gradient, same_gradient)
    cotangents = _pull_back_both(pull_back, l_p, of_update)
    cotangents = jax.tree.map(lambda c: jnp.where(is_sound, c, jnp.zeros_like(c)), cotangents)

    new = (solution.direction, solution.residual, *carries)
    old = (before.direction, before.residual, state.damping_carry, state.preconditioner_carry)
    direction, residual, s_carry, p_carry = select_tree(is_sound, new, old)
    skipped = state.info.skipped_steps + jnp.logical_not(is_sound).astype(jnp.int32)
    info = state.info._replace(skipped_steps=skipped, descent=descent.astype(jnp.float32))
    state = ScaleByMLHFState(state.count + is_sound, direction, residual, s_carry, p_carry, info)
    record = _Record(*seen, is_sound, cotangents, l_s, l_p, inner.loss)
    return _Inner(params, state, after_state, next_loss, next_gradient), record


def _run_step_networks(options: Options, meta_params: MetaParams, ggn, inner: _Inner):
    """Runs both LSTMs; returns their outputs, carries and what each has seen."""
    settings, state = meta_params.settings, inner.state
    types = options.layer_types_fn(inner.params)
    s_inputs = Inputs(state.direction, state.residual, inner.gradient)
    s_out, s_carry = run_network(meta_params.damping, settings, types, state.damping_carry, s_inputs)
    p_inputs = s_inputs
    if settings.preconditioner_residual == "current":
        a_d0 = damped(ggn, damping_values(settings, s_out, inner.gradient))(state.direction)
        p_inputs = s_inputs._replace(residual=jax.tree.map(jnp.subtract, inner.gradient, a_d0))
    p_out, p_carry = run_network(
        meta_params.preconditioner, settings, types, state.preconditioner_carry, p_inputs
    )
    return Controls(s_out, p_out), (s_carry, p_carry), (s_inputs, p_inputs)


def _after_solve(options: Options, inner: _Inner, key):
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


def _run_networks(meta_params: MetaParams, *, types, state: ScaleByMLHFState, records: _Record) -> Controls:
    """Runs both LSTMs over the T recorded steps; returns their outputs, leaves (T, ...)."""

    def step(carries, record):
        s_inputs, p_inputs, is_sound = record
        settings = meta_params.settings
        s_out, s_carry = run_network(meta_params.damping, settings, types, carries[0], s_inputs)
        p_out, p_carry = run_network(meta_params.preconditioner, settings, types, carries[1], p_inputs)
        return select_tree(is_sound, (s_carry, p_carry), carries), Controls(s_out, p_out)

    carries = (state.damping_carry, state.preconditioner_carry)
    seen = (records.damping_inputs, records.preconditioner_inputs, records.is_sound)
    return lax.scan(step, carries, seen)[1]


__all__ = ["Options", "mlhf_meta_gradient", "mlhf_optimizer"]
