"""What came out of a comparison of optimizers: records, the best of them, and their JSON form."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from mlhf_optax.comparison import reporting
from mlhf_optax.comparison.training import TABLE_STEPS
from mlhf_optax.tasks import Task


@dataclasses.dataclass(frozen=True)
class Result:
    """What one optimizer did, averaged over seeds.

    Attributes:
      name: name of the optimizer, unique in a comparison; ``"mlhf"`` for MLHF.
      family: ``"mlhf"`` or a key of :data:`mlhf_optax.comparison.first_order.FAMILIES`.
      hyperparameters: its settings.
      seeds: number of seeds.
      steps: numbers of steps at which the loss was taken.
      train_loss: mean over seeds on the whole training part, in nats; not finite where any diverged.
      test_accuracy: mean over seeds after the last step, in [0, 1].
      seconds_per_step: of a single training.
    """

    name: str
    family: str
    hyperparameters: dict[str, Any]
    seeds: int
    steps: tuple[int, ...]
    train_loss: tuple[float, ...]
    test_accuracy: float
    seconds_per_step: float

    def loss_at(self, step: int) -> float:
        """Returns the loss after ``step`` steps, infinite if it diverged."""
        loss = self.train_loss[self.steps.index(step)]
        return loss if math.isfinite(loss) else math.inf

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values; a loss that is not finite becomes None."""
        fields = dataclasses.asdict(self)
        del fields["family"]
        losses = [loss if math.isfinite(loss) else None for loss in self.train_loss]
        return fields | {"steps": list(self.steps), "train_loss": losses}


def table_steps(results: Sequence[Result]) -> list[int]:
    """Returns the steps that make columns: 10, 30, 100, 200, 500 as far as trained, and the last one.

    Args:
      results: at least one result.

    Returns:
      Ascending steps.

    Example:
      >>> result = Result("mlhf", "mlhf", {}, 1, (1, 10, 20), (2.0, 1.0, 0.5), 0.9, 1e-3)
      >>> table_steps([result])
      [10, 20]
    """
    steps = results[0].steps
    return sorted({*(step for step in TABLE_STEPS if step in steps), steps[-1]})


def best_of(results: Sequence[Result], step: int) -> Result:
    """Returns the result of lowest loss after ``step`` steps."""
    return min(results, key=lambda result: result.loss_at(step))


def leaders(results: Sequence[Result], steps: Sequence[int]) -> list[Result]:
    """Returns the results that are best of all at one of the steps or more, in the order of the steps."""
    best = [best_of(results, step) for step in steps]
    return [result for index, result in enumerate(best) if result not in best[:index]]


def report(task: Task, results: Sequence[Result], command: str) -> dict[str, Any]:
    """Returns results with what is needed to judge and repeat them, as plain JSON values.

    Args:
      task: the task that was trained.
      results: what came out.
      command: the command line that did it.

    Returns:
      A dict with ``task``, ``machine``, ``versions``, ``command``, ``date`` and ``results``.

    Example:
      >>> from mlhf_optax.tasks import get_task
      >>> sorted(report(get_task("digits-mlp"), [], "mlhf-optax train"))
      ['command', 'date', 'machine', 'results', 'task', 'versions']
    """
    return {"task": task.name} | reporting.report(command, results=[result.to_json() for result in results])


__all__ = ["Result", "best_of", "leaders", "report", "table_steps"]
