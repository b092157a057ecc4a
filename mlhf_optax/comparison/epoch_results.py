"""Results of a training by epochs, and how those of several seeds join."""

import dataclasses
import math
from typing import Any

from mlhf_optax.comparison.results import Result


@dataclasses.dataclass(frozen=True)
class EpochResult(Result):
    """A result that knows its epochs.

    Attributes:
      steps_per_epoch: mini-batches an epoch.
      test_curve: mean over seeds of the test accuracy at ``steps``, in [0, 1].
      final_losses: the last training loss of every seed, in nats.
    """

    steps_per_epoch: int
    test_curve: tuple[float, ...]
    final_losses: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values; a loss that is not finite becomes None."""
        losses = [loss if math.isfinite(loss) else None for loss in self.final_losses]
        return super().to_json() | {"test_curve": list(self.test_curve), "final_losses": losses}

    @classmethod
    def from_json(cls, entry: dict[str, Any], family: str) -> "EpochResult":
        """Returns the result that :meth:`to_json` wrote."""
        finite = lambda losses: tuple(math.inf if loss is None else loss for loss in losses)
        curves = {name: finite(entry[name]) for name in ("train_loss", "final_losses")}
        lists = {name: tuple(entry[name]) for name in ("steps", "test_curve")}
        return cls(**{**entry, **curves, **lists, "family": family})

    def joined(self, other: "EpochResult") -> "EpochResult":
        """Returns the result over the seeds of both: every mean weighs its seeds alike.

        Args:
          other: the same optimizer, judged at the same steps, on other seeds.

        Returns:
          The result; ``seconds_per_step`` is this one's.

        Raises:
          ValueError: if it is another optimizer's, or was judged at other steps.

        Example:
          >>> of_two = EpochResult("sgd", "sgd", {}, 2, (5,), (1.0,), 0.5, 0.1, 5, (0.5,), (0.5, 1.5))
          >>> of_one = EpochResult("sgd", "sgd", {}, 1, (5,), (4.0,), 0.8, 0.1, 5, (0.8,), (4.0,))
          >>> joined = of_two.joined(of_one)
          >>> joined.seeds, joined.train_loss, round(joined.test_accuracy, 3), joined.final_losses
          (3, (2.0,), 0.6, (0.5, 1.5, 4.0))
        """
        same = ("name", "family", "hyperparameters", "steps", "steps_per_epoch")
        differing = [name for name in same if getattr(self, name) != getattr(other, name)]
        if differing:
            raise ValueError(
                f"results of one optimizer and of the same steps can be joined, {self.name} and {other.name} "
                f"differ in {', '.join(differing)}"
            )
        seeds = self.seeds + other.seeds
        mean = lambda one, its: (self.seeds * one + other.seeds * its) / seeds
        means = lambda ones, others: tuple(map(mean, ones, others))
        return dataclasses.replace(
            self,
            seeds=seeds,
            train_loss=means(self.train_loss, other.train_loss),
            test_accuracy=mean(self.test_accuracy, other.test_accuracy),
            test_curve=means(self.test_curve, other.test_curve),
            final_losses=self.final_losses + other.final_losses,
        )


__all__ = ["EpochResult"]
