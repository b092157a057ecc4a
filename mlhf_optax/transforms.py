"""What follows the solve: bounds on direction and update, learning rate, momentum, weight decay."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mlhf_optax.support import placement, trees
from mlhf_optax.support.checks import DECAY, INSIDE_0_1, POSITIVE, check_number

_FREE_UPDATES = 3  # until then nothing can be called typical
_GROWTH_DECAY = 0.98
_MIN_RMS = 1e-3  # of parameters, below which they count as this large


def after_solve(
    learning_rate: optax.ScalarOrSchedule,
    *,
    max_growth: float | None = None,
    max_update_ratio: float | None = 0.25,
    momentum: float | jax.Array | None = None,
    weight_decay: float | jax.Array = 0.0,
) -> optax.GradientTransformation:
    """Returns what turns a direction into an update: bounds, weight decay, learning rate, momentum.

    Each update is bounded before it is averaged, so that one bad gradient moves the average by a bounded
    amount.

    Args:
      learning_rate: a number or an optax schedule.
      max_growth: bound on the direction, see :func:`limit_growth`; None for no bound, and no state.
      max_update_ratio: see :func:`limit_update_ratio`; None for no bound.
      momentum: see :func:`average_updates`; None for none, and no state.
      weight_decay: see :func:`decay_weights`.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: for numbers out of range.

    Example:
      >>> tx, w = after_solve(0.5, max_update_ratio=None), jnp.ones(2)
      >>> tx.update(jnp.array([1.0, 2.0]), tx.init(w), w)[0]
      Array([-0.5, -1. ], dtype=float32)
    """
    check_number("max_growth", max_growth, POSITIVE, or_none=True)
    check_number("max_update_ratio", max_update_ratio, POSITIVE, or_none=True)
    growth = None if max_growth is None else limit_growth(max_growth)
    averaging = None if momentum is None else average_updates(momentum)
    has_decay = not (isinstance(weight_decay, int | float) and weight_decay == 0)

    def init_fn(params):
        state = AfterSolveState(
            jnp.zeros((), jnp.int32),
            () if growth is None else growth.init(params),
            () if averaging is None else averaging.init(params),
        )
        return placement.copied_to_mesh_of(params, state)

    def update_fn(updates, state, params: Any = None):
        if has_decay or max_update_ratio is not None:
            require_params(params, "after_solve")
        norm = trees.norm(updates)
        is_step = norm > 0
        rate: Any = learning_rate(state.count) if callable(learning_rate) else learning_rate
        scale = -jnp.asarray(rate, norm.dtype)
        # All that is done to a direction is one factor on it, and one on the parameters.
        decay = scale * weight_decay if has_decay else None
        new_growth = state.growth
        if max_growth is not None:
            bound, new_growth = _bounded_growth(max_growth, _GROWTH_DECAY, norm, state.growth)
            scale = scale * bound
        if max_update_ratio is not None:
            of_params = trees.norm(params)
            length = jnp.abs(scale) * norm
            if decay is not None:
                mixed = 2 * scale * decay * trees.vdot(updates, params)
                length = trees.safe_sqrt(length**2 + mixed + jnp.square(decay * of_params))
            shorter = _bounded_ratio(max_update_ratio, _MIN_RMS, length, of_params, trees.size(params))
            scale, decay = shorter * scale, None if decay is None else shorter * decay
        scale = trees.once(scale)
        if decay is None:
            updates = trees.scaled(scale, updates)
        else:
            both = lambda u, w: jnp.where(is_step, scale * u + decay * w, 0.0).astype(u.dtype)
            updates = jax.tree.map(both, updates, params)
        new_average = state.average
        if averaging is not None:
            updates, new_average = averaging.update(updates, state.average)
        count = jnp.where(is_step, jnp.asarray(optax.safe_increment(state.count)), state.count)
        return updates, AfterSolveState(count, new_growth, new_average)

    return optax.GradientTransformation(init_fn, update_fn)


class AfterSolveState(NamedTuple):
    """State of :func:`after_solve`.

    Attributes:
      count: updates so far, which a schedule is given; those that are zero are not among them.
      growth: a :class:`LimitGrowthState`; empty without ``max_growth``.
      average: an :class:`AverageUpdatesState`; empty without ``momentum``.
    """

    count: jax.Array  # shape=(), dtype=int32
    growth: Any
    average: Any


def limit_update_ratio(max_update_ratio: float, min_rms: float = _MIN_RMS) -> optax.GradientTransformation:
    """Bounds the norm of the whole update to a share of the norm of the parameters.

    Scales the update by ``min(1, max_update_ratio * max(|w|, min_rms * sqrt(N)) / |u|)``, with norms over
    all N coordinates. Chain it after the learning rate: it bounds the step that is taken. The
    authors of MLHF bound their steps so in meta-training, at 0.25. Unlike
    :func:`optax.adaptive_grad_clip` it sees all parameters as one vector, so it keeps the direction.

    Args:
      max_update_ratio: largest allowed ``|u| / |w|``, > 0.
      min_rms: root mean square below which parameters count as this large, so that parameters
        initialised to zero can leave zero.

    Returns:
      A gradient transformation without state.

    Raises:
      ValueError: if ``max_update_ratio`` is not positive, or ``params`` is missing in ``update``.

    Example:
      >>> tx = limit_update_ratio(0.1)
      >>> tx.update(jnp.array([3.0, 4.0]), tx.init(None), jnp.array([10.0, 0.0]))[0]
      Array([0.6, 0.8], dtype=float32)
    """
    check_number("max_update_ratio", max_update_ratio, POSITIVE, or_none=True)

    def update_fn(updates, state, params: Any = None):
        require_params(params, "limit_update_ratio")
        norms = trees.norm(updates), trees.norm(params)
        scale = _bounded_ratio(max_update_ratio, min_rms, *norms, trees.size(params))
        return trees.scaled(scale, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def _bounded_ratio(
    max_update_ratio: Any, min_rms: float, norm: jax.Array, of_params: jax.Array, size: int
) -> jax.Array:
    """Returns the factor of :func:`limit_update_ratio` on an update, from its norm and the parameters'."""
    return trees.share_within(max_update_ratio * jnp.maximum(of_params, min_rms * size**0.5), norm)


