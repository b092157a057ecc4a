"""One small LSTM that runs on every coordinate of a parameter with shared weights.

For a parameter of shape ``shape``, carries and stacked inputs have shape ``(units, *shape)``. So nothing is
reshaped, elementwise work is contiguous, and a carry is sharded like its parameter.
On a CPU both networks take 1.8 to 4.0 times as long as their tanh and exponentials alone; one product per
layer, over inputs and hidden states joined, was the fastest way to write the gates.
Source: paper, section 4 (two layers of 4 units), after Andrychowicz et al. 2016.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mlhf_optax.support import placement
from mlhf_optax.support.checks import FROM_ONE, check_number, require


class LayerWeights(NamedTuple):
    """Weights of one LSTM layer of H units on F inputs; gates in the order i, f, g, o.

    Attributes:
      kernel: shape (4 H, F + H), on inputs and previous hidden state.
      bias: shape (4 H,).
    """

    kernel: jax.Array
    bias: jax.Array


class LSTMWeights(NamedTuple):
    """Weights of a coordinate-wise LSTM.

    Attributes:
      layers: one :class:`LayerWeights` a layer.
      output_kernel: shape (H,), the linear map on the last hidden state.
      output_bias: shape ().
    """

    layers: tuple[LayerWeights, ...]
    output_kernel: jax.Array
    output_bias: jax.Array


class LayerCarry(NamedTuple):
    """State of one LSTM layer for one parameter, or for a tree of them.

    Attributes:
      cell: shape (H, *param.shape).
      hidden: shape (H, *param.shape).
    """

    cell: Any
    hidden: Any


def init_weights(key: chex.PRNGKey, num_inputs: int, units: Sequence[int] = (4, 4)) -> LSTMWeights:
    """Returns fresh weights: scaled normal kernels, forget biases of one, a zero output map.

    With a zero output map every coordinate starts at the damping and the preconditioner that the settings
    chose, whatever it sees.

    Args:
      key: random key.
      num_inputs: number of input features F >= 1.
      units: width of every layer; its length is the depth.

    Returns:
      The weights.

    Raises:
      ValueError: if ``units`` is empty or any size is below one.

    Example:
      >>> import jax
      >>> weights = init_weights(jax.random.key(0), num_inputs=3)
      >>> [layer.kernel.shape for layer in weights.layers]
      [(16, 7), (16, 8)]
    """
    check_number("num_inputs", num_inputs, FROM_ONE)
    require(units and min(units) >= 1, "units", "at least 1 for every layer, and at least one layer", units)
    layers = []
    fan_in = num_inputs
    for layer_key, width in zip(jax.random.split(key, len(units)), units, strict=True):
        # Pre-activations of about one, whatever the width.
        scale = (fan_in + width) ** -0.5
        kernel = scale * jax.random.normal(layer_key, (4 * width, fan_in + width))
        # A forget gate that is open at the start remembers.
        bias = jnp.zeros((4, width)).at[1].set(1.0).reshape(-1)
        layers.append(LayerWeights(kernel, bias))
        fan_in = width
    return LSTMWeights(tuple(layers), jnp.zeros(fan_in), jnp.zeros(()))


def init_carry(
    params: chex.ArrayTree, units: Sequence[int] = (4, 4), dtype=jnp.float32
) -> tuple[LayerCarry, ...]:
    """Returns zero carries for every parameter, one :class:`LayerCarry` of trees a layer.

    Args:
      params: pytree of arrays.
      units: width of every layer.
      dtype: dtype of the carries.

    Returns:
      A tuple over layers; each tree is shaped like ``params`` with leaves ``(H, *param.shape)``.

    Example:
      >>> import jax.numpy as jnp
      >>> init_carry({"w": jnp.ones((3, 2))})[0].cell["w"].shape
      (4, 3, 2)
    """

    def zeros(width: int) -> chex.ArrayTree:
        return jax.tree.map(lambda p: placement.zeros_like(p, dtype, (width,)), params)

    return tuple(LayerCarry(zeros(width), zeros(width)) for width in units)


def apply(
    weights: LSTMWeights,
    carry: tuple[LayerCarry, ...],
    inputs: jax.Array,
    shared: jax.Array | None = None,
) -> tuple[jax.Array, tuple[LayerCarry, ...]]:
    """Runs the LSTM one step on every coordinate of one parameter.

    Args:
      weights: weights shared by all coordinates.
      carry: one :class:`LayerCarry` a layer for this parameter, leaves ``(H, *shape)``.
      inputs: features, shape ``(F, *shape)``, float32.
      shared: further features that are the same for all coordinates, shape (G,). The LSTM then has F + G
        inputs.

    Returns:
      The output of shape ``shape`` and the next carry, in the dtypes of the old one.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> weights = init_weights(jax.random.key(0), num_inputs=3)
      >>> output, carry = apply(weights, init_carry(jnp.ones(5)), jnp.ones((3, 5)))
      >>> output.shape, len(carry)
      ((5,), 2)
    """
    hidden = inputs
    next_carry = []
    layers = weights.layers if shared is None else _with_shared(weights.layers, inputs.shape[0], shared)
    for layer, old in zip(layers, carry, strict=True):
        cell, hidden = _cell(layer, old, hidden)
        next_carry.append(LayerCarry(cell.astype(old.cell.dtype), hidden.astype(old.hidden.dtype)))
    output = jnp.tensordot(weights.output_kernel, hidden, axes=1) + weights.output_bias
    return output, tuple(next_carry)


def _with_shared(
    layers: tuple[LayerWeights, ...], num_inputs: int, shared: jax.Array
) -> tuple[LayerWeights, ...]:
    """Puts the part of the shared features into the bias of the first layer.

    All coordinates have it in common, so one product of a vector does for all.
    """
    first, *others = layers
    before, its, after = jnp.split(first.kernel, [num_inputs, num_inputs + shared.size], axis=1)
    return LayerWeights(jnp.concatenate([before, after], axis=1), first.bias + its @ shared), *others


def _cell(layer: LayerWeights, old: LayerCarry, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    # One small matrix product for all gates. Written as sums of scaled rows, the gates and their gradient are
    # several times slower on CPUs: XLA fuses them into loops that compute them again and again.
    stacked = jnp.concatenate([inputs, old.hidden.astype(inputs.dtype)])
    bias = layer.bias.reshape((-1,) + (1,) * (stacked.ndim - 1))
    gates = jnp.tensordot(layer.kernel, stacked, axes=1) + bias
    i, f, g, o = jnp.split(gates, 4)
    cell = _sigmoid(f) * old.cell.astype(gates.dtype) + _sigmoid(i) * jnp.tanh(g)
    return cell, _sigmoid(o) * jnp.tanh(cell)


def _sigmoid(x: jax.Array) -> jax.Array:
    """Returns the logistic function by a tanh, which on CPUs costs less than an exp and a division."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5
