"""Measures how long a step takes, the same way for every optimizer."""

import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from mlhf_optax.comparison.inner_training import (
    Hyperparameters,
    MakeOptimizer,
    augmentation_key,
    draw_batch,
    draw_order,
    init_training,
    training_step,
)
from mlhf_optax.tasks import Task, in_memory


def seconds_per_step(
    task: Task,
    optimizers: Mapping[str, tuple[MakeOptimizer, Hyperparameters]],
    *,
    num_steps: int = 25,
    repeats: int = 9,
    on_repeat: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Measures how long one compiled step of a single training takes, the same way for every optimizer.

    A step is gathering and augmenting the mini-batch, the gradient and the update, one call of a jitted
    function. Stretches of ``num_steps`` steps of all optimizers take turns, so that a busy moment of the
    machine meets them all, and the median over the stretches is taken.

    Args:
      task: what to train.
      optimizers: by name, a function that makes the optimizer and its hyperparameters (numbers).
      num_steps: steps a stretch.
      repeats: stretches an optimizer; one more comes first to compile and warm up.
      on_repeat: called after every round of stretches with the number of rounds done.

    Returns:
      Seconds a step, by name.

    Raises:
      ValueError: if ``num_steps`` or ``repeats`` is below one.

    Example:
      >>> import optax
      >>> from mlhf_optax.tasks import get_task
      >>> optimizers = {"adam": (optax.adam, {"learning_rate": 1e-2})}
      >>> times = seconds_per_step(get_task("digits-mlp"), optimizers, num_steps=2, repeats=1)
      >>> times["adam"] > 0
      True
    """
    if num_steps < 1 or repeats < 1:
        raise ValueError(
            f"`num_steps` and `repeats` must be at least 1, got num_steps={num_steps}, repeats={repeats}"
        )
    stretches = {
        name: _stretch(task, make, hyperparameters, num_steps)
        for name, (make, hyperparameters) in optimizers.items()
    }
    for stretch in stretches.values():
        stretch()
    times: dict[str, list[float]] = {name: [] for name in stretches}
    for repeat in range(1, repeats + 1):
        for name, stretch in stretches.items():
            start = time.perf_counter()
            stretch()
            times[name].append((time.perf_counter() - start) / num_steps)
        if on_repeat is not None:
            on_repeat(repeat)
    return {name: statistics.median(values) for name, values in times.items()}


def _stretch(task: Task, make_optimizer: MakeOptimizer, hyperparameters: Hyperparameters, num_steps: int):
    """Returns a function that takes ``num_steps`` steps of one training and waits for the last one."""
    examples = jax.tree.map(jnp.asarray, in_memory(task.data.train))
    key = jax.random.key(0)
    # Traced as in a training over many settings: constants could be folded into a faster program.
    hyperparameters = {name: jnp.asarray(value, jnp.float32) for name, value in hyperparameters.items()}
    batches = list(draw_order(task, key, num_steps))
    init = jax.jit(lambda hyper: init_training(task, make_optimizer, hyper, key))

    def take_step(hyper, examples, indices, state):
        # Another key at every step, as in a training: a constant one could be computed in advance.
        batch = draw_batch(task, examples, indices, augmentation_key(key, indices[0]))
        return training_step(task, make_optimizer, hyper, batch, state)

    step = jax.jit(take_step, donate_argnums=3)
    state = init(hyperparameters)

    def run() -> None:
        nonlocal state
        for indices in batches:
            state = step(hyperparameters, examples, indices, state)
        jax.block_until_ready(state)

    return run


__all__ = ["seconds_per_step"]
