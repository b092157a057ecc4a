"""What keeps a step from doing harm: bounds, finiteness, and clear errors for missing arguments."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax


def limit_update_ratio(max_ratio: float, min_rms: float = 1e-3) -> optax.GradientTransformation:
    """Bounds the norm of the whole update to a share of the norm of the parameters.

    Scales the update by ``min(1, max_ratio * max(|w|, min_rms * sqrt(N)) / |u|)``, with norms over all
    N coordinates. Chain it last, after the learning rate: it bounds the step that is taken. The
    authors of MLHF bound their steps so in meta-training, at 0.25. Unlike
    :func:`optax.adaptive_grad_clip` it sees all parameters as one vector, so it keeps the direction.

    Args:
      max_ratio: largest allowed ``|u| / |w|``, > 0.
      min_rms: root mean square below which parameters count as this large, so that parameters
        initialised to zero can leave zero.

    Returns:
      A gradient transformation without state.

    Raises:
      ValueError: if ``max_ratio`` is not positive, or ``params`` is missing in ``update``.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = limit_update_ratio(0.1)
      >>> tx.update(jnp.array([3.0, 4.0]), tx.init(None), jnp.array([10.0, 0.0]))[0]
      Array([0.6, 0.8], dtype=float32)
    """
    if isinstance(max_ratio, int | float) and not max_ratio > 0:
        raise ValueError(f"`max_update_ratio` must be positive, or None for no bound, got {max_ratio}")

    def update_fn(updates, state, params: Any = None):
        require_params(params, "limit_update_ratio")
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        allowed = max_ratio * jnp.maximum(_norm(params), min_rms * size**0.5)
        norm = _norm(updates)
        is_long = norm > allowed
        scale = jnp.where(is_long, allowed / jnp.where(is_long, norm, 1.0), 1.0)
        return jax.tree.map(lambda u: (scale * u).astype(u.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def decay_weights(weight_decay: float | jax.Array) -> optax.GradientTransformation:
    """Adds ``weight_decay * w`` to every update but those that are zero as a whole.

    Unlike :func:`optax.add_decayed_weights` it lets a skipped step, whose update is zero, change
    nothing.

    Args:
      weight_decay: factor on the parameters.

    Returns:
      A gradient transformation without state.

    Example:
      >>> import jax.numpy as jnp
      >>> tx, w = decay_weights(0.5), jnp.array([2.0, 4.0])
      >>> [tx.update(u, tx.init(w), w)[0] for u in (jnp.array([0.0, 1.0]), jnp.zeros(2))]
      [Array([1., 3.], dtype=float32), Array([0., 0.], dtype=float32)]
    """

    def update_fn(updates, state, params=None):
        require_params(params, "decay_weights")
        factor = jnp.where(is_any_nonzero(updates), weight_decay, 0.0)
        decay = lambda u, w: u + (factor * w).astype(u.dtype)
        return jax.tree.map(decay, updates, params), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def tree_is_finite(tree: chex.ArrayTree) -> jax.Array:
    """Returns whether every number in the tree is finite."""
    # One sum of flags a leaf: `all` of every leaf fuses into the pass that made it.
    flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    # The smallest flag, by sorting: a chain of `and` would be fused, whole, into every pass that selects
    # by it, and programs and the time to compile them would grow with the square of the number of leaves.
    return jnp.sort(jnp.stack(flags))[0] if flags else jnp.asarray(True)


def is_any_nonzero(tree: chex.ArrayTree) -> jax.Array:
    """Returns whether any number in the tree is not zero; the update of a skipped step is zero as a whole."""
    return jnp.any(jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(tree)]))


def select_tree(condition: jax.Array, on_true: Any, on_false: Any) -> Any:
    """Returns one of two trees of equal shapes, by a traced condition."""
    return jax.tree.map(lambda t, f: jnp.where(condition, t, f).astype(f.dtype), on_true, on_false)


def require_params(params: Any, name: str) -> None:
    """Raises ValueError if ``params`` were not given to ``update``."""
    if params is None:
        raise ValueError(
            f"`{name}` needs the current parameters: call `update(grads, state, params, ...)` with `params`, "
            "not None"
        )


def require_batch(batch: Any, name: str) -> None:
    """Raises TypeError if ``batch`` was not given to ``update``."""
    if batch is None:
        raise TypeError(
            f"`{name}` needs the batch to evaluate curvature: call "
            "`tx.update(grads, state, params, batch=batch)`. With Flax use `mlhf_optax.TrainState` and "
            "`apply_gradients(grads=grads, batch=batch)`, or "
            "`nnx.Optimizer.update(model, grads, batch=batch)`. Wrappers whose update takes no extra "
            "arguments (`optax.lookahead`, `optax.contrib.sam`, `MultiSteps.gradient_transformation()`) "
            "drop it"
        )


def _norm(tree: chex.ArrayTree) -> jax.Array:
    at_least_f32 = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
    total = sum(jnp.sum(jnp.square(at_least_f32(leaf))) for leaf in jax.tree.leaves(tree))
    # The derivative of a square root at zero is infinite, and meta-training differentiates this.
    return jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1.0)), 0.0)


__all__ = [
    "decay_weights",
    "is_any_nonzero",
    "limit_update_ratio",
    "require_batch",
    "require_params",
    "select_tree",
    "tree_is_finite",
]
