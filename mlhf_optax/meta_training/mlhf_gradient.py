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
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from mlhf_optax.controls import Inputs, run_network
from mlhf_optax.coordinate_lstm import LayerCarry
from mlhf_optax.curvature import CurvatureBatch
from mlhf_optax.layer_types import LayerTypesFn, layer_types
from mlhf_optax.meta_params import MetaParams, init_meta_params
from mlhf_optax.meta_training.learned_optimizer import LearnedOptimizer, MetaGradient, task_loss
from mlhf_optax.meta_training.losses import StepLoss
from mlhf_optax.meta_training.mlhf_unroll import Inner, Options, Record, inner_step
from mlhf_optax.mlhf import mlhf
from mlhf_optax.mlhf_step import Controls, ScaleByMLHFState
from mlhf_optax.safeguards import select_tree


def mlhf_optimizer(
    learning_rate: float = 1.0,
    *,
    num_cg_steps: int = 4,
    curvature_batch_size: CurvatureBatch = None,
    max_update_ratio: float | None = 0.25,
    update_noise: float = 0.02,
    step_loss: StepLoss = "relative",
    step_loss_epsilon: float = 1e-6,
    same_batch_weight: float = 1.0,
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
      same_batch_weight: weight in it of the gain on the mini-batch of the step itself (paper: 1).
      damping_loss_scale: factor on the gradient of ``l_s`` (authors' code: 10, paper: 1).
      layer_types_fn: layer types of the parameters.
      unroll: unroll the CG loop.
      scan_unroll: unroll the loop over the T steps.

    Returns:
      A :class:`LearnedOptimizer` with the meta-losses ``l_p`` and ``l_s``.

    Example:
      >>> learned = mlhf_optimizer(learning_rate=1.0, step_loss="difference")
      >>> sorted(learned._fields)
      ['build', 'init', 'meta_gradient']
    """
    options = Options(
        learning_rate,
        num_cg_steps,
        curvature_batch_size,
        max_update_ratio,
        update_noise,
        step_loss,
        step_loss_epsilon,
        same_batch_weight,
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

    def init(key, task) -> MetaParams:
        shapes = jax.eval_shape(task.init_fn, jax.random.key(0))
        return init_meta_params(key, layer_types=sorted(set(jax.tree.leaves(layer_types_fn(shapes)))))

    return LearnedOptimizer(build, functools.partial(mlhf_meta_gradient, options), init)


def mlhf_meta_gradient(
    options: Options, meta_params: MetaParams, task, params, opt_state, batches, key
) -> MetaGradient:
    """Returns the gradients of ``l_p`` for LSTM_p and of ``l_s`` for LSTM_s over one unroll."""
    state, *after_state = opt_state
    first = jax.tree.map(lambda x: x[0], batches)
    loss, gradient = jax.value_and_grad(functools.partial(task_loss, task))(params, first)
    inner = Inner(params, state, tuple(after_state), loss, gradient)
    batch_pairs = (jax.tree.map(lambda x: x[:-1], batches), jax.tree.map(lambda x: x[1:], batches))
    num_steps = jax.tree.leaves(batches)[0].shape[0] - 1
    keys = jax.random.split(key, num_steps)
    step = functools.partial(inner_step, options, meta_params, task)
    last, records = lax.scan(step, inner, (*batch_pairs, keys), unroll=options.scan_unroll)

    # Equation 5, weights are constants. A step that was skipped has no say.
    weights = jax.nn.softmax(records.l_s, where=records.has_gain)
    scale = lambda weight, tree: jax.tree.map(lambda x: weight.reshape((-1,) + (1,) * (x.ndim - 1)) * x, tree)
    cotangents = Controls(
        scale(options.damping_loss_scale * weights, records.cotangents.damping),
        scale(jnp.full_like(weights, 1.0 / num_steps), records.cotangents.preconditioner),
    )
    gradient = _pull_back_through_time(
        meta_params, options.layer_types_fn(params), state, records, cotangents
    )
    l_s = jnp.sum(jnp.where(records.has_gain, weights * records.l_s, 0.0))
    meta_losses = {"l_p": jnp.mean(records.l_p), "l_s": jnp.where(jnp.any(records.has_gain), l_s, jnp.nan)}
    return MetaGradient(
        gradient,
        meta_losses,
        last.params,
        (last.state, *last.after_state),
        jnp.append(records.loss, last.loss),
        optax.tree.norm(last.gradient),
        meta_losses["l_s"],
    )


def _pull_back_through_time(
    meta_params: MetaParams, types, state: ScaleByMLHFState, records: Record, cotangents: Controls
) -> Any:
    """Pulls cotangents of the LSTM outputs, leaves (T, ...), back to the weights of both LSTMs."""
    # All parameters of a type as one vector: the program is as large as there are types, not parameters.
    join = functools.partial(_join_types, types)
    join_carry = lambda carry: tuple(LayerCarry(*map(join, layer)) for layer in carry)
    carries = join_carry(state.damping_carry), join_carry(state.preconditioner_carry)
    seen = tuple(Inputs(*map(join, x)) for x in (records.damping_inputs, records.preconditioner_inputs))
    names = {name: name for name in jax.tree.leaves(types)}

    def run(meta: MetaParams) -> Controls:
        def step(carries, record):
            s_inputs, p_inputs, is_sound = record
            s_out, s_carry = run_network(meta.damping, meta.settings, names, carries[0], s_inputs)
            p_out, p_carry = run_network(meta.preconditioner, meta.settings, names, carries[1], p_inputs)
            return select_tree(is_sound, (s_carry, p_carry), carries), Controls(s_out, p_out)

        return lax.scan(step, carries, (*seen, records.is_sound))[1]

    return jax.vjp(run, meta_params)[1](Controls(*map(join, cotangents)))[0]


def _join_types(types: chex.ArrayTree, tree: chex.ArrayTree) -> dict[str, jax.Array]:
    """Joins leaves of shape (L, ...) to one of shape (L, coordinates) a layer type."""
    groups: dict[str, list[jax.Array]] = {}
    for name, leaf in zip(jax.tree.leaves(types), jax.tree.leaves(tree), strict=True):
        groups.setdefault(name, []).append(leaf.reshape(leaf.shape[0], -1))
    return {name: jnp.concatenate(leaves, axis=1) for name, leaves in groups.items()}


__all__ = ["mlhf_meta_gradient", "mlhf_optimizer"]
