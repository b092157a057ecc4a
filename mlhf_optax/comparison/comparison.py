"""Trains one task with MLHF and with first-order optimizers, and yields what came out."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mlhf_optax.comparison import first_order
from mlhf_optax.comparison.inner_training import MakeOptimizer
from mlhf_optax.comparison.results import Result
from mlhf_optax.comparison.timing import seconds_per_step
from mlhf_optax.comparison.training import default_record_steps, train
from mlhf_optax.controllers.coordinate_lstm import MetaParams
from mlhf_optax.curvature import CurvatureBatch
from mlhf_optax.mlhf import mlhf
from mlhf_optax.tasks import Task

# on_progress(family, steps done, lowest mean loss if it was taken now)
OnProgress = Callable[[str, int, float | None], None]


@dataclasses.dataclass(frozen=True)
class Contender:
    """Optimizers that differ in numbers only, so that one compilation serves them all.

    Attributes:
      family: ``"mlhf"`` or a key of :data:`mlhf_optax.comparison.first_order.FAMILIES`.
      names: one name an optimizer, E of them.
      hyperparameters: what to report of each.
      make_optimizer: returns an optimizer for given values of ``stacked``.
      stacked: arguments of ``make_optimizer``, arrays of shape (E,); empty if it takes none.
    """

    family: str
    names: tuple[str, ...]
    hyperparameters: tuple[dict[str, Any], ...]
    make_optimizer: MakeOptimizer
    stacked: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)


def mlhf_contender(
    task: Task,
    meta_params: MetaParams,
    *,
    learning_rate: float = 1.0,
    num_cg_steps: int = 4,
    curvature_batch_size: CurvatureBatch = None,
    max_update_ratio: float | None = 0.25,
    momentum: float | None = None,
    carry_dtype: str = "float32",
    source: str = "",
) -> Contender:
    """Returns MLHF as a contender.

    Args:
      task: the task to be trained.
      meta_params: see :func:`mlhf_optax.mlhf`, as ``learning_rate``, ``num_cg_steps``,
        ``curvature_batch_size``, ``max_update_ratio`` and ``momentum``.
      learning_rate: the learning rate.
      num_cg_steps: CG steps.
      curvature_batch_size: part of the batch for GGN products.
      max_update_ratio: bound on the update.
      momentum: decay of the average over directions.
      carry_dtype: type of the LSTMs' states, such as ``"bfloat16"``.
      source: where the meta-parameters came from, for the record.

    Returns:
      The contender, named ``"mlhf"``.

    Example:
      >>> from mlhf_optax import init_meta_params
      >>> from mlhf_optax.tasks import get_task
      >>> mlhf_contender(get_task("digits-mlp"), init_meta_params(jax.random.key(0))).names
      ('mlhf',)
    """
    limits: dict[str, Any] = {
        "num_cg_steps": num_cg_steps,
        "curvature_batch_size": curvature_batch_size,
        "max_update_ratio": max_update_ratio,
        "momentum": momentum,
        "carry_dtype": carry_dtype,
    }

    optimizer = mlhf(learning_rate, meta_params, task.predict_fn, task.loss_fn, **limits)
    settings = {"learning_rate": learning_rate, **limits, "meta_params": source}
    return Contender("mlhf", ("mlhf",), (settings,), lambda: optimizer)


def grid_contenders(
    batch_size: int, families: Sequence[str] | None = None, *, baseline_batch_size: int = 128
) -> list[Contender]:
    """Returns the first-order grid of the paper's Table 1, one contender a family.

    Args:
      batch_size: see :func:`mlhf_optax.comparison.first_order.grid`, as all that follow.
      families: which families.
      baseline_batch_size: batch size of which the learning rates are.

    Returns:
      The contenders.

    Raises:
      ValueError: for an unknown family.

    Example:
      >>> [len(contender.names) for contender in grid_contenders(128)]
      [9, 9, 27]
    """
    contenders = []
    for family in first_order.FAMILIES if families is None else families:
        entries = first_order.grid(batch_size, [family], baseline_batch_size=baseline_batch_size)
        contenders.append(
            Contender(
                family,
                tuple(entry.name for entry in entries),
                tuple(entry.hyperparameters for entry in entries),
                first_order.FAMILIES[family],
                first_order.stack_hyperparameters(entries),
            )
        )
    return contenders


def compare(
    task: Task,
    contenders: Sequence[Contender],
    *,
    num_seeds: int = 5,
    num_steps: int = 500,
    on_progress: OnProgress | None = None,
) -> Iterator[list[Result]]:
    """Trains the task with every contender, one after the other, and yields results as they come.

    Args:
      task: what to train.
      contenders: from :func:`mlhf_contender` and :func:`grid_contenders`.
      num_seeds: trainings an optimizer, from the seeds 0, 1, and so on.
      num_steps: length of every training.
      on_progress: called after every step with the family, the steps done and, where the loss was
        taken, the lowest mean over seeds.

    Yields:
      The results of each contender.

    Raises:
      ValueError: as :func:`mlhf_optax.comparison.training.train`.

    Example:
      >>> from mlhf_optax.tasks import get_task
      >>> results, = compare(get_task("digits-mlp"), grid_contenders(128, ["sgd"]), num_seeds=1, num_steps=2)
      >>> len(results), results[0].name
      (9, 'sgd lr=0.1 momentum=0.9')
    """
    # One member of a family speaks for all: they are one program with other numbers.
    first = {c.family: (c.make_optimizer, {k: v[0] for k, v in c.stacked.items()}) for c in contenders}
    seconds = seconds_per_step(task, first)
    for contender in contenders:
        curves = train(
            task,
            contender.make_optimizer,
            contender.stacked,
            seeds=range(num_seeds),
            num_steps=num_steps,
            record_steps=default_record_steps(num_steps),
            on_step=on_progress and functools.partial(_report_progress, on_progress, contender.family),
        )
        yield [
            Result(
                name=name,
                family=contender.family,
                hyperparameters=contender.hyperparameters[index],
                seeds=num_seeds,
                steps=curves.steps,
                train_loss=tuple(curves.train_loss[index].mean(axis=0).tolist()),
                test_accuracy=float(curves.test_accuracy[index].mean()),
                seconds_per_step=seconds[contender.family],
            )
            for index, name in enumerate(contender.names)
        ]


def _report_progress(on_progress: OnProgress, family: str, step: int, losses: np.ndarray | None) -> None:
    if losses is None:
        on_progress(family, step, None)
        return
    means = losses.mean(axis=1)
    on_progress(family, step, float(np.min(means, where=np.isfinite(means), initial=math.inf)))


__all__ = ["Contender", "compare", "grid_contenders", "mlhf_contender"]
