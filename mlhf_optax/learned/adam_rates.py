"""Adam with a learned learning rate for every tensor: the smallest learned optimizer, and how to write one.

A learned optimizer is ``init(key) -> meta_params`` and ``build(meta_params, *, learning_rate) -> optax
transformation``. From these two :func:`backpropagated` makes everything else: the meta-gradient, the options
on the command line, the files. One line in ``mlhf_optax/learned/__init__.py`` gives it its name.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlhf_optax.learned.backpropagation import BackpropagationOptions, MetaLossName, backpropagated
from mlhf_optax.support.layer_types import check_leaves


class AdamRates(NamedTuple):
    """Meta-parameters; five numbers fit any network, as tensors are told apart by their rank alone.

    Attributes:
      log_rate: shape (5,), log of the learning rate of tensors of rank 0, 1, 2, 3, and 4 or more.
    """

    log_rate: jax.Array


def init_adam_rates(key: jax.Array) -> AdamRates:
    """Returns untrained meta-parameters, a rate of 1 for every tensor."""
    del key  # nothing here is random
    return AdamRates(jnp.zeros(5, jnp.float32))


def adam_rates(
    meta_params: AdamRates, *, learning_rate: optax.ScalarOrSchedule = 1.0
) -> optax.GradientTransformation:
    """Returns Adam with the learned rates.

    Args:
      meta_params: logarithms of the rates by rank.
      learning_rate: factor of all rates, a number or a schedule.

    Example:
      >>> tx = adam_rates(AdamRates(jnp.log(jnp.array([1.0, 0.5, 0.1, 0.1, 0.1]))))
      >>> params = {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates["bias"].round(3), updates["kernel"].round(3)
      (Array([-0.5], dtype=float32), Array([[-0.1]], dtype=float32))
    """
    adam = optax.adam(learning_rate)
    rate = lambda u: jnp.exp(meta_params.log_rate[min(u.ndim, 4)])

    def init(params):
        check_leaves(params, "adam_rates")  # an error names what cannot be trained, such as integers
        return adam.init(params)

    def update(updates, state, params=None):
        updates, state = adam.update(updates, state, params)
        return jax.tree.map(lambda u: (rate(u) * u).astype(u.dtype), updates), state

    return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class AdamRatesOptions(BackpropagationOptions):
    """How the rates are meta-trained."""

    learning_rate: float = 0.01
    """Learning rate of every tensor before meta-training; afterwards the factor of the learned ones."""
    meta_loss: MetaLossName = "log"


ADAM_RATES = backpropagated(
    "adam_rates",
    init_adam_rates,
    adam_rates,
    label="Adam, learned rates",
    description="Adam with a learned learning rate for tensors of each rank",
    options=AdamRatesOptions,
)
