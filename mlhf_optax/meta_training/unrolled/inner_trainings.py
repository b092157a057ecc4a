"""The trainings that meta-training learns from: their health, and what replaces the ones that end.

A training that has diverged teaches nothing, and neither does one that is stuck, with its loss at chance or
its gradient gone: the meta-parameters would go on "improving" on a dead network. Such trainings are
recognised, counted and replaced.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mlhf_optax.meta_training.interface import MetaGradient
from mlhf_optax.meta_training.unrolled import replay as replay_lib
from mlhf_optax.meta_training.unrolled.config import MetaTrainingConfig
from mlhf_optax.support import trees


class InnerTraining(NamedTuple):
    """One training being optimised; leaves have a leading axis of ``num_tasks`` where several run.

    Attributes:
      params: its parameters.
      opt_state: its optimizer state.
      age: steps since its fresh start.
      first_loss: loss at its fresh start; NaN before the first unroll.
      first_gradient_norm: norm of the gradient after its first unroll; NaN before.
    """

    params: Any
    opt_state: Any
    age: jax.Array
    first_loss: jax.Array
    first_gradient_norm: jax.Array


class Health(NamedTuple):
    """Flags of one training, or of several.

    Attributes:
      diverged: something is not finite, or the loss is far above its first value.
      idle: the loss is still at its first value, or the gradient has vanished far from a minimum. A young
        training may be idle, but is not worth storing.
      stuck: idle although it is old enough to have made progress.
    """

    diverged: jax.Array
    idle: jax.Array
    stuck: jax.Array

    @property
    def healthy(self) -> jax.Array:
        """Neither diverged nor stuck."""
        return ~(self.diverged | self.stuck)

    @property
    def worth_storing(self) -> jax.Array:
        """Healthy and not idle: a training that died in its first steps is not stored either."""
        return self.healthy & ~self.idle


def fresh_training(key: chex.PRNGKey, init_fn, init_opt_state) -> InnerTraining:
    """Returns a training at its fresh start."""
    params = init_fn(key)
    unknown = jnp.full((), jnp.nan, jnp.float32)
    return InnerTraining(params, init_opt_state(params), jnp.zeros((), jnp.int32), unknown, unknown)


def without_opt_state(training: InnerTraining) -> InnerTraining:
    """Returns what is stored for replay: the optimizer starts anew there, as in the paper."""
    return training._replace(opt_state=())


def advance(training: InnerTraining, result: MetaGradient, unroll_length: int) -> InnerTraining:
    """Returns the training after an unroll."""
    is_first = jnp.isnan(training.first_loss)
    return InnerTraining(
        result.params,
        result.opt_state,
        training.age + unroll_length,
        jnp.where(is_first, result.inner_losses[0], training.first_loss),
        jnp.where(is_first, result.gradient_norm, training.first_gradient_norm),
    )


def examine(config: MetaTrainingConfig, training: InnerTraining, result: MetaGradient) -> Health:
    """Returns whether a training, after an unroll, has diverged or is stuck.

    Example:
      >>> import jax.numpy as jnp
      >>> one, zero = jnp.ones(()), jnp.zeros(())
      >>> training = InnerTraining(one, (), jnp.int32(100), jnp.float32(2.3), one)
      >>> result = MetaGradient(zero, {}, one, (), jnp.full(11, 2.3), one)
      >>> bool(examine(MetaTrainingConfig(), training, result).stuck)
      True
    """
    losses, first = result.inner_losses, training.first_loss
    is_finite = trees.is_finite((result.params, result.opt_state, losses))
    # One bad mini-batch is not a divergence, hence the mean of the unroll.
    level = jnp.mean(losses[1:])
    diverged = ~is_finite | (level > config.divergence_ratio * first)
    at_chance = level > config.stuck_ratio * first
    vanished = result.gradient_norm < config.vanishing_ratio * training.first_gradient_norm
    idle = (at_chance | (vanished & (level > 0.1 * first))) & ~diverged
    return Health(diverged, idle, idle & (training.age >= config.stuck_patience))


def replace_ended(
    config: MetaTrainingConfig,
    trainings: InnerTraining,
    health: Health,
    replay: replay_lib.Replay,
    key: chex.PRNGKey,
    make_fresh,
    init_opt_state,
) -> tuple[InnerTraining, replay_lib.Replay, dict[str, jax.Array]]:
    """Stores healthy trainings for replay and replaces those that end.

    Args:
      config: probabilities and limits.
      trainings: leaves (num_tasks, ...).
      health: leaves (num_tasks,).
      replay: the buffer.
      key: random key.
      make_fresh: ``make_fresh(keys) -> InnerTraining`` with leaves (num_tasks, ...).
      init_opt_state: ``init_opt_state(params) -> opt_state`` for stacked params.

    Returns:
      The trainings to go on with, the buffer, and counts by name.
    """
    count = config.num_tasks
    keep_key, store_key, fresh_key, replay_key, init_key = jax.random.split(key, 5)
    goes_on = health.healthy & (jax.random.uniform(keep_key, (count,)) < config.keep_probability)
    if config.max_age is not None:
        goes_on &= trainings.age < config.max_age
    to_store = health.worth_storing & (jax.random.uniform(store_key, (count,)) < config.store_probability)
    replay = replay_lib.store(replay, without_opt_state(trainings), to_store)

    replayed, found = replay_lib.sample(replay, replay_key, count)
    replayed = replayed._replace(opt_state=init_opt_state(replayed.params))
    fresh = make_fresh(jax.random.split(init_key, count))
    takes_fresh = ~found | (jax.random.uniform(fresh_key, (count,)) < config.fresh_probability)
    next_trainings = _choose(goes_on, trainings, _choose(takes_fresh, fresh, replayed))
    counts = {
        "diverged": jnp.sum(health.diverged),
        "stuck": jnp.sum(health.stuck),
        "replayed": jnp.sum(~goes_on & ~takes_fresh),
        "fresh": jnp.sum(~goes_on & takes_fresh),
    }
    return next_trainings, replay, counts


def _choose(mask: jax.Array, on_true: Any, on_false: Any) -> Any:
    pick = lambda t, f: jnp.where(mask.reshape((-1,) + (1,) * (t.ndim - 1)), t, f)
    return jax.tree.map(pick, on_true, on_false)
