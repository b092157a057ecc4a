"""Meta-training over long horizons, by evolution strategies with one perturbation per inner training.

One-step meta-losses are greedy: they learn what suits the next step, and cannot learn a schedule. Here
meta-parameters are judged by the loss along whole trainings of hundreds to thousands of steps, without
back-propagation. Pairs of trainings run side by side, with meta-parameters moved by plus and minus the
same noise, which a pair keeps from its start to its end. Every few steps, a *truncation*, each pair gives an
estimate of the gradient,

    (L_plus - L_minus) / (2 sigma^2) * noise,

where L is the meta-loss of that truncation. Because the noise stays the same, an estimate sees what earlier
steps of the training have done to later ones, without an accumulator. Pairs start at different times, so
every meta-iteration meets all ages.

Source: Li et al., `Variance-reduced gradient estimation via noise-reuse in online evolution strategies
<https://arxiv.org/abs/2304.12180>`_ (NRES), 2023; Vicol, `Low-variance gradient estimation in unrolled
computation graphs with ES-Single <https://arxiv.org/abs/2304.11153>`_, 2023.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlhf_optax.meta_training.interface import LearnedOptimizer, TaskLike
from mlhf_optax.meta_training.long_horizon.config import LongHorizonConfig
from mlhf_optax.meta_training.long_horizon.pairs import (
    Pair,
    Truncated,
    advance_pairs,
    replace_pairs,
    start_pair,
)
from mlhf_optax.meta_training.meta_optimizer import meta_optimizer
from mlhf_optax.support import placement, trees
from mlhf_optax.support.spread import Spread, make_spread

Metrics = dict[str, jax.Array]


class LongHorizonState(NamedTuple):
    """Everything that carries over from one meta-iteration to the next; one pytree of arrays.

    Attributes:
      iteration: meta-iterations done.
      meta_params: what was learned: the running mean of ``centre``, or ``centre`` itself.
      centre: meta-parameters around which trainings are perturbed.
      meta_opt_state: state of the meta-optimizer.
      gradient_squares: shape (tasks,), running mean of the squared norm of each task's gradient.
      pairs: one :class:`Pair` per task, leaves (num_pairs, ...).
      key: random key data, uint32.
      counts: totals since the start: ``fresh`` starts, ``diverged`` truncations that ended at the ceiling,
        ``dropped_gradients`` of tasks that were not finite.
    """

    iteration: jax.Array
    meta_params: Any
    centre: Any
    meta_opt_state: Any
    gradient_squares: jax.Array
    pairs: tuple[Pair, ...]
    key: jax.Array
    counts: dict[str, jax.Array]


def make_long_horizon_step(
    tasks: Sequence[TaskLike],
    learned: LearnedOptimizer,
    config: LongHorizonConfig = LongHorizonConfig(),
    optimizer: optax.GradientTransformation | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    axis_name: placement.AxisName = None,
) -> tuple[Callable, Callable]:
    """Returns ``init`` and ``step``, in the place of those of :func:`make_meta_step`.

    With a ``mesh`` the pairs of every task are spread over its devices. Each device trains its share, and its
    part of the meta-gradient, meta-losses and ages is added to the others' once per task and meta-iteration.
    No training leaves its device, and results are those of one device, up to the order of sums. The state and
    ``batches`` may lie anywhere, and the state may come from a checkpoint of another number of devices: they
    are put where they belong. To draw batches in place, give them the sharding
    ``NamedSharding(mesh, PartitionSpec(axis_name))``. With several processes (``jax.distributed``), each
    gives the same key, meta-parameters and batches, or arrays on the mesh; :func:`meta_train` writes
    checkpoints there, too.

    Args:
      tasks: what is trained, one or several. Each weighs the same, however large its gradients are.
      learned: the learned optimizer; only its ``build`` is used.
      config: how to train.
      optimizer: meta-optimizer; Adam with the clipping and rate of the config if None.
      mesh: devices over which the pairs are spread; None for one device.
      axis_name: axis of the mesh, or several; all of its axes if None.

    Returns:
      ``init(key, meta_params) -> state`` and ``step(state, batches) -> (state, metrics)``, both pure, made
      of jitted parts. ``batches`` has one pytree per task with leaves (num_pairs, truncation, B, ...); both
      trainings of a pair see the same. The old state is donated to ``step``: use the returned one.

    Raises:
      TypeError: if ``mesh`` is no mesh of devices.
      ValueError: if there are no tasks, if ``num_pairs`` is no multiple of the devices, for an axis that the
        mesh does not have, and from ``step`` if the leading dimensions of ``batches`` are not these.

    Example:
      >>> from types import SimpleNamespace
      >>> from mlhf_optax import SquaredError
      >>> from mlhf_optax.meta_training import LongHorizonConfig, unrolled_optimizer
      >>> task = SimpleNamespace(
      ...     init_fn=lambda key: jax.random.normal(key, (3,)),
      ...     predict_fn=lambda params, batch: batch["x"] @ params,
      ...     loss_fn=SquaredError(targets="y"))
      >>> sgd = unrolled_optimizer(lambda log_rate, task: optax.sgd(jnp.exp(log_rate)), None)
      >>> config = LongHorizonConfig(num_pairs=2, truncation=5, horizons=(10, 20))
      >>> init, step = make_long_horizon_step([task], sgd, config)
      >>> batches = {"x": jnp.ones((2, 5, 4, 3)), "y": jnp.zeros((2, 5, 4))}
      >>> state, metrics = step(init(jax.random.key(0), jnp.array(-3.0)), [batches])
      >>> int(state.iteration), sorted(metrics)[:3]
      (1, ['age', 'diverged', 'dropped_gradients'])

      On all devices, of which there is one here:

      >>> init, step = make_long_horizon_step([task], sgd, config, mesh=jax.make_mesh((1,), ("pairs",)))
      >>> state, _ = step(init(jax.random.key(0), jnp.array(-3.0)), [batches])
      >>> int(state.iteration)
      1
    """
    tasks = tuple(tasks)
    if not tasks:
        raise ValueError("`tasks` is empty; give at least one task")
    optimizer = meta_optimizer(config) if optimizer is None else optimizer
    spread = make_spread(mesh, axis_name, config.num_pairs, "num_pairs")
    # Small programs, one after the other: one for all tasks would take minutes to compile.
    programs = [_compile(task, learned, config, spread) for task in tasks]

    def placed(state: LongHorizonState) -> LongHorizonState:
        return state if spread is None else spread.put_fields(state, cut=("pairs",))

    def init(key: chex.PRNGKey, meta_params: chex.ArrayTree) -> LongHorizonState:
        if spread is not None:
            key, meta_params = spread.put((key, meta_params), spread.whole)
        key, *task_keys = jax.random.split(key, len(tasks) + 1)
        each = zip(programs, task_keys, strict=True)
        state = LongHorizonState(
            iteration=jnp.zeros((), jnp.int32),
            meta_params=jax.tree.map(jnp.array, meta_params),
            centre=jax.tree.map(jnp.array, meta_params),
            meta_opt_state=optimizer.init(meta_params),
            gradient_squares=jnp.zeros(len(tasks)),
            pairs=tuple(_first_pairs(config, program, task_key, meta_params) for program, task_key in each),
            key=jax.random.key_data(key),
            counts={name: jnp.zeros((), jnp.int32) for name in ("fresh", "diverged", "dropped_gradients")},
        )
        return placed(state)

    @jax.jit
    def keys_of(key_data: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(jax.random.wrap_key_data(key_data), len(tasks) + 1)
        return [jax.random.key_data(keys[0]), *keys[1:]]

    learn = jax.jit(functools.partial(_learn, config, optimizer))

    def step(state: LongHorizonState, batches: Any) -> tuple[LongHorizonState, Metrics]:
        _check_batches(config, len(tasks), batches)
        state, batches = placed(state), tuple(batches)
        if spread is not None:
            batches = spread.put(batches, spread.cut)
        key, *task_keys = keys_of(state.key)
        all_pairs, results = [], []
        for program, pairs, own_batches, task_key in zip(
            programs, state.pairs, batches, task_keys, strict=True
        ):
            is_over = np.asarray(program.is_over(pairs.age, pairs.horizon))
            if is_over.any():
                fresh = program.start(jax.random.split(task_key, config.num_pairs), state.centre)
                pairs = program.replace(pairs, fresh, is_over)
            pairs, result = program.advance(state.centre, pairs, own_batches)
            all_pairs.append(pairs)
            results.append(result._replace(fresh=int(is_over.sum())))
        # The learning needs no trainings, which may be large.
        new, metrics = learn(state._replace(pairs=()), results)
        return new._replace(pairs=tuple(all_pairs), key=key), metrics

    return init, step


class _Programs(NamedTuple):
    """What one task needs, compiled.

    Attributes:
      start: ``start(keys, meta_params) -> pairs``.
      is_over: ``is_over(age, horizon)``, shape (num_pairs,), which every process can read.
      replace: :func:`replace_pairs`; the old pairs are donated.
      advance: :func:`advance_pairs`; the old pairs are donated.
    """

    start: Callable
    is_over: Callable
    replace: Callable
    advance: Callable


def _compile(
    task: TaskLike, learned: LearnedOptimizer, config: LongHorizonConfig, spread: Spread | None
) -> _Programs:
    start = jax.vmap(functools.partial(start_pair, task, learned, config), (0, None))
    advance = functools.partial(advance_pairs, task, learned, config)
    if spread is None:
        return _Programs(
            jax.jit(start),
            jnp.greater_equal,
            jax.jit(replace_pairs, donate_argnums=0),
            jax.jit(advance, donate_argnums=1),
        )
    advance = functools.partial(advance, axis_name=spread.axis_name)
    return _Programs(
        jax.jit(spread.per_device(start, (True, False), True), out_shardings=spread.cut),
        jax.jit(jnp.greater_equal, out_shardings=spread.whole),
        jax.jit(replace_pairs, donate_argnums=0, out_shardings=spread.cut),
        jax.jit(
            spread.per_device(advance, (False, True, True), (True, False)),
            donate_argnums=1,
            out_shardings=(spread.cut, spread.whole),
        ),
    )


def _first_pairs(config: LongHorizonConfig, program: _Programs, key: chex.PRNGKey, meta_params: Any) -> Pair:
    """Returns the first pairs of a task, which end at any time, so that later ones do not start together."""
    start_key, age_key = jax.random.split(key)
    pairs = program.start(jax.random.split(start_key, config.num_pairs), meta_params)
    share = jax.random.uniform(age_key, (config.num_pairs,))
    end = jnp.ceil(share * pairs.horizon).astype(jnp.int32)
    return pairs._replace(horizon=jnp.maximum(end, 1))


def _learn(
    config: LongHorizonConfig,
    optimizer: optax.GradientTransformation,
    state: LongHorizonState,
    results: list[Truncated],
) -> tuple[LongHorizonState, Metrics]:
    """Returns the state after a step of the meta-optimizer, and the metrics."""
    gradient, squares, dropped = _mean_of_normalized(
        [result.gradient for result in results], state.gradient_squares, state.iteration
    )
    updates, opt_state = optimizer.update(gradient, state.meta_opt_state, state.centre)
    centre, iteration = optax.apply_updates(state.centre, updates), state.iteration + 1
    keep = jnp.minimum(config.average_decay, iteration / (iteration + 10))
    counts = {
        "fresh": sum(result.fresh for result in results),
        "diverged": sum(result.diverged for result in results),
        "dropped_gradients": dropped,
    }
    losses = jnp.stack([result.meta_loss for result in results])
    metrics = {
        "meta_loss": jnp.mean(losses),
        "meta_gradient_norm": trees.norm(gradient),
        "age": jnp.mean(jnp.stack([result.mean_age for result in results])),
        **{f"meta_loss_{number}": loss for number, loss in enumerate(losses)},
        **counts,
    }
    new = state._replace(
        iteration=iteration,
        meta_params=jax.tree.map(
            lambda mean, now: (keep * mean + (1 - keep) * now).astype(now.dtype),
            state.meta_params,
            centre,
        ),
        centre=centre,
        meta_opt_state=opt_state,
        gradient_squares=squares,
        counts={name: state.counts[name] + counts[name] for name in state.counts},
    )
    return new, metrics


def _mean_of_normalized(
    gradients: list, squares: jax.Array, iteration: jax.Array
) -> tuple[chex.ArrayTree, jax.Array, jax.Array]:
    """Averages the gradients of the tasks, each over its running root mean square norm.

    Returns the average, the new running means (tasks,), and how many gradients were not finite.
    """
    is_finite = jnp.stack([trees.is_finite(gradient) for gradient in gradients])
    gradients = [trees.zero_unless(fine, one) for fine, one in zip(is_finite, gradients, strict=True)]
    now = jnp.stack([jnp.square(trees.norm(gradient)).astype(jnp.float32) for gradient in gradients])
    decay = jnp.where(iteration == 0, 0.0, 0.95)
    squares = jnp.where(is_finite, decay * squares + (1 - decay) * now, squares)
    scales = 1 / (jnp.sqrt(squares + 1e-30) * len(gradients))
    weighted = [
        jax.tree.map(lambda g: (scale * g).astype(g.dtype), one)  # noqa: B023
        for scale, one in zip(scales, gradients, strict=True)
    ]
    total = jax.tree.map(lambda *leaves: sum(leaves), *weighted)
    return total, squares, jnp.sum(~is_finite).astype(jnp.int32)


def _check_batches(config: LongHorizonConfig, num_tasks: int, batches: Any) -> None:
    wanted = (config.num_pairs, config.truncation)
    if len(batches) != num_tasks:
        raise ValueError(f"`batches` must have one entry per task, {num_tasks}, got {len(batches)}")
    wrong = [leaf.shape for leaf in jax.tree.leaves(batches) if leaf.shape[:2] != wanted]
    if wrong:
        raise ValueError(
            f"every leaf of `batches` must have shape (num_pairs, truncation, ...) = {wanted} + (...), "
            f"got {wrong}"
        )
