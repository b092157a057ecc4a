"""Small networks that run on every coordinate: dense layers, an LSTM layer, a GRU.

Arrays are kept as in :mod:`mlhf_optax.controllers.lstm`: features of a parameter of shape ``shape`` have
shape ``(F, *shape)``, so the sharding of a parameter extends to all that belongs to it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mlhf_optax.controllers import lstm
from mlhf_optax.support import placement, trees


class Dense(NamedTuple):
    """Weights of an affine map from F to G features.

    Attributes:
      kernel: shape (G, F).
      bias: shape (G,).
    """

    kernel: jax.Array
    bias: jax.Array


class GRU(NamedTuple):
    """Weights of a GRU of H units on F features; gates in the order update, reset, candidate.

    Attributes:
      kernel: shape (3 H, F), on the inputs.
      recurrent: shape (3 H, H), on the state.
      bias: shape (3 H,).
    """

    kernel: jax.Array
    recurrent: jax.Array
    bias: jax.Array


def init_dense(key: chex.PRNGKey, num_inputs: int, num_outputs: int, scale: float = 0.1) -> Dense:
    """Returns a dense layer: truncated normal kernel of standard deviation ``scale``, zero bias.

    Example:
      >>> init_dense(jax.random.key(0), 2, 20).kernel.shape
      (20, 2)
    """
    kernel = scale * jax.random.truncated_normal(key, -2.0, 2.0, (num_outputs, num_inputs), jnp.float32)
    return Dense(kernel, jnp.zeros(num_outputs, jnp.float32))


def init_lstm(
    key: chex.PRNGKey,
    num_inputs: int,
    units: int,
    sample: Callable[[chex.PRNGKey, tuple[int, ...]], jax.Array],
) -> lstm.LayerWeights:
    """Returns an LSTM layer with forget biases of one; ``sample(key, shape)`` draws the kernel.

    Example:
      >>> init_lstm(jax.random.key(0), 2, 20, jax.random.normal).kernel.shape
      (80, 22)
    """
    bias = jnp.zeros((4, units), jnp.float32).at[1].set(1.0).reshape(-1)
    return lstm.LayerWeights(sample(key, (4 * units, num_inputs + units)), bias)


def uniform(bound: float) -> Callable[[chex.PRNGKey, tuple[int, ...]], jax.Array]:
    """Returns a sampler of kernels, uniform between ``-bound`` and ``bound``."""
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def glorot(key: chex.PRNGKey, shape: tuple[int, ...]) -> jax.Array:
    """Samples a kernel, uniform with the bound of Glorot and Bengio."""
    return uniform((6.0 / sum(shape)) ** 0.5)(key, shape)


def dense(weights: Dense, inputs: jax.Array) -> jax.Array:
    """Applies a dense layer to features.

    Args:
      weights: of F to G features.
      inputs: shape (F, *shape).

    Returns:
      Shape (G, *shape).

    Example:
      >>> dense(Dense(jnp.ones((1, 2)), jnp.ones(1)), jnp.ones((2, 3)))
      Array([[3., 3., 3.]], dtype=float32)
    """
    return jnp.tensordot(weights.kernel, inputs, axes=1) + spread(weights.bias, inputs)


def lstm_layer(
    weights: lstm.LayerWeights, carry: lstm.LayerCarry, inputs: jax.Array
) -> tuple[jax.Array, lstm.LayerCarry]:
    """Runs one LSTM layer one step; returns its hidden state, shape (H, *shape), and the next carry."""
    units = weights.bias.size // 4
    # The output map is not used, and compiled away.
    whole = lstm.LSTMWeights(
        (weights,), jnp.zeros(units, weights.bias.dtype), jnp.zeros((), weights.bias.dtype)
    )
    _, (after,) = lstm.apply(whole, (carry,), inputs)
    return after.hidden, after


def gru(weights: GRU, state: jax.Array, inputs: jax.Array, shift: jax.Array | None = None) -> jax.Array:
    """Runs a GRU one step.

    Args:
      weights: of H units on F features.
      state: shape (H, *shape).
      inputs: shape (F, *shape).
      shift: shape (3 H,), added to the gates before their activations.

    Returns:
      The next state, shape (H, *shape).

    Example:
      >>> weights = GRU(jnp.ones((6, 1)), jnp.zeros((6, 2)), jnp.zeros(6))
      >>> gru(weights, jnp.zeros((2, 5)), jnp.ones((1, 5))).shape
      (2, 5)
    """
    bias = weights.bias if shift is None else weights.bias + shift
    units = weights.recurrent.shape[1]
    driven = jnp.tensordot(weights.kernel, inputs, axes=1) + spread(bias, inputs)
    recurrent = jnp.tensordot(weights.recurrent[: 2 * units], state, axes=1)
    update, reset = jnp.split(jax.nn.sigmoid(driven[: 2 * units] + recurrent), 2)
    recalled = jnp.tensordot(weights.recurrent[2 * units :], reset * state, axes=1)
    candidate = jnp.tanh(driven[2 * units :] + recalled)
    return update * state + (1.0 - update) * candidate


def spread(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Returns a vector of features with axes of size one for every other axis of ``like``."""
    return vector.reshape((-1,) + (1,) * (like.ndim - 1))


def wide(params: Any, *features: int) -> Any:
    """Returns zeros for every parameter, float32 or wider, with leading axes of ``features``.

    Example:
      >>> wide(jnp.ones((3, 2), jnp.bfloat16), 20).shape
      (20, 3, 2)
    """
    return jax.tree.map(lambda p: placement.zeros_like(p, trees.wide_dtype(p), features), params)


def init_carry(params: Any, num_layers: int, units: int) -> tuple[lstm.LayerCarry, ...]:
    """Returns zero carries of LSTM layers, float32 or wider; leaves have shape (units, *param.shape).

    Example:
      >>> init_carry({"w": jnp.ones((3, 2))}, 2, 20)[1].cell["w"].shape
      (20, 3, 2)
    """
    return tuple(lstm.LayerCarry(wide(params, units), wide(params, units)) for _ in range(num_layers))


def unstacked(carry: Sequence[lstm.LayerCarry]) -> list[Any]:
    """Returns cells and hidden states of LSTM layers as one list, for :func:`map_leaves`."""
    return [part for layer in carry for part in layer]


def stacked(parts: Sequence[Any]) -> tuple[lstm.LayerCarry, ...]:
    """Undoes :func:`unstacked`."""
    return tuple(lstm.LayerCarry(*parts[i : i + 2]) for i in range(0, len(parts), 2))


def map_leaves(function: Callable[..., tuple], first: Any, *others: Any) -> tuple[Any, ...]:
    """Calls ``function`` on the leaves of one tree and what lies there in others.

    Args:
      function: called with one leaf of each tree; returns a tuple of any length.
      first: pytree of arrays with at least one leaf.
      *others: pytrees with the structure of ``first``, or that go on below its leaves.

    Returns:
      A tuple of trees with the structure of ``first``, as many as the function returned.

    Example:
      >>> map_leaves(lambda x, y: (x + y, x - y), {"a": 3}, {"a": 1})
      ({'a': 4}, {'a': 2})
    """
    leaves, treedef = jax.tree.flatten(first)
    columns = [treedef.flatten_up_to(other) for other in others]
    results = [function(*row) for row in zip(leaves, *columns, strict=True)]
    return tuple(treedef.unflatten(column) for column in zip(*results, strict=True))
