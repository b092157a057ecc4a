"""A pair of trainings, which differ by the sign of the noise on their meta-parameters, from start to end."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from mlhf_optax.meta_training.interface import LearnedOptimizer, TaskLike, map_trainings, task_loss
from mlhf_optax.meta_training.long_horizon.config import LongHorizonConfig
from mlhf_optax.support import placement

_SIGNS = (1.0, -1.0)


class Pair(NamedTuple):
    """A pair of trainings; leaves have a leading axis of ``num_pairs`` where several run.

    Attributes:
      params: parameters of both, leaves (2, ...): with plus and with minus the noise.
      opt_state: optimizer states of both, leaves (2, ...).
      noise: on the meta-parameters.
      first_loss: loss before the first step; NaN until it is known.
      age: steps done.
      horizon: steps after which the next pair starts.
    """

    params: Any
    opt_state: Any
    noise: Any
    first_loss: jax.Array
    age: jax.Array
    horizon: jax.Array


class Truncated(NamedTuple):
    """What a truncation of all pairs of one task gives.

    Attributes:
      gradient: estimate of the meta-gradient, shaped like the meta-parameters.
      meta_loss: mean over the trainings.
      mean_age: steps that pairs have done, on average.
      fresh: pairs that began just before.
      diverged: trainings that ended it at the ceiling.
    """

    gradient: chex.ArrayTree
    meta_loss: jax.Array
    mean_age: jax.Array
    fresh: jax.Array
    diverged: jax.Array


def start_pair(
    task: TaskLike, learned: LearnedOptimizer, config: LongHorizonConfig, key: chex.PRNGKey, meta_params: Any
) -> Pair:
    """Returns a pair at its start."""
    # Two keys are spare. Fewer would give other draws, and the shipped sets could not be made again.
    noise_key, _, _, horizon_key, init_key = jax.random.split(key, 5)
    draw = lambda leaf, k: config.sigma * jax.random.normal(k, leaf.shape, leaf.dtype)
    noise = jax.tree.map(draw, meta_params, optax.tree.split_key_like(noise_key, meta_params))
    spread = jnp.exp(config.init_spread * jax.random.normal(jax.random.fold_in(key, 5)))
    params = jax.tree.map(lambda w: (spread * w).astype(w.dtype), task.init_fn(init_key))
    init = lambda sign: learned.build(_moved(meta_params, sign, noise), task).init(params)
    return Pair(
        params=jax.tree.map(lambda w: jnp.stack([w, w]), params),
        opt_state=jax.vmap(init)(jnp.array(_SIGNS)),
        noise=noise,
        first_loss=jnp.full((), jnp.nan, jnp.float32),
        age=jnp.zeros((), jnp.int32),
        horizon=_draw_horizon(horizon_key, config),
    )


def replace_pairs(pairs: Pair, fresh: Pair, is_over: jax.Array) -> Pair:
    """Returns fresh pairs in the place of those that are over."""
    choose = lambda new, old: jnp.where(is_over.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)
    return jax.tree.map(choose, fresh, pairs)


def train_pair(
    task: TaskLike,
    learned: LearnedOptimizer,
    config: LongHorizonConfig,
    meta_params: Any,
    pair: Pair,
    batches: Any,
) -> tuple[Pair, jax.Array, jax.Array]:
    """Trains both of a pair for a truncation.

    Args:
      task: what is trained.
      learned: the learned optimizer.
      config: how to train.
      meta_params: those around which the pair's noise lies.
      pair: where both are.
      batches: mini-batches, leaves (truncation, B, ...).

    Returns:
      The pair after it; the meta-loss of each of the two, shape (2,); and whether each ended at the ceiling.
    """

    def run(sign, params, opt_state):
        optimizer = optax.with_extra_args_support(learned.build(_moved(meta_params, sign, pair.noise), task))

        def step(carry, batch):
            w, state = carry
            loss, gradient = jax.value_and_grad(lambda p: task_loss(task, p, batch))(w)
            updates, state = optimizer.update(gradient, state, w, batch=batch)
            return (optax.apply_updates(w, updates), state), loss

        return lax.scan(step, (params, opt_state), batches)

    (params, opt_state), losses = jax.vmap(run)(jnp.array(_SIGNS), pair.params, pair.opt_state)
    # Before its first step both of a pair have the same loss.
    first = jnp.where(jnp.isnan(pair.first_loss), losses[0, 0], pair.first_loss)
    relative = losses / jnp.maximum(first, jnp.finfo(jnp.float32).tiny)
    is_known = jnp.isfinite(relative)
    bounded = jnp.where(is_known, jnp.minimum(relative, config.loss_ceiling), config.loss_ceiling)
    logs = jnp.log(bounded + config.loss_floor)
    if config.early_steps is not None:
        age = pair.age + jnp.arange(config.truncation)
        logs = logs * (1 + age / config.early_steps) ** -0.5
    after = pair._replace(
        params=params, opt_state=opt_state, first_loss=first, age=pair.age + config.truncation
    )
    return after, jnp.mean(logs, axis=1), bounded[:, -1] >= config.loss_ceiling


def advance_pairs(
    task: TaskLike,
    learned: LearnedOptimizer,
    config: LongHorizonConfig,
    meta_params: Any,
    pairs: Pair,
    batches: Any,
    axis_name: placement.AxisName = None,
) -> tuple[Pair, Truncated]:
    """Trains every pair of a task for a truncation, and estimates the meta-gradient.

    Args:
      task: what is trained.
      learned: the learned optimizer.
      config: how to train.
      meta_params: those around which the noise of the pairs lies.
      pairs: leaves (num_pairs, ...), or the share of this device.
      batches: leaves (num_pairs, truncation, B, ...), or the share of this device.
      axis_name: axes of the mesh over which the pairs are spread; None for one device.

    Returns:
      The pairs after it, and what they give, all devices together.
    """
    # Train.
    one = lambda inputs: train_pair(task, learned, config, meta_params, *inputs)
    pairs, meta_losses, is_diverged = map_trainings(task, one, (pairs, batches), config.task_axis)
    # Where both have blown up there is nothing more to learn.
    ended = jnp.where(jnp.all(is_diverged, axis=1), 0, pairs.horizon)

    # Estimate the gradient.
    difference = meta_losses[:, 0] - meta_losses[:, 1]
    if config.difference_bound is not None:
        difference = jnp.clip(difference, -config.difference_bound, config.difference_bound)
    share = difference / (2 * config.sigma**2 * config.num_pairs)
    gradient = jax.tree.map(lambda n: jnp.tensordot(share.astype(n.dtype), n, axes=1), pairs.noise)

    # Meet the other devices.
    result = Truncated(
        gradient,
        meta_loss=jnp.sum(meta_losses) / (2 * config.num_pairs),
        mean_age=jnp.sum(pairs.age) / config.num_pairs,
        fresh=jnp.zeros((), jnp.int32),
        diverged=jnp.sum(is_diverged).astype(jnp.int32),
    )
    # One vector: between processes every array of a sum takes a round of messages.
    numbers, unravel = ravel_pytree(result)
    result = unravel(placement.sum_over(numbers, axis_name))
    return pairs._replace(horizon=ended), result


def _moved(meta_params: Any, sign: jax.Array, noise: Any) -> Any:
    return jax.tree.map(lambda centre, n: centre + sign.astype(centre.dtype) * n, meta_params, noise)


def _draw_horizon(key: chex.PRNGKey, config: LongHorizonConfig) -> jax.Array:
    """Returns the length of a training, an integer scalar."""
    shortest, longest = map(float, config.horizons)
    exponent = config.horizon_exponent
    # In this power of the length the density is flat.
    forth, back = (lambda h: h**-exponent, lambda x: x ** (-1 / exponent)) if exponent else (jnp.log, jnp.exp)
    drawn = jax.random.uniform(key, (), minval=0.0, maxval=1.0)
    return jnp.ceil(back((1 - drawn) * forth(shortest) + drawn * forth(longest))).astype(jnp.int32)
