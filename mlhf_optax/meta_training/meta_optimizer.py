"""The optimizer of the meta-parameters."""

import optax

from mlhf_optax.meta_training.long_horizon.config import LongHorizonConfig
from mlhf_optax.meta_training.unrolled.config import MetaTrainingConfig


def meta_optimizer(config: MetaTrainingConfig | LongHorizonConfig) -> optax.GradientTransformation:
    """Returns the Adam that trains the meta-parameters, with the clipping and the rate of a config.

    Args:
      config: the settings of either kind of meta-training.

    Returns:
      The gradient transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = meta_optimizer(MetaTrainingConfig(meta_learning_rate=0.5))
      >>> updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
      >>> updates.round(3)
      Array([-0.5, -0.5], dtype=float32)
    """
    rate: optax.ScalarOrSchedule = config.meta_learning_rate
    if config.decay_iterations is not None:
        rate = optax.cosine_decay_schedule(
            config.meta_learning_rate, config.decay_iterations, config.final_rate_share
        )
    if config.meta_gradient_clip is None:
        return optax.chain(optax.adam(rate))
    return optax.chain(optax.clip_by_global_norm(config.meta_gradient_clip), optax.adam(rate))
