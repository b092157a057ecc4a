"""One meta-iteration as a pure function: unroll, meta-gradient, Adam, and the care of the trainings."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from mlhf_optax.meta_training.interface import (
    LearnedOptimizer,
    MetaGradient,
    TaskLike,
    map_trainings,
)
from mlhf_optax.meta_training.meta_optimizer import meta_optimizer
from mlhf_optax.meta_training.unrolled import replay as replay_lib
from mlhf_optax.meta_training.unrolled.config import MetaTrainingConfig
from mlhf_optax.meta_training.unrolled.inner_trainings import (
    Health,
    InnerTraining,
    advance,
    examine,
    fresh_training,
    replace_ended,
    without_opt_state,
)
from mlhf_optax.meta_training.unrolled.tricks import with_tricks
from mlhf_optax.support import placement
from mlhf_optax.support.spread import Spread, make_spread

Metrics = dict[str, jax.Array]

_COUNTS = ("diverged", "stuck", "replayed", "fresh", "dropped_gradients")


class MetaState(NamedTuple):
    """Everything that meta-training carries from one iteration to the next; one pytree of arrays.

    Attributes:
      iteration: number of meta-iterations done.
      meta_params: what is being learned.
      meta_opt_state: state of the meta-optimizer.
      trainings: the inner trainings, leaves (num_tasks, ...).
      replay: stored training states.
      key: random key data for the next iteration, uint32.
      counts: totals since the start: diverged, stuck, replayed, fresh, dropped_gradients.
    """

    iteration: jax.Array
    meta_params: Any
    meta_opt_state: Any
    trainings: InnerTraining
    replay: replay_lib.Replay
    key: jax.Array
    counts: dict[str, jax.Array]


InitFn = Callable[[chex.PRNGKey, Any], MetaState]
MetaStepFn = Callable[[MetaState, Any], tuple[MetaState, Metrics]]


def make_meta_step(
    task: TaskLike,
    learned: LearnedOptimizer,
    config: MetaTrainingConfig = MetaTrainingConfig(),
    optimizer: optax.GradientTransformation | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    axis_name: placement.AxisName = None,
) -> tuple[InitFn, MetaStepFn]:
    """Returns ``init`` and a jitted ``meta_step`` for an own meta-training loop.

    With a ``mesh`` the inner trainings are spread over its devices, and each unrolls and differentiates its
    share; the results are those of one device, up to the order of sums. The replay buffer is on every device,
    so that any training can go on anywhere: once per meta-iteration the trainings are gathered for it.
    :func:`make_long_horizon_step` has no such buffer. States and ``batches`` may lie anywhere; they are put
    where they belong.

    Args:
      task: anything with ``init_fn(key) -> params``, ``predict_fn(params, batch) -> outputs`` and
        ``loss_fn(outputs, batch) -> scalar``.
      learned: the learned optimizer, for example :func:`mlhf_optax.meta_training.mlhf_optimizer`.
      config: how inner trainings are run, kept and replaced.
      optimizer: meta-optimizer; :func:`meta_optimizer` of the config if None.
      mesh: devices over which the ``num_tasks`` trainings are spread; None for one device.
      axis_name: axis of the mesh, or several; all of its axes if None.

    Returns:
      ``init(key, meta_params) -> meta_state`` and
      ``meta_step(meta_state, batches) -> (meta_state, metrics)``, both pure. ``batches`` has leaves
      (num_tasks, unroll_length + 1, B, ...): step t uses mini-batches t and t + 1. The old
      ``meta_state`` is donated to ``meta_step``: use the returned one.

    Raises:
      TypeError: if ``mesh`` is no mesh of devices.
      ValueError: if ``num_tasks`` is no multiple of the devices, for an axis that the mesh does not have, and
        from ``meta_step`` if the leading dimensions of ``batches`` are not these.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from types import SimpleNamespace
      >>> from mlhf_optax import SquaredError, init_meta_params
      >>> from mlhf_optax.meta_training import MetaTrainingConfig, make_meta_step, mlhf_optimizer
      >>> task = SimpleNamespace(
      ...     init_fn=lambda key: {"kernel": jax.random.normal(key, (3, 1))},
      ...     predict_fn=lambda params, batch: batch["x"] @ params["kernel"],
      ...     loss_fn=SquaredError(targets="y"))
      >>> config = MetaTrainingConfig(num_tasks=2, unroll_length=2)
      >>> init, meta_step = make_meta_step(task, mlhf_optimizer(num_cg_steps=1), config)
      >>> state = init(jax.random.key(0), init_meta_params(jax.random.key(1), layer_types=["dense_kernel"]))
      >>> batches = {"x": jnp.ones((2, 3, 4, 3)), "y": jnp.zeros((2, 3, 4, 1))}
      >>> state, metrics = meta_step(state, batches)
      >>> int(state.iteration), sorted(metrics)[:3]
      (1, ['age', 'diverged', 'dropped_gradients'])
    """
    optimizer = meta_optimizer(config) if optimizer is None else optimizer
    spread = make_spread(mesh, axis_name, config.num_tasks, "num_tasks")
    task, learned = with_tricks(
        task, learned, random_scaling=config.random_scaling, companion_size=config.companion_size
    )

    @jax.jit
    def init(key: chex.PRNGKey, meta_params: chex.ArrayTree) -> MetaState:
        make_fresh, _ = _starts(task, learned, meta_params)
        key, init_key = jax.random.split(key)
        trainings = make_fresh(jax.random.split(init_key, config.num_tasks))
        example = without_opt_state(jax.tree.map(lambda x: x[0], trainings))
        return MetaState(
            iteration=jnp.zeros((), jnp.int32),
            meta_params=meta_params,
            meta_opt_state=optimizer.init(meta_params),
            trainings=trainings,
            replay=replay_lib.init_replay(example, config.replay_capacity),
            key=jax.random.key_data(key),
            counts={name: jnp.zeros((), jnp.int32) for name in _COUNTS},
        )

    cut = ("trainings",)
    shardings: dict[str, Any] = {}
    if spread is not None:
        shardings = {"out_shardings": (spread.of_fields(MetaState, cut), spread.whole)}
    one_step = functools.partial(_one_step, task, learned, config, optimizer, spread)
    jitted = jax.jit(one_step, donate_argnums=0, **shardings)

    def meta_step(state: MetaState, batches: Any) -> tuple[MetaState, Metrics]:
        check_batches(config, batches)
        if spread is not None:
            state = spread.put_fields(state, cut)
            batches = spread.put(batches, spread.cut)
        return jitted(state, batches)

    return init, meta_step


def _starts(task: TaskLike, learned: LearnedOptimizer, meta_params: Any) -> tuple[Callable, Callable]:
    """Returns how fresh trainings are made of keys, and optimizer states of parameters, several at once."""
    init_opt_state = learned.build(meta_params, task).init
    make_fresh = jax.vmap(lambda key: fresh_training(key, task.init_fn, init_opt_state))
    return make_fresh, jax.vmap(init_opt_state)


def _one_step(
    task: TaskLike,
    learned: LearnedOptimizer,
    config: MetaTrainingConfig,
    optimizer: optax.GradientTransformation,
    spread: Spread | None,
    state: MetaState,
    batches: Any,
) -> tuple[MetaState, Metrics]:
    """One meta-iteration."""
    key, unroll_key, replace_key = jax.random.split(jax.random.wrap_key_data(state.key), 3)

    # Learn.
    results = _unroll_all(task, learned, config, state, batches, unroll_key, spread)
    gradient, dropped = _mean_gradient(results.gradient)
    updates, opt_state = optimizer.update(gradient, state.meta_opt_state, state.meta_params)
    meta_params = optax.apply_updates(state.meta_params, updates)

    # Care for the trainings.
    go_on = functools.partial(advance, unroll_length=config.unroll_length)
    trainings = jax.vmap(go_on)(state.trainings, results)
    health = jax.vmap(functools.partial(examine, config))(trainings, results)
    trainings, replay, counts = replace_ended(
        config, trainings, health, state.replay, replace_key, *_starts(task, learned, meta_params)
    )

    # Report.
    counts["dropped_gradients"] = dropped
    new = MetaState(
        iteration=state.iteration + 1,
        meta_params=meta_params,
        meta_opt_state=opt_state,
        trainings=trainings,
        replay=replay,
        key=jax.random.key_data(key),
        counts={name: state.counts[name] + counts[name] for name in _COUNTS},
    )
    return new, _metrics(state, results, gradient, health) | counts


def check_batches(config: MetaTrainingConfig, batches: Any) -> None:
    """Raises ValueError unless every leaf starts with (num_tasks, unroll_length + 1)."""
    wanted = (config.num_tasks, config.unroll_length + 1)
    leaves = jax.tree.leaves(batches)
    wrong = [leaf.shape for leaf in leaves if leaf.shape[:2] != wanted]
    if wrong or not leaves:
        raise ValueError(
            "every leaf of `batches` must have shape (num_tasks, unroll_length + 1, ...) = "
            f"{wanted} + (...), got {wrong or 'no arrays'}; an unroll of T steps needs T + 1 mini-batches"
        )


def _unroll_all(
    task, learned: LearnedOptimizer, config, state: MetaState, batches, key, spread: Spread | None
) -> MetaGradient:
    def several(meta_params, inputs):
        def one(inputs):
            training, task_batches, task_key = inputs
            return learned.meta_gradient(
                meta_params, task, training.params, training.opt_state, task_batches, task_key
            )

        return map_trainings(task, one, inputs, config.task_axis)

    run = several if spread is None else spread.per_device(several, (False, True), True)
    return run(state.meta_params, (state.trainings, batches, jax.random.split(key, config.num_tasks)))


def _mean_gradient(gradients: chex.ArrayTree) -> tuple[chex.ArrayTree, jax.Array]:
    """Averages over the trainings whose gradient is finite; returns how many were not."""
    # One array: between processes every array of a sum takes a round of messages.
    flat = jax.vmap(lambda gradient: ravel_pytree(gradient)[0])(gradients)
    _, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], gradients))
    is_finite = jnp.all(jnp.isfinite(flat), axis=1)
    total = jnp.sum(jnp.where(is_finite[:, None], flat, 0.0), axis=0)
    return unravel(total / jnp.maximum(jnp.sum(is_finite), 1)), jnp.sum(~is_finite)


def _metrics(state: MetaState, results: MetaGradient, gradient, health: Health) -> Metrics:
    metrics = {name: jnp.nanmean(value) for name, value in results.meta_losses.items()}
    metrics["inner_loss"] = jnp.nanmean(results.inner_losses)
    # The mean is ruled by the early trainings; the mean of logs also sees the late ones.
    metrics["log_inner_loss"] = jnp.nanmean(jnp.log(results.inner_losses + 1e-8))
    metrics["meta_gradient_norm"] = optax.tree.norm(gradient)
    metrics["age"] = jnp.mean(state.trainings.age.astype(jnp.float32))
    metrics["healthy"] = jnp.mean(health.healthy.astype(jnp.float32))
    return metrics
