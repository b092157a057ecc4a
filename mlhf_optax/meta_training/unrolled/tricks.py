"""Tricks of meta-training that make learned optimizers general, for any of them.

*Random scaling*: a training of f(w) becomes one of f(c w), started at w0 / c, with a random factor c for
every coordinate. An optimizer then cannot rely on the scale of parameters and gradients.
*Convex companion*: a few more coordinates, with a convex loss of their own, are trained beside the network.
From them an optimizer learns to descend at all.

Source: Lv, Jiang, Li 2017, "Learning Gradient Descent: Better Generalization and Longer Horizons",
arXiv 1703.03633, section 3.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlhf_optax.meta_training.interface import LearnedOptimizer, TaskLike

_COMPANION_SCALING = 1.0
_COMPANION_BOUND = 10.0


class SeenParams(NamedTuple):
    """What the optimizer sees of a training with tricks.

    Attributes:
      network: parameters of the network over their factors.
      companion: shape (D,), the convex companion's over its factors; None without one.
    """

    network: Any
    companion: Any


class FixedFactors(NamedTuple):
    """What stays as it is for the whole training.

    Attributes:
      scale: shaped like :class:`SeenParams`, factors of all coordinates.
      target: shape (D,), the minimum of the companion before scaling; None without one.
    """

    scale: SeenParams
    target: Any


class TrickedParams(NamedTuple):
    """Parameters of a training with tricks: those that the optimizer sees, and what stays fixed."""

    seen: SeenParams
    fixed: FixedFactors


class _TrickedBatch(NamedTuple):
    """A mini-batch of the task with the :class:`FixedFactors` of its training."""

    batch: Any
    fixed: Any


class _TrickedTask(NamedTuple):
    """A task, see :class:`mlhf_optax.meta_training.TaskLike`."""

    init_fn: Any
    predict_fn: Any
    loss_fn: Any


def with_tricks(
    task: TaskLike, learned: LearnedOptimizer, *, random_scaling: float = 0.0, companion_size: int = 0
) -> tuple[TaskLike, LearnedOptimizer]:
    """Returns a task and a learned optimizer whose trainings have the tricks.

    Args:
      task: the task.
      learned: the learned optimizer. If its meta-parameters belong to types of layers, there are none for a
        companion.
      random_scaling: r; factors are ``exp(u)`` with u uniform between -r and r, one for every coordinate.
        The paper's is 3. 0 for none.
      companion_size: D, coordinates of the convex companion; the paper's is 20, with factors of r = 1. 0 for
        none.

    Returns:
      The task and the learned optimizer. Without a trick they are those that came; with one, the parameters
      of a training are :class:`TrickedParams`.

    Example:
      >>> import optax
      >>> from types import SimpleNamespace
      >>> from mlhf_optax import SquaredError
      >>> from mlhf_optax.meta_training import META_LOSSES, unrolled_optimizer
      >>> task = SimpleNamespace(
      ...     init_fn=lambda key: {"kernel": jnp.ones((2, 1))},
      ...     predict_fn=lambda params, batch: batch["x"] @ params["kernel"],
      ...     loss_fn=SquaredError(targets="y"))
      >>> sgd = unrolled_optimizer(lambda rate, task: optax.sgd(rate), META_LOSSES["last"])
      >>> scaled, _ = with_tricks(task, sgd, random_scaling=3.0, companion_size=20)
      >>> scaled.init_fn(jax.random.key(0)).seen.companion.shape
      (20,)

    Source: Lv et al. 2017, sections 3.1 and 3.2.
    """
    if not random_scaling and not companion_size:
        return task, learned
    # The optimizer sees factors in the batch; the harness sees them in the parameters.
    inner = _TrickedTask(
        init_fn=lambda key: _fresh(task, key, random_scaling, companion_size).seen,
        predict_fn=lambda seen, batch: _outputs(task, seen, batch),
        loss_fn=lambda outputs, batch: _loss(task, outputs, batch),
    )
    outer = _TrickedTask(
        init_fn=lambda key: _fresh(task, key, random_scaling, companion_size),
        predict_fn=lambda params, batch: _outputs(task, params.seen, _TrickedBatch(batch, params.fixed)),
        loss_fn=lambda outputs, batch: _loss(task, outputs, _TrickedBatch(batch, None)),
    )

    def meta_gradient(meta_params, _, params, opt_state, batches, key):
        length = jax.tree.leaves(batches)[0].shape[0]
        repeat = lambda x: jnp.broadcast_to(x, (length, *x.shape))
        batches = _TrickedBatch(batches, jax.tree.map(repeat, params.fixed))
        result = learned.meta_gradient(meta_params, inner, params.seen, opt_state, batches, key)
        return result._replace(params=params._replace(seen=result.params))

    def build(meta_params, _):
        tx = learned.build(meta_params, inner)
        return tx._replace(init=lambda params: tx.init(params.seen))

    return outer, LearnedOptimizer(build, meta_gradient, learned.init)


def _fresh(task: TaskLike, key: jax.Array, random_scaling: float, companion_size: int) -> TrickedParams:
    init_key, scale_key, own_key, target_key = jax.random.split(key, 4)
    network = task.init_fn(init_key)
    keys = optax.tree.split_key_like(scale_key, network)
    scale = jax.tree.map(lambda x, k: _factors(k, x.shape, random_scaling), network, keys)
    companion = own = target = None
    if companion_size:
        companion = jnp.zeros(companion_size)
        own = _factors(own_key, (companion_size,), _COMPANION_SCALING if random_scaling else 0.0)
        target = jax.random.uniform(target_key, (companion_size,), minval=-1.0, maxval=1.0)
    seen = SeenParams(jax.tree.map(lambda w, c: (w / c).astype(w.dtype), network, scale), companion)
    return TrickedParams(seen, FixedFactors(SeenParams(scale, own), target))


def _factors(key: jax.Array, shape: tuple[int, ...], bound: float) -> jax.Array:
    return jnp.exp(jax.random.uniform(key, shape, minval=-bound, maxval=bound))


def _outputs(task: TaskLike, seen: SeenParams, batch: _TrickedBatch) -> tuple[Any, Any]:
    """Returns the outputs of the network, and how far the companion is from its minimum."""
    scale, target = batch.fixed
    network = jax.tree.map(lambda w, c: (w * c).astype(w.dtype), seen.network, scale.network)
    residual = None if target is None else seen.companion * scale.companion - target
    return task.predict_fn(network, batch.batch), residual


def _loss(task: TaskLike, outputs: tuple[Any, Any], batch: _TrickedBatch) -> jax.Array:
    outputs, residual = outputs
    loss = task.loss_fn(outputs, batch.batch)
    if residual is None:
        return loss
    return loss + jnp.mean(jnp.minimum(jnp.square(residual), _COMPANION_BOUND))
