"""Meta-Learning with Hessian-Free (MLHF; Chen, Lu, Fokoue 2018) as an optax gradient transformation."""

from typing import Any

import optax

from mlhf_optax.controllers.coordinate_lstm import MetaParams, coordinate_lstm
from mlhf_optax.controllers.tensor_lstm import TensorLSTM, tensor_lstm
from mlhf_optax.curvature import CurvatureBatch, LossFn, PerExample, PredictFn
from mlhf_optax.damped_step import Solver, scale_by_damped_step
from mlhf_optax.support.layer_types import LayerTypesFn
from mlhf_optax.support.placement import AxisName
from mlhf_optax.transforms import after_solve


def scale_by_mlhf(
    meta_params: TensorLSTM | MetaParams,
    predict_fn: PredictFn,
    loss_fn: LossFn,
    *,
    num_cg_steps: int = 4,
    curvature_batch_size: CurvatureBatch = None,
    per_example: PerExample = None,
    axis_name: AxisName = None,
    schedule: optax.Schedule | None = None,
    layer_types_fn: LayerTypesFn | None = None,
    carry_dtype: Any = "float32",
    unroll: bool | int = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient g by the MLHF direction d, in the sign of the gradient.

    .. math::
      d \approx (J^T H_l J + \operatorname{diag}(s))^{-1} g

    by ``num_cg_steps`` steps of preconditioned conjugate gradient from the previous direction,
    with damping s and preconditioner P from two coordinate-wise LSTMs, or with damping on a learned metric,
    which also preconditions, from one LSTM per tensor.

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
      per_example: with a number or a fraction, names in the batch below which every array has one entry per
        example, such as ``("image", "label")``; None if that is so for all of the batch.
      axis_name: axis of ``jax.shard_map`` or ``jax.pmap`` along which batches differ
        (:func:`mlhf_optax.scale_by_damped_step`); None for ``jax.jit``.
      schedule: the learning rate that follows, if it is a schedule. The general meta-parameters have a rate
        of their own, which falls towards the end of a training. With a schedule it makes room: the product
        of both is the smaller of the learned rate and 1.5 times the schedule.
      layer_types_fn: maps the parameters to a tree of layer type names;
        :func:`mlhf_optax.layer_types` if None.
      carry_dtype: dtype in which the LSTM states are stored.
      unroll: unroll the CG loop (:func:`mlhf_optax.pcg.pcg`).

    Returns:
      A transformation whose ``update(grads, state, params, *, batch)`` needs the batch; its state is a
      :class:`mlhf_optax.DampedStepState`.

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
      >>> meta_params = init_meta_params(jax.random.key(0), layer_types=["dense_kernel"])
      >>> tx = scale_by_mlhf(meta_params, predict_fn, loss_fn, num_cg_steps=2)
      >>> grads = jax.grad(lambda p: loss_fn(predict_fn(p, batch), batch))(params)
      >>> direction, state = jax.jit(tx.update)(grads, tx.init(params), params, batch=batch)
      >>> bool(optax.tree.vdot(direction, grads) > 0)
      True

    References:
      Chen, Lu, Fokoue, `Meta-Learning with Hessian-Free Approach in Deep Neural Nets Training
      <https://arxiv.org/abs/1805.08462>`_, 2018, Algorithm 1.
    """
    if isinstance(meta_params, TensorLSTM):
        controller = tensor_lstm(meta_params, schedule=schedule)
    else:
        controller = coordinate_lstm(meta_params, layer_types_fn=layer_types_fn, carry_dtype=carry_dtype)
    return scale_by_damped_step(
        controller,
        predict_fn,
        loss_fn,
        name="mlhf",
        solver=Solver(num_cg_steps, unroll=unroll),
        curvature_batch_size=curvature_batch_size,
        per_example=per_example,
        axis_name=axis_name,
    )


def mlhf(
    learning_rate: optax.ScalarOrSchedule,
    meta_params: TensorLSTM | MetaParams,
    predict_fn: PredictFn,
    loss_fn: LossFn,
    *,
    num_cg_steps: int = 4,
    curvature_batch_size: CurvatureBatch = None,
    per_example: PerExample = None,
    axis_name: AxisName = None,
    max_growth: float | None = None,
    max_update_ratio: float | None = 0.25,
    momentum: float | None = None,
    weight_decay: float = 0.0,
    layer_types_fn: LayerTypesFn | None = None,
    carry_dtype: Any = "float32",
    unroll: bool | int = True,
) -> optax.GradientTransformationExtraArgs:
    """The MLHF optimizer: :func:`scale_by_mlhf`, the learning rate and the bound on the update.

    Args:
      learning_rate: a number or an optax schedule. The paper's rule is the batch size in use over
        the batch size of meta-training; the record of shipped meta-parameters says what to use. A number
        multiplies the learned rate of the general meta-parameters; a schedule bounds it, as ``schedule`` of
        :func:`scale_by_mlhf`. Under :func:`optax.inject_hyperparams` it is a number, also of a schedule.
      meta_params: see :func:`scale_by_mlhf`, as ``predict_fn``, ``loss_fn``, ``num_cg_steps``,
        ``curvature_batch_size``, ``per_example``, ``layer_types_fn``, ``carry_dtype`` and ``unroll``.
      predict_fn: the model.
      loss_fn: the loss.
      num_cg_steps: CG steps.
      curvature_batch_size: part of the batch for GGN products.
      per_example: what of the batch has one entry per example.
      axis_name: axis of ``jax.shard_map`` or ``jax.pmap`` along which batches differ
        (:func:`mlhf_optax.scale_by_damped_step`); None for ``jax.jit``.
      max_growth: bound on the norm of a direction, as a multiple of what it has typically been lately
        (:func:`mlhf_optax.limit_growth`); None for none, and no state. 1 prevents spikes late in a training.
      max_update_ratio: bound on the norm of the whole update as a share of the norm of the
        parameters (:func:`mlhf_optax.limit_update_ratio`). The authors' code has this bound at 0.25,
        but only in meta-training; meta-parameters trained under it diverge without it. None for
        the paper's unbounded update.
      momentum: decay in [0, 1) of a running average over bounded updates
        (:func:`mlhf_optax.transforms.average_updates`); None for none, as in the paper, and no state. Late in
        a training whose mini-batches are noisy 0.9 lowers the loss that a given learning rate can reach.
      weight_decay: decoupled weight decay, added to the direction before the learning rate.
      layer_types_fn: layer types of the parameters.
      carry_dtype: dtype of the LSTM states.
      unroll: unroll the CG loop.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; call ``update(grads, state, params, batch=batch)``.

    Raises:
      TypeError: from ``update`` if ``batch`` is missing.
      ValueError: as :func:`scale_by_mlhf`, and for a ``max_growth`` or ``max_update_ratio`` that is not
        positive.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from mlhf_optax import SquaredError, init_meta_params
      >>> predict_fn = lambda p, batch: batch["x"] @ p["kernel"]
      >>> loss_fn = SquaredError(targets="y")
      >>> batch = {"x": jnp.eye(3), "y": jnp.ones((3, 1))}
      >>> params = {"kernel": jnp.full((3, 1), 0.5)}
      >>> meta_params = init_meta_params(jax.random.key(0), layer_types=["dense_kernel"])
      >>> tx = mlhf(1.0, meta_params, predict_fn, loss_fn, num_cg_steps=2)
      >>> grads = jax.grad(lambda p: loss_fn(predict_fn(p, batch), batch))(params)
      >>> updates, state = jax.jit(tx.update)(grads, tx.init(params), params, batch=batch)
      >>> new = optax.apply_updates(params, updates)
      >>> bool(loss_fn(predict_fn(new, batch), batch) < loss_fn(predict_fn(params, batch), batch))
      True
    """
    direction = scale_by_mlhf(
        meta_params,
        predict_fn,
        loss_fn,
        num_cg_steps=num_cg_steps,
        curvature_batch_size=curvature_batch_size,
        per_example=per_example,
        axis_name=axis_name,
        schedule=learning_rate if callable(learning_rate) else None,
        layer_types_fn=layer_types_fn,
        carry_dtype=carry_dtype,
        unroll=unroll,
    )
    after = after_solve(
        learning_rate,
        max_growth=max_growth,
        max_update_ratio=max_update_ratio,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    return optax.chain(direction, after)
