"""Settings of a meta-training, checked when they are made."""

import dataclasses
from typing import Literal

from mlhf_optax.support import checks


@dataclasses.dataclass(frozen=True)
class MetaTrainingConfig:
    """How inner trainings are run, kept, replaced and learned from.

    Args:
      num_tasks: inner trainings side by side.
      unroll_length: steps T of an unroll (paper: 10).
      task_axis: ``"vmap"`` runs the trainings at once, ``"sequential"`` one after another, which
        is faster for convolutions on a CPU; ``"auto"`` is sequential on a CPU for models with
        parameters of rank 4 or more.
      meta_learning_rate: peak rate of the meta-optimizer, Adam.
      decay_iterations: the rate falls along a cosine to ``final_rate_share`` of its peak over so many
        meta-iterations; None keeps it constant (paper).
      final_rate_share: share of the peak rate that is left at the end.
      meta_gradient_clip: bound on the global norm of the meta-gradient; None for none (paper).
      keep_probability: chance that a healthy inner training goes on after an unroll (authors: 0.3
        for the convnet, 0.5 for the ResNet).
      fresh_probability: chance that one which does not go on is replaced by a fresh network rather
        than by a replayed state.
      store_probability: chance that a healthy state is stored for replay after an unroll. A training without
        any progress never is.
      replay_capacity: states kept for replay (authors: 200).
      max_age: steps after which an inner training is replaced; None for never.
      random_scaling: random factors of all parameters, between ``exp(-r)`` and ``exp(r)``; see
        :func:`mlhf_optax.meta_training.with_tricks`.
      companion_size: coordinates of a convex function that is trained beside every network; see there, too.
      divergence_ratio: an inner training whose loss exceeds this multiple of its first loss has diverged.
      stuck_patience: steps after which a training must have made progress.
      stuck_ratio: a training whose loss is still above this share of its first loss by then is stuck.
      vanishing_ratio: so is one whose gradient norm fell below this share of its first value while its loss
        is still above a tenth of its first loss.

    Raises:
      ValueError: for a value out of range, naming it.

    Example:
      >>> MetaTrainingConfig(num_tasks=2).unroll_length
      10
    """

    num_tasks: int = 8
    unroll_length: int = 10
    task_axis: Literal["auto", "vmap", "sequential"] = "auto"
    meta_learning_rate: float = 1e-2
    decay_iterations: int | None = None
    final_rate_share: float = 0.01
    meta_gradient_clip: float | None = 1.0
    keep_probability: float = 0.95
    fresh_probability: float = 0.5
    store_probability: float = 0.3
    replay_capacity: int = 200
    max_age: int | None = None
    random_scaling: float = 0.0
    companion_size: int = 0
    divergence_ratio: float = 3.0
    stuck_patience: int = 50
    stuck_ratio: float = 0.97
    vanishing_ratio: float = 1e-5

    def __post_init__(self):
        checks.check_fields(
            self, checks.FROM_ONE, "num_tasks", "unroll_length", "replay_capacity", "stuck_patience"
        )
        checks.check_fields(
            self,
            checks.SHARE,
            *("keep_probability", "fresh_probability", "store_probability", "final_rate_share"),
        )
        checks.check_fields(self, checks.POSITIVE, "meta_learning_rate", "divergence_ratio", "stuck_ratio")
        checks.check_fields(
            self, checks.POSITIVE, "meta_gradient_clip", "decay_iterations", "max_age", or_none=True
        )
        checks.check_fields(self, checks.NOT_NEGATIVE, "random_scaling", "companion_size", "vanishing_ratio")
        checks.check_choice("task_axis", self.task_axis, ("auto", "vmap", "sequential"))
        checks.require(
            self.replay_capacity >= self.num_tasks,
            "replay_capacity",
            f"at least `num_tasks`={self.num_tasks}",
            self.replay_capacity,
        )
