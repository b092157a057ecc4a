"""Meta-Learning with Hessian-Free (MLHF; Chen, Lu, Fokoue 2018) as an optax gradient transformation."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import optax

from mlhf_optax.controllers.coordinate_lstm import MetaParams, coordinate_lstm
from mlhf_optax.controllers.protocol import Controller
from mlhf_optax.controllers.tensor_lstm import tensor_lstm
from mlhf_optax.controllers.tensor_network import TensorLSTM
from mlhf_optax.curvature import LossFn, PredictFn
from mlhf_optax.curvature_batch import CurvatureBatch, PerExample
from mlhf_optax.damped_step import scale_by_damped_step
from mlhf_optax.model import Model
from mlhf_optax.solvers import PCG
from mlhf_optax.support.checks import suggests_arguments
from mlhf_optax.support.layer_types import LayerTypesFn
from mlhf_optax.support.placement import AxisName
from mlhf_optax.transforms import after_solve, chain


def scale_by_mlhf(
    meta_params: TensorLSTM | MetaParams,
    model: Model,
    *,
    num_cg_steps: int = 4,
    schedule: optax.Schedule | None = None,
    layer_types_fn: LayerTypesFn | None = None,
    carry_dtype: Any = "float32",
    unroll: bool | int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient g by the MLHF direction d, in the sign of the gradient.

    .. math::
      d \approx (J^T H_l J + S)^{-1} g

    by ``num_cg_steps`` steps of preconditioned conjugate gradient from the previous direction. Damping S and
    preconditioner come from two LSTMs on every coordinate, as in the paper, or from one LSTM on every tensor,
    whose damping is a scale times a learned metric.

    Args:
      meta_params: the LSTMs and their settings, from :func:`mlhf_optax.load_pretrained`,
        :func:`mlhf_optax.init_meta_params` or meta-training.
      model: what is predicted, the loss, and where curvature is taken.
      num_cg_steps: CG steps K; the step costs K + 1 GGN products.
      schedule: the learning rate that follows, if it is a schedule. The general meta-parameters have a rate
        of their own, which falls towards the end of a training. With a schedule it makes room: the product
        of both is the smaller of the learned rate and 1.5 times the schedule.
      layer_types_fn: maps the parameters to a tree of layer type names, for LSTMs on every coordinate;
        :func:`mlhf_optax.layer_types` if None.
      carry_dtype: dtype in which the states of LSTMs on every coordinate are stored.
      unroll: unroll the CG loop (:func:`mlhf_optax.pcg.pcg`); None for models with convolutions alone, which
        XLA on CPUs runs far slower in a loop.

    Returns:
      A transformation whose ``update(grads, state, params, *, batch)`` needs the batch; its state is a
      :class:`mlhf_optax.DampedStepState`. A step that is not finite or does not descend is skipped
      (:func:`mlhf_optax.damped_step.damped_step`).

    Raises:
      TypeError: for arguments of a wrong type, and from ``update`` if ``batch`` is missing.
      ValueError: for arguments out of range, missing ``params`` or parameters of unknown type.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from mlhf_optax import Model, SquaredError, init_meta_params
      >>> model = Model(lambda p, batch: batch["x"] @ p["kernel"], SquaredError(targets="y"))
      >>> batch = {"x": jnp.eye(3), "y": jnp.ones((3, 1))}
      >>> params = {"kernel": jnp.zeros((3, 1))}
      >>> meta_params = init_meta_params(jax.random.key(0), layer_types=["dense_kernel"])
      >>> tx = scale_by_mlhf(meta_params, model, num_cg_steps=2)
      >>> grads = jax.grad(model.loss)(params, batch)
      >>> direction, state = jax.jit(tx.update)(grads, tx.init(params), params, batch=batch)
      >>> bool(optax.tree.vdot(direction, grads) > 0)
      True

    References:
      Chen, Lu, Fokoue, `Meta-Learning with Hessian-Free Approach in Deep Neural Nets Training
      <https://arxiv.org/abs/1805.08462>`_, 2018, Algorithm 1.
    """
    controller = _controller(meta_params, schedule, layer_types_fn, carry_dtype)
    return scale_by_damped_step(controller, model, name="mlhf", solver=PCG(num_cg_steps, unroll))


