"""The race in every file here: twenty steps with the defaults of the shelf, against AdamW with its own."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax

STEPS = 20

# A training: it takes an optimizer and returns the losses before, between and after its steps.
Training = Callable[[optax.GradientTransformationExtraArgs], list[float]]


def trained(tx: Any, predict_fn: Callable, loss_fn: Callable, start: Any, batches: Iterable) -> list[float]:
    """Trains as JAX users do where a model is a function of its parameters; a loss before every step."""

    @jax.jit
    def train_step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(lambda p: loss_fn(predict_fn(p, batch), batch))(params)
        updates, opt_state = tx.update(grads, opt_state, params, batch=batch)
        return optax.apply_updates(params, updates), opt_state, loss

    params, losses = start, []
    opt_state = tx.init(params)
    for batch in batches:
        params, opt_state, loss = train_step(params, opt_state, batch)
        losses.append(float(loss))
    return losses


def plain_training(predict_fn: Callable, loss_fn: Callable, start: Any, batch: Any) -> Training:
    """Returns the plain loop on one batch."""
    return lambda tx: trained(tx, predict_fn, loss_fn, start, [batch] * (STEPS + 1))


def assert_ahead_of_adamw(train: Training, tx: optax.GradientTransformationExtraArgs) -> None:
    """Trains twice from the same start; the last loss has to be below AdamW's, and below the first."""
    ours = train(tx)
    adamw = train(optax.with_extra_args_support(optax.adamw(1e-3)))
    assert len(ours) == len(adamw) == STEPS + 1
    assert ours[0] == adamw[0], "both start at the same loss"
    assert ours[-1] < min(adamw[-1], ours[0]), f"AdamW ends at {adamw[-1]:.4g}, ours at {ours[-1]:.4g}"
