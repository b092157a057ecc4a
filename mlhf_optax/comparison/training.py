"""Trains networks of a task: many seeds and many settings of one optimizer at once."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mlhf_optax.comparison.inner_training import Hyperparameters, MakeOptimizer
from mlhf_optax.comparison.trainings import Program, Trainings
from mlhf_optax.tasks import Task

TABLE_STEPS = (10, 30, 100, 200, 500)


class Curves(NamedTuple):
    """What trainings with E settings of one optimizer and S seeds did.

    Attributes:
      steps: the R numbers of steps after which the loss was taken.
      train_loss: shape (E, S, R), on the whole training part, in nats; not finite where diverged.
      test_accuracy: shape (E, S), after the last step, in [0, 1].
    """

    steps: tuple[int, ...]
    train_loss: np.ndarray
    test_accuracy: np.ndarray


def default_record_steps(num_steps: int, count: int = 25) -> tuple[int, ...]:
    """Returns steps to take the loss at: those of the table and ``count`` evenly spaced in the logarithm.

    Args:
      num_steps: length of the training.
      count: number of evenly spaced steps, before those that round to the same step fall together.

    Returns:
      Ascending steps in [1, num_steps] that end with ``num_steps``.

    Raises:
      ValueError: if ``num_steps`` is below one.

    Example:
      >>> default_record_steps(30, count=4)
      (1, 3, 10, 30)
    """
    _check_steps(num_steps)
    curve = np.geomspace(1, num_steps, count).round().astype(int).tolist()
    return tuple(sorted({*curve, num_steps, *(step for step in TABLE_STEPS if step <= num_steps)}))


def train(
    task: Task,
    make_optimizer: MakeOptimizer,
    hyperparameters: Hyperparameters | None = None,
    *,
    seeds: Sequence[int] = range(5),
    num_steps: int = 500,
    record_steps: Sequence[int] | None = None,
    on_step: Callable[[int, np.ndarray | None], None] | None = None,
) -> Curves:
    """Trains networks from several seeds, with every setting of an optimizer, in one compilation.

    Args:
      task: what to train; mini-batches have its ``batch_size``.
      make_optimizer: returns the optimizer for given hyperparameters; its ``update`` gets ``batch=``.
      hyperparameters: arguments of ``make_optimizer``, arrays of shape (E,) for E settings; None for
        a function without arguments, E = 1.
      seeds: S seeds of the initial parameters and the order of the batches.
      num_steps: length of every training.
      record_steps: ascending steps in [1, num_steps] after which to take the loss;
        :func:`default_record_steps` if None.
      on_step: called after every step with the number of steps done and, where the loss was taken, the
        losses of shape (E, S), otherwise None.

    Returns:
      The :class:`Curves`.

    Raises:
      ValueError: if ``seeds`` is empty, ``num_steps`` is below one, ``record_steps`` are out of range or
        not ascending, or the batch is larger than the training part.

    Example:
      >>> import optax
      >>> from mlhf_optax.tasks import get_task
      >>> curves = train(get_task("digits-mlp"), lambda: optax.adam(1e-2), seeds=[0], num_steps=3)
      >>> curves.steps, curves.train_loss.shape
      ((1, 2, 3), (1, 1, 3))
    """
    steps = tuple(default_record_steps(num_steps) if record_steps is None else record_steps)
    _check_steps(num_steps, steps)
    runs = Trainings(Program(task, make_optimizer), hyperparameters, seeds, num_steps)
    losses = []
    for step in range(1, num_steps + 1):
        runs.step()
        is_recorded = step in steps
        if is_recorded:
            losses.append(runs.train_loss())
        if on_step is not None:
            runs.wait()
            on_step(step, losses[-1] if is_recorded else None)
    return Curves(steps, np.stack(losses, axis=-1), runs.test_accuracy())


def _check_steps(num_steps: int, record_steps: tuple[int, ...] = (1,)) -> None:
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1, got {num_steps}")
    ascending = all(a < b for a, b in pairwise(record_steps))
    if not record_steps or not ascending or record_steps[0] < 1 or record_steps[-1] > num_steps:
        raise ValueError(f"`record_steps` must ascend within [1, {num_steps}], got {record_steps}")


__all__ = ["TABLE_STEPS", "Curves", "default_record_steps", "train"]
