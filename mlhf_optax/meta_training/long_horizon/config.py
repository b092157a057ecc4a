"""Settings of a meta-training over long horizons, checked when they are made."""

import dataclasses
from typing import Literal

from mlhf_optax.support import checks


@dataclasses.dataclass(frozen=True)
class LongHorizonConfig:
    """How meta-parameters are trained over long horizons.

    Args:
      num_pairs: pairs of trainings per task.
      sigma: standard deviation of the noise on every meta-parameter.
      truncation: steps of every training per meta-iteration.
      horizons: shortest and longest training, in steps.
      horizon_exponent: lengths h of trainings are drawn with a density of ``h^(-1 - horizon_exponent)``. With
        0 it is uniform in the logarithm. With 0.5 more of the work goes into the first steps of trainings.
      init_spread: all initial parameters are multiplied by ``exp(init_spread * n)``, n normal, so that some
        trainings start too small and some too large.
      loss_floor: the meta-loss is the mean of ``log(loss / first loss + loss_floor)``.
      loss_ceiling: bound on ``loss / first loss``; a loss that is not finite counts as this. When both
        trainings of a pair end a truncation there, a fresh pair takes their place.
      early_steps: a step at age t has weight ``(1 + t / early_steps)^(-1/2)`` in the meta-loss, because the
        first steps are few, yet everybody waits for them. None for equal weights.
      difference_bound: bound on the difference of the two meta-losses of a pair, so that a single training
        that blows up does not decide the gradient; None for none.
      meta_learning_rate: peak rate of the meta-optimizer, Adam.
      decay_iterations: the rate falls along a cosine to ``final_rate_share`` of its peak over so many
        meta-iterations; None keeps it constant.
      final_rate_share: share of the peak rate that is left at the end.
      meta_gradient_clip: bound on the global norm of the meta-gradient; None for none.
      average_decay: what is validated and kept is a running mean of the meta-parameters with this decay (less
        at the start); with 0 it is the last ones.
      task_axis: how the pairs of a task run, ``"vmap"``, ``"sequential"`` or ``"auto"``
        (:func:`mlhf_optax.meta_training.runs_in_sequence`).

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
    init_spread: float = 0.0
    loss_floor: float = 1e-2
    loss_ceiling: float = 2.0
    early_steps: float | None = None
    difference_bound: float | None = None
    meta_learning_rate: float = 3e-3
    decay_iterations: int | None = None
    final_rate_share: float = 0.1
    meta_gradient_clip: float | None = 1.0
    average_decay: float = 0.0
    task_axis: Literal["auto", "vmap", "sequential"] = "auto"

    def __post_init__(self):
        positive_or_none = ("early_steps", "difference_bound", "decay_iterations", "meta_gradient_clip")
        checks.check_fields(self, checks.FROM_ONE, "num_pairs", "truncation")
        checks.check_fields(
            self, checks.POSITIVE, "sigma", "loss_floor", "loss_ceiling", "meta_learning_rate"
        )
        checks.check_fields(self, checks.NOT_NEGATIVE, "horizon_exponent", "init_spread")
        checks.check_fields(self, checks.SHARE, "final_rate_share")
        checks.check_fields(self, checks.DECAY, "average_decay")
        checks.check_fields(self, checks.POSITIVE, *positive_or_none, or_none=True)
        checks.check_choice("task_axis", self.task_axis, ("auto", "vmap", "sequential"))
        shortest, longest = self.horizons
        checks.require(1 <= shortest <= longest, "horizons", "two ascending numbers from 1 on", self.horizons)
