"""What the network of :func:`mlhf_optax.controllers.tensor_lstm.tensor_lstm` sees: statistics without scale.

Multiplying the loss, or measuring all parameters in another unit, changes none of them. All are bounded, so
that the network meets nothing far beyond what it was trained on.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlhf_optax.controllers.units import size_of
from mlhf_optax.support import trees
from mlhf_optax.support.packing import AnyPacking, Vector

if TYPE_CHECKING:  # the controller's file imports this one
    from mlhf_optax.controllers.tensor_lstm import TensorLSTMState

TENSOR_FEATURES, SHARED_FEATURES = 12, 10
FEATURES = TENSOR_FEATURES + SHARED_FEATURES
_TINY = 1e-30


class Products(NamedTuple):
    """Inner products of every tensor of w, g, the last d, and the running mean m before; shape (tensors,)."""

    w_w: jax.Array
    g_g: jax.Array
    d_d: jax.Array
    m_m: jax.Array
    g_d: jax.Array
    g_m: jax.Array
    d_m: jax.Array


def products(packing: AnyPacking, w: Vector, g: Vector, d: Vector, m: Vector) -> Products:
    """Returns all inner products that a controller sees, from one pass over the vectors."""
    pairs = ((w, w), (g, g), (d, d), (m, m), (g, d), (g, m), (d, m))
    times = lambda x, y: jax.tree.map(jnp.multiply, x, y)
    return Products(*packing.sums(*(times(x, y) for x, y in pairs)).astype(jnp.float32))


def with_scaled_gradient(inner: Products, scale: jax.Array) -> Products:
    """Returns the products for ``scale * g`` in the place of g."""
    return inner._replace(g_g=scale**2 * inner.g_g, g_d=scale * inner.g_d, g_m=scale * inner.g_m)


class _Sizes(NamedTuple):
    """Root mean squares, of every tensor or of all.

    Attributes:
      parameters: of w.
      gradient: of g.
      direction: of the last d.
      mean: of the running mean of gradients, as it will be with this one if the network keeps 0.9 of it.
      spread: root of the running mean of squared gradients.
    """

    parameters: jax.Array
    gradient: jax.Array
    direction: jax.Array
    mean: jax.Array
    spread: jax.Array


def features(
    packing: AnyPacking,
    inner: Products,
    state: "TensorLSTMState",
    initial_rms: jax.Array,
    update_ratio: float,
) -> jax.Array:
    """Returns the statistics that the network sees, within [-1, 1].

    Args:
      packing: that of the parameters.
      inner: what the vectors of the step are like.
      state: that before the step, but with squares and losses of this one.
      initial_rms: root mean square of all parameters at the start, a scalar.
      update_ratio: the network is told when the norm of an update exceeds this share of the parameters'.

    Returns:
      Shape (tensors, FEATURES): first those of the tensor, then those of all, the same in every row.
    """
    numbers = jnp.asarray(packing.sizes)
    # The new mean is not at hand: the network has yet to choose its memory. Its products with a memory of
    # ten steps follow from those that are, without a pass over the parameters.
    old, new = 0.9 / jnp.maximum(state.mean_weight, 1e-3), 0.1
    m_m = old**2 * inner.m_m + new**2 * inner.g_g + 2 * old * new * inner.g_m
    m_m = jnp.maximum(m_m, 0.0)  # rounding may make it negative
    m_d = old * inner.d_m + new * inner.g_d
    spread = state.mean_squares / state.square_weight
    squares = jnp.stack([inner.w_w, inner.g_g, inner.d_d, m_m, spread * numbers])  # (5, tensors)
    sizes = jnp.sqrt(squares / jnp.maximum(numbers, 1.0)[None] + _TINY)
    of_all = jnp.sqrt(jnp.sum(numbers[None] * jnp.square(sizes), axis=1) / jnp.sum(numbers) + _TINY)
    inner_products = jnp.stack([inner.g_d, inner.g_m, m_d])
    first, second = jnp.stack([inner.g_g, inner.g_g, m_m]), jnp.stack([inner.d_d, inner.m_m, inner.d_d])
    cosines = inner_products / (jnp.sqrt(first * second) + _TINY)
    own = _of_tensors(packing, state, _Sizes(*sizes), _Sizes(*of_all), cosines)
    shared = _of_all(state, _Sizes(*of_all), initial_rms, update_ratio)
    shared = jnp.broadcast_to(shared[None], (len(numbers), SHARED_FEATURES))
    return jnp.concatenate([own.T, shared], 1).astype(jnp.float32)


def _of_tensors(
    packing: AnyPacking, state: "TensorLSTMState", sizes: _Sizes, of_all: _Sizes, cosines: jax.Array
) -> jax.Array:
    """Returns the features of every tensor, shape (features, tensors)."""
    relative_step = sizes.direction / (sizes.parameters + 0.1 * of_all.parameters)
    # Before the first step there is no direction, and nothing that came of one.
    is_started = (state.count > 0).astype(jnp.float32)
    ratios = jnp.stack(
        [
            sizes.mean / of_all.mean,
            sizes.spread / of_all.spread,
            sizes.mean / sizes.spread,
            sizes.parameters / of_all.parameters,
            relative_step,
            sizes.direction / of_all.direction,
            state.residual,
        ]
    )
    # Offsets move the typical value to zero, where tanh tells most.
    column = lambda *values: np.array(values, np.float32)[:, None]
    logs = _log(ratios) + column(0, 0, 1, 0, 4, 0, 0)
    bounded = _bounded(logs, column(3, 3, 1, 3, 3, 3, 2))
    bounded = bounded * jnp.where(column(0, 0, 0, 0, 1, 1, 1) == 1, is_started, 1.0)
    share = is_started * (2 * state.damped_share - 1)
    kind = np.where(packing.is_matrix, -1.0, 1.0).astype(np.float32)
    return jnp.concatenate([bounded[:6], cosines, bounded[6:], share[None], kind[None]])


def _of_all(
    state: "TensorLSTMState", of_all: _Sizes, initial_rms: jax.Array, update_ratio: float
) -> jax.Array:
    """Returns the features that all tensors share, shape (features,)."""
    age = state.count.astype(jnp.float32)
    now, fast, slow, first = state.losses
    last_ratio = state.rate * of_all.direction / jnp.maximum(of_all.parameters, _TINY)
    ages = 2 * age / (age + np.array([10, 100, 1000], np.float32)) - 1
    logs = _log(
        jnp.stack(
            [
                of_all.gradient / of_all.spread,
                of_all.mean / of_all.spread,
                of_all.parameters / size_of(initial_rms).astype(jnp.float32),
                jnp.minimum(1.0, update_ratio / jnp.maximum(last_ratio, _TINY)),
            ]
        )
    ) + np.array([0, 1, 0, 0], np.float32)
    rest = jnp.concatenate([jnp.stack([first - fast, fast - slow, now - fast]), logs])
    return jnp.concatenate([ages, _bounded(rest, np.array([2, 0.3, 0.5, 0.5, 1, 1, 1], np.float32))])


def averaged_losses(losses: jax.Array, count: jax.Array, loss: jax.Array) -> jax.Array:
    """Returns the logarithm of the loss, its running means over 10 and 100 steps, and its first value.

    Args:
      losses: those of the step before, shape (4,).
      count: steps before this one.
      loss: loss of this one, a scalar.
    """
    now = jnp.nan_to_num(jnp.log(jnp.maximum(loss.astype(jnp.float32), _TINY)), nan=30.0)
    share = 1 - jnp.array([0.0, 0.9, 0.99, 1.0], jnp.float32)
    return jnp.where(count == 0, now, trees.running_mean(losses, now, share))


def _bounded(x: jax.Array, scale: np.ndarray) -> jax.Array:
    return jnp.tanh(jnp.nan_to_num(x) / scale)


def _log(x: jax.Array) -> jax.Array:
    return jnp.log(x + _TINY)
