"""HyperAdam: twenty Adams whose decays and weights are learned, for every coordinate (Wang et al. 2019).

Source: Wang, Sun, Xu 2019, "HyperAdam: A Learnable Task-Adaptive Adam for Network Training",
arXiv 1811.08996, section 4.
"""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mlhf_optax.controllers import lstm
from mlhf_optax.learned.backpropagation import BackpropagationOptions, MetaLossName, backpropagated
from mlhf_optax.learned.literature import cells
from mlhf_optax.support import trees
from mlhf_optax.support.layer_types import check_leaves

CANDIDATES = 20
_EPS = 1e-24
_NORM_EPS = 1e-16


class HyperAdam(NamedTuple):
    """Meta-parameters, 5,380 numbers; J = 20.

    Attributes:
      inputs: dense layer from the gradient to J features.
      lstm: layer of J units.
      decays: dense layer from 2 J features to J decays of means and J decays of squares.
      weights: dense layer from the LSTM's state to the weights of J candidates.
    """

    inputs: cells.Dense
    lstm: lstm.LayerWeights
    decays: cells.Dense
    weights: cells.Dense


class Moments(NamedTuple):
    """What J Adams remember; trees with leaves of shape (J, *param.shape).

    Attributes:
      carry: of the LSTM.
      mean: means of gradients.
      variance: means of their squares.
      mean_weight: sum of the weights in ``mean``, which corrects its bias.
      variance_weight: sum of the weights in ``variance``.
    """

    carry: lstm.LayerCarry
    mean: Any
    variance: Any
    mean_weight: Any
    variance_weight: Any


class HyperAdamState(NamedTuple):
    """State of :func:`hyperadam`: 120 floats per parameter.

    Attributes:
      moments: of all candidates.
    """

    moments: Moments


def init_hyperadam(key: chex.PRNGKey) -> HyperAdam:
    """Returns untrained meta-parameters; weights start near 0 and decays near 1/2.

    Example:
      >>> sum(leaf.size for leaf in jax.tree.leaves(init_hyperadam(jax.random.key(0))))
      5380
    """
    keys, J = jax.random.split(key, 4), CANDIDATES
    decays = cells.Dense(cells.glorot(keys[2], (2 * J, 2 * J)), jnp.zeros(2 * J, jnp.float32))
    return HyperAdam(
        cells.init_dense(keys[0], 1, J),
        cells.init_lstm(keys[1], J, J, cells.glorot),
        decays,
        cells.init_dense(keys[3], J, J),
    )


def hyperadam(
    meta_params: HyperAdam, *, learning_rate: optax.ScalarOrSchedule = 0.005
) -> optax.GradientTransformation:
    """Returns HyperAdam with learned weights.

    Norms go over the whole network, so the optimizer sees one tree of parameters, as :func:`optax.lamb`.

    Args:
      meta_params: the weights, from :func:`init_hyperadam` or ``load_pretrained("hyperadam").meta_params``.
      learning_rate: factor of the updates; the paper's is 0.005.

    Returns:
      A gradient transformation; its state starts with a :class:`HyperAdamState`.

    Example:
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> tx = hyperadam(init_hyperadam(jax.random.key(0)))
      >>> updates, state = tx.update(params, tx.init(params))
      >>> state[0].moments.mean["kernel"].shape, updates["kernel"].shape
      ((20, 3, 2), (3, 2))

    Source: Wang et al. 2019, section 4, equations 4 to 8.
    """

    def init(params):
        check_leaves(params, "hyperadam")
        return HyperAdamState(init_moments(params))

    def update(updates, state, params=None):
        del params
        gradient = jax.tree.map(lambda g: trees.at_least_f32(g)[None], updates)
        features = jax.tree.map(
            lambda g: jax.nn.elu(cells.dense(meta_params.inputs, g)), normalised(gradient)
        )
        direction, _, moments = candidates(meta_params, gradient, features, state.moments)
        return optax.tree.cast_like(direction, updates), HyperAdamState(moments)

    core = optax.GradientTransformation(init, update)
    return optax.chain(core, optax.scale_by_learning_rate(learning_rate))


