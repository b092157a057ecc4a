"""One training of one network: how it starts, its step, and how it is judged."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mlhf_optax.datasets import Examples, epoch_indices, num_examples, take
from mlhf_optax.tasks import Task

MakeOptimizer = Callable[..., optax.GradientTransformation]  # make_optimizer(**hyperparameters)
Hyperparameters = Mapping[str, Any]

_EVALUATION_CHUNK = 2048  # examples a forward pass, to bound the memory of an evaluation


class TrainingState(NamedTuple):
    """What one training carries from step to step.

    Attributes:
      params: parameters of the network.
      opt_state: state of the optimizer.
    """

    params: Any
    opt_state: Any


def init_training(
    task: Task, make_optimizer: MakeOptimizer, hyperparameters: Hyperparameters, key: chex.PRNGKey
) -> TrainingState:
    """Returns the state of one training before its first step; ``key`` decides the parameters."""
    params = task.init_fn(jax.random.fold_in(key, 0))
    return TrainingState(params, make_optimizer(**hyperparameters).init(params))


def draw_order(task: Task, key: chex.PRNGKey, num_steps: int) -> jax.Array:
    """Returns the mini-batches of one training as example numbers, shape (num_steps, B)."""
    size = num_examples(task.data.train)
    return epoch_indices(jax.random.fold_in(key, 1), size, task.batch_size, num_steps)


def training_step(
    task: Task,
    make_optimizer: MakeOptimizer,
    hyperparameters: Hyperparameters,
    examples: Examples,
    indices: jax.Array,
    state: TrainingState,
) -> TrainingState:
    """Takes one step of one training on the examples with numbers ``indices``, shape (B,)."""
    optimizer = optax.with_extra_args_support(make_optimizer(**hyperparameters))
    batch = take(examples, indices)
    loss = lambda params: task.loss_fn(task.predict_fn(params, batch), batch)
    grads = jax.grad(loss)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, batch=batch)
    return TrainingState(optax.apply_updates(state.params, updates), opt_state)


def mean_loss(task: Task, params: Any, examples: Examples) -> jax.Array:
    """Returns the loss over all examples.

    Args:
      task: gives model and loss.
      params: parameters of one network.
      examples: a part of the task's data, N examples.

    Returns:
      A scalar in nats.

    Example:
      >>> from mlhf_optax.tasks import get_task
      >>> task = get_task("digits-mlp")
      >>> params = jax.tree.map(jnp.zeros_like, task.init_fn(jax.random.key(0)))
      >>> round(float(mean_loss(task, params, task.data.test)), 4)  # log 10
      2.3026
    """
    return _mean_over_chunks(examples, lambda part: task.loss_fn(task.predict_fn(params, part), part))


def accuracy(task: Task, params: Any, examples: Examples) -> jax.Array:
    """Returns the share of examples whose largest logit is that of the label.

    Args:
      task: gives the model.
      params: parameters of one network.
      examples: a part of the task's data, N examples with ``"label"``.

    Returns:
      A scalar in [0, 1]; outputs that are not finite count as wrong.

    Example:
      >>> from mlhf_optax.tasks import get_task
      >>> task = get_task("digits-mlp")
      >>> bool(0 <= accuracy(task, task.init_fn(jax.random.key(0)), task.data.test) <= 1)
      True
    """

    def share(part: Examples) -> jax.Array:
        outputs = task.predict_fn(params, part)
        is_right = jnp.argmax(outputs, axis=-1) == part["label"]
        return jnp.mean(is_right & jnp.all(jnp.isfinite(outputs), axis=-1))

    return _mean_over_chunks(examples, share)


def _mean_over_chunks(examples: Examples, mean: Callable[[Examples], jax.Array]) -> jax.Array:
    total = num_examples(examples)
    parts = []
    for start in range(0, total, _EVALUATION_CHUNK):
        part = jax.tree.map(lambda leaf: leaf[start : start + _EVALUATION_CHUNK], examples)  # noqa: B023
        parts.append(mean(part) * (num_examples(part) / total))
    return jnp.sum(jnp.stack(parts))


__all__ = [
    "Hyperparameters",
    "MakeOptimizer",
    "TrainingState",
    "accuracy",
    "draw_order",
    "init_training",
    "mean_loss",
    "training_step",
]
