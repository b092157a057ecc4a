"""Meta-training over long horizons, by evolution strategies with one perturbation per inner training.

One-step meta-losses are greedy: they learn what suits the next step, and cannot learn a schedule. Here
meta-parameters are judged by the loss along whole trainings of hundreds to thousands of steps, without
back-propagation. Pairs of trainings run side by side, with meta-parameters moved by plus and minus the
same noise, which a pair keeps from its start to its end. After every truncation of a few steps, each pair
gives a gradient estimate,

    (L_plus - L_minus) / (2 sigma^2) * noise,

where L is the meta-loss of that truncation. As the noise stays the same, an estimate sees what earlier
steps of the training have done to later ones, without an accumulator. Pairs start at different times, so
all ages are met in every meta-iteration.

Source: Li et al., `Variance-reduced gradient estimation via noise-reuse in online evolution strategies
<https://arxiv.org/abs/2304.12180>`_ (NRES), 2023; Vicol, `Low-variance gradient estimation in unrolled
computation graphs with ES-Single <https://arxiv.org/abs/2304.11153>`_, 2023.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from mlhf_optax.meta_training.interface import LearnedOptimizer, Task, map_trainings, task_loss
from mlhf_optax.meta_training.unrolled.step import meta_optimizer
from mlhf_optax.support import placement, trees
from mlhf_optax.support.spread import Spread, make_spread


@dataclasses.dataclass(frozen=True)
class LongHorizonConfig:
    """How meta-parameters are trained over long horizons.

    Args:
      num_pairs: pairs of trainings per task.
      sigma: standard deviation of the noise on every meta-parameter.
      truncation: steps of every training per meta-iteration.
      horizons: shortest and longest training, in steps.
      horizon_exponent: lengths h of trainings are drawn with a density of ``h^(-1 - horizon_exponent)``: 0 is
        uniform in the logarithm; with 0.5 more of the work goes into the first steps of many trainings.
      weight_scale: the parameters of a training are measured in a unit drawn from ``[1 / weight_scale,
        weight_scale]``, uniformly in the logarithm; 1 for none. So the optimizer cannot rely on the scale.
      loss_scale: the same for the unit of the loss.
      init_spread: all initial parameters are multiplied by ``exp(init_spread * n)``, n normal: starts that
        are too small or too large.
      loss_floor: the meta-loss is the mean of ``log(loss / first loss + loss_floor)``.
      loss_ceiling: bound on ``loss / first loss``; what is not finite counts as this. A pair that ends a
        truncation with both trainings there makes place for a fresh one.
      early_steps: a step at age t counts ``(1 + t / early_steps)^(-1/2)`` in the meta-loss: the first steps
        are few, yet everybody waits for them. None for equal weights.
      difference_bound: bound on the difference of the meta-losses of a pair, so that single trainings that
        blow up do not rule; None for none.
      meta_learning_rate: peak rate of the meta-optimizer, Adam.
      decay_iterations: the rate falls along a cosine to ``final_rate_share`` of its peak over so many
        meta-iterations; None keeps it constant.
      final_rate_share: share of the peak rate that is left at the end.
      meta_gradient_clip: bound on the global norm of the meta-gradient; None for none.
      meta_weight_decay: L2 on all meta-parameters.
      average_decay: what is validated and kept is a running mean of the meta-parameters with this decay (less
        at the start); 0 for the last ones.
      task_axis: how the pairs of a task run, ``"vmap"``, ``"sequential"`` or ``"auto"``
        (:func:`mlhf_optax.meta_training.interface.map_trainings`).

    Raises:
      ValueError: for a value out of range, naming it.

    Example:
      >>> LongHorizonConfig(num_pairs=4).horizons
      (100, 2000)
    """

    num_pairs: int = 8
    sigma: float = 0.02
    truncation: int = 20
    horizons: tuple[int, int] = (100, 2000)
    horizon_exponent: float = 0.0
    weight_scale: float = 1.0
    loss_scale: float = 1.0
    init_spread: float = 0.0
    loss_floor: float = 1e-2
    loss_ceiling: float = 2.0
    early_steps: float | None = None
    difference_bound: float | None = None
    meta_learning_rate: float = 3e-3
    decay_iterations: int | None = None
    final_rate_share: float = 0.1
    meta_gradient_clip: float | None = 1.0
    meta_weight_decay: float = 0.0
    average_decay: float = 0.0
    task_axis: str = "auto"

    def __post_init__(self):
        for name in ("num_pairs", "truncation"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("sigma", "loss_floor", "loss_ceiling", "meta_learning_rate"):
            self._require(name, getattr(self, name) > 0, "positive")
        for name in ("weight_scale", "loss_scale"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("horizon_exponent", self.horizon_exponent >= 0, "at least 0")
        self._require("init_spread", self.init_spread >= 0, "at least 0")
        self._require("average_decay", 0 <= self.average_decay < 1, "in [0, 1)")
        axes = ("auto", "vmap", "sequential")
        self._require("task_axis", self.task_axis in axes, f"one of {axes}")
        for name in ("meta_gradient_clip", "decay_iterations", "early_steps", "difference_bound"):
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "positive or None")
        shortest, longest = self.horizons
        self._require("horizons", 1 <= shortest <= longest, "two ascending numbers from 1 on")

    def _require(self, name: str, is_met: bool, wanted: str) -> None:
        if not is_met:
            raise ValueError(f"`{name}` must be {wanted}, got {getattr(self, name)!r}")


class Episode(NamedTuple):
    """A pair of trainings, from start to end; leaves have a leading axis of ``num_pairs`` where several run.

    Attributes:
      params: parameters of both, leaves (2, ...): with plus and with minus the noise.
      opt_state: optimizer states of both, leaves (2, ...).
      noise: on the meta-parameters.
      weight_unit: unit of the parameters, a scalar.
      loss_unit: unit of the loss, a scalar.
      first_loss: loss before the first step, in the unit of the task; NaN until it is known.
      age: steps done.
      horizon: steps after which the next pair starts.
    """

    params: Any
    opt_state: Any
    noise: Any
    weight_unit: jax.Array
    loss_unit: jax.Array
    first_loss: jax.Array
    age: jax.Array
    horizon: jax.Array


class LongHorizonState(NamedTuple):
    """Everything that carries over from one meta-iteration to the next; one pytree of arrays.

    Attributes:
      iteration: meta-iterations done.
      meta_params: what was learned: the running mean of ``centre``, or ``centre`` itself.
      centre: meta-parameters around which trainings are perturbed.
      meta_opt_state: state of the meta-optimizer.
      gradient_squares: shape (tasks,), running mean of the squared norm of each task's gradient.
      episodes: one :class:`Episode` per task, leaves (num_pairs, ...).
      key: random key data, uint32.
      counts: totals since the start: ``fresh`` starts, ``diverged`` truncations that ended at the ceiling,
        ``dropped_gradients`` of tasks that were not finite.
    """

    iteration: jax.Array
    meta_params: Any
    centre: Any
    meta_opt_state: Any
    gradient_squares: jax.Array
    episodes: tuple[Episode, ...]
    key: jax.Array
    counts: dict[str, jax.Array]


def make_long_horizon_step(
    tasks: Sequence[Task],
    learned: LearnedOptimizer,
    config: LongHorizonConfig = LongHorizonConfig(),
    optimizer: optax.GradientTransformation | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    axis_name: placement.AxisName = None,
) -> tuple[Callable, Callable]:
    """Returns ``init`` and ``step``, in the place of those of :func:`make_meta_step`.

    With a ``mesh`` the pairs of every task are spread over its devices: each trains its share, and only
    their part of the meta-gradient, meta-losses and ages meet those of the others, summed once per task and
    meta-iteration. No training leaves its device. Keys, pairs and results are those of one device, up to the
    order of sums. A state, also one from a checkpoint of another number of devices, and ``batches`` may lie
    anywhere; they are put where they belong. Draw batches in place by giving them the sharding
    ``NamedSharding(mesh, PartitionSpec(axis_name))``. With several processes (``jax.distributed``), each
    gives the same key, meta-parameters and batches, or arrays on the mesh; :func:`meta_train` writes
    checkpoints there.

    Args:
      tasks: what is trained, one or several; each has the same say, whatever its gradients' size.
      learned: the learned optimizer; only its ``build`` is used.
      config: how to train.
      optimizer: meta-optimizer; Adam with the clipping and rate of the config if None.
      mesh: devices over which the pairs are spread; None for one device.
      axis_name: axis of the mesh, or several; all of its axes if None.

    Returns:
      ``init(key, meta_params) -> state`` and ``step(state, batches) -> (state, metrics)``, both pure, made of
      jitted parts.
      ``batches`` has one pytree per task with leaves (num_pairs, truncation, B, ...); both trainings of a
      pair see the same. The old state is donated to ``step``: use the returned one.

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
    programs = [_programs(task, learned, config, spread) for task in tasks]

    def placed(state: LongHorizonState) -> LongHorizonState:
        return state if spread is None else spread.put_fields(state, cut=("episodes",))

    def init(key: chex.PRNGKey, meta_params: chex.ArrayTree) -> LongHorizonState:
        if spread is not None:
            key, meta_params = spread.put((key, meta_params), spread.whole)
        key, *task_keys = jax.random.split(key, len(tasks) + 1)
        episodes = []
        for program, task_key in zip(programs, task_keys, strict=True):
            start_key, age_key = jax.random.split(task_key)
            fresh = program.start(jax.random.split(start_key, config.num_pairs), meta_params)
            # The first pairs end at any time, so that later ones do not all start together.
            share = jax.random.uniform(age_key, (config.num_pairs,))
            first_end = jnp.ceil(share * fresh.horizon).astype(jnp.int32)
            episodes.append(fresh._replace(horizon=jnp.maximum(first_end, 1)))
        state = LongHorizonState(
            jnp.zeros((), jnp.int32),
            jax.tree.map(jnp.array, meta_params),
            jax.tree.map(jnp.array, meta_params),
            optimizer.init(meta_params),
            jnp.zeros(len(tasks)),
            tuple(episodes),
            jax.random.key_data(key),
            {name: jnp.zeros((), jnp.int32) for name in ("fresh", "diverged", "dropped_gradients")},
        )
        return placed(state)

    @jax.jit
    def keys_of(key_data: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(jax.random.wrap_key_data(key_data), len(tasks) + 1)
        return [jax.random.key_data(keys[0]), *keys[1:]]

    learn = jax.jit(functools.partial(_learn, config, optimizer))

    def step(state: LongHorizonState, batches: Any):
        _check_batches(config, len(tasks), batches)
        state, batches = placed(state), tuple(batches)
        if spread is not None:
            batches = spread.put(batches, spread.cut)
        key, *task_keys = keys_of(state.key)
        advanced = []
        for program, episode, series, task_key in zip(
            programs, state.episodes, batches, task_keys, strict=True
        ):
            is_over = np.asarray(program.is_over(episode.age, episode.horizon))
            if is_over.any():
                fresh = program.start(jax.random.split(task_key, config.num_pairs), state.centre)
                episode = program.replace(episode, fresh, is_over)
            episode, result = program.advance(state.centre, episode, series)
            advanced.append((episode, result._replace(fresh=int(is_over.sum()))))
        # The learning needs no trainings, which may be large.
        new, metrics = learn(state._replace(episodes=()), [result for _, result in advanced])
        return new._replace(episodes=tuple(episode for episode, _ in advanced), key=key), metrics

    return init, step


class _Result(NamedTuple):
    """What a truncation of all pairs of one task gives."""

    gradient: chex.ArrayTree
    meta_loss: jax.Array
    mean_age: jax.Array
    fresh: jax.Array
    diverged: jax.Array


class _Programs(NamedTuple):
    """What one task needs, compiled.

    Attributes:
      start: ``start(keys, meta_params) -> episodes``.
      is_over: ``is_over(age, horizon)``, shape (num_pairs,), which every process can read.
      replace: :func:`_replaced`; the old episodes are donated.
      advance: :func:`_advance`; the old episodes are donated.
    """

    start: Callable
    is_over: Callable
    replace: Callable
    advance: Callable


def _programs(
    task: Task, learned: LearnedOptimizer, config: LongHorizonConfig, spread: Spread | None
) -> _Programs:
    start = jax.vmap(functools.partial(_start, task, learned, config), (0, None))
    advance = functools.partial(_advance, task, learned, config)
    if spread is None:
        return _Programs(
            jax.jit(start),
            jnp.greater_equal,
            jax.jit(_replaced, donate_argnums=0),
            jax.jit(advance, donate_argnums=1),
        )
    advance = functools.partial(advance, axis_name=spread.axis_name)
    return _Programs(
        jax.jit(spread.per_device(start, (True, False), True), out_shardings=spread.cut),
        jax.jit(jnp.greater_equal, out_shardings=spread.whole),
        jax.jit(_replaced, donate_argnums=0, out_shardings=spread.cut),
        jax.jit(
            spread.per_device(advance, (False, True, True), (True, False)),
            donate_argnums=1,
            out_shardings=(spread.cut, spread.whole),
        ),
    )


def _start(task: Task, learned: LearnedOptimizer, config: LongHorizonConfig, key, meta_params) -> Episode:
    """Returns a pair at its start."""
    keys = jax.random.split(key, 5)
    draw = lambda leaf, k: config.sigma * jax.random.normal(k, leaf.shape, leaf.dtype)
    noise = jax.tree.map(draw, meta_params, optax.tree.split_key_like(keys[0], meta_params))
    log_uniform = lambda k, low, high: jnp.exp(
        jax.random.uniform(k, (), minval=jnp.log(low), maxval=jnp.log(high))
    )
    weight_unit = log_uniform(keys[1], 1 / config.weight_scale, config.weight_scale)
    loss_unit = log_uniform(keys[2], 1 / config.loss_scale, config.loss_scale)
    horizon = _horizon(keys[3], config)
    spread = jnp.exp(config.init_spread * jax.random.normal(jax.random.fold_in(key, 5)))
    params = jax.tree.map(lambda w: (spread * w / weight_unit).astype(w.dtype), task.init_fn(keys[4]))
    scaled = _scaled(task, weight_unit, loss_unit)
    init = lambda sign: learned.build(_moved(meta_params, sign, noise), scaled).init(params)
    opt_state = jax.vmap(init)(jnp.array([1.0, -1.0]))
    both = jax.tree.map(lambda w: jnp.stack([w, w]), params)
    unknown = jnp.full((), jnp.nan, jnp.float32)
    return Episode(both, opt_state, noise, weight_unit, loss_unit, unknown, jnp.zeros((), jnp.int32), horizon)


def _horizon(key: chex.PRNGKey, config: LongHorizonConfig) -> jax.Array:
    """Returns the length of a training, an integer scalar."""
    shortest, longest = map(float, config.horizons)
    exponent = config.horizon_exponent
    # In this power of the length the density is flat.
    forth, back = (lambda h: h**-exponent, lambda x: x ** (-1 / exponent)) if exponent else (jnp.log, jnp.exp)
    drawn = jax.random.uniform(key, (), minval=0.0, maxval=1.0)
    return jnp.ceil(back((1 - drawn) * forth(shortest) + drawn * forth(longest))).astype(jnp.int32)


def _moved(meta_params: Any, sign: jax.Array, noise: Any) -> Any:
    return jax.tree.map(lambda centre, n: centre + sign.astype(centre.dtype) * n, meta_params, noise)


def _scaled(task: Task, weight_unit: jax.Array, loss_unit: jax.Array) -> Any:
    """Returns the task in other units of parameters and loss: the same functions, other numbers."""
    to_task = lambda params: jax.tree.map(lambda w: (weight_unit * w).astype(w.dtype), params)
    return SimpleNamespace(
        init_fn=task.init_fn,
        predict_fn=lambda params, batch: task.predict_fn(to_task(params), batch),
        loss_fn=lambda outputs, batch: loss_unit * task.loss_fn(outputs, batch),
        curvature_batch_size=getattr(task, "curvature_batch_size", None),
        per_example=getattr(task, "per_example", None),
    )


def _replaced(episodes: Episode, fresh: Episode, is_over: jax.Array) -> Episode:
    """Returns fresh pairs in the place of those that are over."""
    choose = lambda new, old: jnp.where(is_over.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)
    return jax.tree.map(choose, fresh, episodes)


def _advance(
    task, learned, config, meta_params, episodes: Episode, batches, axis_name: placement.AxisName = None
) -> tuple[Episode, _Result]:
    """Takes a truncation of every pair, which are those of one device if there is an ``axis_name``."""

    def one(inputs):
        episode, series = inputs
        return _truncation(task, learned, config, meta_params, episode, series)

    episodes, meta_losses, is_diverged = map_trainings(task, one, (episodes, batches), config.task_axis)
    difference = meta_losses[:, 0] - meta_losses[:, 1]
    if config.difference_bound is not None:
        difference = jnp.clip(difference, -config.difference_bound, config.difference_bound)
    share = difference / (2 * config.sigma**2 * config.num_pairs)
    gradient = jax.tree.map(lambda n: jnp.tensordot(share.astype(n.dtype), n, axes=1), episodes.noise)
    # Where both have blown up there is nothing more to learn.
    ended = jnp.where(jnp.all(is_diverged, axis=1), 0, episodes.horizon)
    result = _Result(
        gradient,
        meta_loss=jnp.sum(meta_losses) / (2 * config.num_pairs),
        mean_age=jnp.sum(episodes.age) / config.num_pairs,
        fresh=jnp.zeros((), jnp.int32),
        diverged=jnp.sum(is_diverged).astype(jnp.int32),
    )
    # One vector: between processes every array of a sum takes a round of messages.
    numbers, unravel = ravel_pytree(result)
    result = unravel(placement.sum_over(numbers, axis_name))
    return episodes._replace(horizon=ended), result


def _truncation(task, learned, config, meta_params, episode: Episode, series):
    """Trains both of a pair for a truncation; returns their meta-losses, shape (2,)."""
    scaled = _scaled(task, episode.weight_unit, episode.loss_unit)

    def run(sign, params, opt_state):
        optimizer = optax.with_extra_args_support(
            learned.build(_moved(meta_params, sign, episode.noise), scaled)
        )

        def step(carry, batch):
            w, state = carry
            loss, gradient = jax.value_and_grad(lambda p: task_loss(scaled, p, batch))(w)
            updates, state = optimizer.update(gradient, state, w, batch=batch)
            return (optax.apply_updates(w, updates), state), loss / episode.loss_unit

        return lax.scan(step, (params, opt_state), series)

    (params, opt_state), losses = jax.vmap(run)(jnp.array([1.0, -1.0]), episode.params, episode.opt_state)
    # Before its first step both of a pair have the same loss.
    first = jnp.where(jnp.isnan(episode.first_loss), losses[0, 0], episode.first_loss)
    relative = losses / jnp.maximum(first, jnp.finfo(jnp.float32).tiny)
    is_known = jnp.isfinite(relative)
    bounded = jnp.where(is_known, jnp.minimum(relative, config.loss_ceiling), config.loss_ceiling)
    logs = jnp.log(bounded + config.loss_floor)
    if config.early_steps is not None:
        age = episode.age + jnp.arange(config.truncation)
        logs = logs * (1 + age / config.early_steps) ** -0.5
    meta_loss = jnp.mean(logs, axis=1)
    is_diverged = bounded[:, -1] >= config.loss_ceiling
    episode = episode._replace(
        params=params, opt_state=opt_state, first_loss=first, age=episode.age + config.truncation
    )
    return episode, meta_loss, is_diverged


def _learn(
    config: LongHorizonConfig,
    optimizer: optax.GradientTransformation,
    state: LongHorizonState,
    results: list[_Result],
) -> tuple[LongHorizonState, dict[str, jax.Array]]:
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