def init_moments(params: Any) -> Moments:
    """Returns zeros for every parameter."""
    zeros = lambda: cells.wide(params, CANDIDATES)
    return Moments(lstm.LayerCarry(zeros(), zeros()), zeros(), zeros(), zeros(), zeros())


def candidates(
    meta_params: Any, gradient: Any, features: Any, moments: Moments, mean_first: bool = False
) -> tuple[Any, Any, Moments]:
    """Advances the Adams by one step and weighs what they propose.

    Args:
      meta_params: has ``lstm``, ``decays`` and ``weights``, as :class:`HyperAdam`.
      gradient: tree with leaves of shape (1, *param.shape).
      features: inputs of the LSTM; tree with leaves of shape (J, *param.shape).
      moments: before the step.
      mean_first: whether the decays see the means before the LSTM's state.

    Returns:
      The direction, a tree shaped like the parameters; the state of the LSTM, leaves (J, *param.shape); and
      the moments after the step.
    """
    run = lambda inputs, cell, hidden: _flat(
        cells.lstm_layer(meta_params.lstm, lstm.LayerCarry(cell, hidden), inputs)
    )
    state, cell, hidden = cells.map_leaves(run, features, *moments.carry)

    def adams(s, m, normal_s, normal_m, g, v, mean_weight, variance_weight):
        seen = (normal_m, normal_s) if mean_first else (normal_s, normal_m)
        decays = jax.nn.sigmoid(cells.dense(meta_params.decays, jnp.concatenate(seen)))
        beta, gamma = jnp.split(decays, 2)
        m = beta * m + (1 - beta) * g
        v = gamma * v + (1 - gamma) * jnp.square(g)
        mean_weight = beta * mean_weight + (1 - beta)
        variance_weight = gamma * variance_weight + (1 - gamma)
        proposed = m / (mean_weight + _EPS) * jax.lax.rsqrt(v / (variance_weight + _EPS) + _EPS)
        weights = jax.nn.elu(cells.dense(meta_params.weights, s))
        return jnp.sum(weights * proposed, axis=0), m, v, mean_weight, variance_weight

    direction, *after = cells.map_leaves(
        adams,
        state,
        moments.mean,
        normalised(state),
        normalised(moments.mean),
        gradient,
        moments.variance,
        moments.mean_weight,
        moments.variance_weight,
    )
    return direction, state, Moments(lstm.LayerCarry(cell, hidden), *after)


def normalised(tree: Any) -> Any:
    """Divides every feature by its norm over all coordinates of the network.

    Args:
      tree: leaves of shape (F, *param.shape).

    Returns:
      The same shapes; zeros stay zeros, and their derivatives are finite.

    Example:
      >>> normalised({"a": jnp.array([[3.0]]), "b": jnp.array([[4.0, 0.0]])})["b"]
      Array([[0.8, 0. ]], dtype=float32)
    """
    squares = sum(jnp.sum(jnp.square(x), axis=range(1, x.ndim)) for x in jax.tree.leaves(tree))
    scale = jax.lax.rsqrt(squares + _NORM_EPS)
    return jax.tree.map(lambda x: x * cells.spread(scale, x), tree)


def _flat(result: tuple[jax.Array, lstm.LayerCarry]) -> tuple[jax.Array, jax.Array, jax.Array]:
    return result[0], *result[1]


@dataclasses.dataclass(frozen=True)
class HyperAdamOptions(BackpropagationOptions):
    """How HyperAdam is meta-trained.

    Raises:
      ValueError: for a value out of range.
    """

    learning_rate: float = 0.005
    """Factor of the updates, in meta-training and in the record."""
    meta_loss: MetaLossName = "mean"


HYPERADAM = backpropagated(
    "hyperadam",
    init_hyperadam,
    hyperadam,
    label="HyperAdam",
    description="twenty Adams with learned decays and weights for every coordinate (Wang et al. 2019)",
    options=HyperAdamOptions,
)
