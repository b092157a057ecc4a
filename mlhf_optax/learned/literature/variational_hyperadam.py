"""Variational HyperAdam: HyperAdam whose update is sampled, with a learned variance (Wang et al. 2022).

Source: Wang, Yang, Sun, Xu 2022, "Variational HyperAdam: A Meta-Learning Approach to Network Training", IEEE
TPAMI 44(8), 4469-4484. The KL divergence is to a unit Gaussian with the mean left out, as its authors
implemented it.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import optax

from mlhf_optax.controllers import lstm
from mlhf_optax.learned.backpropagation import BackpropagationOptions, MetaLossName, backpropagated
from mlhf_optax.learned.literature import cells
from mlhf_optax.learned.literature.hyperadam import CANDIDATES, Moments, candidates, init_moments, normalised
from mlhf_optax.learned.literature.rnnprop import adam_features
from mlhf_optax.support import trees
from mlhf_optax.support.checks import check_choice
from mlhf_optax.support.layer_types import check_leaves

KLReduction = Literal["sum", "mean"]
_KL_WEIGHT = 1e-4


class VariationalHyperAdam(NamedTuple):
    """Meta-parameters, 5,421 numbers; J = 20.

    Attributes:
      inputs: dense layer from RNNprop's two inputs to J features.
      lstm: layer of J units.
      decays: dense layer from 2 J features to J decays of means and J decays of squares.
      weights: dense layer from the LSTM's state to the weights of J candidates.
      log_variance: dense layer from the LSTM's state to the logarithm of the update's variance.
    """

    inputs: cells.Dense
    lstm: lstm.LayerWeights
    decays: cells.Dense
    weights: cells.Dense
    log_variance: cells.Dense


class VariationalHyperAdamState(NamedTuple):
    """State of :func:`variational_hyperadam`: 122 floats per parameter.

    Attributes:
      count: number of steps done, int32, shape ().
      gradient_mean: running mean of gradients, shaped like the parameters.
      gradient_square: running mean of their squares, shaped like the parameters.
      moments: of all candidates.
      key: random key data for the next step, uint32.
      kl: divergence of the last update from a unit Gaussian, nats, float32, shape ().
    """

    count: jax.Array
    gradient_mean: Any
    gradient_square: Any
    moments: Moments
    key: jax.Array
    kl: jax.Array


def init_variational_hyperadam(key: chex.PRNGKey) -> VariationalHyperAdam:
    """Returns untrained meta-parameters.

    Example:
      >>> sum(leaf.size for leaf in jax.tree.leaves(init_variational_hyperadam(jax.random.key(0))))
      5421
    """
    keys, J = jax.random.split(key, 5), CANDIDATES
    return VariationalHyperAdam(
        cells.init_dense(keys[0], 2, J),
        cells.init_lstm(keys[1], J, J, cells.glorot),
        cells.Dense(cells.glorot(keys[2], (2 * J, 2 * J)), jnp.zeros(2 * J, jnp.float32)),
        cells.init_dense(keys[3], J, J),
        cells.init_dense(keys[4], J, 1),
    )


def variational_hyperadam(
    meta_params: VariationalHyperAdam,
    *,
    learning_rate: optax.ScalarOrSchedule = 0.001,
    deterministic: bool = False,
    kl_reduction: KLReduction = "sum",
    seed: int = 0,
) -> optax.GradientTransformation:
    """Returns Variational HyperAdam with learned weights.

    Args:
      meta_params: the weights, from :func:`init_variational_hyperadam` or
        ``load_pretrained("variational_hyperadam").meta_params``.
      learning_rate: factor of the updates. The paper's is 0.001 in meta-training; its authors tuned it for
        every problem, down to 0.00001.
      deterministic: take the mean update instead of a sample.
      kl_reduction: whether ``state.kl`` is the sum over coordinates (the authors') or their mean.
      seed: of the samples; equal seeds draw equal noise.

    Returns:
      A gradient transformation; its state starts with a :class:`VariationalHyperAdamState`.

    Raises:
      ValueError: for an unknown ``kl_reduction``.

    Example:
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> tx = variational_hyperadam(init_variational_hyperadam(jax.random.key(0)), kl_reduction="mean")
      >>> updates, state = tx.update(params, tx.init(params))
      >>> bool(state[0].kl < 0.01), updates["kernel"].shape
      (True, (3, 2))
    """
    check_choice("kl_reduction", kl_reduction, get_args(KLReduction))

    def init(params):
        check_leaves(params, "variational_hyperadam")
        return VariationalHyperAdamState(
            jnp.zeros((), jnp.int32),
            cells.wide(params),
            cells.wide(params),
            init_moments(params),
            jax.random.key_data(jax.random.key(seed)),
            jnp.zeros((), jnp.float32),
        )

    def update(updates, state, params=None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        mean, variance, features = cells.map_leaves(
            lambda g, m, v: adam_features(g, m, v, count), updates, state.gradient_mean, state.gradient_square
        )
        inner = jax.tree.map(lambda x: jax.nn.elu(cells.dense(meta_params.inputs, x)), features)
        gradient = jax.tree.map(lambda g, m: g.astype(m.dtype)[None], updates, mean)
        # As its authors' code, which normalises what enters the LSTM too.
        carry = state.moments.carry
        moments = state.moments._replace(carry=carry._replace(hidden=normalised(carry.hidden)))
        direction, hidden, moments = candidates(
            meta_params, gradient, normalised(inner), moments, mean_first=True
        )
        log_variance = jax.tree.map(lambda s: cells.dense(meta_params.log_variance, s)[0], hidden)
        key, draw_key = jax.random.split(jax.random.wrap_key_data(state.key))
        if not deterministic:
            direction = _sampled(draw_key, direction, log_variance)
        kl = _divergence(log_variance, kl_reduction).astype(jnp.float32)
        state = VariationalHyperAdamState(count, mean, variance, moments, jax.random.key_data(key), kl)
        return optax.tree.cast_like(direction, updates), state

    core = optax.GradientTransformation(init, update)
    return optax.chain(core, optax.scale_by_learning_rate(learning_rate))


def _sampled(key: jax.Array, mean: Any, log_variance: Any) -> Any:
    sample = lambda m, v, k: m + jnp.exp(0.5 * v) * jax.random.normal(k, m.shape, m.dtype)
    return jax.tree.map(sample, mean, log_variance, optax.tree.split_key_like(key, mean))


def _divergence(log_variance: Any, reduction: KLReduction) -> jax.Array:
    total = trees.total([jnp.sum(0.5 * (jnp.expm1(x) - x)) for x in jax.tree.leaves(log_variance)])
    return jnp.asarray(total if reduction == "sum" else total / trees.size(log_variance))


@dataclasses.dataclass(frozen=True)
class VariationalHyperAdamOptions(BackpropagationOptions):
    """How Variational HyperAdam is meta-trained.

    Raises:
      ValueError: for a value out of range.
    """

    learning_rate: float = 0.001
    """Factor of the updates, in meta-training and in the record."""
    meta_loss: MetaLossName = "mean_after"


VARIATIONAL_HYPERADAM = backpropagated(
    "variational_hyperadam",
    init_variational_hyperadam,
    variational_hyperadam,
    label="Variational HyperAdam",
    description="HyperAdam whose update is sampled with a learned variance (Wang et al. 2022)",
    options=VariationalHyperAdamOptions,
    # The weight of the divergence is the authors', for its sum over coordinates.
    penalty=lambda state: _KL_WEIGHT * state[0].kl,
)
