"""The network of :func:`mlhf_optax.controllers.tensor_lstm.tensor_lstm`: from statistics to controls.

One small LSTM runs for every tensor, its weights shared by all. Its outputs say by how much the controls of a
step differ from those of the best constant, :data:`CONSTANTS`.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mlhf_optax.controllers.tensor_features import FEATURES
from mlhf_optax.support.checks import FROM_ONE, check_number

OUTPUTS = 7


class Constants(NamedTuple):
    """What the controls are while the output weights are zero, and what is never learned.

    Attributes:
      damping: of every tensor, in its unit ``rms(g) / rms(w0)``.
      power: exponent of the Kronecker factors.
      diagonal: share of Adam's diagonal ``v^(1/2)`` in the metric of matrices, as an exponent.
      rate: factor on the direction.
      memory: steps over which the gradient is averaged.
      warm_start_share: largest multiple of the previous direction with which CG begins.
      floor: added to the eigenvalues of a factor, in units of their mean.
      factor_decay: of the running means in the factors.
      square_decay: of the running mean of squared gradients.
      block: longest side of a factor.
      refresh_every: steps between two eigendecompositions.
      max_rate: largest factor on the direction.
      update_ratio: the network is told when the norm of an update exceeds this share of the parameters'.
      largest_share: share of the largest gradient so far in the unit of damping, as an exponent.
      start_share: share of its damping with which a training starts.
      start_steps: steps after which damping is half-way to its full value.
    """

    damping: float = 10.0
    power: float = 0.7
    diagonal: float = 0.05
    rate: float = 1.0
    memory: float = 7.0
    warm_start_share: float = 0.95
    floor: float = 5e-2
    factor_decay: float = 0.95
    square_decay: float = 0.98
    block: int = 128
    refresh_every: int = 20
    max_rate: float = 1.5
    update_ratio: float = 0.25
    largest_share: float = 0.4
    start_share: float = 0.2
    start_steps: float = 10.0


CONSTANTS = Constants()


class TensorLSTM(NamedTuple):
    """Meta-parameters, for any network; float32.

    Attributes:
      kernel: shape (features + units, 4 * units), of the gates i, f, g, o of the LSTM.
      bias: shape (4 * units,).
      readout: shape (units, outputs), from half of the LSTM's hidden state to the outputs.
      linear: shape (features, outputs), past the LSTM.
      offset: shape (outputs,).
    """

    kernel: jax.Array
    bias: jax.Array
    readout: jax.Array
    linear: jax.Array
    offset: jax.Array


def init_tensor_lstm(key: chex.PRNGKey, units: int = 8) -> TensorLSTM:
    """Returns a random LSTM whose output weights are zero, so that it is the constant controller.

    Args:
      key: random key.
      units: units of the LSTM.

    Raises:
      ValueError: if ``units`` is below one.

    Example:
      >>> sum(leaf.size for leaf in init_tensor_lstm(jax.random.key(0)))
      1209
    """
    check_number("units", units, FROM_ONE)
    fan_in = FEATURES + units
    # With forget gates that are open at the start, long time scales are learned sooner.
    bias = jnp.zeros((4, units)).at[1].set(1.0).reshape(-1)
    return TensorLSTM(
        jax.random.normal(key, (fan_in, 4 * units)) * fan_in**-0.5,
        bias,
        jnp.zeros((units, OUTPUTS)),
        jnp.zeros((FEATURES, OUTPUTS)),
        jnp.zeros(OUTPUTS),
    )


def run_network(
    meta_params: TensorLSTM, features: jax.Array, hidden: jax.Array, cell: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Takes one step of the LSTM of every tensor.

    Args:
      meta_params: the weights.
      features: shape (tensors, FEATURES).
      hidden: hidden states, shape (tensors, units).
      cell: cells, likewise.

    Returns:
      Outputs, shape (tensors, OUTPUTS), and the next hidden states and cells.
    """
    gates = jnp.concatenate([features, hidden], 1) @ meta_params.kernel + meta_params.bias[None]
    i, f, g, o = jnp.split(gates, 4, axis=1)
    cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
    # Twice: equal noise on all meta-parameters then moves the outputs about as much by each. Evolution
    # strategies perturb them all with noise of one size.
    outputs = 2 * hidden @ meta_params.readout + features @ meta_params.linear + meta_params.offset[None]
    return outputs, hidden, cell


class Controls(NamedTuple):
    """What the network chooses; the first four have shape (tensors,), the others are scalars.

    Attributes:
      damping: in the unit of damping.
      trust: the preconditioner is ``trust * S^-1``, so a tensor's share of a CG step grows with it.
      power: exponent of the Kronecker factors.
      diagonal: exponent share of Adam's diagonal.
      rate: factor on the direction.
      memory: steps over which the gradient is averaged.
      warm_start_share: largest multiple of the previous direction with which CG begins.
    """

    damping: jax.Array
    trust: jax.Array
    power: jax.Array
    diagonal: jax.Array
    rate: jax.Array
    memory: jax.Array
    warm_start_share: jax.Array


def bounded_controls(outputs: jax.Array, constants: Constants = CONSTANTS) -> Controls:
    """Turns outputs of the network, shape (tensors, OUTPUTS), into bounded controls around the constants.

    Example:
      >>> controls = bounded_controls(jnp.zeros((3, OUTPUTS)))
      >>> controls.damping, controls.rate
      (Array([10., 10., 10.], dtype=float32), Array(1., dtype=float32))
    """
    # Both are the constant at zero, with a slope of one: in its logarithm, or in its logit.
    within = lambda x, factor: jnp.exp(math.log(factor) * jnp.tanh(x / math.log(factor)))
    share = lambda x, at: jax.nn.sigmoid(x + math.log(at / (1 - at)))
    each, shared = outputs.T, jnp.mean(outputs, axis=0)
    return Controls(
        damping=constants.damping * within(2 * each[0], 30.0),
        trust=within(-each[1], 10.0),
        power=share(each[2], constants.power),
        diagonal=share(each[3], constants.diagonal),
        rate=constants.max_rate * share(shared[4], constants.rate / constants.max_rate),
        memory=jnp.maximum(constants.memory * within(shared[5], 10.0), 1.0),
        warm_start_share=share(shared[6], constants.warm_start_share),
    )
