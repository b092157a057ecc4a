"""A Flax training state that hands the batch to the optimizer."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Self

import optax
from flax.training import train_state


class TrainState(train_state.TrainState):
    """Flax's ``TrainState`` for optimizers that need the batch, as :func:`mlhf_optax.mlhf` does.

    It differs from Flax's in one argument, ``apply_gradients(grads=..., batch=...)``. All else is Flax's own:
    ``create``, extra fields in subclasses (``batch_stats``, keys), and keywords of ``apply_gradients`` that
    replace fields. Optimizers that need no batch work, too, and so does ``optax.MultiSteps`` around either.

    The optimizer calls ``predict_fn(params, batch)`` itself. So what the model needs beside its parameters
    rides in the batch: hand over ``{**batch, "batch_stats": state.batch_stats}``, and with dropout the key
    that the gradient was taken with.

    Args:
      step: number of calls of ``apply_gradients``.
      apply_fn: usually ``model.apply``.
      params: the parameters, ``model.init(...)["params"]``.
      tx: any optax transformation, or an ``optax.MultiSteps``.
      opt_state: its state.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from mlhf_optax import SoftmaxCrossEntropy, init_meta_params, mlhf
      >>> model, loss_fn = nn.Dense(3), SoftmaxCrossEntropy()
      >>> predict_fn = lambda params, batch: model.apply({"params": params}, batch["image"])
      >>> batch = {"image": jnp.ones((4, 2)), "label": jnp.array([0, 1, 2, 2])}
      >>> params = model.init(jax.random.key(0), batch["image"])["params"]
      >>> tx = mlhf(init_meta_params(jax.random.key(1)), predict_fn, loss_fn, num_cg_steps=2)
      >>> state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
      >>> loss = lambda params: loss_fn(predict_fn(params, batch), batch)
      >>> step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads, batch=batch))
      >>> state = step(state, jax.grad(loss)(state.params))
      >>> int(state.step), bool(loss(state.params) < loss(params))
      (1, True)
    """

    def apply_gradients(self, *, grads: Any, batch: Any = None, **kwargs: Any) -> Self:
        """Updates ``step``, ``params``, ``opt_state`` and the fields named in ``kwargs``.

        Args:
          grads: gradients, shaped like ``params``.
          batch: handed to the optimizer as ``tx.update(grads, opt_state, params, batch=batch)``. A
            pytree; model state such as ``batch_stats`` rides in it to where ``predict_fn`` reads it.
          **kwargs: fields to replace, as in Flax, for example ``batch_stats=new_batch_stats``.

        Returns:
          The next state.

        Raises:
          TypeError: if the optimizer needs a batch and got none.

        Example:
          See :class:`TrainState`.
        """
        if batch is None:
            return super().apply_gradients(grads=grads, **kwargs)
        update: Any = self.tx.update
        if _takes_batch(update):
            update = functools.partial(update, batch=batch)
        bound = optax.GradientTransformation(self.tx.init, update)
        # Flax calls `tx.update` without extra arguments, so it gets one that has the batch already.
        # `tx` is static under jit: putting the old one back keeps one compilation for all steps.
        state = super(TrainState, self.replace(tx=bound)).apply_gradients(grads=grads, **kwargs)
        return state if "tx" in kwargs else state.replace(tx=self.tx)


def _takes_batch(update: Callable) -> bool:
    """Whether ``update(..., batch=batch)`` can be called, as far as its signature tells."""
    # The signature, not the type: `optax.MultiSteps` and what its `gradient_transformation()` returns hand
    # extra arguments on without being a `GradientTransformationExtraArgs`.
    parameters = inspect.signature(update).parameters
    return "batch" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
