"""The meta-gradient of MLHF, in two passes that its cut points make exact.

The paper stops gradients at w, g, d0 and r0 (section 3.1). What happens inside step t therefore reaches the
meta-loss only through that step's LSTM outputs, and only the LSTM states carry gradient through time. Hence

1. a forward scan of T steps runs the optimizer and, at each step, pulls the cotangents of both losses back
   through that step's PCG to the two LSTM outputs. Both losses share one backward solve, and the gradient of
   ``l_s`` at w[t+1] is the gradient that the next step needs anyway;
2. back-propagation through time runs through the LSTMs alone.

Nothing of the model is kept for a later backward pass: memory grows with T by a few vectors only.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from mlhf_optax.controllers.coordinate_lstm import (
    Carries,
    MetaParams,
    Outputs,
    coordinate_lstm,
    init_meta_params,
    run_network,
)
from mlhf_optax.controllers.lstm import LayerCarry
from mlhf_optax.controllers.lstm_settings import Inputs
from mlhf_optax.meta_training.interface import LearnedOptimizer, MetaGradient, task_loss
from mlhf_optax.meta_training.unrolled.mlhf_unroll import Inner, StepTrace, UnrollOptions, inner_step
from mlhf_optax.mlhf import mlhf
from mlhf_optax.support import trees
from mlhf_optax.support.layer_types import layer_types


def mlhf_optimizer(learning_rate: float = 1.0, **options: Any) -> LearnedOptimizer:
    """Returns MLHF as a learned optimizer for meta-training.

    Args:
      learning_rate: inner learning rate while meta-training.
      **options: other fields of :class:`mlhf_optax.meta_training.UnrollOptions`: CG steps, curvature batch,
        bound and noise on the update, the scale of the meta-losses.

    Returns:
      A :class:`LearnedOptimizer` with the meta-losses ``l_p`` and ``l_s``.

    Raises:
      TypeError: for an unknown option.

    Example:
      >>> learned = mlhf_optimizer(learning_rate=1.0, step_loss="difference")
      >>> sorted(learned._fields)
      ['build', 'init', 'meta_gradient']
    """
    chosen = UnrollOptions(learning_rate, **options)
    types_of = chosen.layer_types_fn or layer_types

    def build(meta_params: MetaParams, task) -> optax.GradientTransformationExtraArgs:
        return mlhf(
            meta_params,
            task.predict_fn,
            task.loss_fn,
            learning_rate=learning_rate,
            num_cg_steps=chosen.num_cg_steps,
            curvature_batch_size=chosen.curvature_batch_size,
            per_example=chosen.per_example,
            max_update_ratio=chosen.max_update_ratio,
            layer_types_fn=chosen.layer_types_fn,
            unroll=chosen.unroll,
        )

    def init(key, task) -> MetaParams:
        types = types_of(jax.eval_shape(task.init_fn, jax.random.key(0)))
        return init_meta_params(key, layer_types=sorted(set(jax.tree.leaves(types))))

    return LearnedOptimizer(build, functools.partial(mlhf_meta_gradient, chosen), init)


def mlhf_meta_gradient(
    options: UnrollOptions, meta_params: MetaParams, task, params, opt_state, batches, key
) -> MetaGradient:
    """Returns the gradients of ``l_p`` for LSTM_p and of ``l_s`` for LSTM_s over one unroll."""
    state, after_state = opt_state
    first = jax.tree.map(lambda x: x[0], batches)
    loss, gradient = jax.value_and_grad(functools.partial(task_loss, task))(params, first)
    inner = Inner(params, state, after_state, loss, gradient)
    batch_pairs = (jax.tree.map(lambda x: x[:-1], batches), jax.tree.map(lambda x: x[1:], batches))
    num_steps = jax.tree.leaves(batches)[0].shape[0] - 1
    keys = jax.random.split(key, num_steps)
    controller = coordinate_lstm(meta_params, layer_types_fn=options.layer_types_fn)
    step = functools.partial(inner_step, options, controller, task)
    last, traces = lax.scan(step, inner, (*batch_pairs, keys))

    # Equation 5; the weights are constants. A step that was skipped has no weight.
    weights = jax.nn.softmax(traces.l_s, where=traces.has_gain)
    scale = lambda weight, tree: jax.tree.map(lambda x: weight.reshape((-1,) + (1,) * (x.ndim - 1)) * x, tree)
    cotangents = Outputs(
        scale(options.damping_loss_scale * weights, traces.cotangents.damping),
        scale(jnp.full_like(weights, 1.0 / num_steps), traces.cotangents.preconditioner),
    )
    types = (options.layer_types_fn or layer_types)(params)
    gradient = _pull_back_through_time(meta_params, types, state.controller, traces, cotangents)
    l_s = jnp.sum(jnp.where(traces.has_gain, weights * traces.l_s, 0.0))
    meta_losses = {"l_p": jnp.mean(traces.l_p), "l_s": jnp.where(jnp.any(traces.has_gain), l_s, jnp.nan)}
    return MetaGradient(
        gradient,
        meta_losses,
        last.params,
        (last.state, last.after_state),
        jnp.append(traces.loss, last.loss),
        optax.tree.norm(last.gradient),
    )


def _pull_back_through_time(
    meta_params: MetaParams, types, carries: Carries, traces: StepTrace, cotangents: Outputs
) -> Any:
    """Pulls cotangents of the LSTM outputs, leaves (T, ...), back to the weights of both LSTMs."""
    # All parameters of a type as one vector: the program is as large as there are types, not parameters.
    join = functools.partial(_join_types, types)
    join_carry = lambda carry: tuple(LayerCarry(*map(join, layer)) for layer in carry)
    start = Carries(*map(join_carry, carries))
    seen = tuple(Inputs(*map(join, x)) for x in (traces.damping_inputs, traces.preconditioner_inputs))
    names = {name: name for name in jax.tree.leaves(types)}

    def run(meta: MetaParams) -> Outputs:
        def step(carries, trace):
            s_inputs, p_inputs, is_taken = trace
            s_out, s_carry = run_network(meta.damping, meta.settings, names, carries.damping_carry, s_inputs)
            p_out, p_carry = run_network(
                meta.preconditioner, meta.settings, names, carries.preconditioner_carry, p_inputs
            )
            return trees.select(is_taken, Carries(s_carry, p_carry), carries), Outputs(s_out, p_out)

        return lax.scan(step, start, (*seen, traces.is_taken))[1]

    return jax.vjp(run, meta_params)[1](Outputs(*map(join, cotangents)))[0]


def _join_types(types: chex.ArrayTree, tree: chex.ArrayTree) -> dict[str, jax.Array]:
    """Joins leaves of shape (L, ...) to one of shape (L, coordinates) a layer type."""
    groups: dict[str, list[jax.Array]] = {}
    for name, leaf in zip(jax.tree.leaves(types), jax.tree.leaves(tree), strict=True):
        groups.setdefault(name, []).append(leaf.reshape(leaf.shape[0], -1))
    return {name: jnp.concatenate(leaves, axis=1) for name, leaves in groups.items()}