def _controller(meta_params: Any, schedule: Any, layer_types_fn: Any, carry_dtype: Any) -> Controller:
    """Returns the controller that the meta-parameters belong to."""
    if isinstance(meta_params, MetaParams):
        return coordinate_lstm(meta_params, layer_types_fn=layer_types_fn, carry_dtype=carry_dtype)
    if not isinstance(meta_params, TensorLSTM):
        raise TypeError(
            "`meta_params` must be what `load_pretrained(name).meta_params`, `init_meta_params` or "
            f"meta-training gives, got {type(meta_params).__name__}"
        )
    if layer_types_fn is not None or carry_dtype != "float32":
        raise ValueError(
            "`layer_types_fn` and `carry_dtype` belong to meta-parameters with an LSTM on every coordinate; "
            "these have one on every tensor, of whatever layer, so leave both out"
        )
    return tensor_lstm(meta_params, schedule=schedule)


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _knows_the_old_order(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates :func:`mlhf`, whose first argument was the learning rate: the error says what changed."""

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if len(args) > 3 or (args and "meta_params" in kwargs):
            raise TypeError(
                "the learning rate of `mlhf` is a keyword (it was the first argument): write "
                "`mlhf(meta_params, predict_fn, loss_fn, learning_rate=1.0)`"
            )
        return function(*args, **kwargs)

    return checked


@_knows_the_old_order
@suggests_arguments
def mlhf(
    meta_params: TensorLSTM | MetaParams,
    predict_fn: PredictFn,
    loss_fn: LossFn,
    *,
    learning_rate: optax.ScalarOrSchedule = 1.0,
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
    unroll: bool | int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The MLHF optimizer: :func:`scale_by_mlhf`, the learning rate and the bound on the update.

    Args:
      meta_params: the LSTMs, as ``num_cg_steps``, ``layer_types_fn``, ``carry_dtype`` and ``unroll`` of
        :func:`scale_by_mlhf`.
      predict_fn: the model, with ``loss_fn``, ``curvature_batch_size``, ``per_example`` and ``axis_name``
        those of :class:`mlhf_optax.Model`.
      loss_fn: the loss.
      learning_rate: a number or an optax schedule. A number multiplies the learned rate of the general
        meta-parameters; a schedule bounds it, as ``schedule`` of :func:`scale_by_mlhf`. For LSTMs on every
        coordinate the paper's rule is the batch size in use over that of meta-training; the record of shipped
        meta-parameters says what to use. Under :func:`optax.inject_hyperparams` it is a number, also of a
        schedule.
      num_cg_steps: CG steps.
      curvature_batch_size: part of the batch for GGN products.
      per_example: what of the batch has one entry per example.
      axis_name: axis along which batches differ.
      max_growth: bound on the direction, with ``max_update_ratio``, ``momentum`` and ``weight_decay`` those
        of :func:`mlhf_optax.transforms.after_solve`. The general meta-parameters were trained with 1.
      max_update_ratio: bound on the norm of the update as a share of that of the parameters. The authors'
        code has it at 0.25, but only in meta-training; meta-parameters trained under it diverge without it.
        None for the paper's unbounded update.
      momentum: decay of a running average over updates; None for none, as in the paper.
      weight_decay: decoupled weight decay.
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
      >>> tx = mlhf(meta_params, predict_fn, loss_fn, num_cg_steps=2)
      >>> grads = jax.grad(lambda p: loss_fn(predict_fn(p, batch), batch))(params)
      >>> updates, state = jax.jit(tx.update)(grads, tx.init(params), params, batch=batch)
      >>> new = optax.apply_updates(params, updates)
      >>> bool(loss_fn(predict_fn(new, batch), batch) < loss_fn(predict_fn(params, batch), batch))
      True
    """
    direction = scale_by_mlhf(
        meta_params,
        Model(predict_fn, loss_fn, curvature_batch_size, per_example, axis_name),
        num_cg_steps=num_cg_steps,
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
    return chain("mlhf", direction, after)
