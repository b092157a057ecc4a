"""Meta-Learning with Hessian-Free (MLHF; Chen, Lu, Fokoue 2018) as an optax gradient transformation."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from mlhf_optax import coordinate_lstm
from mlhf_optax.controls import damping_values, preconditioner_values, root_mean_square
from mlhf_optax.curvature import (
    CurvatureBatch,
    LossFn,
    PredictFn,
    check_curvature_batch,
    curvature_subset,
    ggn_matvec,
)
from mlhf_optax.layer_types import LayerTypesFn, check_whole_tree, layer_types
from mlhf_optax.meta_params import MetaParams, Settings
from mlhf_optax.mlhf_step import MLHFInfo, ScaleByMLHFState, Step, mlhf_step
from mlhf_optax.momentum import average_directions
from mlhf_optax.pcg import check_num_steps
from mlhf_optax.safeguards import (
    decay_weights,
    limit_update_ratio,
    require_batch,
    require_params,
    select_tree,
    tree_is_finite,
)


def scale_by_mlhf(
    meta_params: MetaParams,
    predict_fn: PredictFn,
    loss_fn: LossFn,
    *,
    num_cg_steps: int = 4,
    curvature_batch_size: CurvatureBatch = None,
    layer_types_fn: LayerTypesFn | None = None,
    carry_dtype: Any = "float32",
    unroll: bool | int = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient g by the MLHF direction d, in the sign of the gradient.

    .. math::
      d \approx (J^T H_l J + \operatorname{diag}(s))^{-1} g

    by ``num_cg_steps`` steps of preconditioned conjugate gradient from the previous direction,
    with damping s and preconditioner P from two coordinate-wise LSTMs.

    A step whose gradient, direction or LSTM state is not finite, or whose direction is not one of
    descent, gives a zero update and leaves the state as it was, but for a counter in its ``info``.

    Args:
      meta_params: the LSTMs and their settings, from :func:`mlhf_optax.load_pretrained`,
        :func:`mlhf_optax.init_meta_params` or meta-training.
      predict_fn: ``predict_fn(params, batch) -> outputs``, any pytree of arrays.
      loss_fn: ``loss_fn(outputs, batch) -> scalar``, convex in the outputs; the gradients given to
        ``update`` are those of ``loss_fn(predict_fn(params, batch), batch)``.
      num_cg_steps: CG steps K; the step costs K + 1 GGN products.
      curvature_batch_size: take GGN products on part of the batch: a number of examples, a
        fraction or a function of the batch (:func:`mlhf_optax.curvature.curvature_subset`).
      layer_types_fn: maps the parameters to a tree of layer type names;
        :func:`mlhf_optax.layer_types` if None.
      carry_dtype: dtype in which the LSTM states are stored.
      unroll: unroll the CG loop (:func:`mlhf_optax.pcg.pcg`).

    Returns:
      A transformation whose ``update(grads, state, params, *, batch)`` needs the batch.

    Raises:
      TypeError: from ``update`` if ``batch`` is missing.
      ValueError: for arguments out of range, missing ``params`` or parameters of unknown type.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from mlhf_optax import SquaredError, init_meta_params
      >>> predict_fn = lambda p, batch: batch["x"] @ p["kernel"]
      >>> loss_fn = SquaredError(targets="y")
      >>> batch = {"x": jnp.eye(3), "y": jnp.ones((3, 1))}
      >>> params = {"kernel": jnp.zeros((3, 1))}
      >>> tx = scale_by_mlhf(init_meta_params(jax.random.key(0)), predict_fn, loss_fn)
      >>> grads = jax.grad(lambda p: loss_fn(predict_fn(p, batch), batch))(params)
      >>> direction, state = tx.update(grads, tx.init(params), params, batch=batch)
      >>> bool(optax.tree.vdot(direction, grads) > 0)
      True

    References:
      Chen, Lu, Fokoue, `Meta-Learning with Hessian-Free Approach in Deep Neural Nets Training
      <https://arxiv.org/abs/1805.08462>`_, 2018, Algorithm 1.
    """
    _check_arguments(meta_params, predict_fn, loss_fn, num_cg_steps, curvature_batch_size)
    # Defaults that are not callable: `optax.inject_hyperparams` takes callables for schedules.
    types_of = layer_types_fn or layer_types

    def init_fn(params):
        check_whole_tree(params)
        _check_types(meta_params, types_of(params))
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        carry = lambda: coordinate_lstm.init_carry(params, meta_params.units, carry_dtype)
        # Every leaf has a buffer of its own, so that the state may be donated.
        numbers = (jnp.zeros((), jnp.float32) for _ in MLHFInfo._fields[1:])
        info = MLHFInfo(jnp.zeros((), jnp.int32), *numbers)
        size = root_mean_square(params)
        return ScaleByMLHFState(jnp.zeros((), jnp.int32), zeros(), zeros(), carry(), carry(), size, info)

    def update_fn(updates, state, params: Any = None, *, batch=None, **extra_args):
        del extra_args
        require_params(params, "mlhf")
        require_batch(batch, "mlhf")
        check_whole_tree(params)
        types = types_of(params)
        _check_types(meta_params, types)
        part = curvature_subset(predict_fn, params, batch, curvature_batch_size)
        ggn = ggn_matvec(predict_fn, loss_fn, params, part)
        step = mlhf_step(meta_params, types, ggn, updates, state, num_cg_steps, unroll)
        return _guarded(meta_params.settings, step, updates, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mlhf(
    learning_rate: optax.ScalarOrSchedule,
    meta_params: MetaParams,
    predict_fn: PredictFn,
    loss_fn: LossFn,
    *,
    num_cg_steps: int = 4,
    curvature_batch_size: CurvatureBatch = None,
    max_update_ratio: float | None = 0.25,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    layer_types_fn: LayerTypesFn | None = None,
    carry_dtype: Any = "float32",
    unroll: bool | int = True,
) -> optax.GradientTransformationExtraArgs:
    """The MLHF optimizer: :func:`scale_by_mlhf`, the learning rate and the bound on the update.

    Args:
      learning_rate: a number or an optax schedule. The paper's rule is the batch size in use over
        the batch size of meta-training; the record of shipped meta-parameters says what to use.
      meta_params: see :func:`scale_by_mlhf`, as ``predict_fn``, ``loss_fn``, ``num_cg_steps``,
        ``curvature_batch_size``, ``layer_types_fn``, ``carry_dtype`` and ``unroll``.
      predict_fn: the model.
      loss_fn: the loss.
      num_cg_steps: CG steps.
      curvature_batch_size: part of the batch for GGN products.
      max_update_ratio: bound on the norm of the whole update as a share of the norm of the
        parameters (:func:`mlhf_optax.limit_update_ratio`). The authors' code has this bound at 0.25,
        but only in meta-training; meta-parameters trained under it diverge without it. None for
        the paper's unbounded update.
      momentum: decay of a running average over directions (:func:`mlhf_optax.momentum.average_directions`),
        in [0, 1); 0 for none, as in the paper. Late in a training whose mini-batches are noisy 0.9 lowers
        the loss that a given learning rate can reach.
      weight_decay: decoupled weight decay, added to the direction before the learning rate.
      layer_types_fn: layer types of the parameters.
      carry_dtype: dtype of the LSTM states.
      unroll: unroll the CG loop.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; call ``update(grads, state, params, batch=batch)``.

    Raises:
      TypeError: from ``update`` if ``batch`` is missing.
      ValueError: as :func:`scale_by_mlhf`, and for a ``max_update_ratio`` that is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from mlhf_optax import SquaredError, init_meta_params
      >>> predict_fn = lambda p, batch: batch["x"] @ p["kernel"]
      >>> loss_fn = SquaredError(targets="y")
      >>> batch = {"x": jnp.eye(3), "y": jnp.ones((3, 1))}
      >>> params = {"kernel": jnp.full((3, 1), 0.5)}
      >>> tx = mlhf(1.0, init_meta_params(jax.random.key(0)), predict_fn, loss_fn)
      >>> grads = jax.grad(lambda p: loss_fn(predict_fn(p, batch), batch))(params)
      >>> updates, state = tx.update(grads, tx.init(params), params, batch=batch)
      >>> new = optax.apply_updates(params, updates)
      >>> bool(loss_fn(predict_fn(new, batch), batch) < loss_fn(predict_fn(params, batch), batch))
      True
    """
    parts: list[optax.GradientTransformation] = [
        scale_by_mlhf(
            meta_params,
            predict_fn,
            loss_fn,
            num_cg_steps=num_cg_steps,
            curvature_batch_size=curvature_batch_size,
            layer_types_fn=layer_types_fn,
            carry_dtype=carry_dtype,
            unroll=unroll,
        )
    ]
    if not (isinstance(momentum, int | float) and momentum == 0):
        parts.append(average_directions(momentum))
    if not (isinstance(weight_decay, int | float) and weight_decay == 0):
        parts.append(decay_weights(weight_decay))
    parts.append(optax.scale_by_learning_rate(learning_rate))
    if max_update_ratio is not None:
        parts.append(limit_update_ratio(max_update_ratio))
    return optax.chain(*parts)


def _guarded(settings: Settings, step: Step, gradient: chex.ArrayTree, state: ScaleByMLHFState):
    """Returns update and state of the step, or a zero update and the old state if it is unsound."""
    solution = step.solution
    descent = jnp.asarray(optax.tree.vdot(solution.direction, gradient), jnp.float32)
    new = (solution.direction, solution.residual, step.damping_carry, step.preconditioner_carry)
    is_sound = tree_is_finite((gradient, new)) & (descent > 0)
    old = (state.direction, state.residual, state.damping_carry, state.preconditioner_carry)
    direction, residual, s_carry, p_carry = select_tree(is_sound, new, old)
    update = jax.tree.map(lambda d: jnp.where(is_sound, d, jnp.zeros_like(d)), solution.direction)
    damping = damping_values(settings, step.controls.damping, step.unit)
    preconditioner = preconditioner_values(settings, step.controls.preconditioner, step.unit, damping)
    info = MLHFInfo(
        state.info.skipped_steps + jnp.logical_not(is_sound).astype(jnp.int32),
        descent,
        solution.residual_norm,
        *_min_mean_max(damping),
        *_min_mean_max(preconditioner),
    )
    count = jnp.where(is_sound, optax.safe_increment(state.count), state.count)
    new_state = state._replace(
        count=count,
        direction=direction,
        residual=residual,
        damping_carry=s_carry,
        preconditioner_carry=p_carry,
        info=info,
    )
    return update, new_state


def _min_mean_max(tree: chex.ArrayTree) -> tuple[jax.Array, jax.Array, jax.Array]:
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
    mean = jnp.sum(jnp.stack([jnp.sum(leaf) for leaf in leaves])) / sum(leaf.size for leaf in leaves)
    smallest = jnp.min(jnp.stack([jnp.min(leaf) for leaf in leaves]))
    largest = jnp.max(jnp.stack([jnp.max(leaf) for leaf in leaves]))
    return smallest, mean, largest


def _check_arguments(meta_params, predict_fn, loss_fn, num_cg_steps, curvature_batch_size) -> None:
    if not isinstance(meta_params, MetaParams):
        raise TypeError(
            f"`meta_params` must be a MetaParams, got {type(meta_params).__name__}; get one from "
            "`load_pretrained(name).meta_params` or `init_meta_params(key)`"
        )
    for name, function in (("predict_fn", predict_fn), ("loss_fn", loss_fn)):
        if not callable(function):
            raise TypeError(f"`{name}` must be a function, got {type(function).__name__}")
    check_num_steps(num_cg_steps, "num_cg_steps")
    if num_cg_steps < 1:
        raise ValueError("`num_cg_steps` must be at least 1: without a step there is no direction")
    check_curvature_batch(curvature_batch_size)


def _check_types(meta_params: MetaParams, types: chex.ArrayTree) -> None:
    missing = sorted(set(jax.tree.leaves(types)) - set(meta_params.damping))
    if missing:
        raise ValueError(
            f"the model has parameters of layer types {missing}, but these meta-parameters were trained for "
            f"{list(meta_params.layer_types)}; use meta-parameters that know them, or map the parameters to "
            "a known type with `layer_types_fn=functools.partial(layer_types, "
            "rules={r'regex of the path': type})`"
        )


__all__ = ["mlhf", "scale_by_mlhf"]
