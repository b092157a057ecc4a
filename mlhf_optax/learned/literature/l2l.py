"""L2L: an LSTM on every coordinate sees the gradient and writes the update (Andrychowicz et al. 2016).

The first of its kind, and the control of those that followed: it works on networks like those that it was
meta-trained on and fails on others.

Source: Andrychowicz et al. 2016, "Learning to learn by gradient descent by gradient descent",
arXiv 1606.04474, section 3 and appendix A.
"""

import dataclasses
from typing import NamedTuple

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
_P = 10.0


class L2L(NamedTuple):
    """Meta-parameters, 5,141 numbers.

    Attributes:
      lstm: two layers of 20 units on two inputs, and the output map.
    """

    lstm: lstm.LSTMWeights


class L2LState(NamedTuple):
    """State of :func:`l2l`: 80 floats per parameter.

    Attributes:
      carry: of both LSTM layers; trees with leaves of shape (20, *param.shape).
    """

    carry: tuple[lstm.LayerCarry, ...]


def init_l2l(key: chex.PRNGKey) -> L2L:
    """Returns untrained meta-parameters.

    Example:
      >>> sum(leaf.size for leaf in jax.tree.leaves(init_l2l(jax.random.key(0))))
      5141
    """
    keys = jax.random.split(key, 3)

    def scaled(key, shape):
        return shape[1] ** -0.5 * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)

    first = cells.init_lstm(keys[0], 2, UNITS, scaled)
    second = cells.init_lstm(keys[1], UNITS, UNITS, scaled)
    return L2L(lstm.LSTMWeights((first, second), scaled(keys[2], (1, UNITS))[0], jnp.zeros(())))


def l2l(meta_params: L2L, *, learning_rate: optax.ScalarOrSchedule = 0.1) -> optax.GradientTransformation:
    """Returns L2L with learned weights.

    Args:
      meta_params: the weights, from :func:`init_l2l` or ``load_pretrained("l2l").meta_params``.
      learning_rate: factor of the LSTM's outputs; the paper's is 0.1.

    Returns:
      A gradient transformation; its state starts with an :class:`L2LState`.

    Example:
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> tx = l2l(init_l2l(jax.random.key(0)))
      >>> updates, state = tx.update(params, tx.init(params))
      >>> state[0].carry[1].hidden["kernel"].shape, updates["kernel"].shape
      ((20, 3, 2), (3, 2))

    Source: Andrychowicz et al. 2016, section 3.
    """

    def init(params):
        check_leaves(params, "l2l")
        return L2LState(cells.init_carry(params, len(meta_params.lstm.layers), UNITS))

    def update(updates, state, params=None):
        del params

        def leaf(g, *carry):
            features = log_features(trees.at_least_f32(g))
            output, after = lstm.apply(meta_params.lstm, cells.stacked(carry), features)
            # The LSTM writes the update itself, not a direction to step against.
            return (-output.astype(g.dtype), *cells.unstacked(after))

        direction, *carry = cells.map_leaves(leaf, updates, *cells.unstacked(state.carry))
        return direction, L2LState(cells.stacked(carry))

    core = optax.GradientTransformation(init, update)
    return optax.chain(core, optax.scale_by_learning_rate(learning_rate))


def log_features(gradient: jax.Array) -> jax.Array:
    """Returns the two inputs of every number: its clipped logarithm and sign, or -1 and its scaled value.

    Args:
      gradient: of any shape.

    Returns:
      Shape (2, *gradient.shape), all in [-1, 1] for gradients up to exp(10).

    Example:
      >>> log_features(jnp.array([1.0, 0.0])).round(3)
      Array([[ 0., -1.],
             [ 1.,  0.]], dtype=float32)

    Source: Andrychowicz et al. 2016, appendix A.
    """
    magnitude = jnp.maximum(jnp.abs(gradient), jnp.exp(jnp.asarray(-_P, gradient.dtype)))
    return jnp.stack([jnp.log(magnitude) / _P, jnp.clip(gradient * jnp.exp(_P), -1.0, 1.0)])


@dataclasses.dataclass(frozen=True)
class L2LOptions(BackpropagationOptions):
    """How L2L is meta-trained.

    Raises:
      ValueError: for a value out of range.
    """

    learning_rate: float = 0.1
    """Factor of the LSTM's outputs, in meta-training and in the record."""
    meta_loss: MetaLossName = "sum"


L2L_FAMILY = backpropagated(
    "l2l",
    init_l2l,
    l2l,
    label="L2L",
    description="an LSTM on every coordinate writes the update (Andrychowicz et al. 2016)",
    options=L2LOptions,
)
