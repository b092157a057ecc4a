"""Evolution strategies on whole trainings: a remedy for the greed of one-step meta-losses.

The losses of MLHF cut gradients at w, so nothing in them knows that a step which helps now can cost
the next hundred. This second stage judges meta-parameters by what a user sees, the loss along a whole
training, and needs no gradient through it. It is an addition beside the paper's method.
Source: antithetic sampling and rank shaping after Salimans et al. 2017, `Evolution Strategies as a
Scalable Alternative to Reinforcement Learning <https://arxiv.org/abs/1703.03864>`_; for learned
optimizers Metz et al. 2019, `Understanding and correcting pathologies in the training of learned
optimizers <https://arxiv.org/abs/1810.10180>`_.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mlhf_optax.meta_training.learned_optimizer import LearnedOptimizer, Task
from mlhf_optax.meta_training.validation import check_steps, score_of, training_losses


@dataclasses.dataclass(frozen=True)
class EvolutionConfig:
    """How meta-parameters are evolved.

    Args:
      num_pairs: antithetic pairs of perturbed meta-parameters an iteration.
      sigma: standard deviation of the perturbation of every meta-parameter.
      steps: after how many steps of a training the loss counts, increasing; the last is its length.
      learning_rate: peak rate of Adam.
      decay_iterations: the rate falls along a cosine to a tenth over so many iterations; None: constant.
      chunk: members trained side by side; None for all at once.

    Raises:
      ValueError: for a value out of range, naming it.

    Example:
      >>> EvolutionConfig(num_pairs=4).steps[-1]
      500
    """

    num_pairs: int = 8
    sigma: float = 0.03
    steps: tuple[int, ...] = (10, 30, 100, 200, 350, 500)
    learning_rate: float = 1e-2
    decay_iterations: int | None = None
    chunk: int | None = None

    def __post_init__(self):
        check_steps(self.steps)
        for name in ("num_pairs", "sigma", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)!r}")


class EvolutionState(NamedTuple):
    """State of an evolution.

    Attributes:
      iteration: iterations done.
      meta_params: the centre of the search.
      opt_state: state of Adam.
      key: random key data.
      counts: totals since the start: ``diverged``, members whose training did not stay finite.
    """

    iteration: jax.Array
    meta_params: Any
    opt_state: Any
    key: jax.Array
    counts: dict[str, jax.Array]


def make_evolution_step(
    task: Task, learned: LearnedOptimizer, config: EvolutionConfig = EvolutionConfig()
) -> tuple[Callable, Callable]:
    """Returns ``init`` and a jitted ``step``, in the place of those of ``make_meta_step``.

    Args:
      task: the task.
      learned: how meta-parameters become an optimizer; only its ``build`` is used.
      config: how to search.

    Returns:
      ``init(key, meta_params) -> state`` and ``step(state, batches) -> (state, metrics)``, where
      ``batches`` is a pair: mini-batches with leaves (steps[-1], B, ...), and the examples on which the
      loss is taken. All members of an iteration train from the same start on the same mini-batches.

    Example:
      >>> from types import SimpleNamespace
      >>> from mlhf_optax import SquaredError, init_meta_params
      >>> from mlhf_optax.meta_training import mlhf_optimizer
      >>> task = SimpleNamespace(
      ...     init_fn=lambda key: {"kernel": jax.random.normal(key, (2, 1))},
      ...     predict_fn=lambda params, batch: batch["x"] @ params["kernel"],
      ...     loss_fn=SquaredError(targets="y"))
      >>> config = EvolutionConfig(num_pairs=1, steps=(1, 2))
      >>> init, step = make_evolution_step(task, mlhf_optimizer(num_cg_steps=1), config)
      >>> state = init(jax.random.key(0), init_meta_params(jax.random.key(1), layer_types=["dense_kernel"]))
      >>> batches = {"x": jnp.ones((2, 4, 2)), "y": jnp.zeros((2, 4, 1))}
      >>> examples = {"x": jnp.ones((4, 2)), "y": jnp.zeros((4, 1))}
      >>> int(step(state, (batches, examples))[0].iteration)
      1
    """
    rate: optax.ScalarOrSchedule = config.learning_rate
    if config.decay_iterations is not None:
        rate = optax.cosine_decay_schedule(rate, config.decay_iterations, 0.1)
    optimizer = optax.adam(rate)
    losses_of = training_losses(task, learned, config.steps)

    @jax.jit
    def init(key: chex.PRNGKey, meta_params: chex.ArrayTree) -> EvolutionState:
        counts = {"diverged": jnp.zeros((), jnp.int32)}
        start = jnp.zeros((), jnp.int32)
        return EvolutionState(
            start, meta_params, optimizer.init(meta_params), jax.random.key_data(key), counts
        )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: EvolutionState, batches: Any) -> tuple[EvolutionState, dict[str, jax.Array]]:
        key, noise_key, start_key = jax.random.split(jax.random.wrap_key_data(state.key), 3)
        noise = _noise(noise_key, state.meta_params, config.num_pairs)
        members = jax.tree.map(
            lambda centre, n: jnp.concatenate([centre + config.sigma * n, centre - config.sigma * n]),
            state.meta_params,
            noise,
        )
        series, examples = batches
        train = lambda member: losses_of(member, series, examples, start_key)
        losses = jax.lax.map(train, members, batch_size=config.chunk or 2 * config.num_pairs)
        score = jax.vmap(score_of)(losses)
        gradient = _gradient(score, noise, config)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.meta_params)
        diverged = jnp.sum(~jnp.all(jnp.isfinite(losses), axis=1)).astype(jnp.int32)
        metrics = {"score": jnp.mean(score), "best_score": jnp.min(score), "diverged": diverged}
        metrics["meta_gradient_norm"] = optax.tree.norm(gradient)
        meta_params = optax.apply_updates(state.meta_params, updates)
        counts = {"diverged": state.counts["diverged"] + diverged}
        key_data = jax.random.key_data(key)
        return EvolutionState(state.iteration + 1, meta_params, opt_state, key_data, counts), metrics

    return init, step


def _noise(key: chex.PRNGKey, meta_params: chex.ArrayTree, num_pairs: int) -> chex.ArrayTree:
    leaves, treedef = jax.tree.flatten(meta_params)
    keys = jax.random.split(key, len(leaves))
    draw = lambda k, leaf: jax.random.normal(k, (num_pairs, *leaf.shape), leaf.dtype)
    return treedef.unflatten(draw(k, leaf) for k, leaf in zip(keys, leaves, strict=True))


def _gradient(score: jax.Array, noise: chex.ArrayTree, config: EvolutionConfig) -> chex.ArrayTree:
    """Estimates the gradient of the expected rank: ranks make one exploding member count no more."""
    count = score.shape[0]
    rank = jnp.argsort(jnp.argsort(score)) / (count - 1) - 0.5
    difference = (rank[: config.num_pairs] - rank[config.num_pairs :]) / (2 * config.sigma * config.num_pairs)
    return jax.tree.map(lambda n: jnp.tensordot(difference.astype(n.dtype), n, axes=1), noise)


__all__ = ["EvolutionConfig", "EvolutionState", "make_evolution_step"]
