"""Adam with a learned learning rate for every tensor: the smallest learned optimizer there is.

Tensors are told apart by their rank, so the five numbers fit any network. It is meta-trained by
back-propagation through the unroll (Andrychowicz et al. 2016), and shows how an optimizer joins the
library: one file, one line in the registry.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mlhf_optax.learned.family import LearnedFamily
from mlhf_optax.meta_training.interface import META_LOSSES, LearnedOptimizer, unrolled_optimizer
from mlhf_optax.support.layer_types import check_leaves

_MAX_RANK = 4


class AdamRates(NamedTuple):
    """Meta-parameters.

    Attributes:
      log_rate: shape (5,), log of the learning rate of tensors of rank 0, 1, 2, 3, and 4 or more.
    """

    log_rate: jax.Array


@dataclasses.dataclass(frozen=True)
class AdamRatesOptions:
    """How the rates are meta-trained.

    Raises:
      ValueError: for a rate that is not positive.
    """

    initial_rate: float = 0.01
    """Learning rate of every tensor before meta-training."""

    def __post_init__(self):
        if not 0 < self.initial_rate < math.inf:
            raise ValueError(f"`initial_rate` must be a positive number, got {self.initial_rate}")


def adam_rates(meta_params: AdamRates, *, b1: float = 0.9, b2: float = 0.999) -> optax.GradientTransformation:
    """Returns Adam with the learned rates.

    Args:
      meta_params: logarithms of the rates by rank.
      b1: decay of the mean of gradients.
      b2: decay of the mean of their squares.

    Returns:
      A gradient transformation.

    Example:
      >>> tx = adam_rates(AdamRates(jnp.log(jnp.array([1.0, 0.5, 0.1, 0.1, 0.1]))))
      >>> params = {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates["bias"].round(3), updates["kernel"].round(3)
      (Array([-0.5], dtype=float32), Array([[-0.1]], dtype=float32))
    """

    def init(params):
        check_leaves(params, "adam_rates")
        return optax.EmptyState()

    def scale(updates, state, params=None):
        del params
        rate = lambda u: jnp.exp(meta_params.log_rate[min(u.ndim, _MAX_RANK)])
        return jax.tree.map(lambda u: (-rate(u) * u).astype(u.dtype), updates), state

    return optax.chain(optax.scale_by_adam(b1, b2), optax.GradientTransformation(init, scale))


def _init(key: chex.PRNGKey, initial_rate: float) -> AdamRates:
    del key
    return AdamRates(jnp.full(_MAX_RANK + 1, math.log(initial_rate), jnp.float32))


def _learned(options: AdamRatesOptions, start: Any = None) -> LearnedOptimizer:
    def init(key, task) -> AdamRates:
        del task
        return _init(key, options.initial_rate) if start is None else start.meta_params

    build = lambda meta_params, task: optax.with_extra_args_support(adam_rates(meta_params))
    return unrolled_optimizer(build, META_LOSSES["log"], init=init)


def _optimizer(
    meta_params: AdamRates, predict_fn: Any, loss_fn: Any, *, b1: float = 0.9, b2: float = 0.999
) -> optax.GradientTransformationExtraArgs:
    """Returns :func:`adam_rates`; the model is not needed."""
    del predict_fn, loss_fn
    return optax.with_extra_args_support(adam_rates(meta_params, b1=b1, b2=b2))


def _template(structure: Mapping[str, Any]) -> AdamRates:
    del structure
    return jax.eval_shape(lambda: _init(jax.random.key(0), 1.0))


ADAM_RATES = LearnedFamily(
    name="adam_rates",
    label="Adam, learned rates",
    description="Adam with a learned learning rate for tensors of each rank",
    options=AdamRatesOptions,
    learned=_learned,
    optimizer=_optimizer,
    arguments=(),
    record=lambda options: {},
    template=_template,
    fits_any=True,
)
