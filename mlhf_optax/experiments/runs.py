"""One run: the training of one network from one seed. How it starts, its step, and how it is judged."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mlhf_optax.tasks import Examples, Task, epoch_indices, num_examples, take

MakeOptimizer = Callable[..., optax.GradientTransformation]  # make_optimizer(**hyperparameters)
Hyperparameters = Mapping[str, Any]


class RunState(NamedTuple):
    """What a run carries from step to step."""

    params: Any
    opt_state: Any


def init_run(
    task: Task, make_optimizer: MakeOptimizer, hyperparameters: Hyperparameters, key: chex.PRNGKey
) -> RunState:
    """Returns the state of a run before its first step; ``key`` decides the parameters."""
    params = task.init_fn(jax.random.fold_in(key, 0))
    return RunState(params, make_optimizer(**hyperparameters).init(params))


def draw_order(task: Task, key: chex.PRNGKey, num_steps: int) -> jax.Array:
    """Returns the mini-batches of a run as numbers of examples, shape (num_steps, B)."""
    size = num_examples(task.data.train)
    return epoch_indices(jax.random.fold_in(key, 1), size, task.batch_size, num_steps)


def augmentation_key(key: chex.PRNGKey, step: int | jax.Array) -> chex.PRNGKey:
    """Returns the key for the augmentation at a step, counted from 0, of the run with ``key``."""
    return jax.random.fold_in(jax.random.fold_in(key, 2), step)


def draw_batch(task: Task, examples: Examples, indices: jax.Array, key: chex.PRNGKey) -> Examples:
    """Returns the examples with numbers ``indices``, of any shape, augmented."""
    return task.augment_fn(key, take(examples, indices))


def run_step(
    task: Task,
    make_optimizer: MakeOptimizer,
    hyperparameters: Hyperparameters,
    batch: Examples,
    state: RunState,
) -> RunState:
    """Takes one step of a run on a mini-batch."""
    optimizer = optax.with_extra_args_support(make_optimizer(**hyperparameters))
    loss = lambda params: task.loss_fn(task.predict_fn(params, batch), batch)
    grads = jax.grad(loss)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, batch=batch)
    return RunState(optax.apply_updates(state.params, updates), opt_state)


def evaluation_state(task: Task, params: Any, examples: Examples) -> Any:
    """Returns the model state of a network from a sample of the training part, None if it has no state."""
    return None if task.model_state_fn is None else task.model_state_fn(params, examples)


def mean_loss(task: Task, params: Any, examples: Examples, model_state: Any = None) -> jax.Array:
    """Returns the loss over all examples, taken at once, in nats.

    Without ``model_state``, from :func:`evaluation_state`, batch normalisation normalises by these examples.
    """
    return task.loss_fn(task.predict_fn(params, _with_state(examples, model_state)), examples)


def accuracy(task: Task, params: Any, examples: Examples, model_state: Any = None) -> jax.Array:
    """Returns the share of examples whose largest logit is that of the label; what is not finite is wrong.

    NaN for a task without classes.
    """
    if task.num_classes is None:
        return jnp.full((), jnp.nan)
    outputs = task.predict_fn(params, _with_state(examples, model_state))
    is_right = jnp.argmax(outputs, axis=-1) == examples["label"]
    return jnp.mean(is_right & jnp.all(jnp.isfinite(outputs), axis=-1))


def _with_state(examples: Examples, model_state: Any) -> Examples:
    return examples if model_state is None else {**examples, "model_state": model_state}