class LimitGrowthState(NamedTuple):
    """State of :func:`limit_growth`.

    Attributes:
      count: updates so far; those that are zero are not among them.
      log_norm: running mean of the logarithms of their norms, before the bound.
    """

    count: jax.Array  # shape=(), dtype=int32
    log_norm: jax.Array  # shape=(), dtype=float32


def limit_growth(max_growth: float = 1.0, decay: float = _GROWTH_DECAY) -> optax.GradientTransformation:
    """Bounds the norm of the whole update to a multiple of the norm that updates have typically had lately.

    It scales the update by ``min(1, max_growth * typical / |u|)``. Here ``typical`` is the geometric mean of
    the norms of all updates before, with weights that decay. Norms count as they were before the bound, so
    the bound follows updates that stay larger. It has no unit: multiplying all updates by a number changes
    nothing.

    Late in a training that fits most examples, a few mini-batches hold an example that it does not fit. Their
    directions are far longer than the others, and each would throw the parameters back by many steps. On a
    network with such spikes, among those that validate ``general``, this bound lowered the loss after 1,000
    steps from 0.027 to 0.0002. Without spikes it changes little. Chain it before the learning rate, so that
    schedules are followed at once. It is not part of the paper's method.

    Args:
      max_growth: bound on ``|u| / typical``, > 0.
      decay: decay of the weights per update, in (0, 1).

    Returns:
      A gradient transformation. The first three updates are not bounded, and zero updates, which skipped
      steps give, change nothing.

    Raises:
      ValueError: for numbers out of range.

    Example:
      >>> tx = limit_growth(2.0)
      >>> state = tx.init(None)
      >>> for norm in (1.0, 1.0, 1.0, 10.0):
      ...     update, state = tx.update(jnp.array([norm, 0.0]), state)
      >>> update
      Array([2., 0.], dtype=float32)
    """
    check_number("max_growth", max_growth, POSITIVE, or_none=True)
    check_number("decay", decay, INSIDE_0_1)

    def init_fn(params):
        state = LimitGrowthState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))
        return placement.copied_to_mesh_of(params, state)

    def update_fn(updates, state, params: Any = None):
        del params
        scale, new = _bounded_growth(max_growth, decay, trees.norm(updates), state)
        return trees.scaled(scale, updates), new

    return optax.GradientTransformation(init_fn, update_fn)


def _bounded_growth(
    max_growth: float, decay: float, norm: jax.Array, state: LimitGrowthState
) -> tuple[jax.Array, LimitGrowthState]:
    """Returns the factor of :func:`limit_growth` on an update of that norm, and its next state."""
    is_step = norm > 0
    allowed = max_growth * jnp.exp(state.log_norm)
    # The weights of a mean over all so far, until they decay more slowly than that.
    share = jnp.maximum(1 - decay, 1 / (state.count + 1))
    log_norm = state.log_norm + share * (jnp.log(jnp.where(is_step, norm, 1.0)) - state.log_norm)
    count = jnp.asarray(optax.safe_increment(state.count))
    new = LimitGrowthState(count, log_norm.astype(state.log_norm.dtype))
    scale = trees.share_within(allowed, norm, state.count >= _FREE_UPDATES)
    return scale, trees.select(is_step, new, state)


