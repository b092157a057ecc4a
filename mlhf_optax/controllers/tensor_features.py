"""What the network of :func:`mlhf_optax.controllers.tensor_lstm.tensor_lstm` sees: statistics without scale.

Multiplying the loss, or measuring all parameters in another unit, changes none of them. All are bounded, so
that the network meets nothing far beyond what it was trained on.
"""

from typing import TYPE_CHECKING, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mlhf_optax.controllers.kronecker_factors import matrix_shape
from mlhf_optax.controllers.protocol import View
from mlhf_optax.controllers.units import size_of
from mlhf_optax.support import trees

if TYPE_CHECKING:  # the controller's file imports this one
    from mlhf_optax.controllers.tensor_lstm import TensorLSTMState

TENSOR_FEATURES, SHARED_FEATURES = 12, 10
FEATURES = TENSOR_FEATURES + SHARED_FEATURES
_TINY = 1e-30


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


def features(view: View, state: "TensorLSTMState", update_ratio: float) -> jax.Array:
    """Returns the statistics that the network sees, within [-1, 1].

    Args:
      view: what the step sees.
      state: that before the step, but with squares and losses of this one.
      update_ratio: the network is told when the norm of an update exceeds this share of the parameters'.

    Returns:
      Shape (tensors, FEATURES): first those of the tensor, then those of all, the same in every row.
    """
    numbers = jnp.array([leaf.size for leaf in jax.tree.leaves(view.gradient)], jnp.float32)
    sizes, cosines = _sizes_and_cosines(view, state, numbers)
    total = lambda each: jnp.sqrt(jnp.sum(numbers * jnp.square(each)) / jnp.sum(numbers) + _TINY)
    of_all = _Sizes(*map(total, sizes))
    own = jnp.stack(_of_tensors(view, state, sizes, of_all, cosines), 1)
    shared = jnp.stack(_of_all(view, state, of_all, update_ratio))
    shared = jnp.broadcast_to(shared, (len(numbers), SHARED_FEATURES))
    return jnp.concatenate([own, shared], 1).astype(jnp.float32)


def _sizes_and_cosines(
    view: View, state: "TensorLSTMState", numbers: jax.Array
) -> tuple[_Sizes, list[jax.Array]]:
    """Returns the sizes of every tensor, and cosines of g and d, g and the old mean, the new mean and d."""
    w, g, d, old = view.params, view.gradient, view.direction, state.mean
    g_g, d_d, old_old, g_old, g_d = inner(g, g), inner(d, d), inner(old, old), inner(g, old), inner(g, d)
    # The new mean is not at hand: the network has yet to choose its memory. Its products with a memory of
    # ten steps follow from those above, without a pass over the parameters.
    old_share, new_share = 0.9 / jnp.maximum(state.mean_weight, 1e-3), 0.1
    m_m = old_share**2 * old_old + new_share**2 * g_g
    m_m = jnp.maximum(m_m + 2 * old_share * new_share * g_old, 0.0)  # rounding may make it negative
    m_d = old_share * inner(old, d) + new_share * g_d
    rms = lambda squares: jnp.sqrt(squares / numbers + _TINY)
    spread = jnp.sqrt(mean_squares(state.square) / state.square_weight + _TINY)
    cosine = lambda x_y, x_x, y_y: x_y / (jnp.sqrt(x_x * y_y) + _TINY)
    cosines = [cosine(g_d, g_g, d_d), cosine(g_old, g_g, old_old), cosine(m_d, m_m, d_d)]
    return _Sizes(rms(inner(w, w)), rms(g_g), rms(d_d), rms(m_m), spread), cosines


def _of_tensors(
    view: View, state: "TensorLSTMState", sizes: _Sizes, of_all: _Sizes, cosines: list[jax.Array]
) -> list[jax.Array]:
    """Returns the features of every tensor, each of shape (tensors,)."""
    relative_step = sizes.direction / (sizes.parameters + 0.1 * of_all.parameters)
    # Before the first step there is no direction, and nothing that came of one.
    is_started = (state.count > 0).astype(jnp.float32)
    shapes = [leaf.shape for leaf in jax.tree.leaves(view.gradient)]
    # Offsets move the typical value to zero, where tanh tells most.
    return [
        _bounded(_log(sizes.mean / of_all.mean), 3.0),
        _bounded(_log(sizes.spread / of_all.spread), 3.0),
        _bounded(_log(sizes.mean / sizes.spread) + 1, 1.0),
        _bounded(_log(sizes.parameters / of_all.parameters), 3.0),
        is_started * _bounded(_log(relative_step) + 4, 3.0),
        is_started * _bounded(_log(sizes.direction / of_all.direction), 3.0),
        *cosines,
        is_started * _bounded(_log(state.residual), 2.0),
        is_started * (2 * state.damped_share - 1),
        jnp.array([1.0 if matrix_shape(shape) is None else -1.0 for shape in shapes], jnp.float32),
    ]


def _of_all(view: View, state: "TensorLSTMState", of_all: _Sizes, update_ratio: float) -> list[jax.Array]:
    """Returns the features that all tensors share, scalars."""
    age = state.count.astype(jnp.float32)
    now, fast, slow, first = state.losses
    last_ratio = state.rate * of_all.direction / jnp.maximum(of_all.parameters, _TINY)
    return [
        2 * age / (age + 10) - 1,
        2 * age / (age + 100) - 1,
        2 * age / (age + 1000) - 1,
        _bounded(first - fast, 2.0),
        _bounded(fast - slow, 0.3),
        _bounded(now - fast, 0.5),
        _bounded(_log(of_all.gradient / of_all.spread), 0.5),
        _bounded(_log(of_all.mean / of_all.spread) + 1, 1.0),
        _bounded(_log(of_all.parameters / size_of(view.initial_rms)), 1.0),
        _bounded(_log(jnp.minimum(1.0, update_ratio / jnp.maximum(last_ratio, _TINY))), 1.0),
    ]


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


def inner(a: chex.ArrayTree, b: chex.ArrayTree) -> jax.Array:
    """Returns the inner product of each of n tensors with its counterpart, shape (n,), float32."""
    each = map(trees.vdot, jax.tree.leaves(a), jax.tree.leaves(b))
    return jnp.stack([product.astype(jnp.float32) for product in each])


def mean_squares(squares: chex.ArrayTree) -> jax.Array:
    """Returns the mean of every tensor, here of squared gradients, shape (tensors,), float32."""
    return jnp.stack([jnp.mean(v) for v in jax.tree.leaves(squares)]).astype(jnp.float32)


def _bounded(x: jax.Array, scale: float) -> jax.Array:
    return jnp.tanh(jnp.nan_to_num(x) / scale)


def _log(x: jax.Array) -> jax.Array:
    return jnp.log(x + _TINY)
