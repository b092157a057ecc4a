"""The hierarchical optimizer: small GRUs for every coordinate, tensor and network (Wichrowska et al. 2017).

The network of a coordinate is small, since those above it tell it what it needs to know. Inputs are scaled
by their own running size, so nothing depends on the scale of the loss.

Source: Wichrowska et al. 2017, "Learned Optimizers that Scale and Generalize", arXiv 1703.04813, section 3.
Attention (a second point at which gradients are taken) is left out, and the logarithms of learning rates
start from one value instead of random ones.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mlhf_optax.learned.backpropagation import (
    BackpropagationOptions,
    InnerGradients,
    MetaLossName,
    backpropagated,
)
from mlhf_optax.learned.literature import cells
from mlhf_optax.support import trees
from mlhf_optax.support.checks import POSITIVE, check_number
from mlhf_optax.support.layer_types import check_leaves

PARAM_UNITS = 10
UPPER_UNITS = 20
TIMESCALES = 4
_FEATURES = 3 * TIMESCALES
_POWERS = tuple(0.5**k for k in range(TIMESCALES))
_EPS = 1e-16
_MAX_LOG_RATE = 33.0


class Hierarchical(NamedTuple):
    """Meta-parameters, 8,350 numbers.

    Attributes:
      param_gru: 10 units on 12 inputs, for every coordinate.
      tensor_gru: 20 units on the means over a tensor of the states and inputs of its coordinates.
      global_gru: 20 units on the mean over tensors of their states.
      param_start: shape (10,), first state of a coordinate.
      tensor_start: shape (20,), first state of a tensor.
      global_start: shape (20,), first state of the network.
      tensor_to_param: dense layer to what is added to the gates of ``param_gru``.
      global_to_param: dense layer to what is added to them as well.
      global_to_tensor: dense layer to what is added to the gates of ``tensor_gru``.
      outputs: dense layer from a coordinate's state to direction, change of the log rate, and the two decays.
      shortcut: shape (4,), from the scaled gradients to the direction.
      rate_momentum: shape (), logit of the momentum of log rates.
      rate_offset: shape (), subtracted from log rates.
    """

    param_gru: cells.GRU
    tensor_gru: cells.GRU
    global_gru: cells.GRU
    param_start: jax.Array
    tensor_start: jax.Array
    global_start: jax.Array
    tensor_to_param: cells.Dense
    global_to_param: cells.Dense
    global_to_tensor: cells.Dense
    outputs: cells.Dense
    shortcut: jax.Array
    rate_momentum: jax.Array
    rate_offset: jax.Array


class HierarchicalState(NamedTuple):
    """State of :func:`hierarchical`: 21 floats per parameter, 20 a tensor and 20 in all.

    Attributes:
      param_state: of the coordinates; leaves of shape (10, *param.shape).
      tensor_state: of the tensors; leaves of shape (20,).
      global_state: of the network, shape (20,).
      means: running means of gradients at four timescales; leaves of shape (4, *param.shape).
      squares: running means of the squares of these; leaves of shape (4, *param.shape).
      decays: logits of the decays of means and of squares; leaves of shape (2, *param.shape).
      log_rate: logarithms of the learning rates, shaped like the parameters.
    """

    param_state: Any
    tensor_state: Any
    global_state: jax.Array
    means: Any
    squares: Any
    decays: Any
    log_rate: Any


def init_hierarchical(key: chex.PRNGKey) -> Hierarchical:
    """Returns untrained meta-parameters, which descend along the scaled gradient.

    Example:
      >>> sum(leaf.size for leaf in jax.tree.leaves(init_hierarchical(jax.random.key(0))))
      8350
    """
    keys = jax.random.split(key, 10)
    P, U = PARAM_UNITS, UPPER_UNITS
    start = lambda k, units: jax.random.uniform(k, (units,), jnp.float32, -1.0, 1.0)
    bias = jnp.array([0.0, 0.0, 2.2, 3.2], jnp.float32)
    return Hierarchical(
        _init_gru(keys[0], _FEATURES, P),
        _init_gru(keys[1], P + _FEATURES, U),
        _init_gru(keys[2], U, U),
        start(keys[3], P),
        start(keys[4], U),
        start(keys[5], U),
        cells.init_dense(keys[6], U, 3 * P, 0.01),
        cells.init_dense(keys[7], U, 3 * P, 0.01),
        cells.init_dense(keys[8], U, 3 * U, 0.01),
        cells.init_dense(keys[9], P, 4, 0.01)._replace(bias=bias),
        jnp.full(TIMESCALES, 1 / TIMESCALES, jnp.float32),
        jnp.asarray(3.2, jnp.float32),
        jnp.asarray(1.0, jnp.float32),
    )


def _init_gru(key: chex.PRNGKey, num_inputs: int, units: int) -> cells.GRU:
    keys = jax.random.split(key)
    scaled = lambda k, n: 0.5 * n**-0.5 * jax.random.normal(k, (3 * units, n), jnp.float32)
    gates = jnp.full(2 * units, 2.2, jnp.float32)
    return cells.GRU(scaled(keys[0], num_inputs), scaled(keys[1], units), jnp.pad(gates, (0, units)))


def hierarchical(
    meta_params: Hierarchical,
    *,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    initial_rate: float = 1e-2,
) -> optax.GradientTransformation:
    """Returns the hierarchical optimizer with learned weights.

    Args:
      meta_params: the weights, from :func:`init_hierarchical` or
        ``load_pretrained("hierarchical").meta_params``.
      learning_rate: factor of the updates.
      initial_rate: learning rate of every coordinate at the first step, before the learned offset: root mean
        square of the change of a tensor, in units of the parameter.

    Returns:
      A gradient transformation; its state starts with a :class:`HierarchicalState`.

    Raises:
      ValueError: for an ``initial_rate`` that is not positive.

    Example:
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> tx = hierarchical(init_hierarchical(jax.random.key(0)))
      >>> updates, state = tx.update(params, tx.init(params))
      >>> state[0].param_state["kernel"].shape, state[0].tensor_state["kernel"].shape
      ((10, 3, 2), (20,))

    Source: Wichrowska et al. 2017, section 3.
    """
    check_number("initial_rate", initial_rate, POSITIVE)

    def init(params):
        check_leaves(params, "hierarchical")

        def starts(vector):
            zeros = cells.wide(params, vector.size)
            return jax.tree.map(lambda x: x + cells.spread(vector, x).astype(x.dtype), zeros)

        tensors = jax.tree.map(lambda p: meta_params.tensor_start.astype(trees.wide_dtype(p)), params)
        return HierarchicalState(
            starts(meta_params.param_start),
            tensors,
            meta_params.global_start.astype(trees.common_dtype(jnp.float32, *jax.tree.leaves(params))),
            cells.wide(params, TIMESCALES),
            cells.wide(params, TIMESCALES),
            starts(meta_params.outputs.bias[2:]),
            jax.tree.map(lambda x: x + math.log(initial_rate), cells.wide(params)),
        )

    def update(updates, state, params=None):
        del params
        gradient = jax.tree.map(trees.at_least_f32, updates)
        means, squares, scaled = cells.map_leaves(
            _running_means, gradient, state.means, state.squares, state.decays
        )
        mean_rate = _mean(state.log_rate)
        (features,) = cells.map_leaves(
            lambda x, v, rate: (_features(x, v, rate, mean_rate),), scaled, squares, state.log_rate
        )
        from_global = cells.dense(meta_params.global_to_param, state.global_state)
        to_tensor = cells.dense(meta_params.global_to_tensor, state.global_state)

        def advance(x, coordinate, tensor):
            shift = from_global + cells.dense(meta_params.tensor_to_param, tensor)
            coordinate = cells.gru(meta_params.param_gru, coordinate, x, shift)
            whole = jnp.concatenate([coordinate, x])
            summary = jnp.mean(whole, axis=range(1, whole.ndim))
            return coordinate, cells.gru(meta_params.tensor_gru, tensor, summary, to_tensor)

        param_state, tensor_state = cells.map_leaves(advance, features, state.param_state, state.tensor_state)
        tensors = jax.tree.leaves(tensor_state)
        summary = jnp.mean(jnp.stack(tensors), axis=0)
        global_state = cells.gru(meta_params.global_gru, state.global_state, summary)

        def step(coordinate, x, log_rate):
            outputs = cells.dense(meta_params.outputs, coordinate)
            direction = outputs[0] + jnp.tensordot(meta_params.shortcut, x, axes=1)
            direction *= jax.lax.rsqrt(jnp.mean(jnp.square(direction)) + _EPS)
            change = (1 - jax.nn.sigmoid(meta_params.rate_momentum)) * outputs[1]
            log_rate = jnp.clip(log_rate + change, -_MAX_LOG_RATE, _MAX_LOG_RATE)
            return jnp.exp(log_rate - meta_params.rate_offset) * direction, outputs[2:], log_rate

        direction, decays, log_rate = cells.map_leaves(step, param_state, scaled, state.log_rate)
        state = HierarchicalState(param_state, tensor_state, global_state, means, squares, decays, log_rate)
        return optax.tree.cast_like(direction, updates), state

    core = optax.GradientTransformation(init, update)
    return optax.chain(core, optax.scale_by_learning_rate(learning_rate))


def _running_means(g, means, squares, decays):
    """Returns means, mean squares and the means in their own units, squashed; each (4, *shape)."""
    power = cells.spread(jnp.asarray(_POWERS, g.dtype), means)
    decay, square_decay = jax.nn.sigmoid(decays)[:, None] ** power[None]
    means = decay * means + (1 - decay) * g[None]
    squares = square_decay * squares + (1 - square_decay) * jnp.square(means)
    return means, squares, jnp.arcsinh(means * jax.lax.rsqrt(squares + _EPS))


def _features(scaled, squares, log_rate, mean_rate):
    """Returns the 12 inputs of every coordinate, (12, *shape)."""
    log_squares = jnp.log(squares + _EPS)
    noise = log_squares - jnp.mean(log_squares, axis=0, keepdims=True)
    return jnp.concatenate([scaled, scaled[1:] * scaled[:-1], noise, (log_rate - mean_rate)[None]])


def _mean(tree: Any) -> jax.Array:
    return jnp.asarray(trees.total([jnp.sum(x) for x in jax.tree.leaves(tree)]) / trees.size(tree))


@dataclasses.dataclass(frozen=True)
class HierarchicalOptions(BackpropagationOptions):
    """How the hierarchical optimizer is meta-trained.

    Raises:
      ValueError: for a value out of range.
    """

    meta_loss: MetaLossName = "log"
    inner_gradients: InnerGradients = "differentiated"


HIERARCHICAL = backpropagated(
    "hierarchical",
    init_hierarchical,
    hierarchical,
    label="Hierarchical RNN",
    description="small GRUs for every coordinate, tensor and network (Wichrowska et al. 2017)",
    options=HierarchicalOptions,
)