def decay_weights(weight_decay: float | jax.Array) -> optax.GradientTransformation:
    """Adds ``weight_decay * w`` to every update but those that are zero as a whole.

    Unlike with :func:`optax.add_decayed_weights`, a skipped step, whose update is zero, changes nothing.

    Args:
      weight_decay: factor on the parameters.

    Returns:
      A gradient transformation without state.

    Example:
      >>> tx, w = decay_weights(0.5), jnp.array([2.0, 4.0])
      >>> [tx.update(u, tx.init(w), w)[0] for u in (jnp.array([0.0, 1.0]), jnp.zeros(2))]
      [Array([1., 3.], dtype=float32), Array([0., 0.], dtype=float32)]
    """
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()

    def update_fn(updates, state, params=None):
        require_params(params, "decay_weights")
        is_step = trees.is_any_nonzero(updates)
        decay = lambda u, w: u + jnp.where(is_step, weight_decay * w, 0.0).astype(u.dtype)
        return jax.tree.map(decay, updates, params), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


class AverageUpdatesState(NamedTuple):
    """State of :func:`average_updates`.

    Attributes:
      num_averaged: number of updates averaged so far; those of skipped steps are not among them.
      average: ``m_t = momentum * m_(t-1) + (1 - momentum) * u_t``, shaped like the parameters.
    """

    num_averaged: jax.Array  # shape=(), dtype=int32
    average: chex.ArrayTree


def average_updates(momentum: float | jax.Array) -> optax.GradientTransformation:
    """Replaces each update by the running average of all so far, with weights that decay.

    Every direction solves the system of one mini-batch and carries its noise. The average is as noisy as that
    of about ``(1 + momentum) / (1 - momentum)`` mini-batches. It lags by about ``momentum / (1 - momentum)``
    steps and costs one more vector of state. A zero update, as of a skipped step, is passed on and changes
    nothing. It is not part of the paper's method.

    Args:
      momentum: decay of the weights, in [0, 1).

    Returns:
      A gradient transformation. The average is divided by the sum of its weights, as in Adam, so the
      first steps are not shorter than the others (:func:`optax.ema` with ``debias=True``, which would
      average zero updates).

    Raises:
      ValueError: if ``momentum`` is a number outside [0, 1).

    Example:
      >>> tx = average_updates(0.5)
      >>> first, state = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
      >>> second, state = tx.update(jnp.array([1.0]), state)
      >>> first, second
      (Array([4.], dtype=float32), Array([2.], dtype=float32))

    Source: Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015, section 3, for the correction.
    """
    check_number("momentum", momentum, DECAY, or_none=True)

    def init_fn(params):
        average = jax.tree.map(placement.zeros_like, params)
        return placement.copied_to_mesh_of(params, AverageUpdatesState(jnp.zeros((), jnp.int32), average))

    def update_fn(updates, state, params: Any = None):
        del params
        is_step = trees.is_any_nonzero(updates)
        next_average = lambda m, u: (momentum * m + (1 - momentum) * u).astype(m.dtype)
        average = jax.tree.map(next_average, state.average, updates)
        new = AverageUpdatesState(jnp.asarray(optax.safe_increment(state.num_averaged)), average)
        dtype = trees.common_dtype(jnp.float32, *jax.tree.leaves(updates))
        sum_of_weights = 1 - jax.lax.pow(jnp.asarray(momentum, dtype), new.num_averaged)
        correct = lambda m, u: jnp.where(is_step, m / sum_of_weights, 0.0).astype(u.dtype)
        return jax.tree.map(correct, average, updates), trees.select(is_step, new, state)

    return optax.GradientTransformation(init_fn, update_fn)


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
            "`nnx.Optimizer.update(model, grads, batch=batch)`. Some wrappers drop it: `optax.lookahead` and "
            "`optax.contrib.sam`, which hand no extra arguments on (keep an average of the parameters beside "
            "the optimizer instead, as by `optax.incremental_update`), and `optax.chain` around "
            "`MultiSteps(tx, k).gradient_transformation()` (call `MultiSteps(tx, k).update` itself, and "
            "chain inside: `MultiSteps(optax.chain(tx, ...), k)`)"
        )


def check_by_name(others: tuple[Any, ...], name: str) -> None:
    """Raises TypeError if something came by position after the parameters, as a batch would."""
    if others:
        raise TypeError(
            f"`{name}` takes the batch by name, but {len(others) + 3} arguments came by position: call "
            "`tx.update(grads, state, params, batch=batch)`"
        )


def chain(name: str, *transformations: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns ``optax.chain``, whose update says how to give the batch if it comes by position.

    Args:
      name: what the error calls the optimizer.
      *transformations: as for :func:`optax.chain`.
    """
    inner = optax.chain(*transformations)

    def update_fn(updates, state, params: Any = None, *others, **extra_args):
        check_by_name(others, name)
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)
