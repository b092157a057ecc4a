"""The model as an optimizer knows it: what is predicted, the loss, and where curvature is taken."""

import dataclasses
import functools
from typing import Any

import chex
import jax

from mlhf_optax.curvature import GGN, Batch, LossFn, PredictFn, loss_and_ggn
from mlhf_optax.curvature_batch import (
    CurvatureBatch,
    PerExample,
    check_curvature_batch,
    curvature_subset,
)
from mlhf_optax.support import placement, trees
from mlhf_optax.support.checks import require_function


@dataclasses.dataclass(frozen=True)
class Model:
    """A function of parameters and batch, its loss, and the part of the batch for curvature.

    Every optimizer of the library takes these five as arguments of its own or as one ``Model``.

    Args:
      predict_fn: ``predict_fn(params, batch) -> outputs``, any pytree of arrays.
      loss_fn: ``loss_fn(outputs, batch) -> scalar``, convex in the outputs and a mean over the batch. The
        gradients given to ``update`` are those of ``loss_fn(predict_fn(params, batch), batch)``.
      curvature_batch_size: take GGN products on part of the batch: a number of examples, a fraction, or a
        function ``batch -> smaller batch`` (:func:`mlhf_optax.curvature_batch.curvature_subset`); None for
        all of it. Under ``optax.MultiSteps`` the batch is that of its last call;
        :func:`mlhf_optax.over_micro_batches` takes curvature on all.
      per_example: with a number or a fraction, the names in the batch below which every array has one entry
        per example, such as ``("image", "label")``; None if that is so for all of the batch.
      axis_name: name, or names, of the axis of ``jax.shard_map`` or ``jax.pmap`` along which batches differ.
        Loss and GGN products are averaged over it. The user averages the gradients: under ``pmap`` by
        ``jax.lax.pmean(grads, axis_name)``; ``shard_map`` sums gradients by itself, so take the gradient of
        ``jax.lax.pmean(loss, axis_name)`` there. ``loss_fn`` is the mean over the device's own examples.
        Not needed with ``jax.jit`` on a sharded batch.

    Raises:
      TypeError: for arguments of a wrong type.
      ValueError: for arguments out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from mlhf_optax import SquaredError
      >>> model = Model(lambda w, batch: batch["x"] @ w, SquaredError(), curvature_batch_size=0.5)
      >>> batch = {"x": jnp.eye(4), "label": jnp.ones(4)}
      >>> model.loss(jnp.zeros(4), batch), model.curvature_batch(jnp.zeros(4), batch)["x"].shape
      (Array(0.5, dtype=float32), (2, 4))
    """

    predict_fn: PredictFn
    loss_fn: LossFn
    curvature_batch_size: CurvatureBatch = None
    per_example: PerExample = None
    axis_name: placement.AxisName = None

    def __post_init__(self):
        for name in ("predict_fn", "loss_fn"):
            require_function(name, getattr(self, name))
        check_curvature_batch(self.curvature_batch_size, self.per_example)

    def loss(self, params: chex.ArrayTree, batch: Batch) -> jax.Array:
        """Returns the loss on the whole batch, the mean over ``axis_name``."""
        return placement.mean_over(self.loss_fn(self.predict_fn(params, batch), batch), self.axis_name)

    def curvature_batch(self, params: chex.ArrayTree, batch: Batch) -> Batch:
        """Returns the part of the batch on which curvature is taken."""
        part, names = self.curvature_batch_size, self.per_example
        return curvature_subset(self.predict_fn, params, batch, part, names, loss_fn=self.loss_fn)

    def linearized(self, params: chex.ArrayTree, batch: Batch) -> tuple[jax.Array, GGN]:
        """Returns loss and GGN product on the part of the batch for curvature; linearizes the model once."""
        try:
            part: Any = self.curvature_batch(params, batch)
            return loss_and_ggn(self.predict_fn, self.loss_fn, params, part, self.axis_name)
        except Exception as error:
            _explain(self, params, batch, error)
            raise


def _explain(model: Model, params: chex.ArrayTree, batch: Batch, error: Exception) -> None:
    """Raises a clearer error from that of a model, where trying it another way tells what is wrong."""
    shapes = functools.partial(trees.attempt, trees.shapes_of)
    outputs = shapes(model.predict_fn, params, batch)
    if outputs is None:
        if isinstance(params, jax.Array) and params.ndim == 1:
            raise ValueError(
                f"`predict_fn` fails on the parameters, which came as one vector of shape {params.shape}. "
                "`optax.flatten` joins them, but the model needs them as they are: leave it out. Vectors are "
                "joined inside where it pays"
            ) from error
        return
    if shapes(model.loss_fn, outputs, batch) is None and shapes(model.loss_fn, params, batch) is not None:
        raise TypeError(
            "`loss_fn` is a function of `(params, batch)`, and fails on outputs. Curvature needs the loss "
            "apart from the model: `predict_fn(params, batch) -> outputs` and `loss_fn(outputs, batch) -> "
            "scalar`, so that `loss_fn(predict_fn(params, batch), batch)` is what is minimised"
        ) from error
