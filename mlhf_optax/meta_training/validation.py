"""Validation of meta-parameters: whole trainings from fresh starts, as a user would run them.

Meta-losses judge one step at a time, and meta-parameters that do well at every step can still ruin a long
training. What is kept and shipped is therefore chosen by runs of a few hundred steps.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from mlhf_optax.meta_training.interface import (
    LearnedOptimizer,
    TaskLike,
    map_trainings,
    task_loss,
)
from mlhf_optax.support.checks import require

_WORST_LOSS = 1e3
_LOSS_FLOOR = 1e-9


class Validation(NamedTuple):
    """Result of validating one set of meta-parameters.

    Attributes:
      score: mean of log(loss) over fresh starts and the steps where the loss is taken, in nats; lower is
        better. A loss that is not finite counts as 1000.
      losses: shape (len(steps),), mean loss over the fresh starts after these steps.
      worst_loss: largest loss of any fresh start after the last step.
    """

    score: jax.Array
    losses: jax.Array
    worst_loss: jax.Array


LossesFn = Callable[[Any, Any, Any, chex.PRNGKey], jax.Array]
ValidateFn = Callable[[Any, Any, Any, chex.PRNGKey], Validation]


def make_validation(
    task: TaskLike, learned: LearnedOptimizer, steps: Sequence[int] = (10, 30, 100, 300), num_starts: int = 3
) -> ValidateFn:
    """Returns a jitted function that validates meta-parameters on one task.

    Args:
      task: the task.
      learned: how meta-parameters become an optimizer.
      steps: after how many steps the loss is taken, increasing; the last is the length.
      num_starts: fresh starts, run side by side, or one after another where that is faster.

    Returns:
      ``validate(meta_params, batches, examples, key) -> Validation``: ``batches`` has leaves
      (steps[-1], B, ...) and is shared by all starts, ``examples`` is the batch on which the loss is
      taken, ``key`` draws the starts. With the same key and batches, scores can be compared.

    Raises:
      ValueError: if ``steps`` is empty, not increasing, or starts below 1.

    Example:
      >>> from types import SimpleNamespace
      >>> import jax, jax.numpy as jnp
      >>> from mlhf_optax import SquaredError, init_meta_params
      >>> from mlhf_optax.meta_training import mlhf_optimizer
      >>> task = SimpleNamespace(
      ...     init_fn=lambda key: {"kernel": jax.random.normal(key, (2, 1))},
      ...     predict_fn=lambda params, batch: batch["x"] @ params["kernel"],
      ...     loss_fn=SquaredError(targets="y"))
      >>> validate = make_validation(task, mlhf_optimizer(num_cg_steps=1), steps=(1, 3))
      >>> batches = {"x": jnp.ones((3, 4, 2)), "y": jnp.zeros((3, 4, 1))}
      >>> examples = {"x": jnp.ones((4, 2)), "y": jnp.zeros((4, 1))}
      >>> meta_params = init_meta_params(jax.random.key(0), layer_types=["dense_kernel"])
      >>> validate(meta_params, batches, examples, jax.random.key(1)).losses.shape
      (2,)
    """
    losses_of = training_losses(task, learned, steps)

    @jax.jit
    def validate(meta_params, batches, examples, key) -> Validation:
        run = lambda start_key: losses_of(meta_params, batches, examples, start_key)
        losses = map_trainings(task, run, jax.random.split(key, num_starts))
        return Validation(score_of(losses), jnp.mean(losses, axis=0), jnp.max(_bounded(losses[:, -1])))

    return validate


def training_losses(task: TaskLike, learned: LearnedOptimizer, steps: Sequence[int]) -> LossesFn:
    """Returns a function that trains from a fresh start and returns the loss after some steps.

    Args:
      task: the task.
      learned: how meta-parameters become an optimizer.
      steps: after how many steps the loss is taken, increasing.

    Returns:
      ``losses(meta_params, batches, examples, key)``, shape (len(steps),); see :func:`make_validation`.

    Raises:
      ValueError: if ``steps`` is empty, not increasing, or starts below 1.
    """
    steps = tuple(steps)
    is_rising = bool(steps) and steps[0] >= 1 and all(a < b for a, b in itertools.pairwise(steps))
    require(is_rising, "steps", "increasing numbers from 1 on", steps)

    def losses_of(meta_params, batches, examples, key):
        optimizer = learned.build(meta_params, task)
        params = task.init_fn(key)

        def step(carry, batch):
            params, opt_state = carry
            gradient = jax.grad(lambda p: task_loss(task, p, batch))(params)
            updates, opt_state = optimizer.update(gradient, opt_state, params, batch=batch)
            return (optax.apply_updates(params, updates), opt_state), None

        # One scan to the longest stretch, not one program a stretch: the step is compiled once.
        def to_next(carry, bounds):
            start, end = bounds
            body = lambda i, c: step(c, jax.tree.map(lambda x: x[i], batches))[0]
            carry = lax.fori_loop(start, end, body, carry)
            return carry, task_loss(task, carry[0], examples)

        ends = jnp.asarray(steps, jnp.int32)
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
        return lax.scan(to_next, (params, optimizer.init(params)), (starts, ends))[1]

    return losses_of


def score_of(losses: jax.Array) -> jax.Array:
    """Returns the mean of log(loss), with losses that are not finite counted as 1000."""
    return jnp.mean(jnp.log(_bounded(losses)))


def _bounded(losses: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(losses), jnp.clip(losses, _LOSS_FLOOR, _WORST_LOSS), _WORST_LOSS)
