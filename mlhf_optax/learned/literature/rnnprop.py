"""RNNprop: an LSTM on every coordinate sees the gradient and its mean in units of Adam (Lv et al. 2017).

Its inputs do not change with the scale of the loss, and no update exceeds the learning rate.

Source: Lv, Jiang, Li 2017, "Learning Gradient Descent: Better Generalization and Longer Horizons",
arXiv 1703.03633, sections 3 and 4.
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

UNITS = 20
DECAY = 0.95
_EPS = 1e-8


class RNNProp(NamedTuple):
    """Meta-parameters, 6,641 numbers.

    Attributes:
      dense: from the two inputs to 20 features.
      lstm: two layers of 20 units and the output map.
    """

    dense: cells.Dense
    lstm: lstm.LSTMWeights


class RNNPropState(NamedTuple):
    """State of :func:`rnnprop`: 82 floats per parameter.

    Attributes:
      count: number of steps done, int32, shape ().
      mean: running mean of gradients, shaped like the parameters.
      variance: running mean of their squares, shaped like the parameters.
      carry: of both LSTM layers; trees with leaves of shape (20, *param.shape).
    """

    count: jax.Array
    mean: Any
    variance: Any
    carry: tuple[lstm.LayerCarry, ...]


def init_rnnprop(key: chex.PRNGKey) -> RNNProp:
    """Returns untrained meta-parameters.

    Example:
      >>> sum(leaf.size for leaf in jax.tree.leaves(init_rnnprop(jax.random.key(0))))
      6641
    """
    keys = jax.random.split(key, 4)
    sample = cells.uniform((3 / (2 * UNITS)) ** 0.5)
    layers = tuple(cells.init_lstm(k, UNITS, UNITS, sample) for k in keys[1:3])
    output = cells.init_dense(keys[3], UNITS, 1)
    weights = lstm.LSTMWeights(layers, output.kernel[0], output.bias[0])
    return RNNProp(cells.init_dense(keys[0], 2, UNITS), weights)


def rnnprop(
    meta_params: RNNProp, *, learning_rate: optax.ScalarOrSchedule = 0.1
) -> optax.GradientTransformation:
    """Returns RNNprop with learned weights.

    Args:
      meta_params: the weights, from :func:`init_rnnprop` or ``load_pretrained("rnnprop").meta_params``.
      learning_rate: bound on the change of a parameter in one step, in units of the parameter. The paper's
        is 0.1.

    Returns:
      A gradient transformation; its state starts with a :class:`RNNPropState`.

    Example:
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> tx = rnnprop(init_rnnprop(jax.random.key(0)))
      >>> updates, state = tx.update(params, tx.init(params))
      >>> state[0].carry[0].cell["kernel"].shape, bool(abs(updates["kernel"]).max() <= 0.1)
      ((20, 3, 2), True)

    Source: Lv et al. 2017, section 4.1.
    """

    def init(params):
        check_leaves(params, "rnnprop")
        carry = cells.init_carry(params, len(meta_params.lstm.layers), UNITS)
        return RNNPropState(jnp.zeros((), jnp.int32), cells.wide(params), cells.wide(params), carry)

    def update(updates, state, params=None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))

        def leaf(g, mean, variance, *carry):
            mean, variance, features = adam_features(g, mean, variance, count)
            inner = jax.nn.elu(cells.dense(meta_params.dense, features))
            output, after = lstm.apply(meta_params.lstm, cells.stacked(carry), inner)
            return (jnp.tanh(output).astype(g.dtype), mean, variance, *cells.unstacked(after))

        direction, mean, variance, *carry = cells.map_leaves(
            leaf, updates, state.mean, state.variance, *cells.unstacked(state.carry)
        )
        return direction, RNNPropState(count, mean, variance, cells.stacked(carry))

    core = optax.GradientTransformation(init, update)
    return optax.chain(core, optax.scale_by_learning_rate(learning_rate))


def adam_features(
    gradient: jax.Array, mean: jax.Array, variance: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the next running mean and mean square of one tensor, and RNNprop's two inputs of them.

    Args:
      gradient: of shape ``shape``.
      mean: running mean of gradients before this step, shape ``shape``.
      variance: running mean of their squares, shape ``shape``.
      count: number of this step, from 1.

    Returns:
      Mean, mean square, and features of shape (2, *shape): the gradient and its mean over the root of the
      mean square, with corrected bias.
    """
    g = gradient.astype(mean.dtype)
    mean = DECAY * mean + (1 - DECAY) * g
    variance = DECAY * variance + (1 - DECAY) * jnp.square(g)
    correction = 1 - jax.lax.pow(jnp.asarray(DECAY, mean.dtype), count)
    # Nothing is learned before these inputs, but the parameters' history may be differentiated as well.
    root = trees.safe_sqrt(variance / correction) + _EPS
    return mean, variance, jnp.stack([g / root, mean / correction / root])


@dataclasses.dataclass(frozen=True)
class RNNPropOptions(BackpropagationOptions):
    """How RNNprop is meta-trained.

    Raises:
      ValueError: for a value out of range.
    """

    learning_rate: float = 0.1
    """Bound on the change of a parameter in one step, in meta-training and in the record."""
    meta_loss: MetaLossName = "last"


RNNPROP = backpropagated(
    "rnnprop",
    init_rnnprop,
    rnnprop,
    label="RNNprop",
    description="an LSTM on every coordinate sees gradient and mean in units of Adam (Lv et al. 2017)",
    options=RNNPropOptions,
)
